"""Wrong, odd and hostile requests: each gets an answer that says what to mend, and none harms anybody else."""

import contextlib
import functools
import itertools
import json
import select
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import joblib
import numpy as np
import pandas as pd
import pytest
from conftest import (
    PASSWORD,
    WORKER_CLASSES,
    Client,
    Gunicorn,
    basic,
    gunicorn,
    read_all,
    ready,
    records,
    write_users,
)
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder
from sklearn.tree import DecisionTreeClassifier

from monitor import segments
from settings import Settings

SECRET = "SECRETVALUE"  # stands for what a caller's rows may hold: in no answer, and not in the journal
LEAKS = ("Traceback", 'File "', "site-packages", "/tmp", "sklearn", "numpy", "orjson", "werkzeug", PASSWORD, SECRET)
ROW = [5.1, 3.5, 1.4, 0.2]
NAMES = ["sepal length (cm)", "sepal width (cm)", "petal length (cm)", "petal width (cm)"]
NAMED = dict(zip(NAMES, ROW, strict=True))
GOOD = {"data": [ROW]}
SMALL = 300  # bytes; the body limit of the client "small"


# --- through the test client


class Odd:
    """A model that answers 0 and 1 like any other, and to the number of a misbehaviour misbehaves."""

    n_features_in_ = 1

    def predict(self, rows: Any) -> Any:
        """Return zeros, or misbehave."""
        code = int(rows[0][0])
        return np.zeros(len(rows)) if code < 2 else list(MISBEHAVIOUR.values())[code - 2](rows)


def raises(error: BaseException) -> Callable[[Any], Any]:
    """Return a misbehaviour that raises."""

    def misbehave(rows: Any) -> Any:
        raise error

    return misbehave


MISBEHAVIOUR: dict[str, Callable[[Any], Any]] = {
    "raises RuntimeError": raises(RuntimeError(SECRET)),
    "raises KeyError": raises(KeyError(SECRET)),
    "raises MemoryError": raises(MemoryError(SECRET)),
    "raises RecursionError": raises(RecursionError(SECRET)),
    "raises StopIteration": raises(StopIteration(SECRET)),
    "raises SystemExit": raises(SystemExit(SECRET)),  # let through, it would end a gthread worker
    "raises OSError": raises(FileNotFoundError(2, "No such file", "/tmp/" + SECRET)),
    "too few rows": lambda rows: np.zeros(len(rows) - 1),
    "too many rows": lambda rows: np.zeros(len(rows) + 1),
    "no rows": lambda rows: [],
    "nothing": lambda rows: None,
    "one number": lambda rows: 1.0,
    "one text": lambda rows: SECRET,
    "a generator": lambda rows: (0 for _ in rows),
    "a dictionary": lambda rows: {"prediction": SECRET},
    "complex numbers": lambda rows: np.zeros(len(rows), dtype=complex),
    "objects": lambda rows: [object() for _ in rows],
    "integers of 100 bits": lambda rows: [2**100 for _ in rows],
    "half a surrogate pair": lambda rows: ["\ud800" + SECRET for _ in rows],
}


@functools.cache
def fitted(name: str) -> Any:
    """Fit the model of a name."""
    iris = load_iris(as_frame=True)
    if name == "knn":
        return KNeighborsClassifier().fit(iris.data.to_numpy(), iris.target)
    if name == "texts":
        return make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(["good day", "bad night"], [1, 0])
    if name == "people":
        frame = pd.DataFrame({"città": ["Rome", "Bari", "Rome", "Bari"], "age": [20.0, 30.0, 40.0, 50.0]})
        columns = make_column_transformer((OneHotEncoder(), ["città"]), (SimpleImputer(), ["age"]))
        return make_pipeline(columns, LogisticRegression()).fit(frame, [0, 1, 0, 1])
    if name == "odd":
        return Odd()
    kind = {"tree": DecisionTreeClassifier, "line": LinearRegression}.get(name, LogisticRegression)
    return kind(**{"max_iter": 1000} if kind is LogisticRegression else {}).fit(iris.data, iris.target)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Client]:
    """Return a function that gives the client of a model, each made once; "small" is iris with a small body limit."""
    made: dict[str, Client] = {}

    def give(name: str) -> Client:
        if name not in made:
            place = tmp_path_factory.mktemp(name)
            joblib.dump(fitted(name), place / "model.joblib")
            limit = {"max_body_bytes": SMALL} if name == "small" else {}
            made[name] = Client(
                Settings(
                    model_path=place / "model.joblib",
                    users_file=write_users(place / "users.json"),
                    journal_dir=place / "journal",
                    **limit,
                )
            )
        return made[name]

    return give


def ask(client: Client, body: Any, method: str = "POST", path: str = "/predict", **headers: str | None) -> Any:
    """Send a JSON value, or bytes as they are; a header that is None is left out."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    given = {"Content-Type": "application/json", **client.headers} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    return client.http.open(
        path, method=method, data=data, headers={name: value for name, value in given.items() if value is not None}
    )


def journal(client: Client) -> str:
    """Return the text of the whole journal."""
    return "".join(path.read_text() for path in segments(client.journal_dir))


def check_problem(client: Client, answer: Any, status: int, *words: str) -> Any:
    """Check that an answer is a problem that leaks nothing, nor did the journal; return it decoded."""
    assert answer.status_code == status, answer.text
    assert answer.content_type == "application/problem+json"
    problem = answer.json
    assert problem.keys() - {"errors"} == {"status", "title", "detail", "request_id"}
    assert problem["status"] == status
    assert problem["title"]
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    for word in words:
        assert word in problem["detail"]
    for leak in LEAKS:
        assert leak not in answer.text + str(answer.headers)
    text = journal(client)
    assert SECRET not in text
    assert PASSWORD not in text
    return problem


def record_of(client: Client, answer: Any) -> dict[str, Any]:
    """Return the journal's record of an answer, which is the last one."""
    record = records(client.journal_dir)[-1]
    assert record["request_id"] == answer.headers["X-Request-ID"]
    return record


