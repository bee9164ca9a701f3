"""What a fitted model takes, learned from the model itself.

A fitted scikit-learn model records how many columns it takes and, when it was fitted on a data frame, their names. It
does not record which columns hold text or may be missing: the first is read from the encoders and imputers inside the
model, the second is tried out, one missing value at a time.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .formats import ModelLoadError
from .formats.sklearn import estimators_in
from .signature import ACCEPTED, Column, Kind, Layout, Signature, kind_of


def learn(model: Any, sample: list[Any] | None = None) -> tuple[Signature, list[Any]]:
    """Learn what a fitted model takes, and prove it with a row that the model answers.

    Args:
        model: a fitted estimator.
        sample: rows that the model is known to answer; without them a synthetic one is made.

    Returns:
        The signature, and the rows that it was proved with.

    Raises:
        ModelLoadError: the model answered none of the rows that could be made up.
    """
    failure: Exception | None = None
    tells = hasattr(model, "signatures")  # its file says what it takes, and NaN would pass through it unseen
    for signature, guessed in _candidates(model, sample):
        tried = signature if tells else _all_nullable(signature)
        for rows in [sample] if sample else _synthetic(signature, n_rows=2 if tells else 1):
            try:
                model.predict(tried.parse(rows))
            except Exception as error:  # a model may raise anything at a row that it does not know
                failure = failure or error
            else:
                if guessed:
                    signature, rows = _as_numbers(model, signature, rows, guessed)
                return signature if tells else _with_nullable(model, signature, rows), rows
    if sample:
        raise ModelLoadError(
            f"the model refuses its recorded sample ({type(failure).__name__}: {failure})"
        ) from failure
    raise ModelLoadError(
        f"the model answered no row that could be made up for it ({type(failure).__name__}: {failure}). "
        "A recorded sample of rows would tell what it takes"
    ) from failure


def _candidates(model: Any, sample: list[Any] | None) -> Iterable[tuple[Signature, list[int]]]:
    """Yield the signatures the model may have, the likeliest first, each with the columns whose kind is a guess."""
    if hasattr(model, "signatures"):
        for signature in model.signatures(sample):
            yield signature, []
        return
    width = getattr(model, "n_features_in_", None)
    if width is None:
        if _takes_texts(model):
            yield Signature("texts", ()), []
            return
        if not _tag(model, "one_d_array"):
            yield Signature("array", None), []
            yield Signature("texts", ()), []
        yield Signature("numbers", ()), []
        return
    names = [str(name) for name in getattr(model, "feature_names_in_", ())]
    seen: list[_Seen] = [_Seen() for _ in range(width)]
    _look(model, seen)
    columns = [s.column(name) for s, name in itertools.zip_longest(seen, names)]
    framed = bool(names) and (_selects_columns(model) or any(c.kind != "number" for c in columns))
    layout: Layout = "frame" if framed else "array"
    if names and not framed:
        _forget_names(model)
    # What a step of the user's own wants cannot be read off it. Such columns are tried as numbers, then as text.
    unknown = [at for at, s in enumerate(seen) if framed and not s.known]
    if sample and unknown:
        columns = _as_in_sample(columns, unknown, sample)
        unknown = []
    for kinds in _guesses(len(unknown)):
        tried = list(columns)
        for at, kind in zip(unknown, kinds, strict=True):
            tried[at] = replace(tried[at], kind=kind, dtype="")
        yield Signature(layout, tuple(tried)), unknown
    yield Signature(layout, tuple(columns), precision="float32"), []


def _guesses(count: int) -> Iterable[tuple[Kind, ...]]:
    """Guess the kinds of so many unknown columns: each combination of a few; of more, all alike or all but one."""
    if count <= 6:
        yield from itertools.product(("number", "text"), repeat=count)
        return
    pairs: list[tuple[Kind, Kind]] = [("number", "text"), ("text", "number")]
    for most, _ in pairs:
        yield (most,) * count
    for most, one in pairs:
        for at in range(count if count <= 64 else 0):
            yield (*(most,) * at, one, *(most,) * (count - at - 1))


def _forget_names(model: Any) -> None:
    """Take the column names off a model that gets arrays: the signature has them, and at each array without names
    scikit-learn would warn, which costs more than a small predict."""
    for part in estimators_in(model):
        vars(part).pop("feature_names_in_", None)


def _as_in_sample(columns: list[Column], unknown: list[int], sample: list[Any]) -> list[Column]:
    """Give the unknown columns the kind of their values in a sample; a row that does not fit tells nothing."""
    found = list(columns)
    given = sample if isinstance(sample, list) else []
    rows = [list(map(row.get, (c.name for c in columns))) if isinstance(row, dict) else row for row in given]
    for at in unknown:
        kinds = {type(row[at]) for row in rows if isinstance(row, list) and len(row) > at} - {type(None)}
        kind: Kind = next((kind for kind, accepted in ACCEPTED.items() if kinds and kinds <= accepted), "number")
        found[at] = replace(columns[at], kind=kind, dtype="")
    return found


def _synthetic(signature: Signature, n_rows: int = 1) -> Iterable[list[Any]]:
    """Make up rows: what the encoders know, and else 0 or 1 (a logarithm takes no 0)."""
    if signature.layout == "texts":
        yield ["text"] * n_rows
        return
    for number in (0.0, 1.0):
        blank = {"number": number, "integer": int(number), "text": "text", "boolean": False, "any": number}
        if signature.layout == "numbers":
            yield [number] * n_rows
        elif signature.layout == "tensor":
            # Of what may have any size, small ones first; an image has to outlast the model's strides.
            for size in (1, 28, 32, 64, 224) if None in signature.shape else (1,):
                shape = [size if fixed is None else fixed for fixed in signature.shape]
                yield [np.full(shape, blank[kind_of(signature.precision)], dtype=object).tolist()] * n_rows
        else:
            columns = signature.columns or (Column(None),)
            yield [[blank[c.kind] if c.example is None else c.example for c in columns]] * n_rows


def _as_numbers(model: Any, signature: Signature, rows: list[Any], guessed: list[int]) -> tuple[Signature, list[Any]]:
    """Make numbers of the columns that were only guessed to be text, wherever the model does without the guess."""

    def does_without(indices: list[int]) -> bool:
        nonlocal signature, rows
        columns, row = list(signature.columns or ()), list(rows[0])
        for at in indices:
            columns[at], row[at] = replace(columns[at], kind="number", dtype=""), 0.0
        fewer = replace(signature, columns=tuple(columns))
        try:
            model.predict(fewer.parse([row]))
        except Exception:  # any refusal means that one of them is text
            return False
        signature, rows = fewer, [row]
        return True

    texts = [at for at in guessed if signature.columns and signature.columns[at].kind == "text"]
    list(_accepted(texts, does_without))
    return signature, rows


def _accepted(indices: list[int], accepts: Callable[[list[int]], bool], finest: int = 1) -> Iterator[int]:
    """Yield the indices that are accepted, asking for many at once and halving what is refused, down to `finest`."""
    left = [indices[at : at + 64] for at in range(0, len(indices), 64)]
    while left:
        group = left.pop()
        if accepts(group):
            yield from group
        elif len(group) > finest:
            middle = len(group) // 2
            left += [group[:middle], group[middle:]]


def _all_nullable(signature: Signature) -> Signature:
    return replace(signature, columns=signature.columns and tuple(replace(c, nullable=True) for c in signature.columns))


def _with_nullable(model: Any, signature: Signature, rows: list[Any]) -> Signature:
    """Find which columns may be missing by leaving each out once. An imputer's tags cannot be trusted on this."""
    if not signature.columns:
        return signature
    values, open_to_all = _whole_row(signature, rows), _all_nullable(signature)

    def answers(indices: list[int]) -> bool:
        probes = [[*values[:at], None, *values[at + 1 :]] for at in indices]
        try:
            model.predict(open_to_all.parse(probes))
        except Exception:  # any refusal means no
            return False
        return True

    # With very many columns the last few are not told apart, and a group in which one is refused is refused.
    nullable = set(_accepted(list(range(len(values))), answers, finest=1 if len(values) <= 256 else 16))
    return replace(
        signature, columns=tuple(replace(c, nullable=at in nullable) for at, c in enumerate(signature.columns))
    )


