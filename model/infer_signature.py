"""What a fitted model takes, inferred from the model itself.

A fitted scikit-learn model records how many columns it takes and, if it was fitted on a data frame, their names. It
does not record which columns hold strings or may be missing: the first is read from the encoders and imputers inside
the model, the second is tried out, one missing value at a time.
"""

import itertools
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from .column_checks import check_categories, check_units
from .columns import ISO_DATE, Kind, rows_as_lists
from .formats import ModelLoadError, foreign
from .formats.sklearn import estimators_in
from .parts import SINGLE, ColumnFacts, find_single, inspect, is_identity, raw_parts
from .signature import Column, Layout, Signature

NUMBER_OR_TEXT: tuple[Kind, ...] = ("number", "text")
NUMBER = re.compile(r"-?\d+(\.\d+)?(e[+-]?\d+)?")  # as Python makes strings of numbers
TRIAL_SECONDS = 10.0  # of each search; only models that are slow or have very many columns need more
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


def infer_signature(
    model: Any, sample: list[Any] | None = None, nullable: Sequence[bool] | None = None
) -> tuple[Signature, list[Any]]:
    """Infer what a fitted model takes, and validate it with rows that the model answers.

    >>> from sklearn.linear_model import LinearRegression
    >>> signature, rows = infer_signature(LinearRegression().fit([[1, 2], [3, 5]], [0, 1]))
    >>> signature.example(), rows
    ('[[0.5, 0.5]]', [[0.0, 0.0]])

    Args:
        model: a fitted estimator of scikit-learn, or a model that declares what it takes: it has a method
            `signatures(sample)`, which returns the signatures it may have, the likeliest first.
        sample: rows that the model is known to answer; without them a synthetic row is made.
        nullable: which columns may be missing, if that is known; otherwise it is tried.

    Returns:
        The signature, and the rows that it was validated with.

    Raises: ModelLoadError, the model does not answer the sample or, without one, any synthetic row.
    """
    failure: Exception | None = None
    end = time.monotonic() + 3 * TRIAL_SECONDS
    declared = hasattr(model, "signatures")  # nothing is tried out then: a tensor model would just compute with NaN
    for signature in _candidates(model, sample):
        if failure is not None and time.monotonic() > end:
            break
        tried = signature if declared else _all_nullable(signature)
        # Two synthetic rows for a declared signature: such a model may be fixed to one row at a time.
        example = getattr(model, "example", None) if declared else None
        made = _synthetic_rows(signature, n_rows=2 if declared else 1) if example is None else [[example] * 2]
        for rows in [sample] if sample else made:
            if (error := _failure(model, tried, rows)) is not None:
                failure = failure or error
                continue
            if declared:
                return signature, rows
            check_categories(model, tried, rows_as_lists(rows, signature.columns or ())[0])
            if sample:
                signature = _with_sample(signature, sample)
            else:
                signature, rows = _with_guesses(model, signature, rows)
            check_units(model, signature, rows)
            return _with_nullable(model, signature, rows, nullable), rows
    raise ModelLoadError(f"{_explain(model, failure, sample)} ({type(failure).__name__}: {failure})") from failure


def _explain(model: Any, failure: Exception | None, sample: list[Any] | None) -> str:
    """Return why a model answered nothing; suggest a sample only where it would help."""
    if any(each.__name__ == "NotFittedError" for each in type(failure).__mro__) or "no trained model" in str(failure):
        return "the model is not fitted; save it after fit"
    if any(type(part).__name__ == "DictVectorizer" for part, *_ in raw_parts(model, range(sys.maxsize))):
        return (
            "the model begins with a DictVectorizer, which takes no rows; fit it on a data frame, with a OneHotEncoder"
        )
    reached = {id(raw.part) for raw in raw_parts(model, range(sys.maxsize))}
    behind = [foreign("columns", part) or () for part in estimators_in(model) if id(part) not in reached]
    if any(column.dtype == "category" for columns in behind for column in columns):
        return (
            "a step stands before a booster with pandas categories, and does not show which columns it passes on; make "
            "the categories in a step of your own, or put an OrdinalEncoder in their place"
        )
    if isinstance(failure, ImportError):
        return "the model needs a library that is not installed here"
    if sample:
        named = not isinstance(sample, list) or isinstance(sample[0], dict) or hasattr(model, "feature_names_in_")
        objects = (
            "" if named else "; if it takes a data frame, write the rows as objects, with the names of its columns"
        )
        return f"the model refuses its recorded sample{objects}"
    return "the model answers none of the synthetic rows that were tried; a recorded sample would show what it takes"


