"""What a model returns becomes JSON with one entry per row, by the rule in model/answers.py."""

import collections
import datetime
import enum
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
import scipy.sparse

from model.answers import ModelFailed, join, split, to_json
from model.loaded import load_model


def encoded_as_is(answer: Any) -> Any:
    """Return what `to_json` returned as the caller gets it."""
    return orjson.loads(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY))


def encoded(result: Any, n_rows: int) -> Any:
    """Return a result as the caller gets it."""
    return encoded_as_is(to_json(result, n_rows))


DAY = datetime.datetime(2024, 5, 1, 12, 30)
NANOSECOND = "2024-05-01T12:30:00.000000001"
Point = collections.namedtuple("Point", "x at")


class Grade(enum.IntEnum):
    """A label that is a number."""

    GOOD = 1


class Named(str):
    """A label that is a string."""


RESULTS = {
    "whole numbers": (np.array([1, 2]), [1, 2]),
    "small whole numbers": (np.array([1, 2], np.int8), [1, 2]),
    "unsigned": (np.array([1, 2**64 - 1], np.uint64), [1, 2**64 - 1]),
    "booleans": (np.array([True, False]), [True, False]),
    "floats": (np.array([0.5, 1e-300]), [0.5, 1e-300]),
    "half precision": (np.array([0.5, 2.0], np.float16), [0.5, 2.0]),
    "single precision": (np.array([0.5, 0.1], np.float32), [0.5, 0.1]),
    "long precision": (np.array([0.5, 2.0], np.longdouble), [0.5, 2.0]),
    "other byte order": (np.array([1, 2], ">i4"), [1, 2]),
    "other byte order of floats": (np.array([0.5, 2.0], ">f8"), [0.5, 2.0]),
    "not finite": (np.array([np.nan, np.inf]), [None, None]),
    "every other": (np.arange(4.0)[::2], [0.0, 2.0]),
    "columns first": (np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]), [[1.0, 2.0], [3.0, 4.0]]),
    "three dimensions": (np.zeros((2, 1, 1)), [[[0.0]], [[0.0]]]),
    "read-only": (np.broadcast_to(np.array([1]), (2,)), [1, 1]),
    "no columns": (np.zeros((2, 0)), [[], []]),
    "texts": (np.array(["a", "bü"]), ["a", "bü"]),
    "texts of numpy 2": (np.array(["a", "b"], dtype=np.dtypes.StringDType()), ["a", "b"]),
    "objects": (np.array(["a", None], dtype=object), ["a", None]),
    "objects with NaN": (np.array([np.nan, float("inf")], dtype=object), [None, None]),
    "objects of numpy": (np.array([np.int64(1), np.float64(0.5)], dtype=object), [1, 0.5]),
    "texts of numpy as objects": (np.array([np.str_("a"), np.bool_(True)], dtype=object), ["a", True]),
    "lists as objects": (pd.Series([["a"], ["b", "c"]]).to_numpy(), [["a"], ["b", "c"]]),
    "sets of labels": ([("a",), ("a", "b")], [["a"], ["a", "b"]]),
    "list": ([1, 2], [1, 2]),
    "list of floats": ([0.5, None], [0.5, None]),
    "list of texts": (["a", "b"], ["a", "b"]),
    "list of this and that": (["a", 1], ["a", 1]),
    "list of lists": ([[1, 2], [3, 4]], [[1, 2], [3, 4]]),
    "list of rows": ([np.array([1, 2]), np.array([3, 4])], [[1, 2], [3, 4]]),
    "list of rows with gaps": (list(np.array([[1, 3], [2, 4]]).T), [[1, 2], [3, 4]]),
    "list of rows in other byte order": ([np.array([1, 2], ">i8"), np.array([3, 4], ">i8")], [[1, 2], [3, 4]]),
    "tuple": ((1, 2), [1, 2]),
    "sparse matrix": (scipy.sparse.csr_matrix([[0, 1], [2, 0]]), [[0, 1], [2, 0]]),
    "sparse array": (scipy.sparse.csr_array([[0.0, 1.0], [2.0, 0.0]]), [[0.0, 1.0], [2.0, 0.0]]),
    "matrix": (np.ones((2, 1)).view(np.matrix), [[1.0], [1.0]]),
    "frame": (pd.DataFrame({"a": [2**53 + 1, 2], "b": [3.5, 4]}), [[2**53 + 1, 3.5], [2, 4.0]]),
    "frame of this and that": (pd.DataFrame({"a": [1, 2], "b": ["x", None]}), [[1, "x"], [2, None]]),
    "series": (pd.Series([1, 2], index=[7, 8]), [1, 2]),
    "series of texts": (pd.Series(["a", None], dtype="str"), ["a", None]),
    "series with missing numbers": (pd.Series([2**53 + 1, None], dtype="Int64"), [2**53 + 1, None]),
    "series of categories": (pd.Series(["a", "b"], dtype="category"), ["a", "b"]),
    "categories": (pd.Categorical(["a", "b"]), ["a", "b"]),
    "dates": (np.array([DAY, "NaT"], "datetime64[s]"), ["2024-05-01T12:30:00", None]),
    "dates of pandas": (pd.Series([DAY, None]), ["2024-05-01T12:30:00", None]),
    "dates of nanoseconds": (np.array([DAY, "NaT"], "datetime64[ns]"), ["2024-05-01T12:30:00", None]),
    "dates as objects": (np.array([DAY, DAY.date()], dtype=object), ["2024-05-01T12:30:00", "2024-05-01"]),
    "one list for each of three outputs": ([np.zeros((2, 1))] * 3, [[[0.0], [0.0]]] * 3),
    "as many outputs as rows": ([np.zeros((2, 1))] * 2, [[[0.0], [0.0]]] * 2),
    "outputs with NaN": ([np.array([[np.nan], [1.0]])] * 3, [[[None], [1.0]]] * 3),
    # times
    "dates with a zone": (pd.Series([DAY, None]).dt.tz_localize("Europe/Oslo"), ["2024-05-01T12:30:00+02:00", None]),
    "dates in UTC": (pd.Series([DAY, DAY]).dt.tz_localize("UTC"), ["2024-05-01T12:30:00+00:00"] * 2),
    "list of Timestamps": ([pd.Timestamp(DAY), pd.NaT], ["2024-05-01T12:30:00", None]),
    "list of datetime64": ([np.datetime64(DAY), np.datetime64("NaT")], ["2024-05-01T12:30:00", None]),
    "days": (np.array([DAY.date(), "NaT"], "datetime64[D]"), ["2024-05-01T00:00:00", None]),
    "times of the day": ([datetime.time(12, 30), None], ["12:30:00", None]),
    "times to the nanosecond": (np.array(["2024-05-01T12:30:00.000000001"] * 2, "datetime64[ns]"), [NANOSECOND] * 2),
    "index of dates": (pd.DatetimeIndex([DAY, None]), ["2024-05-01T12:30:00", None]),
    # durations and spans
    "durations": (np.array([90, "NaT"], "timedelta64[s]"), ["P0DT0H1M30S", None]),
    "durations of pandas": (pd.Series([pd.Timedelta("1D"), None]), ["P1DT0H0M0S", None]),
    "durations of Python": ([datetime.timedelta(days=1, seconds=1), None], ["P1DT0H0M1S", None]),
    "periods": (pd.Series(pd.PeriodIndex(["2024-05", None], freq="M")), ["2024-05", None]),
    "intervals": (pd.Series(pd.cut([0.5, np.nan], [0, 1])), ["(0.0, 1.0]", None]),
    # numbers and what is missing
    "decimals": ([Decimal("1.5"), Decimal("NaN")], [1.5, None]),
    "whole numbers with NA": (pd.array([1, None], "Int64"), [1, None]),
    "floats with NA": (pd.array([0.5, None], "Float32"), [0.5, None]),
    "booleans with NA": (pd.Series([True, None], dtype="boolean"), [True, None]),
    "strings with NA": (pd.Series(["a", None], dtype="string"), ["a", None]),
    "NA among others": ([pd.NA, "a"], [None, "a"]),
    "masked numbers": (np.ma.array([1, 2], mask=[False, True]), [1, None]),
    "masked rows": (np.ma.array([[1.5, 2], [3, 4]], mask=[[0, 1], [0, 0]]), [[1.5, None], [3.0, 4.0]]),
    "masked strings": (np.ma.array(["a", "b"], mask=[True, False]), [None, "b"]),
    "categories with a missing one": (pd.Categorical(["a", None]), ["a", None]),
    "categories of numbers": (pd.Series([3, 5]).astype("category"), [3, 5]),
    "subclasses": ([Grade.GOOD, Named("b")], [1, "b"]),
    "long precision among others": ([np.longdouble(0.5), "a"], [0.5, "a"]),
    # bytes, and what holds others
    "bytes": ([b"\x00\xff", b""], ["AP8=", ""]),
    "bytes of numpy": (np.array([b"ab", b"c"]), ["YWI=", "Yw=="]),
    "sets": ([{"a"}, frozenset()], [["a"], []]),
    "named tuples": ([Point(1, DAY), Point(2, None)], [[1, "2024-05-01T12:30:00"], [2, None]]),
    "dictionaries": ([{"label": "a", "p": np.float64(0.5)}, {}], [{"label": "a", "p": 0.5}, {}]),
    "ordered dictionaries": ([collections.OrderedDict(b=1, a=2), None], [{"b": 1, "a": 2}, None]),
    "frames within": ([pd.DataFrame({"a": [1], "at": [DAY]}), None], [[[1, "2024-05-01T12:30:00"]], None]),
    "series within": ([pd.Series([1.5, None]), pd.Index(["a"])], [[1.5, None], ["a"]]),
    "arrays within": ([np.array(7), {"a": np.array([1, 2])}], [7, {"a": [1, 2]}]),
    "nested deeply": ([[{"at": [(DAY, {pd.NaT})]}], []], [[{"at": [["2024-05-01T12:30:00", [None]]]}], []]),
    "frame of dates": (pd.DataFrame({"a": [DAY, None], "b": [1, 2]}), [["2024-05-01T12:30:00", 1], [None, 2]]),
    # keys
    "keys of numbers": ([{1: "a", 0.5: "b", np.int64(2): "c"}, {}], [{"1": "a", "0.5": "b", "2": "c"}, {}]),
    "keys of booleans": ([{True: 1, np.False_: 0}, {}], [{"true": 1, "false": 0}, {}]),
    "keys of dates": ([{DAY: 1}, {pd.Timestamp(DAY): 2}], [{"2024-05-01T12:30:00": 1}, {"2024-05-01T12:30:00": 2}]),
    "keys of tuples": ([{("a", 1): 1}, {}], [{"['a', 1]": 1}, {}]),
    "keys of None": ([{None: 1}, {pd.NaT: 2}], [{"null": 1}, {"null": 2}]),
}


