"""Checks at load that a model gets of JSON what it was fitted on; one that does not is refused."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import orjson

from .columns import BadRows, json_form
from .formats import ModelLoadError
from .parts import is_present, raw_parts
from .signature import Signature


def check_categories(model: Any, signature: Signature, row: Any) -> None:
    """Check that each category, written as JSON, is encoded as what the encoder learned. Raises: ModelLoadError."""
    if not signature.columns or not isinstance(row, list):
        return
    for part, indices, imputers, entered in raw_parts(model, list(range(len(signature.columns)))):
        if not hasattr(part, "categories_") or not hasattr(part, "transform"):
            continue
        learned = [array[is_present(array)] for array in map(np.asarray, part.categories_)]
        count = max(map(len, learned), default=0)
        learned = [array[np.arange(count) % len(array)] for array in learned if len(array)]
        if len(learned) < len(indices):  # a column without any value
            continue
        step_size = max(1000, 200_000 // len(row))  # an encoder goes through all its categories at each call
        for start in range(0, count, step_size):
            values = [array[start : start + step_size] for array in learned]
            sent = [list(row) for _ in values[0]]
            for at, array in zip(indices, values, strict=True):
                for to, value in zip(sent, array.tolist() if array.dtype.kind == "O" else array, strict=True):
                    to[at] = json_form(value)
            try:
                inputs = _select(signature.parse(orjson.loads(orjson.dumps(sent))), entered)
            except BadRows as error:
                raise ModelLoadError(f"a category that an encoder was fitted on cannot be sent: {error}") from error
            for step in imputers:
                inputs = step.transform(inputs)
            if hasattr(inputs, "iloc") and not hasattr(part, "feature_names_in_"):
                inputs = inputs.to_numpy()
            if not _encodes_alike(part, inputs, _table(values, part)):
                names = ", ".join(str(signature.columns[at].name or at) for at in indices)
                raise ModelLoadError(
                    f"the encoder of the columns {names} was fitted on values that JSON does not bring back as they "
                    "were; train the model on strings or numbers made of them"
                )


def check_units(model: Any, signature: Signature, rows: list[Any]) -> None:
    """Check that answers do not depend on the unit in which pandas keeps times. Raises: ModelLoadError.

    A step that makes numbers of them with `astype("int64")` gets others in microseconds than in nanoseconds, and no
    model shows in which it was trained.
    """
    dates = [at for at, column in enumerate(signature.columns or ()) if column.dtype == "date"]
    methods = ("predict_proba", "decision_function", "predict")
    ask = next(getattr(model, method) for method in methods if hasattr(model, method))
    answers = []
    for unit in ("s", "us", "ns") if dates else ():
        frame = signature.parse(rows)
        with suppress(ValueError):  # nanoseconds end in the year 2262
            for at in dates:
                frame.isetitem(at, frame.iloc[:, at].dt.as_unit("s").dt.as_unit(unit))
            answers.append(ask(frame))
    if not all(_equal(answer, answers[0]) for answer in answers):
        raise ModelLoadError(
            "its answers depend on the unit in which pandas keeps times, which is not known from the model; let the "
            'step that makes numbers of them set it, with dates.dt.as_unit("ns") or the unit that it was trained with'
        )


def _select(inputs: Any, indices: Sequence[int]) -> Any:
    return inputs.iloc[:, list(indices)] if hasattr(inputs, "iloc") else inputs[:, indices]


def _table(columns: list[Any], part: Any) -> Any:
    """Make what an encoder was fitted on of values of its categories."""
    names = getattr(part, "feature_names_in_", None)
    if names is None:
        array = np.empty((len(columns[0]), len(columns)), dtype=np.result_type(*columns))
        for at, values in enumerate(columns):
            array[:, at] = values
        return array
    import pandas as pd

    return pd.DataFrame(
        {name: pd.Series(values, dtype=values.dtype) for name, values in zip(names, columns, strict=True)}
    )


def _encodes_alike(encoder: Any, inputs: Any, expected: Any) -> bool:
    """Return whether an encoder makes the same of what the model gets as of what it learned."""
    try:
        return _equal(encoder.transform(inputs), encoder.transform(expected))
    except ValueError:  # unknown categories
        return False


def _equal(found: Any, expected: Any) -> bool:
    """Return whether two results of an encoder are the same."""
    if hasattr(found, "nnz") and hasattr(expected, "nnz"):  # sparse: dense they may be larger than the memory
        return bool(found.shape == expected.shape and (found != expected).nnz == 0)
    first, second = (each.toarray() if hasattr(each, "toarray") else np.asarray(each) for each in (found, expected))
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))