# --- candidates


def _candidates(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    """Yield the signatures that the model may have, the likeliest first."""
    if hasattr(model, "signatures"):
        yield from model.signatures(sample)
    elif (reader := _first_reader(model)) is not None:
        yield from _candidates_with_columns(model, reader, sample)
    elif any(hasattr(part, "build_analyzer") for part, *_ in raw_parts(model, range(sys.maxsize))):
        yield Signature("texts", ())
    elif isinstance(sample, list) and sample and isinstance(sample[0], dict):
        columns = [Column(name) for name in sample[0]]  # a step of the user's own comes first, and records no names
        for kinds in _guesses(list(range(len(columns))), columns, sample):
            yield Signature("frame", _with_kinds(columns, kinds))
    else:
        one_dimension = False
        with suppress(AttributeError):  # only scikit-learn's own base classes have tags
            one_dimension = model.__sklearn_tags__().input_tags.one_d_array
        if not one_dimension:
            yield Signature("array", None)
            yield Signature("texts", ())
        yield Signature("numbers", ())


def _first_reader(model: Any) -> Any:
    """Return the part that shows the width of the model's own input: the model, or one after a passthrough; or None."""
    while model is not None and not (getattr(model, "n_features_in_", None) or foreign("columns", model)):
        steps = [step for _, step in getattr(model, "steps", ()) if not is_identity(step)]
        model = steps[0] if steps else getattr(model, "best_estimator_", None)
    return model


def _candidates_with_columns(model: Any, reader: Any, sample: list[Any] | None) -> Iterable[Signature]:
    boosted = foreign("columns", reader) or []
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
        _forget_names(model)
    # The model does not show what a step of the user's own takes.
    unknown = _unknown(found)
    if layout != "frame" and not (sample and _strings_learned_later(model, len(found))[0]):
        unknown = []
    shown = _kinds_in(sample, columns)  # numbers may be written as booleans, if the sample has them so
    known = {at for at, c in enumerate(columns) if c.kind == "number" and shown.get(at) == "boolean"} - set(unknown)
    columns = [replace(c, kind="boolean") if at in known else c for at, c in enumerate(columns)]
    if any(foreign("kinds", part) is not None for part in estimators_in(model)):  # these parse strings, in any form
        parsed = [at for at, c in enumerate(columns) if c.kind in ("number", "date") and shown.get(at) == "text"]
        columns = list(_with_kinds(columns, dict.fromkeys(parsed, "text")))
    of_lightgbm = any(type(part).__module__.startswith("lightgbm.") for part in (model, *estimators_in(model)))
    blanks = of_lightgbm and not any(" " in name for name in names)
    for kinds in _guesses(unknown, columns, sample):
        yield Signature(layout, _with_kinds(columns, kinds), precision, blanks)
    yield Signature(layout, tuple(columns), precision="float32")


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


def _forget_names(model: Any) -> None:
    """Remove the column names from a model that gets arrays: the signature has them, and at each array without names
    scikit-learn would warn, which costs more than a small predict."""
    for part in estimators_in(model):
        vars(part).pop("feature_names_in_", None)


def _with_kinds(columns: Iterable[Column], kinds: dict[int, Kind]) -> tuple[Column, ...]:
    """Return the columns, some of them with another kind; "integer" means numbers that pandas holds as int64."""
    found = list(columns)
    for at, kind in kinds.items():
        whole = kind == "integer"
        found[at] = replace(found[at], kind="number" if whole else kind, dtype="int64" if whole else "")
    return tuple(found)


def _kinds_in(sample: Any, columns: Sequence[Column]) -> dict[int, Kind]:
    """Return the kinds of the values in a sample, by column; rows that do not fit are ignored."""
    rows = rows_as_lists(sample, columns) if isinstance(sample, list) else []
    rows = [row for row in rows if isinstance(row, list) and len(row) == len(columns)]
    return {at: _kind_of_values([row[at] for row in rows]) for at in range(len(columns) if rows else 0)}


def _kind_of_values(values: list[Any]) -> Kind:
    """Return the kind of all values but None: "integer" if all numbers are whole, "number" if there are no values."""
    types = set(map(type, values)) - {type(None)}
    if types == {int}:
        return "integer"
    if types == {str}:
        return "date" if all(value is None or ISO_DATE.fullmatch(value) for value in values) else "text"
    return "boolean" if types == {bool} else "number" if types <= {int, float} else "any"


def _with_sample(signature: Signature, sample: Any) -> Signature:
    """Note of a sample what the model does not show: whether dates have an offset, whole numbers that may be floats."""
    columns = signature.columns or ()
    rows = rows_as_lists(sample, columns)
    found = list(columns)
    for at, column in enumerate(columns):
        date = next((row[at] for row in rows if row[at] is not None), None) if column.dtype == "date" else None
        if date is not None:
            found[at] = replace(column, zoned=column.convert(date).tzinfo is not None)  # type: ignore[misc]
        if column.dtype == "int64" and not column.learned and any(row[at] is None for row in rows):
            found[at] = replace(column, doubt=WHOLE_BESIDE_NULL)
    return replace(signature, columns=tuple(found)) if columns else signature


def _guesses(unknown: list[int], columns: list[Column], sample: Any) -> Iterable[dict[int, Kind]]:
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


def _synthetic_rows(signature: Signature, n_rows: int) -> Iterable[list[Any]]:
    """Yield rows to try: values that the encoders know, and otherwise 0 or 1 (a logarithm takes no 0)."""
    if hasattr(signature, "synthetic_rows"):  # it has rows of its own kind
        yield from signature.synthetic_rows(n_rows)
        return
    for number in (0.0, 1.0):
        values = {"number": number, "integer": int(number), "text": "text", "boolean": False, "any": number}
        values |= {"category": "text", "date": "2026-01-31"}
        columns = signature.columns or (Column(None),)
        row: Any = [values[c.kind] if c.example is None else c.example for c in columns]
        if signature.layout in ("texts", "numbers"):
            row = "text" if signature.layout == "texts" else number
        yield [row] * n_rows


def _with_guesses(model: Any, signature: Signature, rows: list[Any]) -> tuple[Signature, list[Any]]:
    """Make numbers of the columns that were only guessed to be strings, if the model takes them."""
    columns = signature.columns or ()
    guessed = [at for at in _unknown(inspect(model, len(columns))) if columns[at].kind == "text"]
    numbers: dict[int, Kind] = {}

    def with_numbers(indices: list[int]) -> tuple[Signature, list[Any]]:
        kinds: dict[int, Kind] = numbers | dict.fromkeys(indices, "number")
        row = [0.0 if at in kinds else value for at, value in enumerate(rows[0])]
        return replace(signature, columns=_with_kinds(columns, kinds)), [row]

    for at in _accepted(guessed, lambda indices: _failure(model, *with_numbers(indices)) is None, math.inf):
        numbers[at] = "number"
    signature, rows = with_numbers([]) if numbers else (signature, rows)
    return _with_ambiguous(model, signature, rows), rows


def _with_ambiguous(model: Any, signature: Signature, rows: list[Any]) -> Signature:
    """Let columns of which the model takes numbers as well as strings hold either: it does not show which is right."""
    columns = signature.columns or ()
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
        return any(_failure(model, tried, [row]) is None for row in rows_of_text)

    for at in _accepted(unknown, takes_text):
        made[at] = replace(columns[at], kind="any", dtype=f"infer {form}".rstrip(), doubt=NUMBERS_OR_STRINGS)
    return replace(signature, columns=tuple(made))


def _strings_learned_later(model: Any, width: int) -> tuple[bool, str]:
    """Return whether some part has learned strings that are not those of raw columns, and of what numbers these were.

    That is int64 if they hold "3", float64 if "3.0", and "" if neither or both.
    """
    reached, found, pointed = {id(raw.part) for raw in raw_parts(model, range(width))}, False, set()
    for part in [part for part in estimators_in(model) if id(part) not in reached]:
        arrays = [*getattr(part, "categories_", ()), *(foreign("categories", part) or {}).values()]
        strings = [value for array in arrays for value in np.asarray(array).tolist() if isinstance(value, str)]
        pointed |= {not value.lstrip("-").isdecimal() for value in strings if NUMBER.fullmatch(value)}
        found = found or bool(strings) or hasattr(part, "vocabulary_") or bool(foreign("keeps_no_categories", part))
    return found, "" if len(pointed) != 1 else "float64" if pointed.pop() else "int64"


def _unknown(found: Sequence[ColumnFacts]) -> list[int]:
    """Return the columns of which the parts of a model show nothing."""
    return [at for at, facts in enumerate(found) if facts.kind is None and not facts.dropped]


def _with_nullable(model: Any, signature: Signature, rows: list[Any], known: Sequence[bool] | None) -> Signature:
    """Find which columns may be missing by leaving each out once. An imputer's tags cannot be trusted on this."""
    if not signature.columns:
        return signature
    if known is not None and len(known) == len(signature.columns):
        columns = (replace(c, nullable=null) for c, null in zip(signature.columns, known, strict=True))
        return replace(signature, columns=tuple(columns))
    # A value of each column from the rows that the model answered, not a missing one if some row has another.
    by_column = zip(*rows_as_lists(rows, signature.columns), strict=True)
    values = [next((value for value in column if value is not None), None) for column in by_column]
    tried = _all_nullable(signature)

    def answers(indices: list[int]) -> bool:
        row = list(values)
        for at in indices:
            row[at] = None
        return _failure(model, tried, [row]) is None

    nullable = set(_accepted(list(range(len(values))), answers))
    columns = (replace(c, nullable=at in nullable) for at, c in enumerate(signature.columns))
    return replace(signature, columns=tuple(columns))


def _failure(model: Any, signature: Signature, rows: list[Any]) -> Exception | None:
    """Return what the model raises at rows, which may be anything; None if it answers them."""
    try:
        model.predict(signature.parse(rows))
    except Exception as error:
        return error
    return None


def _all_nullable(signature: Signature) -> Signature:
    return replace(signature, columns=signature.columns and tuple(replace(c, nullable=True) for c in signature.columns))


def _accepted(indices: list[int], accepts: Callable[[list[int]], bool], seconds: float | None = None) -> Iterator[int]:
    """Yield the indices that are accepted, trying many at once and halving what is refused.

    Of very many columns, or by a slow model, not all can be tried in a few seconds; the rest count as refused.
    """
    end = time.monotonic() + (TRIAL_SECONDS if seconds is None else seconds)
    left = [indices] if indices else []
    for _ in range(max(200, 2_000_000 // max(1, len(indices)))):
        if not left or time.monotonic() > end:
            return
        group = left.pop()
        if accepts(group):
            yield from group
        elif len(group) > 1:
            middle = len(group) // 2
            left += [group[:middle], group[middle:]]
