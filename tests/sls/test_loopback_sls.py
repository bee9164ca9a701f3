"""The stand-in for SLS understands the real SDK, and refuses what SLS refuses; that for ECS's metadata feeds it."""

import hashlib
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from aliyun.log import GetLogsRequest, IndexConfig, IndexKeyConfig, LogClient, LogException
from aliyun.log.log_logs_raw_pb2 import LogGroupRaw
from aliyun.log.resource_params import ResourceRecord
from ecs_metadata import EcsMetadata
from loopback_sls import REFUSALS, LoopbackSLS
from sls_tools import clock

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
    return refusal(put, client, *args, **kwargs)


def refusal(call: Any, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Return code, status and message."""
    with pytest.raises(GaveUp) as raised:
        call(*args, **kwargs)
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
    sls.wait_until(lambda: sls.outcomes == {"lying": 1})
    assert len(sls.logs) == 1


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
    assert time.monotonic() - started < 9  # seconds; the client leaves after 10


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
    with pytest.raises(GaveUp, match="the stand-in has no GET /logstores/ls/shards"):
        client.list_shards("proj", "ls")


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


# --- the control plane


INDEX = IndexConfig(key_config_list={"record_id": IndexKeyConfig(doc_value=True)})


def test_a_project_is_set_up_from_nothing(client: OneTry, sls: LoopbackSLS) -> None:
    sls.bare()
    assert failure(client)[:2] == ("ProjectNotExist", 404)
    assert refusal(client.get_project, "proj")[:2] == ("ProjectNotExist", 404)
    assert refusal(client.create_logstore, "proj", "ls")[:2] == ("ProjectNotExist", 404)
    client.create_project("proj", "a description")
    assert client.get_project("proj").get_description() == "a description"
    assert failure(client)[:2] == ("LogStoreNotExist", 404)
    assert refusal(client.update_logstore, "proj", "ls", ttl=7)[:2] == ("LogStoreNotExist", 404)
    assert refusal(client.create_index, "proj", "ls", INDEX)[:2] == ("LogStoreNotExist", 404)
    client.create_logstore("proj", "ls", ttl=7)
    put(client)
    assert refusal(client.create_project, "proj", "")[:2] == ("ProjectAlreadyExist", 400)
    assert refusal(client.create_logstore, "proj", "ls")[:2] == ("LogStoreAlreadyExist", 400)
    client.update_logstore("proj", "ls", ttl=30)
    assert client.get_logstore("proj", "ls").get_ttl() == 30
    assert (len(sls.logs), set(sls.console)) == (1, {("project", "proj"), ("logstore", "ls")})


def test_what_is_there_by_default_reads_as_if_it_was_created(client: OneTry) -> None:
    assert (client.get_project("proj").get_region(), client.get_logstore("proj", "ls").get_ttl()) == ("cn-test", 30)


@pytest.mark.parametrize(
    ("kind", "named_by", "there", "not_there"),
    [
        ("dashboard", "dashboardName", "ParameterInvalid", "DashboardNotExist"),
        ("savedsearch", "savedsearchName", "ParameterInvalid", "SavedSearchNotExist"),
        ("alert", "name", "JobAlreadyExist", "JobNotExist"),
    ],
)
def test_what_exists_is_not_created_and_what_does_not_is_not_updated(
    client: OneTry, kind: str, named_by: str, there: str, not_there: str
) -> None:
    create, update, get = (getattr(client, f"{verb}_{kind}") for verb in ("create", "update", "get"))
    name, body = "a name", {named_by: "a name", "displayName": "x"}
    assert refusal(update, "proj", body)[:2] == (not_there, 404)
    assert refusal(get, "proj", name)[:2] == (not_there, 404)
    create("proj", body)
    code, status, message = refusal(create, "proj", body | {"displayName": "y"})
    assert (code, status) == (there, 400)
    assert "already exists" in message
    assert get("proj", name).get_entity() == body
    update("proj", {named_by: name, "only": "größer"})
    assert get("proj", name).get_entity() == {named_by: name, "only": "größer"}


def test_an_index_is_created_once_and_then_updated(client: OneTry) -> None:
    assert refusal(client.get_index_config, "proj", "ls")[:2] == ("IndexConfigNotExist", 404)
    assert refusal(client.update_index, "proj", "ls", INDEX)[:2] == ("IndexConfigNotExist", 404)
    client.create_index("proj", "ls", INDEX)
    assert refusal(client.create_index, "proj", "ls", INDEX)[:2] == ("IndexAlreadyExist", 400)
    client.update_index("proj", "ls", IndexConfig(key_config_list={"other": IndexKeyConfig(index_type="long")}))
    keys = client.get_index_config("proj", "ls").get_index_config().key_config_list
    assert {name: key.index_type for name, key in keys.items()} == {"other": "long"}


def test_records_belong_to_the_account(client: OneTry) -> None:
    users = "sls.common.user"
    assert refusal(client.get_resource_record, users, "a")[:2] == ("ResourceRecordNotExist", 404)
    assert refusal(client.create_resource_record, "made.up", record("a"))[:2] == ("ResourceNotExist", 404)
    client.create_resource_record(users, record("a", n=1))
    assert refusal(client.create_resource_record, users, record("a"))[:2] == ("ResourceRecordAlreadyExist", 400)
    client.update_resource_record(users, record("a", n=2))
    assert refusal(client.update_resource_record, users, record("b"))[:2] == ("ResourceRecordNotExist", 404)
    client.upsert_resource_record(users, [record("a", n=3), record("b", n=4)])
    assert client.get_resource_record(users, "a").get_record().get_value() == {"n": 3}
    assert [found.get_record_id() for found in client.list_resource_records(users).get_records()] == ["a", "b"]
    listed = client.list_resource_records(users, record_ids=["b", "c"], tag="the b")
    assert [found.get_value() for found in listed.get_records()] == [{"n": 4}]
    client.create_resource_record(users, ResourceRecord(value={"n": 5}))  # the service names it
    assert client.list_resource_records(users, size=1).get_total() == 3


def record(name: str, **value: int) -> ResourceRecord:
    return ResourceRecord(record_id=name, tag=f"the {name}", value=value or {"n": 0})


def test_logs_are_found_by_key_and_time(client: OneTry) -> None:
    put(client, group({"record_id": b"a:1", "n": b"1"}, {"record_id": b"b", "n": b"2"}, at=1_750_000_010))
    put(client, group({"record_id": b"b", "n": b"3"}, at=1_750_000_000))

    def found(query: str | None, start: int = 1_750_000_000, end: int = 1_750_000_011, **kwargs: Any) -> list[str]:
        logs = client.get_log("proj", "ls", start, end, query=query, **kwargs).get_logs()
        return [log.get_contents()["n"] for log in logs]

    assert refusal(found, "*")[:2] == ("IndexConfigNotExist", 400)
    client.create_index("proj", "ls", INDEX)
    assert found('record_id: "a:1"') == ["1"]
    assert found("record_id: b") == ["3", "2"]
    assert found("record_id: b and __topic__: t", reverse=True) == ["2", "3"]
    assert found("record_id: b", end=1_750_000_010) == ["3"]  # the end is not in
    assert found("record_id: c") == []
    assert (found("*", size=2), found(None, offset=2), found("*", size=-1)) == (["3", "1"], ["2"], ["3", "1", "2"])
    assert refusal(found, "n: 1")[:2] == ("ParameterInvalid", 400)  # not indexed
    assert refusal(found, "*", end=1_750_000_000)[:2] == ("InvalidTimeRange", 400)
    assert refusal(found, "* | select count(*)")[0] == "NotOnLoopback"
    request = GetLogsRequest("proj", "ls", 1_750_000_000, 1_750_000_011, query="record_id: b", line=1)
    assert client.get_logs(request).get_count() == 1


def test_single_operations_fail_until_it_heals(client: OneTry, sls: LoopbackSLS) -> None:
    sls.fail("POST", "/dashboards")
    sls.fail("GET", "/jobs/.*", "InternalError", 500, "it broke")
    assert refusal(client.create_dashboard, "proj", {"dashboardName": "d"})[:2] == ("Unauthorized", 401)
    assert refusal(client.get_alert, "proj", "a") == ("InternalError", 500, "it broke")
    client.create_savedsearch("proj", {"savedsearchName": "s"})
    put(client)
    sls.heal()
    client.create_dashboard("proj", {"dashboardName": "d"})


# --- credentials that change


def test_further_credentials_are_accepted_until_they_expire(client: OneTry, sls: LoopbackSLS) -> None:
    other = connect(sls, client._auth_version, accessKeyId="STS.2", accessKey="secret 2", securityToken="token 2")
    assert failure(other) == ("Unauthorized", 401, "AccessKeyId not found: STS.2")
    sls.accept("STS.2", "secret 2", "token 2")
    put(other)
    put(client)
    sls.expire("STS.2")
    sls.expire(sls.key_id)
    for expired in (other, client):
        assert failure(expired) == ("Unauthorized", 401, "The security token you provided has expired.")
    sls.accept("STS.2", "secret 3", "token 2")
    assert failure(other)[:2] == ("SignatureNotMatch", 401)
    other._session.close()


def test_credentials_of_the_instances_role_open_sls_while_they_last(
    client: OneTry, sls: LoopbackSLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = clock(monkeypatch)
    with EcsMetadata(sls.accept, lifetime=60) as metadata:
        roles = f"{metadata.base}/meta-data/ram/security-credentials/"
        assert roles + ask(roles) == metadata.credentials_uri
        found = json.loads(ask(metadata.credentials_uri))
        assert (found["Code"], found["LastUpdated"] < found["Expiration"]) == ("Success", True)
        key_id, secret, token = (found[name] for name in ("AccessKeyId", "AccessKeySecret", "SecurityToken"))
        client = connect(sls, client._auth_version, accessKeyId=key_id, accessKey=secret, securityToken=token)
        put(client)
        forward(62)
        assert failure(client) == ("Unauthorized", 401, "The security token you provided has expired.")
        client._session.close()
        assert json.loads(ask(metadata.credentials_uri))["AccessKeyId"] != key_id
        assert metadata.calls == {"role": 1, "credentials": 2, 200: 3}


def test_a_hardened_instance_forbids_what_bears_no_token() -> None:
    with EcsMetadata(requires_token=True) as metadata:
        ttl = "X-aliyun-ecs-metadata-token-ttl-seconds"
        assert status(metadata.credentials_uri) == 403
        assert status(metadata.credentials_uri, {"X-aliyun-ecs-metadata-token": "made up"}) == 403
        for seconds, expected in (("0", 400), ("21601", 400), ("x", 400), ("1", 200)):
            assert status(f"{metadata.base}/api/token", {ttl: seconds}, "PUT") == expected
        token = {"X-aliyun-ecs-metadata-token": ask(f"{metadata.base}/api/token", {ttl: "60"}, "PUT")}
        first = ask(metadata.credentials_uri, token)
        assert ask(metadata.credentials_uri, token) == first
        metadata.rotate()
        assert ask(metadata.credentials_uri, token) != first
        metadata.mode = "no role"
        assert status(metadata.credentials_uri, token) == 404
        metadata.mode = "garbage"
        assert ask(metadata.credentials_uri, token).startswith("<html>")
        metadata.down()
        with pytest.raises(urllib.error.URLError, match="refused"):
            ask(metadata.base)
        metadata.up()
        metadata.mode = "ok"
        assert status(f"{metadata.base}/meta-data/ram/security-credentials/other", token) == 404


def ask(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> str:
    request = urllib.request.Request(url, headers=headers or {}, method=method)
    straight = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # urlopen remembers another test's proxy
    with straight.open(request, timeout=10) as answer:
        return str(answer.read().decode())


def status(url: str, headers: dict[str, str] | None = None, method: str = "GET") -> int:
    try:
        ask(url, headers, method)
    except urllib.error.HTTPError as e:
        with e:
            return e.code
    return 200