@pytest.mark.parametrize("name", RESULTS)
def test_result_becomes_json_with_one_entry_a_row(name: str) -> None:
    result, expected = RESULTS[name]
    got = encoded(result, 2)
    assert got == expected
    assert json.dumps(got) == json.dumps(expected)  # 1, 1.0 and true are equal, but not the same JSON


NO_RESULTS = {
    "None": None,
    "number": 1.0,
    "0-d": np.array(1.0),
    "text": "ab",
    "object": object(),
    "dict": {"a": 1, "b": 2},
    "too few": np.array([1]),
    "too many": np.array([1, 2, 3]),
    "none": np.array([]),
    "no list": [],
    "frame of the wrong length": pd.DataFrame({"a": [1]}),
    "sparse of the wrong length": scipy.sparse.csr_matrix([[1, 2]]),
    "outputs of the wrong length": [np.zeros((3, 1))] * 3,
    "outputs of different lengths": [np.zeros((2, 1)), np.zeros((3, 1)), np.zeros((2, 1))],
}


@pytest.mark.parametrize("name", NO_RESULTS)
def test_result_without_one_entry_a_row_is_the_models_fault(name: str) -> None:
    with pytest.raises(ModelFailed):
        to_json(NO_RESULTS[name], 2)


class Outputs:
    """A model whose predict returns a list of arrays, one for each of two outputs or one for each row."""

    def __init__(self, by_output: bool) -> None:
        self.by_output = by_output

    def predict(self, x: Any) -> Any:
        table = np.asarray(x)[:, :2] * [1, 10]
        return list(table.T) if self.by_output else list(table)


