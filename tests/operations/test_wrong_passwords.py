"""Wrong passwords: a line for each address and minute, ids in the journal, and neither name nor password anywhere."""

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import Client, basic, gunicorn, records

from operations import wrong_passwords
from operations.wrong_passwords import EVENT, MAX_ADDRESSES, RECORDS, RECORDS_AT_ONCE, WrongPasswords

LINE = re.compile(r"wrong password from (\S+), request (\S+)")
MORE = re.compile(r"(\d+) more wrong passwords from (\S+) within a minute, the last in request (\S+)")


@pytest.fixture
def client(serve: Any, iris_file: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client whose wrong passwords are counted by `counted`, without the background task."""
    made: list[WrongPasswords] = []

    class Kept(WrongPasswords):
        def __init__(self, service: Any) -> None:
            super().__init__(service)
            made.append(self)
            service.every_second.clear()

    monkeypatch.setattr(wrong_passwords, "WrongPasswords", Kept)
    found: Client = serve(iris_file)
    found.counted = made[0]  # type: ignore[attr-defined]
    return found


def ask(client: Client, address: str, name: str = "predict", password: str = "s3cret", request_id: str = "r") -> int:
    """Ask with a password from an address; return the status."""
    headers = {"Authorization": basic(name, password), "X-Request-ID": request_id}
    answer = client.http.post("/predict", json={"data": []}, headers=headers, environ_base={"REMOTE_ADDR": address})
    return int(answer.status_code)


def events(client: Client) -> list[dict[str, Any]]:
    """Return the records of wrong passwords."""
    return [record for record in records(client.journal_dir) if record.get("event") == EVENT]


def test_address_has_a_line_at_once_and_then_one_with_the_number(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.clear()
    for number in range(4):
        assert ask(client, "192.0.2.1", request_id=f"a{number}") == 401
    assert ask(client, "192.0.2.2", name="unknown-name", request_id="b") == 401
    assert LINE.findall(caplog.text) == [("192.0.2.1", "a0"), ("192.0.2.2", "b")]
    client.counted.tick()  # type: ignore[attr-defined]  # no minute has passed
    assert not MORE.search(caplog.text)
    client.counted.tick(0.0)  # type: ignore[attr-defined]
    assert MORE.findall(caplog.text) == [("3", "192.0.2.1", "a3")]
    client.counted.tick(0.0)  # type: ignore[attr-defined]
    assert len(MORE.findall(caplog.text)) == 1
    assert [(each["request_id"], each["address"], each["reason"]) for each in events(client)] == [
        *((f"a{number}", "192.0.2.1", "wrong password") for number in range(4)),
        ("b", "192.0.2.2", "wrong password"),
    ]
    everything = caplog.text + str(records(client.journal_dir))
    assert not re.search("s3cret|unknown-name|Basic", everything)


def test_address_that_has_to_wait_is_counted_and_others_are_not(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    statuses = [ask(client, "2001:db8:0:1::7", request_id=f"{number}") for number in range(15)]
    assert statuses == [401] * 10 + [429] * 5
    assert ask(client, "2001:db8:0:2::7", password="correct horse") == 422
    assert client.http.post("/predict").status_code == 401  # no password
    client.counted.tick(0.0)  # type: ignore[attr-defined]
    assert LINE.findall(caplog.text) == [("2001:db8:0:1::/64", "0")]
    assert MORE.findall(caplog.text) == [("14", "2001:db8:0:1::/64", "14")]
    assert len(events(client)) == RECORDS


def test_flood_from_everywhere_is_bounded(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.clear()
    for number in range(4 * MAX_ADDRESSES):
        for _ in range(3):
            assert ask(client, f"10.0.{number >> 8}.{number & 255}") == 401
    client.counted.tick(0.0)  # type: ignore[attr-defined]
    lines = [record.getMessage() for record in caplog.records if record.name == "operations.wrong_passwords"]
    assert len(lines) == 2 * MAX_ADDRESSES + 1
    assert lines[-1] == f"{9 * MAX_ADDRESSES} wrong passwords from other addresses within a minute"
    assert max(map(len, lines)) < 150
    assert RECORDS_AT_ONCE <= len(events(client)) <= 3 * MAX_ADDRESSES


def test_worker_that_ends_logs_what_it_has_counted(tmp_path: Path, iris_file: Path) -> None:
    with gunicorn(tmp_path, model_path=iris_file) as server:
        for number in range(3):
            sent = {"Authorization": basic("predict", "s3cret"), "X_Request_ID": f"w{number}"}
            assert server.ask("POST", "/predict", b"{}", **sent)[0] == 401
        assert server.stop() == 0
        log = server.log.read_text()
    assert LINE.findall(log) == [("127.0.0.1", "w0")]
    assert MORE.findall(log) == [("2", "127.0.0.1", "w2")]
