"""Large requests: what JSON costs, and arrays in numpy's own format."""

import io
import json
import random
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from conftest import Gunicorn, basic, gunicorn
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from web.decoding import LARGE_BODY, decode_npy

X, Y = load_breast_cancer(return_X_y=True)
NPY = {"Content_Type": "application/x-npy"}


def saved(array: Any, **options: Any) -> bytes:
    """Return an array as numpy.save writes it."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def fitted() -> Any:
    """A scaled logistic regression on thirty columns."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(X, Y)


def test_large_json_takes_several_times_its_size_and_npy_does_not(serve: Any, fitted: Any) -> None:
    client = serve(fitted)
    rows = np.tile(X, (18, 1))[:10_000]

    def peak(body: bytes, **headers: str) -> float:
        client.post(body, **headers)
        tracemalloc.start()
        try:
            answer = client.post(body, **headers)
            return tracemalloc.get_traced_memory()[1] / rows.size
        finally:
            tracemalloc.stop()
            assert answer.json["prediction"] == fitted.predict(rows).tolist()

    # Bytes for each number. The test client copies the body once more.
    assert peak(json.dumps({"data": rows.tolist()}).encode()) < 200
    assert peak(saved(rows), **NPY) < 40


LONG = X * (1 + 1e-9 * np.random.default_rng(0).random(X.shape))  # with all digits, so that they are a large body


def nested_extra(client: Any) -> None:
    names = [str(name) for name in load_breast_cancer().feature_names]
    rows = [dict(zip(names, row, strict=True)) | {"tags": ["a"], "more": {"b": [1]}} for row in LONG.tolist()]
    assert client.post({"data": rows}).status_code == 200


def rows_of_an_extension(client: Any) -> None:
    client.service.before_predict = lambda rows, record: [row["of"]["values"] for row in rows]
    assert client.post({"data": [{"of": {"values": row}, "beside": [[]]} for row in LONG.tolist()]}).status_code == 200


def index_of_several_levels(client: Any) -> None:
    body = {"columns": [*range(30)], "index": [[at, "a"] for at in range(len(X))], "data": LONG.tolist()}
    assert client.post(body).status_code == 200


def no_model_yet(client: Any) -> None:
    client.service.serving.routes = None
    assert client.post({"data": [[[value] for value in row] for row in LONG.tolist()]}).status_code == 503


@pytest.mark.parametrize("ask", [nested_extra, rows_of_an_extension, index_of_several_levels, no_model_yet])
def test_large_json_of_a_legal_form_is_not_counted_as_too_large(serve: Any, ask: Any) -> None:
    frame = load_breast_cancer(as_frame=True)
    model = make_pipeline(StandardScaler(), LogisticRegression()).fit(frame.data, frame.target)
    extra = "ignore" if ask is nested_extra else "refuse"
    assert len(orjson.dumps(LONG.tolist())) > LARGE_BODY
    ask(serve(model, max_rows=len(X), extra_columns=extra, extensions=()))


def test_large_request_with_a_fault_says_where_it_is(serve: Any, fitted: Any) -> None:
    client = serve(fitted)
    rows: Any = np.tile(X, (18, 1))[:10_000].tolist()
    for value, said in ((None, "null"), ("7", "a string"), (True, "true or false")):
        rows[9876][12] = value
        answer = client.post({"data": rows})
        assert answer.status_code == 422
        assert answer.json["errors"][0]["row"] == 9876
        assert answer.json["errors"][0]["column"] == 12
        assert said in answer.json["errors"][0]["detail"]


def test_missing_values_are_taken_where_the_model_takes_them(serve: Any) -> None:
    model = HistGradientBoostingClassifier(max_iter=5).fit(np.where(X > 500, np.nan, X), Y)
    client = serve(model)
    rows = np.tile(np.where(X > 500, np.nan, X), (18, 1))[:10_000]
    listed = [[None if v != v else v for v in row] for row in rows.tolist()]
    assert client.predict(listed)["prediction"] == model.predict(rows).tolist()
    assert client.post(saved(rows), **NPY).json["prediction"] == model.predict(rows).tolist()