class Bad(NamedTuple):
    """A request that must be refused: with which status, and what its detail must say."""

    body: Any
    status: int
    words: tuple[str, ...]
    on: str  # the model
    method: str
    path: str
    errors: list[dict[str, Any]] | None  # the first places that must be listed
    headers: dict[str, Any]


def bad(
    name: str,
    body: Any,
    status: int,
    *words: str,
    on: str = "iris",
    method: str = "POST",
    path: str = "/predict",
    errors: list[dict[str, Any]] | None = None,
    **headers: Any,
) -> Any:
    """Make a row of the table."""
    return pytest.param(Bad(body, status, words, on, method, path, errors, headers), id=name, marks=marks_of(on))


def marks_of(model: str) -> list[Any]:
    """Return the marks of a test that asks a model."""
    return [pytest.mark.frames] * (model == "people")


def at(row: int, column: Any = None, detail: str = "missing") -> dict[str, Any]:
    """Make a place as `errors` lists it."""
    return {"row": row, "detail": detail} | ({} if column is None else {"column": column})


def with_value(value: str) -> bytes:
    """Write a body with one value as it stands."""
    return b'{"data": [[5.1, 3.5, 1.4, %s]]}' % value.encode()


NOT_JSON = [
    bad("empty", b"", 400, "empty", '{"data"'),
    bad("no body at all", None, 400, "empty"),
    bad("whitespace", b" \r\n\t ", 400, "not JSON"),
    bad("single quotes", b"{'data': [['SECRETVALUE']]}", 400, "line 1 column 2", "single quotes"),
    bad("no quotes", b"{data: [[5.1, 3.5, 1.4, 0.2]]}", 400, "line 1 column 2"),
    bad("trailing comma in a row", b'{"data": [[5.1, 3.5, 1.4, 0.2,]]}', 400, "trailing comma"),
    bad("trailing comma in the object", b'{"data": [[5.1, 3.5, 1.4, 0.2]],}', 400, "trailing comma"),
    bad("comment", b'{"data": [[5.1, 3.5, 1.4, 0.2]]} // mine', 400, "line 1 column 34", "comments"),
    bad("block comment", b'{"data": /* rows */ []}', 400, "line 1 column 10", "comments"),
    bad("truncated", b'{"data": [[5.1, 3.5', 400, "not JSON", "line 1 column"),
    bad("truncated in a text", b'{"data": [["SECRETVALUE', 400, "not JSON"),
    bad("on a later line", b'{"data":\n[[5.1, 3.5,\n1.4, x]]}', 400, "line 3 column 6"),
    bad("NaN", with_value("NaN"), 400, "NaN", "null"),
    bad("nan", with_value("nan"), 400, "column 27"),
    bad("Infinity", with_value("Infinity"), 400, "Infinity"),
    bad("-Infinity", with_value("-Infinity"), 400, "Infinity"),
    bad("None", with_value("None"), 400, "null"),
    bad("True", with_value("True"), 400, "column 27"),
    bad("two documents", b'{"data": [[5.1, 3.5, 1.4, 0.2]]} {"data": []}', 400, "column 34"),
    bad("JSON lines", b'{"data": []}\n{"data": []}\n', 400, "line 2 column 1"),
    bad("UTF-16", json.dumps(GOOD).encode("utf-16"), 400, "UTF-8", "byte 0"),
    bad("invalid UTF-8", b'{"data": [["\xff"]]}', 400, "UTF-8", "byte 12"),
    bad("overlong UTF-8", b'{"data": [["\xc0\xaf"]]}', 400, "UTF-8", "byte 12"),
    bad("a surrogate in UTF-8", b'{"data": [["\xed\xa0\x80"]]}', 400, "UTF-8", "byte 12"),
    bad("half a surrogate pair", b'{"data": [["\\ud800"]]}', 400, "not JSON"),
    bad("unknown escape", b'{"data": [["\\x41"]]}', 400, "not JSON"),
    bad("raw control character", b'{"data": [["\x01"]]}', 400, "not JSON"),
    bad("null byte", b'{"data": [[1, 2, 3, 4]]}\0', 400, "column 25"),
    bad("leading zero", with_value("01"), 400, "not JSON"),
    bad("plus sign", with_value("+1"), 400, "not JSON"),
    bad("hexadecimal", with_value("0x10"), 400, "not JSON"),
    bad("no digit after the point", with_value("1."), 400, "not JSON"),
    bad("thousands separator", with_value("1_000"), 400, "not JSON"),
    bad("1e400", with_value("1e400"), 400, "too large", "64-bit float"),
    bad("-1e400", with_value("-1e400"), 400, "too large", "64-bit float"),
    bad("integer of 400 digits", with_value("9" * 400), 400, "too large"),
    bad("integer of a million digits", with_value("9" * 10**6), 400, "too large"),
    bad("100,000 open brackets", b'{"data": ' + b"[" * 100_000, 400, "deep"),
    bad("100,000 brackets", b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400, "deep"),
    bad("100,000 objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 400, "deep"),
    bad("form in the body", b"data=5.1&data=3.5", 400, "line 1 column 1"),
]

WRONG_FORM = [
    bad("null", b"null", 422, "not an object", '{"data"'),
    bad("number", b"5.1", 422, "not an object"),
    bad("text", b'"SECRETVALUE"', 422, "not an object"),
    bad("true", b"true", 422, "not an object"),
    bad("no data", {}, 422, "data is missing", '{"data"'),
    bad("only a method", {"method": "predict"}, 422, "data is missing"),
    bad("Data", {"Data": [ROW]}, 422, "unknown key 'Data'"),
    bad("instances", {"instances": [ROW]}, 422, "unknown key 'instances'", "data"),
    bad("one key more", GOOD | {"version": SECRET}, 422, "unknown key 'version'"),
    bad("a key of 100,000 characters", GOOD | {"k" * 100_000: 1}, 422, "unknown key 'kkk"),
    bad("data is null", {"data": None}, 422, "data is null", "[["),
    bad("data is a number", {"data": 5.1}, 422, "data is a number", "[["),
    bad("data is a string", {"data": SECRET}, 422, "data is a string", "[["),
    bad("data is an object", {"data": NAMED}, 422, "data is an object", "list of rows"),
    bad("data is true", {"data": True}, 422, "data is true or false", "[["),
    bad("method unknown", GOOD | {"method": "guess"}, 422, "predict_proba"),
    bad("method empty", GOOD | {"method": ""}, 422, "predict_proba"),
    bad("method in capitals", GOOD | {"method": "PREDICT"}, 422, "predict_proba"),
    bad("method null", GOOD | {"method": None}, 422, "method is not a string", "predict_proba"),
    bad("method a number", GOOD | {"method": 1}, 422, "method is not a string"),
    bad("method a list", GOOD | {"method": ["predict"]}, 422, "method is not a string"),
    bad("method that others have", GOOD | {"method": "decision_function"}, 422, "'decision_function'", on="knn"),
    bad("probabilities of a regressor", GOOD | {"method": "predict_proba"}, 422, "'predict_proba'", on="line"),
    *(
        bad(f"method {name}", GOOD | {"method": name}, 422, "this model has no method", "predict_proba")
        for name in ("__class__", "__init__", "fit", "set_params", "_check_n_features", "classes_", "predict.__call__")
    ),
    bad("100,001 rows", {"data": [[1, 2, 3, 4]] * 100_001}, 422, "100001 rows", "100000"),
    bad("100,001 empty rows", {"data": [[]] * 100_001}, 422, "100001 rows", "100000"),
]

NOT_OURS = "not a column of this model"
FOUR = "1 values; expected 4"


def of_names(old: bytes, new: bytes) -> bytes:
    """Write a body with one row by names, and replace a part of it."""
    return json.dumps({"data": [NAMED]}).encode().replace(old, new)


WRONG_ROWS = [
    bad("no rows", {"data": []}, 422, "no rows"),
    bad("no rows of texts", {"data": []}, 422, "no rows", on="texts"),
    bad("an empty row", {"data": [[]]}, 422, "row 0", errors=[at(0, detail="0 values; expected 4")]),
    bad("an empty object", {"data": [{}]}, 422, "missing", errors=[at(0, name) for name in NAMES]),
    bad("one row flat", {"data": ROW}, 422, "[[", "two brackets"),
    bad("one row of texts flat", {"data": [SECRET] * 4}, 422, "[[", "two brackets"),
    bad("nulls", {"data": [None, None]}, 422, "data[0] is null", "[["),
    bad("a list too many around", {"data": [[ROW]]}, 422, FOUR),
    bad("too long", {"data": [[*ROW, 1.0]]}, 422, errors=[at(0, detail="5 values; expected 4")]),
    bad("too short", {"data": [ROW, ROW[:3]]}, 422, "row 1", errors=[at(1, detail="3 values; expected 4")]),
    bad("ragged", {"data": [ROW, ROW[:1], [*ROW, 1]]}, 422, "row 1", "1 more", errors=[at(1, detail=FOUR)]),
    bad("30 rows", {"data": [[1]] * 30}, 422, "the first 20", errors=[at(row, detail=FOUR) for row in range(20)]),
    bad("a list, then an object", {"data": [ROW, NAMED]}, 422, "row 1", "an object; expected a list"),
    bad("an object, then a list", {"data": [NAMED, ROW]}, 422, "row 1", "a list; expected an object"),
    bad("a row is null", {"data": [ROW, None]}, 422, "row 1: null"),
    bad("a row is a number", {"data": [ROW, 5]}, 422, "row 1: a number"),
    bad("names to a model without", {"data": [NAMED]}, 422, "without column names", "[[", on="knn"),
    bad("wrong names", {"data": [{"a": 1, "b": 2, "c": 3, "d": 4}]}, 422, errors=[at(0, name) for name in NAMES]),
    bad(
        "a wrong name",
        of_names(b"petal w", b"Petal w"),
        422,
        errors=[at(0, NAMES[3]), at(0, "Petal width (cm)", NOT_OURS)],
    ),
    bad("a name missing", {"data": [NAMED, dict.fromkeys(NAMES[:3], 1)]}, 422, "row 1", errors=[at(1, NAMES[3])]),
    bad("a name too many", {"data": [NAMED | {"c": SECRET}]}, 422, "'c'", errors=[at(0, "c", NOT_OURS)]),
    bad("a long name", {"data": [NAMED | {"c" * 10**5: 1}]}, 422, errors=[at(0, "c" * 80, NOT_OURS)]),
]

LAST = NAMES[3]
NO_NUMBER = "{}; expected a number"
NO_NULL = "null; this model does not take a missing value here"
WRONG_VALUES = [
    *(
        bad(
            f"{name} for a number",
            {"data": [ROW, [*ROW[:3], value]]},
            422,
            errors=[at(1, LAST, NO_NUMBER.format(what))],
        )
        for name, value, what in (
            ("a string", SECRET, "a string"),
            ('"5.1"', "5.1", "a string"),
            ("an empty string", "", "a string"),
            ('"NaN"', "NaN", "a string"),
            ("true", True, "true or false"),
            ("false", False, "true or false"),
            ("a list", [SECRET], "a list"),
            ("an empty list", [], "a list"),
            ("an object", {SECRET: 1}, "an object"),
        )
    ),
    bad("true under a name", of_names(b"0.2", b"true"), 422, errors=[at(0, LAST, NO_NUMBER.format("true or false"))]),
    bad("null under a name", of_names(b"0.2", b"null"), 422, errors=[at(0, LAST, NO_NULL)]),
    bad("null in a list", with_value("null"), 422, f"row 0, column '{LAST}': null", errors=[at(0, LAST, NO_NULL)]),
    bad("null without names", with_value("null"), 422, errors=[at(0, 3, NO_NULL)], on="knn"),
    bad("null for a city", {"data": [[None, 1]]}, 422, errors=[at(0, "città", NO_NULL)], on="people"),
    bad("a number for a city", {"data": [[5, 1]]}, 422, "a number; expected a string", on="people"),
    bad("a string for an age", {"data": [["Rome", SECRET]]}, 422, "'age'", "expected a number", on="people"),
    bad("rows to a model of texts", {"data": [[SECRET]]}, 422, "a list; expected a string", "some text", on="texts"),
    bad("a number among texts", {"data": ["good day", 5]}, 422, "row 1: a number", on="texts"),
    bad("null among texts", {"data": ["good day", None]}, 422, "row 1: null", on="texts"),
    bad("too large for a tree's 32-bit floats", with_value("1e300"), 422, "too large for float32", on="tree"),
]

TYPES = "text/plain text/json application/x-www-form-urlencoded application/x-ndjson application/jsonp"
NOWHERE = "/predict/ /predictions /predict/../model /%00 /%ff /SECRETVALUE /static/server.py /predict;x"
WRONG_HTTP = [
    *(
        bad(f"content type {kind}", GOOD, 415, "-H 'Content-Type: application/json'", Content_Type=kind)
        for kind in (None, "", *TYPES.split(), "multipart/form-data; boundary=x", "text/html; name=SECRETVALUE")
    ),
    bad("gzip", b"\x1f\x8b" + bytes(50), 415, "Content-Encoding", Content_Encoding="gzip"),
    bad("gzip in name only", GOOD, 415, "Content-Encoding", Content_Encoding="gzip"),
    bad("over the limit", b" " * (SMALL + 1), 413, f"{SMALL} bytes", on="small"),
    bad("without a password", GOOD, 401, "curl -u", Authorization=None),
    bad("with a wrong password", GOOD, 401, "not right", Authorization=basic("predict", SECRET)),
    bad("with a bearer token", GOOD, 401, "HTTP basic auth", Authorization="Bearer SECRETVALUE"),
    *(
        bad(f"with {name} for a password", GOOD, 401, "password", Authorization=value)
        for name, value in (
            ("no base64", "Basic SECRETVALUE!"),
            ("nothing", "Basic"),
            ("no colon", "Basic U0VDUkVU"),
            ("a colon only", "Basic Og=="),
            ("binary base64", "Basic //79/A=="),
            ("bytes that are not ASCII", "Basic \xff\xfe"),
        )
    ),
    bad("without the role", GOOD, 403, "role predict", Authorization=basic("metrics")),
    *(
        bad(f"{method} {path}", b"", 405, f"does not take {method}", method=method, path=path)
        for path, methods in (
            ("/predict", "GET PUT DELETE PATCH TRACE SECRETS"),
            ("/healthz", "POST"),
            ("/model", "PUT"),
        )
        for method in methods.split()
    ),
    *(bad(f"POST {path}", GOOD, 404, "nothing at this path", path=path) for path in NOWHERE.split()),
]


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # as in a server, where warnings are not errors
@pytest.mark.parametrize("case", NOT_JSON + WRONG_FORM + WRONG_ROWS + WRONG_VALUES + WRONG_HTTP)
def test_bad_request_is_answered_with_what_to_mend_and_leaks_nothing(case: Bad, client: Any) -> None:
    caller = client(case.on)
    answer = ask(caller, case.body, case.method, case.path, **case.headers)
    problem = check_problem(caller, answer, case.status, *case.words)
    if case.errors is not None:
        assert problem["errors"][: len(case.errors)] == case.errors
    if case.status == 405:
        assert case.method not in answer.headers["Allow"]
        assert ("POST" in answer.headers["Allow"]) == (case.path == "/predict")
    if case.status == 401:
        assert answer.headers["WWW-Authenticate"].lower().startswith("basic ")
    elif case.path == "/predict" and case.status != 405:
        record = record_of(caller, answer)
        assert (record["status"], record["success"]) == (case.status, False)
        assert record["error_type"] == ("auth" if case.status == 403 else "client")


@pytest.mark.parametrize("inner", [b'":"', b'{"a": 1}'], ids=["a colon", "an object"])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")], ids=["lists", "objects"])
def test_nesting_that_one_parser_takes_and_another_does_not_is_refused(
    opening: bytes, closing: bytes, inner: bytes, client: Any
) -> None:
    for depth in (900, 1000, 1020):
        answer = ask(client("iris"), b'{"data": ' + opening * depth + inner + closing * depth + b"}")
        check_problem(client("iris"), answer, answer.status_code)
        assert answer.status_code in (400, 422)  # which of them hangs on the version of Python


ROME = pd.DataFrame({"città": ["Rome"], "age": [3.0]})
TEXTS = ["", "\0", '{"data": 1, "data": 2}', ":::", "città", "\U0001f600", "\uffff", "good " * 200_000]
ODDITIES = [  # what looks wrong and is not: model, body, and the rows that the model is asked about
    ("minus nought", "iris", with_value("-0"), [[*ROW[:3], -0.0]]),
    ("less than the least normal float", "iris", with_value("1e-320"), [[*ROW[:3], 1e-320]]),
    ("less than the least float", "iris", with_value("1e-400"), [[*ROW[:3], 0.0]]),
    ("the largest signed integer", "iris", with_value(str(2**63 - 1)), [[*ROW[:3], 2.0**63]]),
    ("the largest unsigned integer", "iris", with_value(str(2**64 - 1)), [[*ROW[:3], 2.0**64]]),
    ("the least integer", "iris", with_value(str(-(2**63))), [[*ROW[:3], -(2.0**63)]]),
    ("an integer past 64 bits", "iris", with_value(str(2**64)), [[*ROW[:3], 2.0**64]]),
    ("an integer of 30 digits", "iris", with_value("9" * 30), [[*ROW[:3], 1e30]]),
    ("a huge float", "iris", with_value("1e300"), [[*ROW[:3], 1e300]]),
    ("a float of a million digits", "iris", with_value("0." + "3" * 10**6), [[*ROW[:3], 1 / 3]]),
    ("whitespace all around", "iris", b"\r\n\t " + json.dumps(GOOD, indent=8).encode() + b"\n\n", [ROW]),
    ("names in another order", "iris", {"data": [dict(reversed(NAMED.items()))]}, [ROW]),
    ("names with escapes", "iris", of_names(b"petal", b"\\u0070etal"), [ROW]),
    ("keys in another order", "iris", b'{"method": "predict", "data": [[5.1, 3.5, 1.4, 0.2]]}', [ROW]),
    ("100,000 rows", "iris", {"data": [[1, 2, 3, 4]] * 100_000}, [[1.0, 2.0, 3.0, 4.0]] * 100_000),
    ("a body of just the limit", "small", json.dumps(GOOD).encode().ljust(SMALL), [ROW]),
    ("all kinds of texts", "texts", {"data": TEXTS}, TEXTS),
    ("a name that is not ASCII, escaped", "people", {"data": [{"città": "Rome", "age": 3}]}, ROME),
    ("a name that is not ASCII, raw", "people", '{"data": [{"age": 3, "città": "Rome"}]}'.encode(), ROME),
    ("null where it is taken", "people", {"data": [["Rome", None]]}, ROME.assign(age=np.nan)),
]


@pytest.mark.parametrize(
    ("on", "body", "rows"), [pytest.param(*case, id=name, marks=marks_of(case[0])) for name, *case in ODDITIES]
)
def test_odd_but_right_request_is_answered(on: str, body: Any, rows: Any, client: Any) -> None:
    answer = ask(client(on), body)
    assert answer.status_code == 200, answer.text
    if isinstance(rows, list) and isinstance(rows[0], list):
        rows = pd.DataFrame(rows, columns=NAMES)
    assert answer.json == {"prediction": fitted(on).predict(rows).tolist()}
    assert record_of(client(on), answer)["rows"] == len(rows)


@pytest.mark.parametrize(
    "kind",
    [
        "application/json; charset=utf-8",
        "application/json;charset=UTF-8",
        'application/json; charset="utf-8"',
        "APPLICATION/JSON",
        " application/json ",
    ],
)
def test_content_type_may_be_written_in_every_usual_way(kind: str, client: Any) -> None:
    assert ask(client("iris"), GOOD, Content_Type=kind).json == {"prediction": [0]}


@pytest.mark.parametrize(
    "given", ["a", "x" * 128, "7f3b2c1e-0000-4000-8000-000000000000", "Root=1-67891233-abc", "a.b:c/d+e@f_g"]
)
def test_sane_request_id_is_taken_over(given: str, client: Any) -> None:
    for body, status in ((GOOD, 200), ({}, 422)):
        answer = ask(client("iris"), body, X_Request_ID=given)
        assert (answer.status_code, answer.headers["X-Request-ID"]) == (status, given)
        assert record_of(client("iris"), answer)["request_id"] == given


@pytest.mark.parametrize(
    "given",
    [
        pytest.param("x" * 129, id="too long"),
        pytest.param("x" * 100_000, id="much too long"),
        "",
        " ",
        "a b",
        "a\tb",
        "a\x00b",
        "a\x1b[31mb",
        "a\x7fb",
        "a,b",
        'a"b',
        "<script>alert(1)</script>",
        "${jndi:ldap://x}",
        "a%0d%0ab",
        "caf\xe9",
        "\xff\xfe",
    ],
)
def test_request_id_that_is_not_sane_is_never_echoed(given: str, client: Any) -> None:
    for body, status in ((GOOD, 200), ({}, 422)):
        answer = ask(client("iris"), body, X_Request_ID=given)
        fresh = answer.headers["X-Request-ID"]
        assert answer.status_code == status
        assert len(fresh) == 32
        assert int(fresh, 16)
        assert given.strip() == "" or given not in answer.text + str(answer.headers)
        assert record_of(client("iris"), answer)["request_id"] == fresh


def test_key_that_the_answer_names_is_not_in_the_journal(client: Any) -> None:
    caller = client("iris")
    for body in (GOOD | {"PRIVATEKEY": 1}, {"data": [NAMED | {"PRIVATEKEY": 1}]}, GOOD | {"method": "PRIVATEKEY"}):
        assert ask(caller, body).status_code == 422
    assert "PRIVATEKEY" not in journal(caller)


# --- models that refuse or fail


@pytest.mark.frames
@pytest.mark.parametrize("rows", [[[SECRET, 20]], [["Rome", 30], [SECRET, 20]]], ids=["alone", "beside a good row"])
def test_model_that_refuses_a_value_does_not_pass_its_words_on(rows: Any, client: Any, caplog: Any) -> None:
    caller = client("people")
    caller.service.log_limit.reset()
    answer = ask(caller, {"data": rows})
    problem = check_problem(caller, answer, 422, "the model does not take the values", "ValueError")
    assert "unknown categories" not in answer.text
    record = record_of(caller, answer)
    assert (record["error_type"], record["success"], record["rows"]) == ("client", False, len(rows))
    assert problem["request_id"] in caplog.text  # where the operator finds the library's own words
    assert "unknown categories" in caplog.text
    assert ask(caller, {"data": [["Rome", 30]]}).status_code == 200


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_model_that_fails_is_our_fault_and_leaks_nothing(name: str, client: Any, caplog: Any) -> None:
    caller = client("odd")
    caller.service.log_limit.reset()
    code = 2 + list(MISBEHAVIOUR).index(name)
    answer = ask(caller, {"data": [[code], [code]]})
    problem = check_problem(caller, answer, 500, "the model failed")
    record = record_of(caller, answer)
    assert (record["error_type"], record["success"], record["rows"]) == ("model", False, 2)
    assert problem["request_id"] in caplog.text
    assert PASSWORD not in caplog.text
    assert ask(caller, {"data": [[0], [1]]}).json == {"prediction": [0.0, 0.0]}


# --- real sockets


def head(
    *lines: str, start: str = "POST /predict", user: str | None = "predict", kind: str | None = "application/json"
) -> bytes:
    """Write a request's head, up to the empty line."""
    given = [f"{start} HTTP/1.1", "Host: x", *lines]
    given += [f"Authorization: {basic(user)}"] if user else []
    given += [f"Content-Type: {kind}"] if kind else []
    return "".join(f"{line}\r\n" for line in [*given, ""]).encode()


def sized(length: int, **how: Any) -> bytes:
    """Write the head of a request whose body has a length."""
    return head(f"Content-Length: {length}", **how)


def chunked(**how: Any) -> bytes:
    """Write the head of a request whose body comes in chunks."""
    return head("Transfer-Encoding: chunked", **how)


def chunk(content: bytes) -> bytes:
    """Write one chunk."""
    return b"%x\r\n%s\r\n" % (len(content), content)


BODY = json.dumps(GOOD).encode()
LIMIT = 2_000_000  # bytes of a body
TIMEOUT = 2  # seconds for a body


@pytest.fixture(scope="module", params=WORKER_CLASSES)
def server(request: Any, iris_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A gunicorn for each worker class, with one worker, a small body limit and a short time for bodies."""
    place = tmp_path_factory.mktemp(request.param)
    with gunicorn(
        place, model_path=iris_file, worker_class=request.param, body_timeout=TIMEOUT, max_body_bytes=LIMIT
    ) as running:
        yield running


@contextmanager
def unharmed(server: Gunicorn) -> Iterator[None]:
    """Check that after the block the same workers serve, and that it left no traceback in the log."""
    workers, logged = server.workers(), len(server.log.read_text())
    yield
    assert server.predict([ROW]) == (200, {"prediction": [0]})
    assert server.workers() == workers
    assert "Traceback" not in server.log.read_text()[logged:]


class Talk(NamedTuple):
    """What came of a connection: its bytes, and the seconds until the first of them and until the server ended it."""

    received: bytes
    answered: float
    ended: float

    @property
    def statuses(self) -> list[int]:
        """The statuses of the answers."""
        return [int(part[:3]) for part in self.received.split(b"HTTP/1.1 ")[1:]]


NEVER = float("inf")


def talk(
    port: int,
    first: bytes,
    pieces: Iterable[bytes] = (),
    pause: float = 0.0,
    seconds: float = 18.0,
    quiet: float = NEVER,
) -> Talk:
    """Send `first`, then the pieces with a pause before each, and read all the while until the server ends it.

    Args:
        seconds: the most it may take; less than keepalive in gunicorn.conf.py, which ends any connection.
        quiet: seconds without a byte after the last one that are an end as well.
    """
    received, answered, ended, last = b"", NEVER, NEVER, NEVER
    left, unsent, due = iter(pieces), memoryview(first), 0.0
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setblocking(False)
        while ended == NEVER and (now := time.monotonic() - started) < seconds:
            if not unsent and now >= due:
                unsent, due = memoryview(next(left, b"")), now + pause
            events = ready(connection, select.POLLIN | (select.POLLOUT if unsent else 0), 0.02)
            try:
                if events & ~select.POLLOUT:  # data, or the end
                    received += (new := connection.recv(65536))
                    now = time.monotonic() - started
                    answered, ended, last = min(answered, now), ended if new else now, now
                elif events:
                    unsent = unsent[connection.send(unsent) :]
                elif now - last > quiet:
                    break
            except BrokenPipeError:
                unsent, left = memoryview(b""), iter(())  # it may still be read
            except ConnectionResetError:
                ended = now
    return Talk(received, answered if received else NEVER, ended)


class Slow(NamedTuple):
    """A body that does not come to an end, and the status it is answered with."""

    first: bytes
    pieces: Iterable[bytes]
    pause: float  # seconds before each piece
    status: int


STRANGER: dict[str, Any] = {"user": None}
SOON = 5.0  # seconds in which a connection ends; a refused body is read on for 2, to the next sweep
BY_ITSELF = 15.0  # seconds in which it ends on a slow machine as well, and not only by keepalive in gunicorn.conf.py
SILENT: tuple[Iterable[bytes], float] = ((), 0)
DRIP, CHUNK_DRIP = (itertools.repeat(b" "), 0.3), (itertools.repeat(chunk(b" ")), 0.3)
FAST = (itertools.repeat(chunk(b" " * 4000)), 0)
MB64 = ([b" " * 2**16] * 2**10, 0)
SLOW_BODIES = {
    "half a body, then silence": Slow(sized(1000) + BODY, *SILENT, 408),
    "no body, then silence": Slow(sized(1000), *SILENT, 408),
    "a byte now and then": Slow(sized(1000), *DRIP, 408),
    "half a chunk, then silence": Slow(chunked() + b"1000\r\n{", *SILENT, 408),
    "chunks, then silence": Slow(chunked() + chunk(BODY), *SILENT, 408),
    "a chunk now and then": Slow(chunked(), *CHUNK_DRIP, 408),
    "a chunk size that does not end": Slow(chunked(), itertools.repeat(b"0"), 0.3, 408),
    "trailers that do not end": Slow(chunked() + chunk(BODY) + b"0\r\n", itertools.repeat(b"A: b\r\n"), 0.3, 408),
    "too long by its header, silent": Slow(sized(LIMIT + 1), *SILENT, 413),
    "too long by its header, dripping": Slow(sized(10**20), *DRIP, 413),
    "a stranger's, silent": Slow(sized(1000, **STRANGER), *SILENT, 401),
    "a stranger's, dripping": Slow(sized(1000, **STRANGER), *DRIP, 401),
    "a stranger's dripping chunks": Slow(chunked(**STRANGER), *CHUNK_DRIP, 401),
    "of the wrong type, dripping": Slow(chunked(kind="text/plain"), *CHUNK_DRIP, 415),
    "with GET, dripping": Slow(sized(1000, start="GET /predict"), *DRIP, 405),
    "to the probe, silent": Slow(sized(1000, start="GET /healthz"), *SILENT, 200),
    "to the probe, dripping": Slow(chunked(start="GET /healthz"), *CHUNK_DRIP, 200),
}
FAST_BODIES = {
    "endless chunks": Slow(chunked(), *FAST, 413),
    "endless chunks after a whole call": Slow(chunked() + chunk(BODY), *FAST, 413),
    "one endless chunk": Slow(chunked() + b"fffffffffff\r\n", itertools.repeat(b" " * 4000), 0, 413),
    "64 MB by its header": Slow(sized(2**26), *MB64, 413),
    "a stranger's of 64 MB": Slow(sized(2**26, **STRANGER), *MB64, 401),
    "a stranger's endless chunks": Slow(chunked(**STRANGER), *FAST, 401),
    "of the wrong type, endless": Slow(chunked(kind="text/plain"), *FAST, 415),
    "to nowhere, endless": Slow(chunked(start="POST /nowhere"), *FAST, 404),
    "to the probe, endless": Slow(chunked(start="GET /healthz"), *FAST, 200),
}


def run(slow: Slow, port: int) -> str:
    """Send a body that does not come to an end, and say in what the outcome is not as it should be."""
    came = talk(port, slow.first, slow.pieces, slow.pause)
    kind = b"application/json" if slow.status == 200 else b"application/problem+json"
    low, high = (TIMEOUT - 0.1, TIMEOUT + 2.0) if slow.status == 408 else (0.0, 1.5)
    if came.statuses == [slow.status] and kind in came.received and low <= came.answered <= high and came.ended < SOON:
        return ""
    return f"{came.statuses} after {came.answered:.1f} s, ended after {came.ended:.1f} s; {came.received[-200:]!r}"


def check_at_once(bodies: dict[str, Slow], server: Gunicorn) -> None:
    """Check what comes of such bodies, and that good callers are answered quickly meanwhile."""
    for _ in range(3):  # all of it again: a pause of this machine makes somebody late
        longest = 0.0
        with unharmed(server), ThreadPoolExecutor(len(bodies)) as pool:
            running = {name: pool.submit(run, slow, server.port) for name, slow in bodies.items()}
            while wait(running.values(), 0.2).not_done:
                began = time.monotonic()
                assert server.predict([ROW]) == (200, {"prediction": [0]})
                longest = max(longest, time.monotonic() - began)
        outcomes = {name: future.result() for name, future in running.items()}
        outcomes["good callers"] = "" if longest < 3.0 else f"one waited for {longest:.1f} s"
        if not any(outcomes.values()):
            break
    assert {name: outcome for name, outcome in outcomes.items() if outcome} == {}


def test_slow_bodies_are_answered_in_time_and_keep_nobody_waiting(server: Gunicorn) -> None:
    check_at_once(SLOW_BODIES, server)


@pytest.mark.parametrize("name", FAST_BODIES)
def test_endless_body_is_answered_at_once_and_ended_soon(name: str, server: Gunicorn) -> None:
    check_at_once({name: FAST_BODIES[name]}, server)


def test_endless_chunks_of_one_byte_keep_nobody_waiting(server: Gunicorn) -> None:
    # They come faster than they are read: a read that never has to wait does not give way under gevent.
    tiny = itertools.repeat(chunk(b" ") * 10_000)
    bodies = {"a caller's": Slow(chunked(), tiny, 0, 408), "a stranger's": Slow(chunked(**STRANGER), tiny, 0, 401)}
    check_at_once(bodies, server)


def test_client_that_sends_its_whole_body_before_it_reads_gets_the_413(server: Gunicorn) -> None:
    with unharmed(server), socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(sized(2**26) + b" " * 2**26)
        answer = read_all(connection)
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"problem+json" in answer


@pytest.mark.parametrize(
    "first",
    [
        pytest.param(b"POST /predict HT", id="in the request line"),
        pytest.param(sized(1000)[:-2], id="in the head"),
        pytest.param(sized(1000) + BODY, id="in the body"),
        pytest.param(chunked() + b"20\r\n{", id="in a chunk"),
        pytest.param(sized(len(BODY)) + BODY, id="before the answer"),
        pytest.param(sized(1000, user=None), id="in the body of a stranger"),
    ],
)
@pytest.mark.parametrize("how", ["close", "reset", "half-close"])
def test_caller_that_leaves_in_the_middle_harms_nobody(first: bytes, how: str, server: Gunicorn) -> None:
    with unharmed(server):
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(first)
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif how == "half-close":
                    connection.shutdown(socket.SHUT_WR)
                    assert b" 500 " not in read_all(connection)[:20]


SMUGGLED = b"GET /model HTTP/1.1\r\nHost: x\r\n\r\n"
NEXT = head("Connection: close", start="GET /healthz", kind=None)


EARLY: dict[int, dict[str, Any]] = {  # what is answered before its body is read, but for 400; 200 is a probe
    400: {},
    401: STRANGER,
    403: {"user": "metrics"},
    404: {"start": "POST /nowhere"},
    405: {"start": "PUT /predict"},
    415: {"kind": "text/plain"},
    200: {"start": "GET /healthz"},
}


@pytest.mark.parametrize("form", ["sized", "chunked"])
@pytest.mark.parametrize("at_once", [True, False], ids=["pipelined", "one by one"])
@pytest.mark.parametrize("status", EARLY)
def test_rest_of_a_body_is_never_taken_for_a_request(status: int, at_once: bool, form: str, server: Gunicorn) -> None:
    how = EARLY[status]
    request = (
        sized(len(SMUGGLED), **how) + SMUGGLED
        if form == "sized"
        else chunked(**how) + chunk(SMUGGLED[:9]) + chunk(SMUGGLED[9:]) + b"0\r\n\r\n"
    )
    with unharmed(server), socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request + NEXT if at_once else request)
        answers = b""
        if not at_once:
            answers = connection.recv(65536)
            connection.sendall(NEXT)
        answers += read_all(connection)
    assert Talk(answers, 0, 0).statuses == [status, 200]
    assert answers.endswith(b'{"status":"ok"}\n')


@pytest.mark.parametrize("form", ["sized", "chunked"])
def test_body_past_the_limit_is_never_taken_for_a_request(form: str, server: Gunicorn) -> None:
    rest = SMUGGLED * (2 * LIMIT // len(SMUGGLED))
    with unharmed(server):
        if form == "sized":
            came = talk(server.port, sized(LIMIT + len(rest)) + b" " * LIMIT + rest)
        else:
            came = talk(server.port, chunked() + chunk(b" " * LIMIT) + chunk(rest) + b"0\r\n\r\n")
    assert came.statuses == [413]
    assert came.ended < BY_ITSELF


GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = head()[:-2]
LONG = b"Content-Length: 32\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CALL = b"20\r\n" + BODY + b"\r\n"
BELOW = [  # what gunicorn answers itself, with a short HTML page
    ("no version", b"GET /healthz\r\n\r\n", 400),
    ("two words", b"HELLO WORLD\r\n\r\n", 400),
    ("method in small letters", b"get /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("space in the path", b"GET /he althz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("path not in ASCII", b"GET /\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("path without a slash", b"GET healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("broken IPv6 address", b"GET http://[::1/healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    ("HTTP/9.9", b"GET /healthz HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
    ("PROXY protocol", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + GET + b"\r\n", 400),
    ("TLS hello", bytes.fromhex("16030100c8010000c40303") + bytes(range(189)), 400),
    ("random bytes", bytes(range(128, 256)) + b"\r\n\r\n", 400),
    ("null bytes", bytes(1000) + b"\r\n\r\n", 400),
    ("null bytes without end", bytes(10_000), 414),
    ("request line of 9 KB", b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    ("header without a colon", GET + b"A b\r\n\r\n", 400),
    ("header without a name", GET + b": b\r\n\r\n", 400),
    ("space before the colon", GET + b"A : b\r\n\r\n", 400),
    ("header over two lines", GET + b"A: b\r\n c\r\n\r\n", 400),
    ("null byte in a header", GET + b"A: b\0c\r\n\r\n", 400),
    ("carriage return in a header", GET + b"A: b\rc\r\n\r\n", 400),
    ("control character in the request id", GET + b"X-Request-ID: a\x1bb\r\n\r\n", 400),
    ("line feeds alone", b"GET /healthz HTTP/1.1\nHost: x\n\n", 400),
    ("two hosts", GET + b"Host: y\r\n\r\n", 400),
    ("two content types", POST + b"Content-Type: text/plain\r\n" + LONG + b"\r\n" + BODY, 400),
    ("header of 9 KB", GET + b"A: " + b"a" * 9000 + b"\r\n\r\n", 431),
    ("101 headers", GET + b"A: b\r\n" * 100 + b"\r\n", 431),
    ("expecting something else", POST + LONG + b"Expect: tea\r\n\r\n" + BODY, 417),
    ("length abc", POST + b"Content-Length: abc\r\n\r\n" + BODY, 400),
    ("length -1", POST + b"Content-Length: -1\r\n\r\n" + BODY, 400),
    ("length +32", POST + b"Content-Length: +32\r\n\r\n" + BODY, 400),
    ("empty length", POST + b"Content-Length:\r\n\r\n" + BODY, 400),
    ("length not in ASCII", POST + b"Content-Length: 3\xb2\r\n\r\n" + BODY, 400),
    ("length of 5,000 digits", POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + BODY, 400),
    ("two lengths", POST + LONG + b"Content-Length: 33\r\n\r\n" + BODY, 400),
    ("the same length twice", POST + LONG + LONG + b"\r\n" + BODY, 400),
    ("length and chunks", POST + LONG + CHUNKED + b"\r\n" + CALL + b"0\r\n\r\n", 400),
    ("chunks twice", POST + CHUNKED + CHUNKED + b"\r\n" + CALL + b"0\r\n\r\n", 400),
    ("chunks in HTTP/1.0", POST.replace(b"/1.1", b"/1.0") + CHUNKED + b"\r\n" + CALL + b"0\r\n\r\n", 400),
    ("not chunked in the end", POST + b"Transfer-Encoding: gzip\r\n\r\n" + BODY, 400),
    ("unknown transfer coding", POST + b"Transfer-Encoding: zip\r\n\r\n" + BODY, 501),
]
BROKEN_CHUNKS = {
    "size that is no number": b"xyz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "negative size": b"-20\r\n" + BODY + b"\r\n0\r\n\r\n",
    "size with 0x": b"0x20\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no size": b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "size of 20,000 digits": b"0" * 20_000 + CALL + b"0\r\n\r\n",
    "control character after the size": b"20;a=\x01\r\n" + BODY + b"\r\n0\r\n\r\n",
    "no line end after it": b"20\r\n" + BODY + b"XX0\r\n\r\n",
    "line feed alone after it": b"20\r\n" + BODY + b"\n0\r\n\r\n",
    "length among the trailers": CALL + b"0\r\nContent-Length: 5\r\n\r\n",
    "trailer without a colon": CALL + b"0\r\nabc\r\n\r\n",
}


@pytest.mark.parametrize(("sent", "status"), [pytest.param(sent, status, id=name) for name, sent, status in BELOW])
def test_what_gunicorn_answers_itself_is_a_short_page_and_the_end(sent: bytes, status: int, server: Gunicorn) -> None:
    with unharmed(server):
        came = talk(server.port, sent)
    assert came.statuses == [status]
    assert b"Content-Type: text/html" in came.received
    assert came.ended < BY_ITSELF
    assert not any(leak.encode() in came.received for leak in LEAKS)


@pytest.mark.parametrize("sent", BROKEN_CHUNKS.values(), ids=BROKEN_CHUNKS)
def test_broken_chunks_are_answered_400_and_end_the_connection(sent: bytes, server: Gunicorn) -> None:
    with unharmed(server):
        came = talk(server.port, chunked() + sent)
    assert came.statuses == [400]
    assert b"problem+json" in came.received
    assert b"chunks are malformed" in came.received
    assert came.ended < BY_ITSELF


def test_password_that_is_not_ascii_is_refused_like_any_other(server: Gunicorn) -> None:
    with unharmed(server):
        came = talk(
            server.port,
            sized(32, user=None)[:-2] + b"Authorization: Basic \xff\xfe\r\nConnection: close\r\n\r\n" + BODY,
        )
    assert came.statuses == [401]


@pytest.mark.parametrize(
    "first",
    [b"", b"GET /heal", GET, b"nonsense\r\n\r\n"],
    ids=["nothing", "half a line", "half a head", "nonsense"],
)
@pytest.mark.parametrize("server", ["gevent"], indirect=True)  # gthread gives each such connection a thread of its few
def test_200_silent_connections_do_not_keep_good_callers_waiting(first: bytes, server: Gunicorn) -> None:
    with unharmed(server), contextlib.ExitStack() as silent:
        for _ in range(200):
            silent.enter_context(socket.create_connection(("127.0.0.1", server.port))).sendall(first)
        for _ in range(3):
            with contextlib.closing(server.connect(timeout=BY_ITSELF)) as connection:
                connection.request("GET", "/healthz")
                assert connection.getresponse().status == 200
