"""Bodies as programs write them: a byte order mark, and pandas' `records` and `split`."""

import json
from typing import Any

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import Client, write_users
from sklearn.linear_model import LinearRegression
from werkzeug.exceptions import UnprocessableEntity

from settings import Settings
from web.decoding import decode_json

FRAME = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": [0.5, 0.25, 3.0]}, index=[7, 8, 9])
MODEL = LinearRegression().fit(FRAME, FRAME["a"] - FRAME["b"])
EXPECTED = MODEL.predict(FRAME)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """A server of a model of two named columns."""
    place = tmp_path_factory.mktemp("served")
    joblib.dump(MODEL, place / "model.joblib")
    users = write_users(place / "users.json")
    return Client(Settings(model_path=place / "model.joblib", users_file=users, journal_dir=place / "journal"))


BODIES = {
    "records": FRAME.to_json(orient="records"),
    "records in data": '{"data": ' + FRAME.to_json(orient="records") + "}",
    "split": FRAME.to_json(orient="split"),
    "split with its columns in another order": FRAME[["b", "a"]].to_json(orient="split"),
    "split without an index": FRAME.to_json(orient="split", index=False),
    "split without names": FRAME.set_axis([0, 1], axis=1).to_json(orient="split"),
    "split and a method": FRAME.to_json(orient="split")[:-1] + ', "method": "predict"}',
    "values": FRAME.to_json(orient="values"),
    "a byte order mark": "\ufeff" + json.dumps({"data": FRAME.to_numpy().tolist()}),
    "a byte order mark before records": "\ufeff" + FRAME.to_json(orient="records"),
}


@pytest.mark.parametrize("name", BODIES)
def test_body_that_pandas_or_windows_wrote_is_answered(client: Client, name: str) -> None:
    answer = client.post(BODIES[name].encode("utf-8"))
    assert answer.status_code == 200, answer.text
    assert np.allclose(answer.json["prediction"], EXPECTED, rtol=1e-12)


WRONG = [
    ({"columns": ["a", "b"], "data": [[1.0]]}, "with columns, data is a list of rows with a value for each of the 2"),
    ({"columns": ["a", "b"], "data": [{"a": 1, "b": 2}]}, "with columns, data is a list of rows"),
    ({"columns": ["a", "b"], "data": None}, "with columns, data is a list of rows"),
    ({"columns": "ab", "data": [[1.0, 2.0]]}, "columns is not a list of names"),
    ({"columns": ["a", 1], "data": [[1.0, 2.0]]}, "columns is not a list of names"),
    ({"columns": {"a": 0}, "data": [[1.0, 2.0]]}, "columns is not a list of names"),
    ({"columns": ["a", "b"]}, "data is missing"),
    ({"columns": ["a", "b"], "data": [[1, 2]], "rows": 1}, "unknown key 'rows'"),
    ({"index": [0], "data": [[1.0, 2.0]]}, "unknown key 'index'"),
]


@pytest.mark.parametrize(("body", "detail"), WRONG, ids=lambda value: str(value)[:60])
def test_split_that_is_wrong_says_what_to_fix(body: Any, detail: str) -> None:
    with pytest.raises(UnprocessableEntity) as error:
        decode_json(json.dumps(body).encode())
    assert detail in str(error.value.description)


@pytest.mark.parametrize("columns", [["a", "c"], ["a"], ["a", "b", "c"]])
def test_columns_that_are_not_the_models_are_named(client: Client, columns: list[str]) -> None:
    answer = client.post({"columns": columns, "data": [[1.0] * len(columns)]})
    assert answer.status_code == 422
    assert ("not a column of this model" in answer.text) == ("c" in columns)
    assert ("column 'b': missing" in answer.text) == ("b" not in columns)


def test_column_that_is_named_twice_is_refused(client: Client) -> None:
    answer = client.post({"columns": ["a", "b", "b"], "data": [[1.0, 2.0, 3.0]]})
    assert answer.status_code == 422
    assert "columns has a name twice" in answer.text


def test_byte_order_mark_is_taken_at_the_beginning_only(client: Client) -> None:
    assert client.post(b"\xef\xbb\xbf\xef\xbb\xbf[[1, 2]]").status_code == 400
    assert client.post(b"[[1, 2]]\xef\xbb\xbf").status_code == 400
    assert client.post(b"\xef\xbb\xbf").status_code == 400


def test_extra_columns_are_ignored_by_setting(serve: Any) -> None:
    rows = [{"a": 1.0, "b": 0.5, "note": "x"}, {"note": None, "b": 0.25, "a": 2.0, "other": [1]}]
    refused = serve(MODEL).post({"data": rows})
    assert refused.status_code == 422
    assert "column 'note': not a column of this model" in refused.text
    answer = serve(MODEL, extra_columns="ignore").predict(rows)
    assert np.allclose(answer["prediction"], EXPECTED[:2])