@pytest.mark.parametrize("dtype", ["<f8", ">f8", "<f4", "<f2", "<i8", ">i4", "|u1", "<u2"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_of_numbers_are_taken_as_numpy_writes_them(serve: Any, dtype: str, order: Any) -> None:
    x, y = load_iris(return_X_y=True)
    model = LogisticRegression(max_iter=500).fit(x, y)
    array = np.asarray(x[::7], dtype=dtype, order=order)
    client = serve(model)
    answer = client.post(saved(array), "/predict?method=predict_proba", **NPY)
    assert answer.status_code == 200, answer.text
    assert np.allclose(answer.json["prediction"], model.predict_proba(array.astype(float)), atol=1e-12)
    assert answer.json["classes"] == [0, 1, 2]
    assert client.post(saved(array), **NPY).json["prediction"] == model.predict(array.astype(float)).tolist()


def with_header(text: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Make a file of numpy's format by hand."""
    size = len(text).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode() + data


FOUR = np.zeros((1, 4))
BAD_ARRAYS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 400, "numpy's format"),
    "JSON": (b'{"data": [[1, 2, 3, 4]]}', 400, "numpy's format"),
    "objects": (saved(np.array([[{}]], dtype=object), allow_pickle=True), 422, "numbers"),
    "texts": (saved(np.array([["a"]])), 422, "numbers"),
    "dates": (saved(np.array([["2024-01-01"]], dtype="datetime64[D]")), 422, "numbers"),
    "complex": (saved(FOUR.astype(complex)), 422, "numbers"),
    "true and false": (saved(FOUR.astype(bool)), 422, "numbers"),
    "long doubles": (saved(FOUR.astype(np.longdouble)), 422, "numbers"),
    "fields": (saved(np.zeros(1, dtype=[("a", "f8")])), 422, "numbers"),
    "a single value": (saved(np.float64(1)), 422, "no rows"),
    "no rows": (saved(np.zeros((0, 4))), 422, "no rows"),
    "no columns": (saved(np.zeros((3, 0))), 422, "no rows"),
    "one row written flat": (saved(np.zeros(4)), 422, "(rows, 4)"),
    "too wide": (saved(np.zeros((1, 5))), 422, "(rows, 4)"),
    "three dimensions": (saved(np.zeros((1, 4, 1))), 422, "(rows, 4)"),
    "NaN": (saved(FOUR * np.nan), 422, "NaN"),
    "infinity": (saved(FOUR + np.inf), 422, "infinity"),
    "too many rows": (saved(np.zeros((100_001, 4), dtype="u1")), 422, "100000"),
    "cut off": (saved(FOUR)[:-1], 400, "bytes"),
    "more after it": (saved(FOUR) + b"\0", 400, "bytes"),
    "huge shape": (
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (9999, 10000000000000)}"),
        400,
        "byt",
    ),
    "negative shape": (
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -4)}", b"\0" * 32),
        422,
        "no r",
    ),
    "true for a size": (
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (True, 4)}", b"\0" * 32),
        400,
        "numpy's format",
    ),
    "65 dimensions": (
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1, " * 64 + "4)}", b"\0" * 32),
        422,
        "too many dimensions",
    ),
    "3000 dimensions": (
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (" + "1, " * 3000 + "4)}", b"\0" * 32),
        422,
        "too many dimensions",
    ),
    "header that calls": (with_header("__import__('os').getpid()"), 400, "numpy's format"),
    "deep header": (with_header("(" * 5000), 400, "numpy's format"),
    "long header": (with_header(" " * 60000), 400, "numpy's format"),
    "subarrays": (
        with_header("{'descr': ('<f8', (4,)), 'fortran_order': False, 'shape': (1,)}", b"\0" * 32),
        422,
        "num",
    ),
    "version 9": (saved(FOUR).replace(b"NUMPY\x01", b"NUMPY\x09"), 400, "numpy's format"),
}


@pytest.fixture(scope="module")
def iris_server(tmp_path_factory: pytest.TempPathFactory, iris_file: Path) -> Any:
    """A real gunicorn that serves iris."""
    with gunicorn(tmp_path_factory.mktemp("iris"), model_path=iris_file) as server:
        yield server


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_other_arrays_are_refused_with_what_to_mend(iris_server: Gunicorn, name: str) -> None:
    body, status, said = BAD_ARRAYS[name]
    found, headers, answer = iris_server.ask("POST", "/predict", body, **NPY, Authorization=basic("predict"))
    problem = json.loads(answer)
    assert (found, headers["Content-Type"]) == (status, "application/problem+json"), problem
    assert said in problem["detail"]


def test_array_cannot_ask_for_a_method_that_is_not_there(iris_server: Gunicorn) -> None:
    for method in ("fit", "score_samples", ""):
        status, _, answer = iris_server.ask(
            "POST", f"/predict?method={method}", saved(FOUR), **NPY, Authorization=basic("predict")
        )
        assert status == 422, answer


def test_models_of_other_rows_say_that_they_take_json(serve: Any) -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    client = serve(make_pipeline(CountVectorizer(), MultinomialNB()).fit(["good", "bad"], [1, 0]))
    answer = client.post(saved(FOUR), **NPY)
    assert answer.status_code == 422
    assert "JSON" in answer.json["detail"]


def test_damaged_arrays_end_in_an_error_of_ours() -> None:
    chance = random.Random(1)
    whole = saved(np.arange(40.0).reshape(10, 4))
    for _ in range(3000):
        body = bytearray(whole)
        for _ in range(chance.choice((1, 2, 5))):
            body[chance.randrange(128)] = chance.randrange(256)
        with suppress(BadRequest, UnprocessableEntity):
            assert decode_npy(bytes(body)).nbytes <= len(whole)


def test_large_bodies_do_not_hold_up_small_ones(iris_server: Gunicorn) -> None:
    big = saved(np.tile(load_iris().data, (600, 1)))
    assert len(big) > LARGE_BODY
    status, _, answer = iris_server.ask("POST", "/predict", big, **NPY, Authorization=basic("predict"))
    assert status == 200
    assert len(json.loads(answer)["prediction"]) == 90_000


def test_unprocessable_is_what_a_wrong_array_is() -> None:
    with pytest.raises(UnprocessableEntity):
        decode_npy(saved(np.zeros((0, 4))))
