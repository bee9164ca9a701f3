"""Made-up bodies: whatever arrives, the answer is not a server's fault, and what a program wrote is read as it was."""

import csv
import io
import json
from typing import Any

import pytest
from cloud_models import frame_model, text_model
from conftest import Client
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_sagemaker import CSV, JSON, LINES, NPY, npy

from endpoints.lines import csv_rows, parse_csv
from model.frames.columns import FrameColumn as Column
from model.frames.signature import FrameSignature
from model.signature import BadRows

NAMES = ("sagemaker", "vertex", "function_compute", "eas", "open_inference")
PATHS = (
    "/invocations",
    "/v1/endpoints/1/deployedModels/2:predict",
    "/invoke",
    "/",
    "/predict",
    "/v2/models/model/infer",
)
SIGNATURE = FrameSignature("frame", (Column("number"), Column("text", "text"), Column("flag", "boolean")))
PIECES = st.sampled_from(
    [
        *(
            "1",
            "-2.5",
            "1e400",
            "nan",
            "a",
            "é",
            '"',
            '""',
            ",",
            "\n",
            "\r",
            "\r\n",
            "\0",
            "[",
            "]",
            "{",
            "}",
            ":",
            " ",
        ),
        *("\ufeff", "null", "true", "[[1]]", '"data"', '"instances"', '"inputs"', '{"instances": ['),
        *('[[1.5, "red", 3, true]]', "1.5,red,3,1"),
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["data", "instances", "inputs"]), inner)
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> list[Client]:
    """A model of columns and one of strings, behind every protocol."""
    import joblib
    from conftest import write_users

    from settings import Settings

    found = []
    for make in (frame_model, text_model):
        place = tmp_path_factory.mktemp("made_up")
        joblib.dump(make(), place / "model.joblib")
        found.append(
            Client(
                Settings(
                    model_path=place / "model.joblib",
                    users_file=write_users(place / "users.json"),
                    journal_dir=place / "journal",
                    extensions=tuple(f"+endpoints.{name}" for name in NAMES),
                )
            )
        )
    return found


def check(clients: list[Client], body: bytes, content_type: str, accept: str) -> None:
    """POST a body everywhere."""
    for client in clients:
        for path in PATHS:
            headers = client.headers | {"Accept": accept}
            answer = client.http.post(path, data=body, headers=headers, content_type=content_type)
            assert answer.status_code in (200, 400, 406, 415, 422), (path, answer.text)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(PIECES, max_size=12).map("".join),
    st.sampled_from([CSV, LINES, JSON]),
    st.sampled_from([CSV, LINES, JSON, NPY]),
)
def test_pieces_of_text_are_no_fault_of_the_server(
    clients: list[Client], body: str, content_type: str, accept: str
) -> None:
    check(clients, body.encode(), content_type, accept)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES, st.sampled_from([LINES, JSON]), st.sampled_from([CSV, LINES, JSON, NPY]))
def test_json_values_are_no_fault_of_the_server(
    clients: list[Client], value: Any, content_type: str, accept: str
) -> None:
    check(clients, json.dumps(value).encode("utf-8", "replace"), content_type, accept)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=40), st.sampled_from([CSV, LINES, JSON, NPY]), st.booleans())
def test_bytes_are_no_fault_of_the_server(
    clients: list[Client], body: bytes, content_type: str, is_array: bool
) -> None:
    check(clients, npy([[1.5]])[:-8] + body if is_array else body, content_type, JSON)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63 - 1),
            st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
def test_what_a_program_wrote_is_read_as_it_was(rows: list[Any], ending: str, quoting: Any) -> None:
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator=ending, quoting=quoting).writerows(rows)
    records, lines = parse_csv(file.getvalue().encode())
    found = csv_rows(lines, records, SIGNATURE)
    assert [tuple(row) for row in found] == rows
    assert [list(map(type, row)) for row in found] == [list(map(type, row)) for row in rows]


def test_field_that_could_be_a_number_or_a_string_is_rejected() -> None:
    def read(field: str, column: Column) -> Any:
        return csv_rows([1], [[field]], FrameSignature("frame", (column,)))[0][0]

    mixed = Column("c", "category", dtype="object", learned=("a", "1", 2, 3.5))
    assert [read(field, mixed) for field in ("a", "1", "2", "3.5", "b", "7")] == ["a", "1", 2, 3.5, "b", "7"]
    both = Column("c", "category", dtype="object", learned=("2", 2))
    unknown = Column("c", "category")  # CatBoost, for which 3 and "3" are the same
    assert [read(field, unknown) for field in ("3", "a", "-3")] == ["3", "a", "-3"]
    anything = Column("c", "any")
    assert read("a", anything) == "a"
    for field, column in (
        ("2", both),
        ("3.0", unknown),
        (" 3", unknown),
        ("true", unknown),
        ("3", anything),
        ("true", anything),
    ):
        with pytest.raises(BadRows, match="does not distinguish"):
            read(field, column)
