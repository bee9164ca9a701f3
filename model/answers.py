"""What a model returns → what the server encodes as JSON, one entry per row.

Numbers, strings and booleans are themselves; NaN, infinities, None, NA and NaT are null. Dates, times and durations are
ISO 8601 strings, periods and intervals what pandas prints, Decimals numbers, bytes base64; a data frame is a list of
rows, and a dict an object, whose keys become strings.
"""

import base64
import datetime
import itertools
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

_PLAIN = {str, int, float, bool, type(None)}


class ModelFailed(Exception):
    """The model raised something that is not the caller's fault, or did not return one prediction per row."""


def to_json(result: Any, n_rows: int, by_output: bool = False) -> Any:
    """Turn a model's result into what orjson encodes: one entry per row; for several outputs a tuple of those.

    The result is an array `(n_rows, …)`, sparse, masked or not, a data frame or a series, a list of values, or
    (multi-output `predict_proba`) a list of arrays, which are those of the outputs if `by_output`, or if there is not
    one for each row. Raises: ModelFailed, it does not have one entry per row; TypeError, a value has no form in JSON.
    """
    if isinstance(result, list):
        if by_output or (are_arrays(result) and len(result) != n_rows):
            return tuple(to_json(each, n_rows) for each in result)
        _check_length(len(result), n_rows)
        return _values(result)
    if hasattr(result, "toarray"):
        result = result.toarray()
    if isinstance(result, np.ma.MaskedArray):
        result = np.array(result.tolist(), dtype=object)  # None where it is masked
    array = np.asarray(result.to_numpy() if hasattr(result, "to_numpy") else result)
    if hasattr(result, "iloc") and result.ndim == 2 and len(set(result.dtypes)) > 1:
        array = result.to_numpy(dtype=object)  # as one type of number, large whole ones beside fractions are rounded
    if array.dtype.kind == "f" and getattr(getattr(result, "dtype", None), "kind", "f") in "iu":
        array = result.to_numpy(dtype=object)  # pandas makes floats of whole numbers beside NA, and so rounds them
    _check_length(len(array) if array.ndim else "a single value", n_rows)
    if array.dtype.kind in "biuf":
        # orjson encodes arrays of numbers itself, in the machine's byte order, NaN and infinities as null.
        native = array.dtype.newbyteorder("=") if array.dtype.itemsize <= 8 else np.float64
        return np.ascontiguousarray(array, dtype=native)
    return _values(list(array) if array.dtype.kind in "mM" else array.tolist())


def are_arrays(result: Any) -> bool:
    """Return whether a result is a list of arrays, which may be those of its outputs or of its rows."""
    return isinstance(result, list) and bool(result) and all(isinstance(each, np.ndarray) for each in result)


def _values(values: list[Any]) -> list[Any]:
    return values if set(map(type, values)) <= _PLAIN else [_value(value) for value in values]


def _value(value: Any) -> Any:
    """Return one value in the form above. Raises: TypeError, it has none."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Mapping):
        return {_key(key): _value(each) for key, each in value.items()}
    if isinstance(value, np.ndarray):
        return to_json(value, len(value)) if value.ndim else _value(value[()])
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_value(each) for each in value]
    if isinstance(value, (np.datetime64, np.timedelta64)) or type(value).__module__.partition(".")[0] == "pandas":
        return _value_of_pandas(value)
    if isinstance(value, (datetime.date, datetime.time)):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return _value_of_pandas(np.timedelta64(value))
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (Decimal, np.floating)):
        return float(value)
    if isinstance(value, np.generic):
        return _value(value.item())
    for kind in (int, float, str):  # subclasses
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _value_of_pandas(value: Any) -> Any:
    """Return a time, a duration, a period, an interval or a missing value of pandas or numpy, or a table."""
    import pandas as pd

    if isinstance(value, (pd.DataFrame, pd.Series, pd.Index)):
        return to_json(value, len(value))
    if pd.isna(value):
        return None
    if isinstance(value, np.datetime64):
        value = pd.Timestamp(value)
    elif isinstance(value, np.timedelta64):
        value = pd.Timedelta(value)
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def _key(key: Any) -> str:
    value = _value(key)
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def split(result: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut what `to_json` returned into the rows of each caller."""
    if isinstance(result, tuple):
        return list(zip(*(split(each, sizes) for each in result), strict=True))
    ends = list(itertools.accumulate(sizes))
    return [result[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def join(results: list[Any]) -> Any:
    """Put together what `to_json` returned for pieces of one caller's rows."""
    if isinstance(results[0], tuple):
        return tuple(join(list(each)) for each in zip(*results, strict=True))
    if all(isinstance(each, np.ndarray) for each in results):
        return np.concatenate(results)
    return [value for each in results for value in (each.tolist() if isinstance(each, np.ndarray) else each)]


def _check_length(found: int | str, n_rows: int) -> None:
    if found != n_rows:
        raise ModelFailed(f"the model returned {found} for {n_rows} rows")
