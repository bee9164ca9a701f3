"""Preparing the console, with the real SDK and a loopback SLS; and the queries, in SQLite over records of each kind."""

import itertools
import json
import math
import re
import sqlite3
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from conftest import ROOT
from loopback_sls import LoopbackSLS

from settings import Settings, SettingsError
from sls import console
from sls.check import check, fire_test_alert
from sls.client import Client
from sls.console import KEEP_DAYS, Recipients, desired, for_account, region, setup

TOKEN = "0123456789abcdef"
ROBOT = f"https://oapi.dingtalk.com/robot/send?access_token={TOKEN}"
BOTH = Recipients("oncall@example.com", ROBOT, "SECfedcba")


class Operator:
    """Someone who runs `python -m sls`, and the output."""

    def __init__(self, sls: LoopbackSLS) -> None:
        self.settings = Settings.from_environ(sls.environ())
        self.connect = partial(Client, environ=sls.environ())
        self.lines: list[str] = []

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    @property
    def client(self) -> Client:
        return self.connect(self.settings)

    def setup(self, recipients: Recipients = BOTH, **options: Any) -> int:
        self.lines.clear()
        return setup(self.connect, self.settings, recipients, **options)

    def check(self, wait: float = 90.0) -> int:
        self.lines.clear()
        return check(self.client, wait)


