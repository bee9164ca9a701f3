"""The stand-in for SLS understands the real SDK, and refuses what SLS refuses."""

import hashlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from aliyun.log import LogClient, LogException
from aliyun.log.log_logs_raw_pb2 import LogGroupRaw
from loopback_sls import REFUSALS, LoopbackSLS

pytestmark = pytest.mark.filterwarnings(
    # The SDK signs with it; Python warns from 3.12 on.
    "ignore:datetime.datetime.utcnow:DeprecationWarning"
)


class GaveUp(Exception):
    """What a request failed with; the SDK would send again after a LogException of some kinds."""


class OneTry(LogClient):
    """The SDK's client without its retries, and with a hand in the wire."""

    tampered: Any = staticmethod(lambda body, headers: body)

    def _sendRequest(self, *args: Any, **kwargs: Any) -> Any:  # noqa: N802 - the SDK's name
        try:
            return super()._sendRequest(*args, **kwargs)
        except LogException as e:
            raise GaveUp(e.get_error_code(), e.get_resp_status(), e.get_error_message()) from None

    def _getHttpResponse(self, method: str, url: str, params: Any, body: Any, headers: Any) -> Any:  # noqa: N802
        return super()._getHttpResponse(method, url, params, self.tampered(body, headers), headers)


@pytest.fixture
def sls() -> Iterator[LoopbackSLS]:
    with LoopbackSLS() as server:
        yield server


@pytest.fixture(params=["v1", "v4"])
def client(request: pytest.FixtureRequest, sls: LoopbackSLS, monkeypatch: pytest.MonkeyPatch) -> Iterator[OneTry]:
    for name, value in sls.environ().items():
        monkeypatch.setenv(name, value)
    made = connect(sls, request.param)
    yield made
    made._session.close()


def connect(sls: LoopbackSLS, version: str = "v4", **changed: Any) -> OneTry:
    settings = {"accessKeyId": sls.key_id, "accessKey": sls.secret, "securityToken": sls.token} | changed
    client = OneTry(f"http://{sls.endpoint}", source="s", auth_version=version, region=sls.region, **settings)
    client.timeout = (3, 10)
    return client


def group(*contents: dict[str, bytes], at: int = 1_750_000_000) -> LogGroupRaw:
    made = LogGroupRaw(Topic="t", Source="s")
    for each in contents or ({"error": "größer".encode()},):
        log = made.Logs.add(Time=at, Time_ns=7)
        for key, value in each.items():
            log.Contents.add(Key=key, Value=value)
    return made


def put(client: LogClient, logs: LogGroupRaw | None = None, project: str = "proj", logstore: str = "ls") -> Any:
    return client.put_log_raw(project, logstore, logs or group())


def failure(client: LogClient, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    with pytest.raises(GaveUp) as raised:
        put(client, *args, **kwargs)
    return raised.value.args


def test_a_batch_arrives_decoded(sls: LoopbackSLS, client: OneTry) -> None:
    assert len(put(client, group({"error": "größer".encode()}, {"n": b"2"})).get_request_id()) == 24
    common = {"__topic__": "t", "__source__": "s", "__time__": 1_750_000_000, "__time_ns__": 7}
    assert sls.logs == [common | {"error": "größer"}, common | {"n": "2"}]
    put(client)
    assert (sls.batches, len(sls.batch_bytes), sls.outcomes) == ([2, 1], 2, {"ok": 2})
    assert len(sls._server.connections) == 1  # kept alive


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"accessKey": "other"}, "SignatureNotMatch"),
        ({"accessKeyId": "other"}, "Unauthorized"),
        ({"securityToken": "other"}, "Unauthorized"),
        ({"securityToken": None}, "Unauthorized"),
    ],
)
def test_wrong_credentials_are_refused(sls: LoopbackSLS, client: OneTry, changed: dict[str, str], code: str) -> None:
    sls.token = "token"
    wrong = connect(sls, client._auth_version, **changed)
    assert failure(wrong)[:2] == (code, 401)
    wrong._session.close()
    right = connect(sls, client._auth_version)
    put(right)
    right._session.close()
    assert len(sls.logs) == 1


def forge_body(body: bytes, headers: dict[str, str]) -> bytes:
    return body[:-1] + b"x"


def forge_body_and_digest(body: bytes, headers: dict[str, str]) -> bytes:
    body = forge_body(body, headers)
    if "Content-MD5" in headers:
        headers["Content-MD5"] = hashlib.md5(body).hexdigest().upper()
    else:
        headers["x-log-content-sha256"] = hashlib.sha256(body).hexdigest()
    return body


def forge_header(body: bytes, headers: dict[str, str]) -> bytes:
    headers["x-log-bodyrawsize"] += "0"
    return body


@pytest.mark.parametrize("forge", [forge_body, forge_body_and_digest, forge_header])
def test_a_request_changed_after_signing_is_refused(sls: LoopbackSLS, client: OneTry, forge: Any) -> None:
    client.tampered = forge
    assert failure(client)[:2] == ("SignatureNotMatch", 401)
    assert not sls.logs


@pytest.mark.parametrize("mode", REFUSALS)
def test_a_mode_gives_its_status_and_code(sls: LoopbackSLS, client: OneTry, mode: str) -> None:
    sls.mode = mode
    status, code, _ = REFUSALS[mode]
    assert failure(client)[:2] == (code, status)
    sls.mode = "ok"
    put(client)
    assert sls.outcomes == {code: 1, "ok": 1}


