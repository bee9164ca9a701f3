"""Checks at load that a model gets of JSON what it was fitted on; one that does not is refused."""

from contextlib import suppress
from typing import Any

import numpy as np
import orjson

from ..columns import BadRows, json_form
from ..formats import ModelLoadError
from .parts import is_present, raw_parts
from .signature import FrameSignature


def check_categories(model: Any, signature: FrameSignature, row: Any) -> None:
    """Check that each category, written as JSON, is encoded as what the encoder learned. Raises: ModelLoadError."""
    if not isinstance(row, list):
        return
    for part, indices, before in raw_parts(model, list(range(len(signature.columns)))):
        if not hasattr(part, "categories_") or not hasattr(part, "transform"):
            continue
        learned = [array[is_present(array)] for array in map(np.asarray, part.categories_)]
        known = [(to, at, array) for to, (at, array) in enumerate(zip(indices, learned, strict=False)) if len(array)]
        raw = [(to, at, array) for to, at, array in known if at is not None]
        count = max((len(array) for *_, array in raw), default=0)
        step_size = max(1000, 200_000 // len(row))  # an encoder goes through all its categories at each call
        for start in range(0, count, step_size):
            numbers = np.arange(start, min(start + step_size, count))
            values = {to: array[numbers % len(array)] for to, _, array in raw}
            sent = [list(row) for _ in numbers]
            for to, at, _ in raw:
                array = values[to]
                for each, value in zip(sent, array.tolist() if array.dtype.kind == "O" else array, strict=True):
                    each[at] = json_form(value)
            try:
                inputs = signature.parse(orjson.loads(orjson.dumps(sent)))
            except BadRows as error:
                raise ModelLoadError(f"a category that an encoder was fitted on cannot be sent: {error}") from error
            for step in before:
                inputs = step.transform(inputs)
            if hasattr(inputs, "iloc") and not hasattr(part, "feature_names_in_"):
                inputs = inputs.to_numpy()
            if not _encodes_alike(part, inputs, _with(values, inputs)):
                names = ", ".join(str(signature.columns[at].name or at) for _, at, _ in raw)
                raise ModelLoadError(
                    f"the encoder of the columns {names} was fitted on values that JSON does not bring back as they "
                    "were; train the model on strings or numbers made of them"
                )


def check_units(model: Any, signature: FrameSignature, rows: list[Any]) -> None:
    """Check that answers do not depend on the unit in which pandas keeps times. Raises: ModelLoadError.

    A step that makes numbers of them with `astype("int64")` gets others in microseconds than in nanoseconds, and no
    model shows in which it was trained.
    """
    dates = [at for at, column in enumerate(signature.columns) if column.dtype == "date"]
    methods = ("predict_proba", "decision_function", "predict")
    ask = next(getattr(model, method) for method in methods if hasattr(model, method))
    answers = []
    for unit in ("s", "us", "ns") if dates else ():
        frame = signature.parse(rows)
        with suppress(ValueError):  # nanoseconds end in the year 2262
            for at in dates:
                frame.isetitem(at, frame.iloc[:, at].dt.as_unit("s").dt.as_unit(unit))
            answers.append(ask(frame))
    if not all(_close(answer, answers[0]) for answer in answers):
        raise ModelLoadError(
            "its answers depend on the unit in which pandas keeps times, which is not known from the model; let the "
            'step that makes numbers of them set it, with dates.dt.as_unit("ns") or the unit that it was trained with'
        )


def _with(values: dict[int, Any], inputs: Any) -> Any:
    """Return an encoder's input with some of its columns replaced by values of its categories."""
    if not hasattr(inputs, "iloc"):
        columns = [values.get(at, inputs[:, at]) for at in range(inputs.shape[1])]
        array = np.empty(inputs.shape, dtype=np.result_type(*columns))
        for at, column in enumerate(columns):
            array[:, at] = column
        return array
    import pandas as pd

    frame = inputs.copy(deep=False)
    for at, column in values.items():
        frame.isetitem(at, pd.Series(column, dtype=column.dtype, index=frame.index))
    return frame


def _encodes_alike(encoder: Any, inputs: Any, expected: Any) -> bool:
    """Return whether an encoder makes the same of what the model gets as of what it learned."""
    try:
        return _equal(encoder.transform(inputs), encoder.transform(expected))
    except ValueError:  # unknown categories
        return False


def _close(found: Any, expected: Any) -> bool:
    """Return whether two answers of a model are the same, but for the last bits of their numbers."""
    first, second = np.asarray(found), np.asarray(expected)
    return bool(np.allclose(first, second, rtol=1e-9) if first.dtype.kind == "f" else np.array_equal(first, second))


def _equal(found: Any, expected: Any) -> bool:
    """Return whether two results of an encoder are the same."""
    if hasattr(found, "nnz"):  # sparse: dense they may be larger than the memory
        return bool(found.shape == expected.shape and (found != expected).nnz == 0)
    first, second = np.asarray(found), np.asarray(expected)
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))
