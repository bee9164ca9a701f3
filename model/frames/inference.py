"""What a model takes that selects columns, has learned categories, or has steps of its user's own.

Which columns hold strings is read from the encoders and imputers inside the model; what these do not show is tried out,
or taken from a sample.
"""

import itertools
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..columns import ISO_DATE, Kind, rows_as_lists
from ..formats.sklearn import estimators_in
from ..infer_signature import SINGLE, accepted, all_nullable, failure_of, forget_names, values_in
from ..signature import Layout, Signature
from .checks import check_categories, check_units
from .columns import FrameColumn
from .foreign import booster_columns, column_kinds, keeps_no_categories, learned_categories
from .parts import ColumnFacts, find_single, inspect, is_identity, raw_parts
from .signature import FrameSignature

NUMBER_OR_TEXT: tuple[Kind, ...] = ("number", "text")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")  # as Python makes strings of numbers
SAMPLE_DECIDES = "a sample decides (MODEL_SAMPLE, NAME.sample.json, or publish --sample)"
NUMBERS_OR_STRINGS = (
    "the model takes numbers as well as strings in {}, and does not show which it was fitted on, so both are accepted: "
    f"{SAMPLE_DECIDES}"
)
WHOLE_OR_NOT = (
    "a step of your own reads {} before strings are encoded, and the model does not show whether it was fitted on 3 or "
    f"on 3.0, which are different strings: {SAMPLE_DECIDES}"
)
WHOLE_BESIDE_NULL = (
    "the sample has null beside whole numbers in {}, which are passed on as whole numbers; if the model was fitted on "
    "floats, write 3.0 for 3 in the sample"
)


def candidates(model: Any, sample: list[Any] | None) -> Iterable[Signature] | None:
    """Return the signatures that the model may have, the likeliest first; None if it shows nothing of what it takes."""
    if (reader := _first_reader(model)) is not None:
        return _candidates_with_columns(model, reader, sample)
    if any(hasattr(part, "build_analyzer") for part, *_ in raw_parts(model, range(sys.maxsize))):
        return [Signature("texts", ())]
    if isinstance(sample, list) and sample and isinstance(sample[0], dict):
        columns = [FrameColumn(name) for name in sample[0]]  # a step of the user's own comes first, records no names
        guesses = _guesses(list(range(len(columns))), columns, sample)
        return (FrameSignature("frame", _with_kinds(columns, kinds)) for kinds in guesses)
    return None


def complete(
    model: Any, signature: Signature, rows: list[Any], sample: list[Any] | None
) -> tuple[Signature, list[Any]] | None:
    """Return a signature that the model answers with what else its parts, a sample or further trials show; and rows.

    None if there are no columns. Raises: ModelLoadError, the model does not get of JSON what it was fitted on.
    """
    if not signature.columns:
        return None
    if not isinstance(signature, FrameSignature):
        if not (single := find_single(model, len(signature.columns))) or signature.precision == "float32":
            return None
        columns = enumerate(signature.columns)
        made = tuple(FrameColumn(c.name, c.kind, dtype=c.dtype, single=at in single) for at, c in columns)
        return FrameSignature(signature.layout, made, signature.precision), rows
    tried = all_nullable(signature)
    check_categories(model, tried, rows_as_lists(rows, signature.columns)[0])
    if sample:
        signature = _with_sample(signature, sample)
    else:
        signature, rows = _with_guesses(model, signature, rows)
    check_units(model, signature, rows)
    return signature, rows


def explain(model: Any) -> str:
    """Return why no rows can be made for a model; "" if that is not known."""
    if any(type(part).__name__ == "DictVectorizer" for part, *_ in raw_parts(model, range(sys.maxsize))):
        return (
            "the model begins with a DictVectorizer, which takes no rows; fit it on a data frame, with a OneHotEncoder"
        )
    reached = {id(raw.part) for raw in raw_parts(model, range(sys.maxsize))}
    behind = [booster_columns(part) or () for part in estimators_in(model) if id(part) not in reached]
    if any(column.dtype == "category" for columns in behind for column in columns):
        return (
            "a step stands before a booster with pandas categories, and does not show which columns it passes on; make "
            "the categories in a step of your own, or put an OrdinalEncoder in their place"
        )
    return ""


# --- candidates


def _first_reader(model: Any) -> Any:
    """Return the part that shows the width of the model's own input: the model, or one after a passthrough; or None."""
    while model is not None and not (getattr(model, "n_features_in_", None) or booster_columns(model)):
        steps = [step for _, step in getattr(model, "steps", ()) if not is_identity(step)]
        model = steps[0] if steps else getattr(model, "best_estimator_", None)
    return model