def _whole_row(signature: Signature, rows: list[Any]) -> list[Any]:
    """Put a row together from those that the model answered, without missing values where some row has the value."""
    names = [c.name for c in signature.columns or ()]
    listed = [list(map(row.get, names)) if isinstance(row, dict) else row for row in rows]
    return [next((value for value in column if value is not None), None) for column in zip(*listed, strict=True)]


def known_values(model: Any, width: int) -> list[list[Any]]:
    """Return, for each of the raw columns, the values that the model's encoders and imputers saw at fit."""
    seen = [_Seen() for _ in range(width)]
    _look(model, seen)
    return [column.values for column in seen]


def raw_parts(part: Any, columns: list[int]) -> Iterator[tuple[Any, list[int]]]:
    """Yield each fitted part that raw columns reach as they are, with the indices of those columns."""
    yield part, columns
    if hasattr(part, "steps"):
        for _, step in part.steps:
            if step in (None, "passthrough"):
                continue
            yield from raw_parts(step, columns)
            if not hasattr(step, "statistics_"):
                return
    elif hasattr(part, "_transformer_to_input_indices"):
        for name, inner, _ in part.transformers_:
            if inner not in ("drop", "passthrough"):
                yield from raw_parts(inner, [columns[at] for at in part._transformer_to_input_indices[name]])
    else:
        for inner in _inner_estimators(part):
            yield from raw_parts(inner, columns)