@pytest.mark.parametrize("by_output", [True, False])
@pytest.mark.parametrize("n_rows", [1, 2, 3])
def test_as_many_arrays_as_rows_are_told_apart_from_outputs(tmp_path: Path, by_output: bool, n_rows: int) -> None:
    joblib.dump(Outputs(by_output), tmp_path / "model.joblib")
    model = load_model(tmp_path / "model.joblib", sample=[[1.0, 2.0], [3.0, 4.0]])
    rows = [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]][:n_rows]
    found = model.predict(model.signature.validate(rows))
    assert isinstance(found, tuple) == by_output
    assert np.array_equal(np.asarray(found), Outputs(by_output).predict(rows))


@pytest.mark.parametrize("value", [1j, object(), lambda: 0, range(2), slice(1)], ids=lambda value: type(value).__name__)
def test_value_without_a_form_in_json_is_named_by_its_type(value: Any) -> None:
    for result in ([value, 0.5], [{"a": [value]}, None]):
        with pytest.raises(TypeError, match=f"{type(value).__name__} has no form in JSON"):
            to_json(result, 2)


@pytest.mark.parametrize("name", RESULTS)
def test_result_that_is_cut_for_its_callers_and_joined_again_is_the_same(name: str) -> None:
    result = to_json(RESULTS[name][0], 2)
    parts = split(result, [1, 1])
    assert all(len(each) == 1 for part in parts for each in (part if isinstance(part, tuple) else [part]))
    assert encoded_as_is(join(parts)) == encoded_as_is(result)