def _candidates_with_columns(model: Any, reader: Any, sample: list[Any] | None) -> Iterable[Signature]:
    boosted = booster_columns(reader) or []
    names = [str(name) for name in getattr(reader, "feature_names_in_", ())] or [c.name for c in boosted if c.name]
    found = inspect(model, getattr(reader, "n_features_in_", 0) or len(boosted))
    columns = [facts.column(name) for facts, name in itertools.zip_longest(found, names)]
    precision = "float32" if type(model).__module__.startswith(SINGLE) else "float64"
    single = find_single(model, len(columns)) if precision == "float64" else ()
    columns = [replace(column, single=at in single) for at, column in enumerate(columns)]
    layout: Layout = "array"
    if names and (_selects_columns(model) or any(c.dtype not in ("float64", "int64") for c in columns)):
        layout = "frame"
    elif names:
        forget_names(model)
    # The model does not show what a step of the user's own takes.
    unknown = _unknown(found)
    if layout != "frame" and not (sample and _strings_learned_later(model, len(found))[0]):
        unknown = []
    shown = _kinds_in(sample, columns)  # numbers may be written as booleans, if the sample has them so
    known = {at for at, c in enumerate(columns) if c.kind == "number" and shown.get(at) == "boolean"} - set(unknown)
    columns = [replace(c, kind="boolean") if at in known else c for at, c in enumerate(columns)]
    if any(column_kinds(part) is not None for part in estimators_in(model)):  # these parse strings, in any form
        parsed = [at for at, c in enumerate(columns) if c.kind in ("number", "date") and shown.get(at) == "text"]
        columns = list(_with_kinds(columns, dict.fromkeys(parsed, "text")))
    of_lightgbm = any(type(part).__module__.startswith("lightgbm.") for part in (model, *estimators_in(model)))
    blanks = of_lightgbm and not any(" " in name for name in names)
    for kinds in _guesses(unknown, columns, sample):
        yield FrameSignature(layout, _with_kinds(columns, kinds), precision, blanks_replaced=blanks)
    yield FrameSignature(layout, tuple(columns), precision="float32")


def _selects_columns(model: Any) -> bool:
    """Return whether some part may select columns by name, so that it needs a data frame."""
    parts = list(estimators_in(model))
    return not parts or any(
        not type(part).__module__.startswith("sklearn.")
        or hasattr(part, "_transformer_to_input_indices")
        or hasattr(part, "inverse_func")  # FunctionTransformer
        or hasattr(part, "_sklearn_output_config")  # may pass data frames on
        for part in parts
    )


def _with_kinds(columns: Iterable[FrameColumn], kinds: dict[int, Kind]) -> tuple[FrameColumn, ...]:
    """Return the columns, some of them with another kind; "integer" means numbers that pandas holds as int64."""
    found = list(columns)
    for at, kind in kinds.items():
        whole = kind == "integer"
        found[at] = replace(found[at], kind="number" if whole else kind, dtype="int64" if whole else "")
    return tuple(found)


def _kinds_in(sample: Any, columns: Sequence[FrameColumn]) -> dict[int, Kind]:
    """Return the kinds of the values in a sample, by column; rows that do not fit are ignored."""
    return {at: _kind_of_values(values) for at, values in enumerate(values_in(sample, columns))}


def _kind_of_values(values: Sequence[Any]) -> Kind:
    """Return the kind of all values but None: "integer" if all numbers are whole, "number" if there are no values."""
    types = set(map(type, values)) - {type(None)}
    if types == {int}:
        return "integer"
    if types == {str}:
        return "date" if all(value is None or ISO_DATE.fullmatch(value) for value in values) else "text"
    return "boolean" if types == {bool} else "number" if types <= {int, float} else "any"


def _with_sample(signature: FrameSignature, sample: Any) -> FrameSignature:
    """Note of a sample what the model does not show: whether dates have an offset, whole numbers that may be floats."""
    columns = signature.columns
    rows = rows_as_lists(sample, columns)
    found = list(columns)
    for at, column in enumerate(columns):
        date = next((row[at] for row in rows if row[at] is not None), None) if column.dtype == "date" else None
        if date is not None:
            found[at] = replace(column, zoned=column.convert(date).tzinfo is not None)  # type: ignore[misc]
        if column.dtype == "int64" and not column.learned and any(row[at] is None for row in rows):
            found[at] = replace(column, doubt=WHOLE_BESIDE_NULL)
    return replace(signature, columns=tuple(found))


