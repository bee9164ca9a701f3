"""Large requests: JSON decoded in pieces means what it means as a whole, and arrays come in numpy's own format."""

import io
import json
import random
import time
import tracemalloc
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Gunicorn, basic, gunicorn
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from werkzeug.exceptions import BadRequest, HTTPException

from server import LARGE_BODY
from web.decoding import PIECE_OF_ROWS, Unprocessable, parse_array, parse_call

X, Y = load_breast_cancer(return_X_y=True)
WIDTH = X.shape[1]
ROWS = [[0.5, -1, 3e5, 12345678901234567, None, 0.1 + 0.2] + [7.25] * (WIDTH - 6)] * 500
NPY = {"Content_Type": "application/x-npy"}


def saved(array: Any, **options: Any) -> bytes:
    """Return an array as numpy.save writes it."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


def outcome(body: bytes, width: int) -> Any:
    """Decode a body; return its data as lists of floats and its method, or the error."""
    try:
        data, method = parse_call(body, 5000, width)
    except HTTPException as error:
        return type(error).__name__, error.description
    if isinstance(data, list):
        try:
            if {type(v) for row in data for v in row} <= {int, float, type(None)} and {*map(len, data)} == {WIDTH}:
                data = np.array(data, dtype=float)
        except (TypeError, OverflowError):
            pass
    return (data.tobytes() if isinstance(data, np.ndarray) else data), method


PLAIN = json.dumps({"data": ROWS}).encode()
VARIANTS = {
    "plain": PLAIN,
    "without spaces": PLAIN.replace(b" ", b""),
    "on lines": json.dumps({"data": ROWS}, indent=1).encode(),
    "with a method": PLAIN[:-1] + b', "method": "predict_proba" }\n',
    "method first": b'{"method": "predict", ' + PLAIN[1:],
    "method twice": PLAIN[:-1] + b', "method": "predict", "method": "predict"}',
    "data twice": PLAIN[:-1] + b', "data": []}',
    "escaped key": PLAIN.replace(b'"data"', rb'"d\u0061ta"'),
    "another key": PLAIN[:-1] + b', "other": 1}',
    "a text in it": PLAIN.replace(b"7.25", b'"7.25"', 3),
    "true in it": PLAIN.replace(b"7.25", b"true", 1),
    "true at the end": b"true".join(PLAIN.rsplit(b"7.25", 1)),
    "a list in it": PLAIN.replace(b"7.25", b"[7.25]", 1),
    "an object in it": PLAIN.replace(b"7.25", b"{}", 1),
    "two commas": PLAIN.replace(b"], [", b"],, [", 1),
    "two commas at the end": b"],, [".join(PLAIN.rsplit(b"], [", 1)),
    "comma after the last": PLAIN[:-2] + b",]}",
    "no comma": b"] [".join(PLAIN.rsplit(b"], [", 1)),
    "narrow row": PLAIN[:-2] + b", [1, 2]]}",
    "empty row": PLAIN[:-2] + b", []]}",
    "too many rows": json.dumps({"data": [[1] * WIDTH] * 5001}).encode(),
    "most rows": json.dumps({"data": [[1] * WIDTH] * 5000}).encode(),
    "NaN": PLAIN.replace(b"7.25", b"NaN", 1),
    "too large a number": PLAIN.replace(b"7.25", b"1e400", 1),
    "a whole number of 400 digits": PLAIN.replace(b"7.25", b"1" + b"0" * 399, 1),
    "cut off": PLAIN[:-30],
    "more after it": PLAIN + b"x",
    "three levels": json.dumps({"data": [ROWS]}).encode(),
    "no list": b'{"data": ' + b" " * 2**18 + b"1}",
    "nothing but brackets": b'{"data": [' + b"[" * 2**18 + b"]}",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_decoding_in_pieces_means_the_same_as_at_once(name: str) -> None:
    body = VARIANTS[name]
    assert len(body) > PIECE_OF_ROWS
    assert outcome(body, WIDTH) == outcome(body, 0)


def test_plain_rows_come_as_an_array_and_others_do_not() -> None:
    arrays = {name for name, body in VARIANTS.items() if isinstance(tried(body), np.ndarray)}
    assert arrays == {"plain", "without spaces", "on lines", "with a method", "most rows"}
    assert np.array_equal(tried(PLAIN), np.array(ROWS, dtype=float), equal_nan=True)


def tried(body: bytes) -> Any:
    """Decode a body; return the data, or None."""
    try:
        return parse_call(body, 5000, WIDTH)[0]
    except HTTPException:
        return None


@pytest.mark.parametrize("seed", range(3))
def test_damaged_bodies_end_the_same_in_pieces_as_at_once(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(60):
        body = bytearray(PLAIN)
        for _ in range(chance.choice((1, 1, 2))):
            at = chance.randrange(len(body))
            body[at : at + chance.choice((0, 1, 1, 2))] = chance.choice(
                [b"[", b"]", b",", b'"', b" ", b"1", b"{", b"}", b"n", b"\xff", b"null", b"]]", b"], [", b""]
            )
        assert outcome(bytes(body), WIDTH) == outcome(bytes(body), 0)


@pytest.fixture(scope="module")
def fitted() -> Any:
    """A scaled logistic regression on thirty columns."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=500)).fit(X, Y)


def test_large_request_costs_less_than_three_times_its_body(serve: Any, fitted: Any) -> None:
    client = serve(fitted)
    rows = np.tile(X, (18, 1))[:10_000]
    body = json.dumps({"data": rows.tolist()}).encode()
    client.post(body)
    tracemalloc.start()
    try:
        answer = client.post(body)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert answer.json["prediction"] == fitted.predict(rows).tolist()
    # The test client copies the body once more, and decodes the answer.
    assert peak < 4 * len(body)


def test_large_request_with_a_fault_says_where_it_is(serve: Any, fitted: Any) -> None:
    client = serve(fitted)
    rows: Any = np.tile(X, (18, 1))[:10_000].tolist()
    for value, said in ((None, "null"), ("7", "a text"), (True, "true or false")):
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
        with suppress(BadRequest, Unprocessable):
            assert parse_array(bytes(body), 1000).nbytes <= len(whole)


def test_decoding_has_no_quadratic_step() -> None:
    def seconds(n_rows: int) -> float:
        body = json.dumps({"data": [[0.5] * WIDTH] * n_rows}).encode()
        best = 1e9
        for _ in range(3):
            began = time.process_time()
            parse_call(body, 10**6, WIDTH)
            best = min(best, time.process_time() - began)
        return best

    assert seconds(40_000) < 10 * 8 * seconds(5_000)  # eight times the rows; ten times is what noise may add


def test_large_bodies_do_not_hold_up_small_ones(iris_server: Gunicorn) -> None:
    big = saved(np.tile(load_iris().data, (600, 1)))
    assert len(big) > LARGE_BODY
    status, _, answer = iris_server.ask("POST", "/predict", big, **NPY, Authorization=basic("predict"))
    assert status == 200
    assert len(json.loads(answer)["prediction"]) == 90_000


def test_unprocessable_is_what_a_wrong_array_is() -> None:
    with pytest.raises(Unprocessable):
        parse_array(saved(np.zeros((0, 4))), 10)
