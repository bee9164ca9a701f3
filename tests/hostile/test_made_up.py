"""Made-up bodies and files: what reads them says what is wrong with them, or reads them as they were written.

Other parts have theirs beside their tests: signatures (test_signature.py), heads (test_fast_path.py), the protocols
(test_made_up_bodies.py, test_open_inference.py), feedback and its receipts (test_feedback.py, test_receipts.py).
"""

import io
import json
import re
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import numpy as np
import orjson
import pandas as pd
import pytest
from conftest import CHEAP, PASSWORD, Client, write_users
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.exceptions import BadRequest, UnprocessableEntity

from auth import ROLES, NoUsers, Users, UsersFileError, read_users
from model import limits
from model.columns import BadRows, Column
from model.formats import ModelLoadError
from model.limits import Limits
from model.signature import Signature
from model.versions.guard import Guard, Tail
from model.versions.routing import Routing
from model.versions.store import read_manifest
from monitor import Journal, read_lines, segments
from settings import Settings
from telemetry import report
from web.decoding import LARGE_BODY, decode_json, decode_npy, parse_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
ANY = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner), max_leaves=12
)
FINITE = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def as_json(value: Any) -> bytes:
    """Encode a value as a program might that knows neither JSON nor UTF-8 well."""
    return json.dumps(value).encode("utf-8", "replace")