def _guesses(unknown: list[int], columns: Sequence[FrameColumn], sample: Any) -> Iterable[dict[int, Kind]]:
    """Yield kinds for unknown columns: a sample's; else each combination of a few, or all alike or all but one."""
    if sample:
        shown = {at: kind for at, kind in _kinds_in(sample, columns).items() if at in unknown}
        others: tuple[dict[Kind, Kind], ...] = {"date": "text"}, {"date": "text", "integer": "number"}, {}
        for other in others:
            yield {at: other.get(kind, kind) for at, kind in shown.items()}
    elif len(unknown) <= 6:
        for guess in itertools.product(NUMBER_OR_TEXT, repeat=len(unknown)):
            yield dict(zip(unknown, guess, strict=True))
        for at in unknown:  # as a step takes it that reads its month, say
            numbers: dict[int, Kind] = dict.fromkeys(unknown, "number")
            yield numbers | {at: "date"}
    else:
        for common, rare in itertools.permutations(NUMBER_OR_TEXT):
            alike = dict.fromkeys(unknown, common)
            yield alike
            for at in unknown if len(unknown) <= 64 else ():
                yield alike | {at: rare}


# --- rows that are tried


def _with_guesses(model: Any, signature: FrameSignature, rows: list[Any]) -> tuple[FrameSignature, list[Any]]:
    """Make numbers of the columns that were only guessed to be strings, if the model takes them."""
    columns = signature.columns
    guessed = [at for at in _unknown(inspect(model, len(columns))) if columns[at].kind == "text"]
    numbers: dict[int, Kind] = {}

    def with_numbers(indices: list[int]) -> tuple[FrameSignature, list[Any]]:
        kinds: dict[int, Kind] = numbers | dict.fromkeys(indices, "number")
        row = [0.0 if at in kinds else value for at, value in enumerate(rows[0])]
        return replace(signature, columns=_with_kinds(columns, kinds)), [row]

    for at in accepted(guessed, lambda indices: failure_of(model, *with_numbers(indices)) is None, math.inf):
        numbers[at] = "number"
    signature, rows = with_numbers([]) if numbers else (signature, rows)
    return _with_ambiguous(model, signature, rows), rows


def _with_ambiguous(model: Any, signature: FrameSignature, rows: list[Any]) -> FrameSignature:
    """Let columns of which the model takes numbers as well as strings hold either: it does not show which is right."""
    columns = signature.columns
    unknown = [at for at in _unknown(inspect(model, len(columns))) if columns[at].kind == "number"]
    if not unknown:
        return signature
    encodes_later, form = _strings_learned_later(model, len(columns))
    made, is_frame = list(columns), signature.layout == "frame"
    for at in unknown if encodes_later else ():  # numbers of an array become floats
        dtype = form or ("infer" if is_frame else "")
        made[at] = replace(columns[at], dtype=dtype, doubt="" if form else WHOLE_OR_NOT)
    if not is_frame:
        return replace(signature, columns=tuple(made))

    def takes_text(indices: list[int]) -> bool:
        tried = replace(signature, columns=_with_kinds(columns, dict.fromkeys(indices, "text")))
        texts = ("text", "2026-01-31")
        rows_of_text = [[text if at in indices else value for at, value in enumerate(rows[0])] for text in texts]
        return any(failure_of(model, tried, [row]) is None for row in rows_of_text)

    for at in accepted(unknown, takes_text):
        made[at] = replace(columns[at], kind="any", dtype=f"infer {form}".rstrip(), doubt=NUMBERS_OR_STRINGS)
    return replace(signature, columns=tuple(made))


def _strings_learned_later(model: Any, width: int) -> tuple[bool, str]:
    """Return whether some part has learned strings that are not those of raw columns, and of what numbers these were.

    That is int64 if they hold "3", float64 if "3.0", and "" if neither or both.
    """
    reached, found, pointed = {id(raw.part) for raw in raw_parts(model, range(width))}, False, set()
    for part in [part for part in estimators_in(model) if id(part) not in reached]:
        arrays = [*getattr(part, "categories_", ()), *(learned_categories(part) or {}).values()]
        strings = [value for array in arrays for value in np.asarray(array).tolist() if isinstance(value, str)]
        pointed |= {not value.lstrip("-").isdecimal() for value in strings if NUMBER.fullmatch(value)}
        found = found or bool(strings) or hasattr(part, "vocabulary_") or bool(keeps_no_categories(part))
    return found, "" if len(pointed) != 1 else "float64" if pointed.pop() else "int64"


def _unknown(found: Sequence[ColumnFacts]) -> list[int]:
    """Return the columns of which the parts of a model show nothing."""
    return [at for at, facts in enumerate(found) if facts.kind is None and not facts.dropped]