def test_a_clock_an_hour_off_is_refused(sls: LoopbackSLS, client: OneTry) -> None:
    sls.mode = "skew"
    assert failure(client)[:2] == ("RequestTimeExpired", 400)


def test_a_reset_is_a_reset(sls: LoopbackSLS, client: OneTry) -> None:
    sls.mode = "reset"
    code, _, message = failure(client)
    assert code == "LogRequestError"
    assert "Connection reset by peer" in message
    assert not sls.logs
    sls.mode = "lying reset"
    assert "Connection reset by peer" in failure(client)[2]
    assert len(sls.logs) == 1


def test_a_hanging_request_is_forgotten_or_released(sls: LoopbackSLS, client: OneTry) -> None:
    sls.mode, client.timeout = "hang", (3, 0.2)
    assert "timed out" in failure(client)[2]
    client.timeout = (3, 10)
    sender = threading.Thread(target=put, args=(client,))
    sender.start()
    sls.wait_until(lambda: sls.outcomes["hang"] == 2)
    assert not sls.logs
    sls.release()
    sender.join(10)
    assert len(sls.logs) == 1


def test_a_liar_stores_and_does_not_answer(sls: LoopbackSLS, client: OneTry) -> None:
    sls.mode, client.timeout = "lying", (3, 0.2)
    assert "timed out" in failure(client)[2]
    assert (len(sls.logs), sls.outcomes) == (1, {"lying": 1})


def test_it_goes_down_and_comes_up_on_its_port(sls: LoopbackSLS, client: OneTry) -> None:
    put(client)
    sls.down()
    assert "Connection refused" in failure(client)[2]
    sls.up()
    put(client)
    assert len(sls.logs) == 2


def test_it_stops_while_a_request_hangs(sls: LoopbackSLS, client: OneTry) -> None:
    sls.mode = "hang"
    sender = threading.Thread(target=failure, args=(client,))
    sender.start()
    sls.wait_until(lambda: sls.outcomes["hang"] == 1)
    started = time.monotonic()
    sls.down()
    sender.join(10)
    assert time.monotonic() - started < 5


def test_a_batch_with_a_refused_log_is_refused_whole(sls: LoopbackSLS, client: OneTry) -> None:
    sls.refuse(lambda log: log.get("n") == "2")
    assert failure(client, group({"n": b"1"}, {"n": b"2"}))[:2] == ("PostBodyInvalid", 400)
    put(client, group({"n": b"1"}))
    sls.refuse(lambda log: False)
    put(client, group({"n": b"2"}))
    assert [log["n"] for log in sls.logs] == ["1", "2"]


@pytest.mark.parametrize(
    ("logs", "code"),
    [
        pytest.param(LogGroupRaw(Topic="t"), "PostBodyInvalid", id="no source"),
        pytest.param(LogGroupRaw(Source="s"), "PostBodyInvalid", id="no topic"),
        pytest.param(group({"k": b"\xff"}), "InvalidEncoding", id="not UTF-8"),
        pytest.param(group({"__time__": b"1"}), "InvalidKey", id="reserved key"),
        pytest.param(group(at=1_000_000_000), "InvalidTimestamp", id="year 2001"),
        pytest.param(group(*[{"k": b"v"}] * 4097), "PostBodyTooLarge", id="too many logs"),
        pytest.param(group({"k": b"v" * (1 << 20)}), "PostBodyTooLarge", id="large log"),
        pytest.param(group(*[{"k": b"v" * (1 << 19)}] * 20), "PostBodyTooLarge", id="large batch"),
    ],
)
def test_what_the_service_cannot_store_is_refused(sls: LoopbackSLS, client: OneTry, logs: Any, code: str) -> None:
    assert failure(client, logs)[:2] == (code, 400)
    assert not sls.logs


def test_the_largest_batches_are_stored(sls: LoopbackSLS, client: OneTry) -> None:
    put(client, group(*[{"k": b"v"}] * 4096))
    put(client, group({"k": b"v" * ((1 << 20) - 100)}))
    assert sls.batches == [4096, 1]


def test_another_project_or_logstore_does_not_exist(sls: LoopbackSLS, client: OneTry) -> None:
    assert failure(client, project="other")[:2] == ("ProjectNotExist", 404)
    assert failure(client, logstore="other")[:2] == ("LogStoreNotExist", 404)
    with pytest.raises(GaveUp, match="the stand-in has no GET /logstores/ls"):
        client.get_logstore("proj", "ls")


def test_a_path_without_the_host_is_answered_too(sls: LoopbackSLS, client: OneTry) -> None:
    through_proxy = client._getHttpResponse
    straight = f"http://127.0.0.1:{sls.port}"
    client._getHttpResponse = lambda method, url, *rest: through_proxy(
        method, url.replace(f"http://proj.{sls.endpoint}:80", straight), *rest
    )
    put(client)
    client._getHttpResponse = lambda method, url, *rest: through_proxy(method, straight, *rest)
    assert failure(client)[:2] == ("SignatureNotMatch", 401)
    assert sls.outcomes == {"ok": 1, "SignatureNotMatch": 1}


def test_bytes_that_are_no_batch_are_refused(sls: LoopbackSLS, client: OneTry) -> None:
    class Truncated:
        def SerializeToString(self) -> bytes:  # noqa: N802 - protobuf's name
            return group({"k": b"v"}, {"k": b"v"}).SerializeToString() + b"\x0a\x7f"

    assert failure(client, Truncated())[:2] == ("PostBodyInvalid", 400)
    assert not sls.logs