def objects(**values: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Return objects with some of these keys, most of them with a value that fits."""
    return st.fixed_dictionaries({}, optional={name: value | SCALARS | ANY for name, value in values.items()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("made_up")


@pytest.fixture(scope="module")
def client(place: Path, iris_file: Path) -> Client:
    users = write_users(place / "client.json")
    return Client(Settings(model_path=iris_file, users_file=users, journal_dir=place / "client"))


# --- bodies


@many
@given(
    st.binary(max_size=60)
    | ANY.map(as_json)
    | objects(
        data=st.lists(st.lists(FINITE, min_size=4, max_size=4), max_size=3),
        method=st.sampled_from(["predict", "fit", "predict_proba"]),
        columns=st.lists(st.text(max_size=3)),
    ).map(as_json)
)
def test_body_is_answered_or_says_what_is_wrong(client: Client, body: bytes) -> None:
    answer = client.post(body)
    assert answer.status_code in (200, 400, 422), answer.text
    if answer.status_code == 200:
        rows, method = decode_json(body)
        model = joblib.load(client.service.serving.routes.stable.path)
        frame = pd.DataFrame(rows, columns=model.feature_names_in_, dtype=float)
        assert np.allclose(answer.json["prediction"], getattr(model, method)(frame))


@many
@given(st.lists(st.lists(FINITE, min_size=4, max_size=4), min_size=1, max_size=5), st.sampled_from(["json", "npy"]))
def test_numbers_reach_the_model_as_they_were_sent(client: Client, rows: list[list[float]], form: str) -> None:
    array = np.array(rows, dtype=float)
    model = client.service.serving.routes.stable
    if form == "json":
        found = model.signature.parse(decode_json(orjson.dumps({"data": rows}))[0])
    else:
        file = io.BytesIO()
        np.save(file, array)
        found = model.signature.parse(decode_npy(file.getvalue()))
    assert np.asarray(found).tobytes() == array.tobytes()


ARRAYS = st.sampled_from(["<f8", ">f4", "<i8", "|u1", "<f2"]).flatmap(
    lambda dtype: st.tuples(st.integers(1, 3), st.integers(1, 4)).map(lambda shape: np.ones(shape, dtype))
)
TUPLES = st.lists(st.integers() | st.booleans() | st.none() | st.floats(), max_size=70).map(tuple)


@many
@given(ARRAYS, st.lists(st.tuples(st.integers(0, 127), st.integers(0, 255)), max_size=4))
def test_array_that_was_changed_is_read_as_it_says_or_not_at_all(array: Any, changes: list[tuple[int, int]]) -> None:
    file = io.BytesIO()
    np.save(file, array)
    body = bytearray(file.getvalue())
    for at, byte in changes:
        body[at] = byte
    with suppress(BadRequest, UnprocessableEntity):
        found = decode_npy(bytes(body))
        assert found.nbytes == array.nbytes
        assert changes or np.array_equal(found, array)


@many
@given(TUPLES | ANY, st.sampled_from(["<f8", "<i4", "O", "V8", "<U2", ""]) | ANY, st.booleans() | SCALARS)
def test_header_of_an_array_holds_anything(shape: Any, descr: Any, by_columns: Any) -> None:
    header = f"{ {'descr': descr, 'fortran_order': by_columns, 'shape': shape} }".encode("ascii", "replace")
    body = b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + bytes(32)
    with suppress(BadRequest, UnprocessableEntity):
        assert decode_npy(body).nbytes == 32


# --- what JSON is counted for before it is decoded

STRINGS = st.text(st.sampled_from('[]{},:"\\ é\n1a'), max_size=8)
NESTED = st.recursive(
    STRINGS | st.booleans() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(STRINGS, inner)
)


@many
@given(NESTED, st.integers(1, 7))
def test_strings_are_cut_out_of_json_at_any_size_of_a_piece(value: Any, size: int) -> None:
    body = orjson.dumps(value)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "PIECE_SIZE", size)
        assert b"".join(limits._without_strings(body)) == re.sub(rb'"(?:[^"\\]|\\.)*"', b"", body)


@many
@given(st.integers(0, 5), st.integers(1, 5), st.sampled_from(["lists", "records", "split", "texts", "tensor"]), STRINGS)
def test_no_request_of_as_many_rows_as_are_allowed_is_counted_as_too_large(
    more: int, width: int, form: str, text: str
) -> None:
    n_rows = 50
    columns = tuple(Column(f"{text}{at}", "text") for at in range(width))
    names, row = [column.name for column in columns], [text] * width
    body: Any = {"data": [row] * n_rows, "method": "predict"}
    signature = Signature("texts" if form == "texts" else "array", () if form == "texts" else columns)
    if form == "records":
        body = [dict(zip(names, row, strict=True))] * n_rows
    elif form == "split":
        index: list[Any] = list(range(n_rows)) if more % 2 else [[1, 2]] * n_rows
        body = {"columns": names, "index": index, "data": [row] * n_rows}
    elif form == "texts":
        body = {"data": [text] * n_rows}
    elif form == "tensor":
        signature = SimpleNamespace(row_shape=(width, 3, 1), ignores_extra=False)  # type: ignore[assignment]
        body = {"data": [[[[text]] * 3] * width] * n_rows}
    Limits.of(n_rows, [signature]).check(orjson.dumps(body))
    if more and form in ("lists", "records", "split"):
        many_rows = orjson.dumps([row] * (2 * n_rows + 8 + more))
        with pytest.raises(BadRows, match="more lists and objects than 50 rows"):
            Limits.of(n_rows, [signature]).check(many_rows)
        if width > 1:
            wide = orjson.dumps([[1] * (width * 2 + 3 + more)] * n_rows)
            with pytest.raises(BadRows, match="more values than its rows can have"):
                Limits.of(n_rows, [signature]).check(wide)


def test_small_body_is_not_counted() -> None:
    body = b"[" + b"[]," * 1000 + b"[]]"
    assert len(body) < LARGE_BODY
    assert len(parse_json(body, Limits(1, 1, 1))) == 1001


# --- files that operators, other programs or broken disks wrote

HASHES = st.sampled_from(
    [CHEAP, "scrypt:3:1:1$a$00", "scrypt:0:0:0$a$00", "pbkdf2:sha256:0$a$00", f"scrypt:{2**62}:8:1$a$0"]
) | st.from_regex(r"\A(scrypt:[0-9]{1,3}:[0-9]:[0-9]|pbkdf2:sha1:[0-9]{1,4})\$a\$0\Z")


@many
@given(
    st.binary(max_size=40)
    | ANY.map(as_json)
    | st.dictionaries(
        st.sampled_from(["predict", "é", "a:b", ""]) | st.text(max_size=3),
        st.fixed_dictionaries({"password": HASHES, "roles": st.lists(st.sampled_from(ROLES), max_size=3)}),
        max_size=3,
    ).map(as_json)
    | st.dictionaries(st.text(max_size=3), objects(password=HASHES, roles=st.just([])), max_size=3).map(as_json)
)
def test_users_file_is_used_or_says_what_is_wrong(place: Path, content: bytes) -> None:
    path = write_users(place / "users.json")
    users = Users(path, lambda function, *arguments: function(*arguments))
    path.write_bytes(content)
    users.refresh()
    try:
        found = read_users(path)
    except UsersFileError:
        assert users.verify("h", "predict", PASSWORD, "192.0.2.1"), "the old users stay"
        return
    for name, user in found.items():
        assert bool(users.verify(f"h {name}", name, PASSWORD, "192.0.2.2")) == (user.password == CHEAP)
    with nullcontext() if found else pytest.raises(NoUsers):
        assert not users.verify("m", "mallory", PASSWORD, "192.0.2.3")


VERSIONS = st.sampled_from(["1", "2", "../1", "", "a" * 65])


@many
@given(
    st.binary(max_size=30)
    | ANY.map(as_json)
    | objects(
        stable=VERSIONS,
        previous=st.lists(VERSIONS, max_size=2),
        canary=objects(version=VERSIONS, weight=st.floats(0, 100), guard=st.booleans()),
        generation=st.integers(0, 2**53),
    ).map(as_json)
)
def test_routing_is_followed_or_says_what_is_wrong(place: Path, content: bytes) -> None:
    (place / "routing.json").write_bytes(content)
    with suppress(ModelLoadError):
        routing = Routing.read(place)
        assert orjson.loads(orjson.dumps(routing.to_json()))["stable"] == routing.stable
        (place / "routing.json").write_bytes(orjson.dumps(routing.to_json()))
        assert Routing.read(place) == routing


@many
@given(
    ANY.map(as_json)
    | objects(
        version=VERSIONS,
        artifact=st.just("model.joblib"),
        sha256=st.just("0" * 64),
        sample=st.lists(ANY, max_size=2),
        predictions=ANY,
    ).map(as_json)
)
def test_manifest_is_read_or_says_what_is_wrong(place: Path, content: bytes) -> None:
    (place / "1").mkdir(exist_ok=True)
    (place / "1/manifest.json").write_bytes(content)
    with suppress(ModelLoadError):
        manifest = read_manifest(place, "1")
        assert manifest.artifact == place / "1/model.joblib"
        orjson.dumps(manifest.about)


LINES = st.lists(
    st.binary(max_size=30)
    | ANY.map(as_json)
    | objects(
        time=st.floats(0, 2e9),
        dropped=st.integers(0, 9),
        reason=st.text(max_size=3),
        success=st.booleans(),
        response_time=st.floats(0, 1),
        status=st.sampled_from([200, 422, 500]),
        error_type=st.sampled_from(["", "model", "client"]),
        error=st.text(max_size=3),
        rows=st.integers(0, 9),
        variant=st.sampled_from(["stable", "canary"]),
        model_version=st.sampled_from(["1", "2"]),
        event=st.sampled_from(["feedback", "rollback", "drift"]),
        wrong=st.integers(0, 3),
        age=st.floats(0, 9),
    ).map(as_json),
    max_size=6,
)


@many
@given(LINES)
def test_journal_of_any_lines_is_read_judged_and_dropped(place: Path, lines: list[bytes]) -> None:
    directory = place / "journal"
    directory.mkdir(exist_ok=True)
    for path in segments(directory):
        path.unlink()
    old = directory / f"{1:020d}-1.jsonl"
    old.write_bytes(b"\n".join([*lines, b"\n"]) * 3)
    offsets = [offset for offset, _ in read_lines(old)]
    assert offsets == sorted(set(offsets))
    assert offsets[-1] == old.stat().st_size
    routing = Routing("1", canary="2", weight=5.0, guard=True)
    guard = Guard(directory, place / "nowhere")
    assert guard.evaluate(routing, Tail(directory, 0.0).read()) == ""  # too few to judge
    summary = report.Summary()
    for record in report.read(directory, 0.0):
        if record is not None:
            summary.add(record)
    journal = Journal(directory, max_bytes=2**10, writers=1)
    for n in range(20):
        journal.append({"n": n})
    journal.close()
    assert not old.exists(), "it was not dropped"
    assert [record["n"] for path in segments(directory) for _, record in read_lines(path) if record and "n" in record][
        -1
    ] == 19


RECORDS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6).filter(
        lambda name: name not in ("time", "pid", "record_id")
    ),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers(-(2**63), 2**64 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    max_size=5,
)


@many
@given(st.lists(RECORDS, min_size=1, max_size=4))
def test_record_is_read_as_it_was_written(place: Path, written: list[dict[str, Any]]) -> None:
    directory = place / "round"
    journal = Journal(directory, max_bytes=2**24)
    for record in written:
        journal.append(dict(record))
    journal.close()
    (path,) = segments(directory)
    found = [record for _, record in read_lines(path)]
    path.unlink()
    for record, sent in zip(found, written, strict=True):
        assert record is not None
        assert {name: value for name, value in record.items() if name not in ("time", "pid", "record_id")} == sent
