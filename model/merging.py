"""Whether concurrent callers' rows may share one call of a model: only if it treats each row by itself.

A step that looks at all rows of its call, such as `X.fillna(X.mean())`, would answer one caller from another's rows.
"""

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from .columns import rows_as_lists
from .formats.sklearn import estimators_in
from .signature import Signature

# Libraries whose models and transformers treat each row by itself.
ROW_BY_ROW = ("sklearn", "lightgbm", "xgboost", "catboost", "imblearn")
TRIAL_SECONDS = 3.0
WHOLE_BATCH = {"NMF", "MiniBatchNMF"}  # but these begin at the mean of all values, and stop by the error of all rows


def why_not(model: Any, signature: Signature, rows: list[Any]) -> str:
    """Return why a model is not known to treat each row by itself; "" if it is.

    Known are scikit-learn, the boosters, numpy's ufuncs, and models that declare their signature (ONNX, torch, Keras);
    those too are tried with some rows.

    Args:
        model: the estimator.
        signature: what it takes.
        rows: that it answers.
    """
    if unknown := _unknown_part(model):
        return f"{unknown} may look at several rows at once"
    return "it answers rows differently together than one by one" if _differs(model, signature, rows) else ""


def _unknown_part(model: Any) -> str:
    if hasattr(model, "signatures"):
        return ""
    model = getattr(model, "raw", model)  # of model/frames/foreign.py
    if _library(type(model)) not in ROW_BY_ROW:
        return f"the class {type(model).__qualname__}"
    for part in estimators_in(model):
        if _library(type(part)) not in ROW_BY_ROW or type(part).__name__ in WHOLE_BATCH:
            return f"the class {type(part).__qualname__}"
        for name, value in part.get_params(deep=False).items():
            if callable(value) and not isinstance(value, type) and not _is_known(value, part):
                return f"{name}={getattr(value, '__qualname__', value)} of {type(part).__name__}"
    return ""


def _is_known(function: Callable[..., Any], part: Any) -> bool:
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, np.ufunc):
        return True
    if hasattr(part, "inverse_func"):  # a FunctionTransformer; scikit-learn has `scale` and others like it
        return getattr(function, "__name__", "") == "check_array"  # as in HistGradientBoosting's own
    return (_library(function) or _library(type(function))) in ROW_BY_ROW


def _library(thing: Any) -> str:
    return str(getattr(thing, "__module__", "") or "").partition(".")[0]


def _differs(model: Any, signature: Signature, rows: list[Any]) -> bool:
    """Return whether a model answers rows differently in one call than one by one."""
    tried, alone = [], []
    end = time.monotonic() + TRIAL_SECONDS
    for row in _varied(signature, rows):
        if row in tried or time.monotonic() > end:
            continue
        with suppress(Exception):  # a row that the model does not take
            alone.append(np.asarray(model.predict(signature.parse([row])))[0])
            tried.append(row)
    # Without the last as well: the nulls in it may hide what the other rows do to each other.
    counts = [n for n in (len(tried) - 1, len(tried)) if n > 1]
    try:
        return any(_differ(model.predict(signature.parse(tried[:n])), alone[:n]) for n in counts)
    except Exception:  # such as BadRows, of a null beside a whole number that is not exact as a float
        return True


def _differ(answer: Any, by_themselves: list[Any]) -> bool:
    together, alone = np.asarray(answer), np.asarray(by_themselves)
    if together.dtype.kind not in "fc":
        return bool(together.tolist() != alone.tolist())
    if together.shape != alone.shape:
        return True
    # Matrices of one and of many rows are multiplied in another order.
    single = alone.dtype.itemsize <= 4
    scale = float(np.abs(alone[np.isfinite(alone)]).max(initial=1e-300))
    return not np.allclose(
        together, alone, rtol=1e-3 if single else 1e-4, atol=(1e-4 if single else 1e-6) * scale, equal_nan=True
    )


def _changed(value: Any) -> Any:
    """Return a row of nested lists with other numbers."""
    if isinstance(value, list):
        return [_changed(each) for each in value]
    return value if isinstance(value, (str, bool, type(None))) else value + (1 if isinstance(value, int) else 0.5)


def _varied(signature: Signature, rows: list[Any]) -> Iterator[Any]:
    """Yield some rows, and the first one with other numbers, and with nulls."""
    columns = signature.columns or ()
    rows = rows_as_lists(rows[:8], columns)
    yield from rows
    if not columns:
        yield _changed(rows[0])
        return
    for number in (-1.5, 2.0, 1000.0):
        yield [number if c.kind == "number" and not c.learned else v for c, v in zip(columns, rows[0], strict=True)]
    yield [None if c.nullable else v for c, v in zip(columns, rows[0], strict=True)]