@pytest.fixture
def operator(sls: LoopbackSLS, monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator whose requests lead to the loopback SLS, which has one region."""
    for name in ("http_proxy", "no_proxy"):
        monkeypatch.setenv(name, sls.environ()[name])
    monkeypatch.setattr(console, "ACCOUNT_REGION", sls.region)
    operator = Operator(sls)
    monkeypatch.setattr("click.echo", operator.lines.append)
    return operator


def test_setup_creates_everything(sls: LoopbackSLS, operator: Operator) -> None:
    sls.bare()
    assert operator.setup(make_project=True) == 0, operator.output
    resources = list(desired(operator.settings, BOTH, True, None))
    held = {"sls": "record", "alert": "job"}
    for kind, name, body in resources:
        where = (held.get(kind.split(".")[0], kind), f"{kind}/{name}" if "." in kind else name)
        there = sls.console[where]
        if kind in ("dashboard", "savedsearch", "alert"):
            assert there == body
        elif kind == "index":
            assert there["keys"] == body["keys"]
        elif kind == "logstore":
            assert there["ttl"] == KEEP_DAYS
        elif "." in kind:
            assert (there["id"], json.loads(there["value"])) == (name, body["value"])
    assert len(sls.console) == len(resources) == len(operator.lines) == 19
    assert all(line.endswith((": created", ": written")) for line in operator.lines)


def test_second_setup_updates(sls: LoopbackSLS, operator: Operator) -> None:
    assert operator.setup() == 0
    sls.console["index", sls.logstore]["keys"]["theirs"] = {"type": "long", "doc_value": True}
    sls.console["dashboard", "ls-overview"]["charts"] = []
    before = json.loads(json.dumps({" ".join(name): body for name, body in sls.console.items()}))
    assert operator.setup(make_project=True) == 0, operator.output
    assert {line.rpartition(": ")[2] for line in operator.lines} == {"exists", "updated", "written"}
    after = {" ".join(name): body for name, body in sls.console.items()}
    assert after.keys() == before.keys()
    assert "theirs" in after["index ls"]["keys"]
    assert len(after["dashboard ls-overview"]["charts"]) == 13
    for name, body in after.items():
        if name.startswith("job "):
            assert body == {key: value for key, value in before[name].items() if key != "state"}


def test_records_are_kept_as_long_as_before_unless_it_is_asked_for(sls: LoopbackSLS, operator: Operator) -> None:
    sls.console["logstore", sls.logstore]["ttl"] = 180
    assert operator.setup() == 0
    assert sls.console["logstore", sls.logstore]["ttl"] == 180
    assert "logstore ls: exists" in operator.lines
    assert operator.setup(keep_days=90) == 0
    assert sls.console["logstore", sls.logstore]["ttl"] == 90


def test_without_recipients_new_alerts_are_the_built_in_policys_and_others_keep_theirs(
    sls: LoopbackSLS, operator: Operator
) -> None:
    def policies() -> set[str]:
        jobs = [body for (kind, _), body in sls.console.items() if kind == "job"]
        return {job["configuration"]["policyConfiguration"]["actionPolicyId"] for job in jobs}

    assert operator.setup(Recipients()) == 0
    assert "no alert recipients" in operator.lines[-1]
    assert "SLS_ALERT_MAIL" in operator.lines[-1]
    assert policies() == {"sls.builtin"}
    assert operator.setup(Recipients(mail="oncall@example.com")) == 0
    assert "no alert recipients" not in operator.output
    assert policies() == {"alerts-proj"}
    assert operator.setup(Recipients()) == 0
    assert policies() == {"alerts-proj"}


@pytest.mark.parametrize(
    ("recipients", "resources", "fires"),
    [
        (Recipients(mail="a@example.com"), ["sls.common.user"], ["email"]),
        (Recipients(dingtalk=ROBOT), ["sls.alert.action_webhook"], ["webhook_integration"]),
        (BOTH, ["sls.common.user", "sls.alert.action_webhook"], ["email", "webhook_integration"]),
    ],
)
def test_action_policy_names_the_recipients(
    operator: Operator, recipients: Recipients, resources: list[str], fires: list[str]
) -> None:
    records = [resource for resource in desired(operator.settings, recipients, False, None) if "." in resource.kind]
    assert [record.kind for record in records] == [*resources, "sls.alert.action_policy"]
    script = records[-1].body["value"]["primary_policy_script"]
    assert re.findall('fire\\(type="(.*?)"', script) == fires
    assert set(re.findall('(?:users=\\[|webhook_id=)"(.*?)"', script)) == {"alerts-proj"} == {r.name for r in records}
    for record in records:
        if record.kind == "sls.alert.action_webhook":
            assert record.body["value"].get("secret") == (recipients.secret or None)


def test_dry_run_prints_everything_and_sends_nothing(sls: LoopbackSLS, operator: Operator) -> None:
    assert operator.setup(make_project=True, dry_run=True) == 0
    assert sls.outcomes.total() == 0
    kinds = [line.split()[0] for line in operator.lines]
    assert kinds == [resource.kind for resource in desired(operator.settings, BOTH, True, None)]
    assert all(json.loads(line[line.index("{") :]) for line in operator.lines)


def test_robots_url_and_secret_are_never_printed(sls: LoopbackSLS, operator: Operator) -> None:
    operator.setup(dry_run=True)
    assert "***" in operator.output
    for secret in (TOKEN, BOTH.secret):
        assert secret not in operator.output
    for message in (f"webhook {ROBOT} with {BOTH.secret}", f"is no URL: {ROBOT[:-5]}"):
        sls.fail("PUT", "/resources/sls.alert.action_webhook/records", "PostBodyInvalid", 400, message)
        assert operator.setup() == 1
        assert "PostBodyInvalid" in operator.output
        assert TOKEN[:8] not in operator.output
        assert BOTH.secret not in operator.output
        sls.heal()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/logstores"),
        ("POST", "/logstores/ls/index"),
        ("POST", "/dashboards"),
        ("POST", "/savedsearches"),
        ("PUT", "/resources/sls.alert.action_policy/records"),
        ("POST", "/jobs"),
    ],
)
def test_setup_that_failed_half_way_continues_when_run_again(
    sls: LoopbackSLS, operator: Operator, method: str, path: str
) -> None:
    sls.bare()
    sls.fail(method, path)
    assert operator.setup(make_project=True) == 1
    assert re.search("Unauthorized: denied by sts or ram: check ALIBABA_CLOUD_ACCESS_KEY_ID", operator.lines[-2])
    assert "run it again" in operator.lines[-1]
    sls.heal()
    assert operator.setup(make_project=True) == 0
    assert len(sls.console) == 19


def test_setup_waits_for_a_new_logstore_to_be_known(sls: LoopbackSLS, operator: Operator) -> None:
    sls.bare()
    sls.fail("POST", "/logstores/ls/index", "LogStoreNotExist", 404, "logstore ls does not exist")

    def heal() -> None:
        sls.wait_until(lambda: sls.outcomes["LogStoreNotExist"] > 0)
        sls.heal()

    healer = threading.Thread(target=heal)
    healer.start()
    assert operator.setup(make_project=True) == 0, operator.output
    healer.join()


def test_setup_without_a_project_says_at_once_how_to_create_one(sls: LoopbackSLS, operator: Operator) -> None:
    sls.bare()
    began = time.monotonic()
    assert operator.setup() == 1
    assert "--make-project" in operator.output
    assert time.monotonic() - began < 10


def test_region_is_the_endpoints_or_the_one_given() -> None:
    def at(endpoint: str, name: str = "") -> Settings:
        return Settings(sls_endpoint=endpoint, sls_project="p", sls_logstore="l", sls_region=name)

    assert region(at("cn-hangzhou.log.aliyuncs.com")) == "cn-hangzhou"
    assert region(at("https://ap-southeast-1-intranet.log.aliyuncs.com/")) == "ap-southeast-1"
    assert region(at("log.example.com", "cn-beijing")) == "cn-beijing"
    with pytest.raises(SettingsError, match="set SLS_REGION"):
        region(at("log-global.aliyuncs.com"))
    assert for_account(at("cn-hangzhou.log.aliyuncs.com")).sls_endpoint == "https://cn-heyuan.log.aliyuncs.com"
    there = for_account(at("http://cn-hangzhou.log.aliyuncs.com", "cn-hangzhou"))
    assert (there.sls_endpoint, there.sls_region) == ("http://cn-heyuan.log.aliyuncs.com", "cn-heyuan")


def test_recipients_are_written_in_the_accounts_region(
    sls: LoopbackSLS, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    asked = []

    def connect(settings: Settings) -> Any:
        asked.append(settings.sls_endpoint)
        return SimpleNamespace(upsert_resource_record=lambda kind, _: asked.append(kind)) if asked[1:] else MagicMock()

    assert setup(connect, operator.settings, BOTH) == 0
    there = [resource.kind for resource in desired(operator.settings, BOTH, False, None) if "." in resource.kind]
    assert asked == [f"http://{sls.endpoint}", "http://cn-heyuan.log.aliyuncs.com", *there]


# --- check


def test_check_finds_its_record(sls: LoopbackSLS, operator: Operator) -> None:
    operator.setup()
    assert operator.check() == 0
    assert "found it" in operator.lines[-1]
    assert len(sls.logs) == 1


@pytest.mark.parametrize(
    ("mode", "words"),
    [
        ("wrong key", "check ALIBABA_CLOUD_ACCESS_KEY_ID"),
        ("no project", "setup --make-project"),
        ("no logstore", "create it: python -m sls setup"),
        ("skew", "clock"),
        ("reset", "check SLS_ENDPOINT"),
        ("error500", "InternalServerError"),
    ],
)
def test_check_reports_why_no_record_is_taken(sls: LoopbackSLS, operator: Operator, mode: str, words: str) -> None:
    sls.mode = mode
    assert operator.check() == 1
    assert "does not take" in operator.output
    assert words in operator.output


def test_check_reports_that_no_server_listens(sls: LoopbackSLS, operator: Operator) -> None:
    sls.down()
    assert operator.check() == 1
    assert "check SLS_ENDPOINT, and this machine's DNS" in operator.output


def test_check_names_the_missing_permission(sls: LoopbackSLS, operator: Operator) -> None:
    sls.fail("POST", "/logstores/ls/shards/lb", message="denied by sts or ram, action: log:PostLogStoreLogs")
    assert operator.check() == 1
    assert "log:PostLogStoreLogs" in operator.output


def test_check_with_a_key_that_may_only_write_does_not_search(sls: LoopbackSLS, operator: Operator) -> None:
    sls.fail("POST", "/logstores/ls/logs", message="denied by sts or ram, action: log:GetLogStoreLogs")
    assert operator.check() == 0
    assert "not searched for" in operator.lines[-1]
    assert "log:GetLogStoreLogs" in operator.lines[-1]


def test_check_reports_that_there_is_no_index(operator: Operator) -> None:
    assert operator.check() == 1
    assert "create it: python -m sls setup" in operator.output


def test_check_reports_that_the_record_was_not_found(
    sls: LoopbackSLS, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator.setup()
    ticks = itertools.count(time.time(), 0.05)  # so that it looks before its time is over, on any machine
    monkeypatch.setattr("sls.check.time", SimpleNamespace(time=lambda: next(ticks), sleep=lambda _: None))
    sls.fail("POST", "/logstores/ls/logs", "ServerBusy", 503, "busy")
    assert operator.check(wait=0.2) == 1
    assert "ServerBusy" in operator.lines[-1]
    sls.heal()
    sls.operations.insert(0, ("POST", "/logstores/ls/logs", lambda *_: {"meta": {"progress": "Complete"}, "data": []}))
    assert operator.check(wait=0.2) == 1
    assert "could not be found" in operator.lines[-1]
    assert "new index" in operator.lines[-1]


# --- the data


SETTINGS = Settings(sls_endpoint="cn-hangzhou.log.aliyuncs.com", sls_project="proj", sls_logstore="ls")
RESOURCES = list(desired(SETTINGS, BOTH, True, None))
KEYS: dict[str, Any] = next(resource.body["keys"] for resource in RESOURCES if resource.kind == "index")
ALERTS = {resource.name.removeprefix("ls-"): resource.body for resource in RESOURCES if resource.kind == "alert"}
CHARTS = {
    chart["title"]: chart for resource in RESOURCES if resource.kind == "dashboard" for chart in resource.body["charts"]
}
SEARCHES = {t.name: t.body["searchQuery"] for t in RESOURCES if t.kind == "savedsearch"}


def query_of(body: dict[str, Any]) -> str:
    """Return the query of an alert or a chart."""
    configuration = body.get("configuration")
    query: str = configuration["queryList"][0]["query"] if configuration else body["search"]["chartQueries"][0]["query"]
    return query


QUERIES = {name: query_of(body) for name, body in (ALERTS | CHARTS).items()} | SEARCHES
SQL_WORDS = {*"select as from log group by order desc limit and or not is null in distinct time".split()}  # noqa: SIM905
FUNCTIONS = {*"count count_if sum avg max round coalesce if approx_percentile date_format from_unixtime".split()}  # noqa: SIM905


def aliases(query: str) -> set[str]:
    """Return the names that a query gives its columns."""
    return set(re.findall(r"\bas (\w+)", query))


@pytest.mark.parametrize("name", QUERIES)
def test_every_field_of_a_query_is_indexed_with_its_type(name: str) -> None:
    search, _, sql = QUERIES[name].partition(" | ")
    for key, operator in re.findall(r"(\w+)\s*(:|>=|>|<=|<)", re.sub('".*?"', "", search)):
        assert KEYS[key]["type"] == "text" if operator == ":" else KEYS[key]["type"] in ("long", "double"), key
    sql = re.sub(r"'.*?'", "", sql)
    used = set(re.findall(r"[a-z_]\w*", sql)) - SQL_WORDS - FUNCTIONS - aliases(sql) - {"__time__"}
    # An alias may have the name of a field; what is within a function is the field.
    within = set(re.findall(r"(?:sum|approx_percentile)\((?:if\(.*?, )?\"?(\w+)", sql)) - {"if"}
    for key in used | within:
        assert KEYS[key]["doc_value"], key
    for key in within - {"variant"}:
        assert KEYS[key]["type"] in ("long", "double"), key


def test_every_placeholder_is_filled() -> None:
    for _, _, body in RESOURCES:
        for string in strings(body):
            # What is left are variables of SLS itself, in the annotations of alerts.
            assert "$" not in re.sub(r"\$\{[a-z0-9]+\}", "", string), string
    for alert in ALERTS.values():
        for annotation in alert["configuration"]["annotations"]:
            assert set(re.findall(r"\$\{(\w+)\}", annotation["value"])) <= aliases(query_of(alert))


def strings(node: Any) -> Iterator[str]:
    """Yield every string in a body."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from strings(value)


def test_names_and_conditions_are_as_sls_takes_them() -> None:
    for alert in ALERTS.values():
        assert re.fullmatch("[0-9a-z][0-9a-z_-]{2,62}[0-9a-z]", alert["name"])
        assert 4 <= len(alert["displayName"]) <= 64
        (severity,) = alert["configuration"]["severityConfigurations"]
        condition = severity["evalCondition"]["condition"]
        assert len(condition) <= 128
        # Variables have letters and digits only, and are columns of the query.
        assert set(re.findall(r"[A-Za-z_]\w*", condition)) <= {a for a in aliases(query_of(alert)) if a.isalnum()}
        assert severity["severity"] in (2, 4, 6, 8, 10)
        assert re.fullmatch("[1-9][0-9]*[mh]", alert["schedule"]["interval"])
    assert all(3 <= len(name) <= 63 for name in SEARCHES)
    for resource in RESOURCES:
        if "." in resource.kind:
            assert re.fullmatch("[a-z][a-z0-9_.-]{4,59}", resource.name)


def test_charts_stand_beside_each_other_and_show_columns_of_their_queries() -> None:
    taken = set()
    for chart in CHARTS.values():
        display = chart["display"]
        assert display["xPos"] + display["width"] <= 24
        for x in range(display["xPos"], display["xPos"] + display["width"]):
            for y in range(display["yPos"], display["yPos"] + display["height"]):
                assert (x, y) not in taken, chart["title"]
                taken.add((x, y))
        shown = display.get("queryOptionMap", {}).get("A", {})
        assert set(shown.get("showField", [])) | set(shown.get("yAxisKeys", [])) <= aliases(query_of(chart))
    assert len(CHARTS) == 13


def test_every_alert_has_its_section_in_the_operations_guide() -> None:
    guide = (ROOT / "docs/operations.md").read_text()
    headings = set(re.findall("^### Alert: (.+)$", guide, re.MULTILINE))
    assert headings >= {alert["displayName"] for alert in ALERTS.values()}  # of the others see test_prometheus.py
    for alert in ALERTS.values():
        description = alert["configuration"]["annotations"][1]["value"]
        assert f'Read "Alert: {alert["displayName"]}" in docs/operations.md' in description


# --- what the queries find


def request(**fields: Any) -> dict[str, Any]:
    """Return the record of a request that was answered, but for `fields`."""
    fine = {"response_time": 0.01, "success": "true", "error": "", "error_type": "", "status": 200, "path": "/predict"}
    more = {"method": "POST", "rows": 1, "model_version": "1", "variant": "stable", "user": "alice", "request_id": "r"}
    return fine | more | {"record_id": "a-1", "pid": 1} | fields


def failed(error_type: str = "model", **fields: Any) -> dict[str, Any]:
    """Return the record of a request that failed."""
    status = {"model": 500, "internal": 500, "overload": 503, "client": 422, "auth": 403}[error_type]
    return request(success="false", error="words", error_type=error_type, status=status, **fields)


# As server.py and monitor.py write them, and `sls check` and `sls test-alert`.
UNAUTHENTICATED = failed("auth") | {"status": 401, "response_time": 0.0, "rows": 0, "user": "", "requests": 500}
DROPPED = {"dropped": 7, "reason": "the journal was full", "record_id": "a-2", "pid": 1}
CHECK = {"check": "1", "record_id": "c"}
TEST = {"test_alert": "1", "record_id": "t"}
OTHERS = [UNAUTHENTICATED, DROPPED, CHECK, TEST]


class Percentile:
    """The aggregate approx_percentile, exactly."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def step(self, value: float | None, q: float) -> None:
        self.q = q
        if value is not None:
            self.values.append(value)

    def finalize(self) -> float | None:
        return sorted(self.values)[max(0, math.ceil(len(self.values) * self.q) - 1)] if self.values else None


def run(query: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what a query of SLS finds: SQLite stands in for its SQL, and Python for its search."""
    search, _, sql = query.partition(" | ")
    # A term of a key that a record lacks is false.
    condition = re.sub(r'(\w+)\s*:\s*("[^"]*"|\w+)', lambda m: f"(get({m[1]!r}) == {m[2].strip(chr(34))!r})", search)
    condition = re.sub(r"(\w+)\s*(>=|>)\s*(\d+)", r"((get('\1') or 0) \2 \3)", condition)
    found = [record for record in records if eval(condition, {"get": record.get})]
    if not sql:
        return found
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    database.create_function("if", -1, lambda *given: given[1] if given[0] else given[2] if len(given) > 2 else None)
    database.create_function("from_unixtime", 1, lambda seconds: seconds)
    database.create_function("date_format", 2, lambda seconds, _: str(seconds))
    database.create_aggregate("approx_percentile", 2, Percentile)
    columns = [*KEYS, "__time__"]
    database.execute(f"create table log ({', '.join(columns)})")
    for n, record in enumerate(found):
        database.execute(
            f"insert into log values ({', '.join('?' * len(columns))})",
            [{"__time__": 1000 + n, **record}.get(column) for column in columns],
        )
    # Of no rows, SQLite's `total` is 0, and an aggregate of ours would be null.
    select, *clauses = re.split(r" (?=group by|order by|limit)", sql.replace("count_if(", "total("), maxsplit=1)
    rows = database.execute(" ".join([select, "from log", *clauses])).fetchall()
    database.close()
    return [dict(row) for row in rows]


def fires(name: str, records: list[dict[str, Any]]) -> bool:
    """Return whether an alert's condition holds over records of its window."""
    configuration = ALERTS[name]["configuration"]
    condition = configuration["severityConfigurations"][0]["evalCondition"]["condition"]
    condition = condition.replace("&&", "and").replace("||", "or")
    return any(eval(condition, dict(row)) for row in run(configuration["queryList"][0]["query"], records))


CANARY = [request(variant="canary", model_version="2") for _ in range(100)]
STABLE = [request() for _ in range(100)]


@pytest.mark.parametrize(
    ("name", "records", "expected"),
    [
        ("error-rate", STABLE, False),
        ("error-rate", [], False),
        ("error-rate", [*STABLE, *[failed("model")] * 10], True),
        ("error-rate", [*STABLE, *[failed("overload")] * 10], True),
        ("error-rate", [*STABLE, *[failed("internal")] * 10], True),
        ("error-rate", [*STABLE, *[failed("client")] * 500, *[failed("auth")] * 500], False),
        ("error-rate", [failed("model")] * 19, False),
        ("error-rate", [*[failed("model")] * 20, *[UNAUTHENTICATED] * 10_000], True),
        ("error-rate", OTHERS * 100, False),
        ("slow", STABLE, False),
        ("slow", [], False),
        ("slow", [*STABLE, *[request(response_time=1.5)] * 3], True),
        ("slow", [request(response_time=1.5)] * 19, False),
        ("slow", [*STABLE, *[failed("client", response_time=30)] * 50], False),
        ("slow", OTHERS * 100, False),
        ("no-traffic", [], True),
        ("no-traffic", OTHERS * 100, True),
        ("no-traffic", [request()], False),
        ("no-traffic", [failed("client")], False),
        ("dropped", STABLE, False),
        ("dropped", [], False),
        ("dropped", [*STABLE, DROPPED], True),
        ("dropped", [UNAUTHENTICATED, CHECK, TEST], False),
        ("canary", STABLE, False),
        ("canary", [], False),
        ("canary", [*STABLE, *CANARY], False),
        ("canary", [*STABLE, *CANARY[:60], *[failed(variant="canary")] * 10], True),
        ("canary", [*STABLE, *[failed(variant="canary")] * 49], False),
        ("canary", [*STABLE, *[failed()] * 10, *CANARY, *[failed(variant="canary")] * 10], False),
        ("canary", [*STABLE, *CANARY, *[request(variant="canary", response_time=0.1)] * 5], True),
        ("canary", [*STABLE, *CANARY, *[request(variant="canary", response_time=0.012)] * 5], False),
        ("canary", OTHERS * 100, False),
        ("test", [*STABLE, TEST], True),
        ("test", [*STABLE, UNAUTHENTICATED, DROPPED, CHECK], False),
    ],
)
def test_alert_fires_when_it_should_and_not_otherwise(name: str, records: list[dict[str, Any]], expected: bool) -> None:
    assert fires(name, records) is expected


def test_records_that_are_not_requests_change_no_figure() -> None:
    requests = [*STABLE, *CANARY, *[failed("model")] * 3, *[failed("client")] * 5]
    for name, query in QUERIES.items():
        if name not in ("dropped", "outside", "test", "ls-dropped", "ls-strangers"):
            with_others = run(query, [*requests, *OTHERS * 10])
            assert with_others == run(query, requests), name
            assert with_others or name in ("ls-request", "ls-slow"), name


def test_dashboard_shows_what_happened() -> None:
    records = [*STABLE, *CANARY, *[failed("model", user="bob", response_time=2)] * 50, UNAUTHENTICATED, DROPPED]
    rows = {name: run(query, records) for name, query in QUERIES.items()}
    assert rows["requests"] == [{"total": 250}]
    assert rows["success-rate"] == [{"percent": 80.0}]
    assert rows["p99"] == [{"p99": 10.0}]
    assert rows["dropped"] == [{"lost": 7}]
    assert [(row["variant"], row["total"], row["error_percent"]) for row in rows["versions"]] == [
        ("stable", 150, 33.33),
        ("canary", 100, 0.0),
    ]
    assert [(row["user"], row["total"], row["success_percent"]) for row in rows["users"]] == [
        ("alice", 200, 100.0),
        ("bob", 50, 0.0),
    ]
    assert [(row["error_type"], row["total"]) for row in rows["error-words"]] == [("model", 50)]
    assert {row["response_time"] for row in rows["slowest"]} == {2}
    assert [(sum(row[key] for row in rows["outside"])) for key in ("unauthenticated", "lost")] == [500, 7]
    assert len(rows["ls-failures"]) == len(rows["ls-slow"]) == 50


def test_records_of_check_and_test_alert_are_those_the_queries_were_tried_with(
    sls: LoopbackSLS, operator: Operator
) -> None:
    operator.check(wait=0.1)
    assert fire_test_alert(operator.client) == 0
    assert "Test alert" in operator.lines[-1]
    sent = [{key for key in log if not key.startswith("__")} for log in sls.logs]
    assert sent == [set(CHECK), set(TEST)]
    assert fires("test", sls.logs)
    sls.mode = "wrong key"
    assert fire_test_alert(operator.client) == 1