@dataclass
class _Seen:
    """What the model's parts tell about one raw column."""

    kind: Kind | None = None
    dtype: str = ""
    example: Any = None
    none_is_missing: bool = False
    values: list[Any] = field(default_factory=list)
    dropped: bool = False  # by some part; what no part keeps never reaches the model

    @property
    def known(self) -> bool:
        return self.kind is not None or self.dropped

    def learn(self, values: Any) -> None:
        """Learn from values seen at fit: an encoder's categories or an imputer's replacement."""
        array = np.asarray(values)
        present = [v for v in array.ravel().tolist() if v is not None and v == v]
        self.none_is_missing |= any(v is None for v in array.astype(object).ravel())
        kinds = {type(v) for v in present}
        if self.kind is None and kinds:
            self.kind = next((kind for kind, accepted in ACCEPTED.items() if kinds <= accepted), "any")
        if self.kind is not None and kinds <= ACCEPTED[self.kind]:
            self.values = present
            self.example = present[0] if present else None
            if self.kind == "number" and array.dtype.kind in "iuO":
                self.dtype = "object" if array.dtype.kind == "O" else "int64"

    def column(self, name: str | None) -> Column:
        kind: Kind = self.kind or ("any" if self.dropped else "number")
        dtype = "object" if self.none_is_missing else self.dtype
        return Column(name, kind, missing=None if self.none_is_missing else math.nan, dtype=dtype, example=self.example)


def _look(part: Any, seen: list[_Seen]) -> None:
    """Note what a fitted part, and the parts inside it, tell about the raw columns that reach it."""
    if hasattr(part, "steps"):
        for _, step in part.steps:
            if step in (None, "passthrough"):
                continue
            _look(step, seen)
            if not hasattr(step, "statistics_"):  # an imputer hands its columns on as they are; others make new ones
                return
    elif hasattr(part, "_transformer_to_input_indices"):  # ColumnTransformer: names, masks and callables resolved
        for name, inner, _ in part.transformers_:
            columns = [seen[at] for at in part._transformer_to_input_indices[name]]
            if inner == "drop":
                for column in columns:
                    column.dropped = True
            else:
                _look(inner, columns)
    elif hasattr(part, "categories_"):
        for column, values in zip(seen, part.categories_, strict=False):
            column.learn(values)
    elif hasattr(part, "statistics_"):
        for column, value in zip(seen, part.statistics_, strict=False):
            column.none_is_missing |= getattr(part, "missing_values", 0) is None
            column.learn([value])
    elif _takes_texts(part):
        for column in seen:
            column.kind = column.kind or "text"
    else:
        inside = list(_inner_estimators(part))
        for inner in inside:
            _look(inner, seen)
        of_sklearn = type(part).__module__.startswith("sklearn.") and not hasattr(part, "inverse_func")
        if not inside and of_sklearn and hasattr(part, "n_features_in_"):  # fitted: some carry their blueprint along
            for column in seen:
                column.kind = column.kind or "number"


def _inner_estimators(part: Any) -> Iterable[Any]:
    """Yield the fitted estimators that a meta-estimator hands its own input to."""
    for name in ("best_estimator_", "estimator_", "regressor_", "_preprocessor"):
        inner = getattr(part, name, None)
        if inner is not None:
            yield inner
    for name in ("calibrated_classifiers_", "estimators_"):
        # A few are enough of a forest, and are all of a vote between models of different columns.
        for inner in itertools.islice(_flat(getattr(part, name, ())), 10):
            yield getattr(inner, "estimator", inner) if name == "calibrated_classifiers_" else inner
    for _, inner in getattr(part, "transformer_list", ()):
        yield inner


def _flat(values: Any) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (list, np.ndarray)):
            yield from _flat(value)
        else:
            yield value


def _takes_texts(part: Any) -> bool:
    """Tell whether a model begins with a text vectorizer, which takes a list of strings."""
    while getattr(part, "steps", None):
        part = part.steps[0][1]
    inner = getattr(part, "best_estimator_", None)
    if inner is not None:
        return _takes_texts(inner)
    return hasattr(part, "build_analyzer")


def _selects_columns(model: Any) -> bool:
    """Tell whether some part may look at columns by name, so that an array in their order would not do."""
    parts = list(estimators_in(model))
    return not parts or any(
        not type(part).__module__.startswith("sklearn.")
        or hasattr(part, "_transformer_to_input_indices")
        or hasattr(part, "inverse_func")  # FunctionTransformer
        or hasattr(part, "_sklearn_output_config")  # hands on data frames, if it was asked to
        for part in parts
    )


def _tag(model: Any, name: str) -> bool:
    """Look up one of scikit-learn's input tags."""
    try:
        return bool(getattr(model.__sklearn_tags__().input_tags, name))
    except AttributeError:
        return False
