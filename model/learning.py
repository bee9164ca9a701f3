"""What a fitted model takes, learned from the model itself.

A fitted scikit-learn model records how many columns it takes and, when it was fitted on a data frame, their names. It
does not record which columns hold text or may be missing: the first is read from the encoders and imputers inside the
model, the second is tried out, one missing value at a time.
"""

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .formats import ModelLoadError, estimators_in
from .signature import ACCEPTED, Column, Kind, Layout, Signature


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
    for signature in _candidates(model, sample):
        for rows in [sample] if sample else _synthetic(signature):
            try:
                model.predict(signature.parse(rows))
            except Exception as error:  # a model may raise anything at a row that it does not know
                failure = failure or error
            else:
                return _with_nullable(model, signature, rows), rows
    raise ModelLoadError(
        f"the model answered {'its recorded sample' if sample else 'no row that could be made up for it'} "
        f"({type(failure).__name__}: {failure})"
    ) from failure


def _candidates(model: Any, sample: list[Any] | None) -> Iterable[Signature]:
    """Yield the signatures the model may have, the likeliest first."""
    width = getattr(model, "n_features_in_", None)
    if width is None:
        if _takes_texts(model):
            yield Signature("texts", ())
            return
        yield Signature("array", None)
        yield Signature("texts", ())
        yield Signature("numbers", ())
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
        yield Signature(layout, tuple(_as_in_sample(columns, unknown, sample)))
        return
    for kinds in itertools.islice(itertools.product(("number", "text"), repeat=len(unknown)), 256):
        tried = list(columns)
        for at, kind in zip(unknown, kinds, strict=True):
            tried[at] = replace(tried[at], kind=kind)
        yield Signature(layout, tuple(tried))


def _forget_names(model: Any) -> None:
    """Take the column names off a model that gets arrays: the signature has them, and at each array without names
    scikit-learn would warn, which costs more than a small predict."""
    for part in estimators_in(model):
        vars(part).pop("feature_names_in_", None)


def _as_in_sample(columns: list[Column], unknown: list[int], sample: list[Any]) -> Iterable[Column]:
    for at, column in enumerate(columns):
        values = [row[column.name] if isinstance(row, dict) else row[at] for row in sample]
        kinds = {type(value) for value in values} - {type(None)}
        fitting: list[Kind] = [kind for kind, accepted in ACCEPTED.items() if kinds <= accepted]
        yield replace(column, kind=fitting[0]) if at in unknown and fitting else column


def _synthetic(signature: Signature) -> Iterable[list[Any]]:
    """Make up rows: what the encoders know, and else 0 or 1 (a logarithm takes no 0)."""
    if signature.layout == "texts":
        yield ["text"]
        return
    for number in (0.0, 1.0):
        blank = {"number": number, "text": "text", "boolean": False, "any": number}
        if signature.layout == "numbers":
            yield [number]
        else:
            yield [[c.examples[0] if c.examples else blank[c.kind] for c in signature.columns or (Column(None),)]]


def _with_nullable(model: Any, signature: Signature, rows: list[Any]) -> Signature:
    """Find which columns may be missing by leaving each out once. An imputer's tags cannot be trusted on this."""
    if not signature.columns:
        return signature
    open_to_all = replace(signature, columns=tuple(replace(c, nullable=True) for c in signature.columns))
    row = rows[0]
    values = [row[c.name] for c in signature.columns] if isinstance(row, dict) else list(row)

    def answers(indices: range) -> bool:
        probes = [[*values[:at], None, *values[at + 1 :]] for at in indices]
        try:
            model.predict(open_to_all.parse(probes))
        except Exception:  # any refusal means no
            return False
        return True

    nullable: set[int] = set()
    # Many columns in one call, halved where it fails: a model takes missing values nearly everywhere or nowhere.
    left = [range(at, min(at + 64, len(values))) for at in range(0, len(values), 64)]
    while left:
        indices = left.pop()
        if answers(indices):
            nullable.update(indices)
        elif len(indices) > 1:
            middle = len(indices) // 2
            left += [indices[:middle], indices[middle:]]
    return replace(
        signature, columns=tuple(replace(c, nullable=at in nullable) for at, c in enumerate(signature.columns))
    )


@dataclass
class _Seen:
    """What the model's parts tell about one raw column."""

    kind: Kind | None = None
    values: tuple[Any, ...] = ()
    none_is_missing: bool = False

    @property
    def known(self) -> bool:
        return self.kind is not None

    def learn(self, values: Any) -> None:
        """Learn from values seen at fit: an encoder's categories or an imputer's replacement."""
        present = [v for v in np.asarray(values).ravel().tolist() if v is not None and v == v]
        self.none_is_missing |= any(v is None for v in np.asarray(values, dtype=object).ravel())
        kinds = {type(v) for v in present}
        if self.kind is None and kinds:
            self.kind = next((kind for kind, accepted in ACCEPTED.items() if kinds <= accepted), "any")
        if self.kind is not None and kinds <= ACCEPTED[self.kind]:
            self.values = tuple(present[:1])

    def column(self, name: str | None) -> Column:
        missing = None if self.none_is_missing else math.nan
        return Column(name, self.kind or "number", missing=missing, examples=self.values)


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
                    column.kind = column.kind or "any"  # it never reaches the model
            else:
                _look(inner, columns)
    elif hasattr(part, "categories_"):
        for column, values in zip(seen, part.categories_, strict=False):
            column.learn(values)
    elif hasattr(part, "statistics_"):
        for column, value in zip(seen, part.statistics_, strict=False):
            column.learn([value])
    elif _takes_texts(part):
        for column in seen:
            column.kind = column.kind or "text"
    else:
        for inner in _inner_estimators(part):
            _look(inner, seen)
        if type(part).__module__.startswith("sklearn.") and not hasattr(part, "func"):
            for column in seen:
                column.kind = column.kind or "number"


def _inner_estimators(part: Any) -> Iterable[Any]:
    """Yield the fitted estimators that a meta-estimator hands its own input to."""
    for name in ("best_estimator_", "estimator_", "regressor_", "_preprocessor"):
        inner = getattr(part, name, None)
        if inner is not None:
            yield inner
    for name in ("calibrated_classifiers_", "estimators_"):
        for inner in np.ravel(np.asarray(getattr(part, name, ()), dtype=object))[:1]:
            yield getattr(inner, "estimator", inner) if name == "calibrated_classifiers_" else inner
    for _, inner in getattr(part, "transformer_list", ()):
        yield inner


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
        for part in parts
    )
