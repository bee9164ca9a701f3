"""Preparing the console, with the real SDK and a loopback SLS; and the queries, in SQLite over records of each kind."""

import itertools
import json
import math
import random
import re
import shlex
import sqlite3
import threading
import time
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import runbook
from conftest import ROOT, basic, records
from loopback_sls import LoopbackSLS
from sklearn.dummy import DummyClassifier, DummyRegressor

from endpoints.error_rate import mean_interval, wilson
from settings import Settings, SettingsError
from sls import console
from sls.__main__ import main
from sls.check import check, fire_test_alert
from sls.client import Client
from sls.console import KEEP_DAYS, Recipients, desired, for_account, region, setup

TOKEN = "0123456789abcdef"
ROBOT = f"https://oapi.dingtalk.com/robot/send?access_token={TOKEN}"
BOTH = Recipients("oncall@example.com", ROBOT, "SECfedcba")
CHINESE = "[\u4e00-\u9fff]"


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
    assert len(sls.console) == len(resources) == len(operator.lines) == 26
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
    assert len(after["dashboard ls-overview"]["charts"]) == 15
    for name, body in after.items():
        if name.startswith("job "):
            assert body == {key: value for key, value in before[name].items() if key != "state"}


def test_setup_in_another_language_updates_titles_and_adds_nothing(sls: LoopbackSLS, operator: Operator) -> None:
    def titles() -> dict[str, str]:
        return {" ".join(name): body["displayName"] for name, body in sls.console.items() if "displayName" in body}

    assert operator.setup() == 0
    english, names = titles(), set(sls.console)
    assert operator.setup(language="zh") == 0, operator.output
    assert {line.rpartition(": ")[2] for line in operator.lines} == {"exists", "updated", "written"}
    assert set(sls.console) == names
    assert titles().keys() == english.keys()
    assert all(re.search(CHINESE, title) for title in titles().values())
    assert operator.setup() == 0
    assert titles() == english


def test_command_prints_the_console_in_chinese_if_it_is_asked_for(
    sls: LoopbackSLS, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.environ", sls.environ())
    assert main(["setup", "--dry-run"]) == 0
    assert not re.search(CHINESE, capsys.readouterr().out)
    assert main(["setup", "--dry-run", "--language", "zh"]) == 0
    assert '"displayName": "测试告警"' in capsys.readouterr().out


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
    assert len(sls.console) == 26


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


class AsInThePage(LoopbackSLS):
    """The project, the log store and the region that the page names."""

    project, logstore, endpoint, region = "my-project", "predictions", "cn-hangzhou.log.aliyuncs.com", "cn-hangzhou"


def test_commands_of_the_page_set_the_console_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Word for word, but for a scheme that leads to the stand-in; each in this process."""
    (page,) = runbook.commands(__file__, "sls.md", "3. The console")
    (first, *others) = [shlex.split(line, comments=True) for line in page.splitlines()]
    with AsInThePage() as sls:
        environ = sls.environ() | dict(each.split("=", 1) for each in first[1:])
        monkeypatch.setattr("os.environ", environ | {"SLS_ENDPOINT": f"http://{environ['SLS_ENDPOINT']}"})
        monkeypatch.setattr(console, "ACCOUNT_REGION", sls.region)
        del sls.console["project", sls.project], sls.console["logstore", sls.logstore]
        for line in others:
            assert line[:3] == [".venv/bin/python", "-m", "sls"]
            assert main(line[3:]) == 0, capsys.readouterr()
        assert {kind for kind, _ in sls.console} >= {"project", "logstore", "index", "dashboard", "savedsearch", "job"}


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
IN_CHINESE = list(desired(SETTINGS, BOTH, True, None, "zh"))
KEYS: dict[str, Any] = next(resource.body["keys"] for resource in RESOURCES if resource.kind == "index")
ALERTS = {resource.name.removeprefix("ls-"): resource.body for resource in RESOURCES if resource.kind == "alert"}
CHARTS = {
    chart["title"]: chart for resource in RESOURCES if resource.kind == "dashboard" for chart in resource.body["charts"]
}
SEARCHES = {t.name: t.body["searchQuery"] for t in RESOURCES if t.kind == "savedsearch"}


def query_of(body: dict[str, Any]) -> str:
    """Return the query of an alert, its first one, or of a chart."""
    configuration = body.get("configuration")
    query: str = configuration["queryList"][0]["query"] if configuration else body["search"]["chartQueries"][0]["query"]
    return query


QUERIES = {name: query_of(body) for name, body in (ALERTS | CHARTS).items()} | SEARCHES
for _name in ("no-feedback", "rows-rejected"):
    QUERIES[f"{_name}, the day before"] = ALERTS[_name]["configuration"]["queryList"][1]["query"]
SQL_WORDS = {
    *"select as from log where group by having order desc limit and or not is null in distinct time cast".split(),  # noqa: SIM905
    "double",
}
FUNCTIONS = {
    *"count count_if sum avg min max round sqrt greatest coalesce nullif if approx_percentile".split(),  # noqa: SIM905
    *("date_format", "from_unixtime"),
}


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
    within -= aliases(sql) - KEYS.keys() | {"coalesce"}
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
            assert set(re.findall(r"\$\{(\w+)\}", annotation["value"])) <= columns(alert)


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
        assert set(re.findall(r"[A-Za-z_]\w*", condition)) <= {name for name in columns(alert) if name.isalnum()}
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
    assert len(CHARTS) == 15


def test_every_alert_has_its_page() -> None:
    guide = (ROOT / "docs/alerts.md").read_text()
    headings = set(re.findall("^### Alert: (.+)$", guide, re.MULTILINE))
    assert headings >= {alert["displayName"] for alert in ALERTS.values()}  # of the others see test_prometheus.py
    for alert in ALERTS.values():
        description = alert["configuration"]["annotations"][1]["value"]
        assert f'Read "Alert: {alert["displayName"]}" in docs/alerts.md' in description


# --- in Chinese


def leaves(node: Any, *path: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield everything in a body that is neither an object nor a list, and its path."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, *path, key)
    else:
        yield path, node


def is_read_by_people(path: tuple[Any, ...]) -> bool:
    """Return whether a body has at this path a title or a description; a webhook's name is one."""
    titles = {"displayName", "description", "project_des", "tag", "user_name", "action_policy_name"}
    return path[-1] in titles or path == ("value", "name") or ("annotations" in path and path[-1] == "value")


def test_console_in_chinese_has_each_text_in_chinese_and_all_else_as_in_english() -> None:
    for english, chinese in zip(RESOURCES, IN_CHINESE, strict=True):
        assert english[:2] == chinese[:2]
        for (path, text), (there, other) in zip(leaves(english.body), leaves(chinese.body), strict=True):
            assert path == there
            if text and is_read_by_people(path):
                assert re.search(CHINESE, other), text
                assert sorted(re.findall(r"\$\{\w+\}", other)) == sorted(re.findall(r"\$\{\w+\}", text))
            else:
                assert text == other


def test_no_translation_is_of_a_text_that_is_gone() -> None:
    files = [json.loads(path.read_text()) for path in console.FILES.glob("*.json") if path.name != "zh.json"]
    here = {*strings(files), RESOURCES[0].body["project_des"]}
    assert set(json.loads((console.FILES / "zh.json").read_text())) <= here


def test_alert_in_chinese_has_its_section_in_the_chinese_guide() -> None:
    guide = (ROOT / "docs/zh/operations.md").read_text()
    alerts = [resource.body for resource in IN_CHINESE if resource.kind == "alert"]
    assert len({alert["displayName"] for alert in alerts}) == len(alerts) == len(ALERTS)
    for english, alert in zip(ALERTS.values(), alerts, strict=True):
        assert 4 <= len(alert["displayName"]) <= 64
        assert f"\n### 告警：{alert['displayName']}（{english['displayName']}）\n" in guide
        description = alert["configuration"]["annotations"][1]["value"]
        assert f"docs/zh/operations.md 的“告警：{alert['displayName']}”" in description


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
# As telemetry/drift.py writes it, for each version and day.
DRIFT = {"event": "drift", "model_version": "1", "variant": "", "day": "2026-01-31", "rows": 1000, "psi": 0.21}
DRIFT |= {"record_id": "d", "pid": 1}
# As operations/exits.py writes it.
DEATH = {"event": "worker_exit", "model_version": "", "variant": "", "reason": "killed", "worker_pid": 1}
DEATH |= {"record_id": "e", "pid": 1}


def truth(number: int = 0, **fields: Any) -> dict[str, Any]:
    """Return the record of an accepted entry of POST /feedback, for a model that classifies."""
    receipt_id = f"{fields.get('model_version', '1')}-{number:x}"
    known = {"event": "feedback", "receipt_id": receipt_id, "model_version": "1", "variant": "stable", "rows": 1}
    known |= {"wrong": 0, "unknown_labels": 0, "abs_error": None, "sq_error": None, "signed_error": None, "age": 3600.0}
    return known | {"user": "alice", "record_id": "a-3", "pid": 1} | fields


def truths(rows: int, wrong: int, **fields: Any) -> list[dict[str, Any]]:
    """Return the records of so many rows, each with a receipt of its own, so many of which were predicted wrongly."""
    bound = {"error_bound": 0.1}
    return [truth(n, wrong=int(n < wrong), **bound | fields) for n in range(rows)]


def errors(*values: float, **fields: Any) -> list[dict[str, Any]]:
    """Return the records of rows of a regression that were off by these."""
    none = {"wrong": None, "unknown_labels": None}
    sums = [{"abs_error": abs(value), "sq_error": value * value, "signed_error": value} for value in values]
    return [truth(n, **none | each | {"error_bound": 0.1} | fields) for n, each in enumerate(sums)]


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
    condition = re.sub(r"(\w+)\s*(>=|>)\s*(\d+)", r"(get('\1') is not None and get('\1') \2 \3)", condition)
    typed = [{key: as_indexed(key, value) for key, value in record.items()} for record in records]
    found = [record for record in typed if eval(condition, {"get": record.get})]
    if not sql:
        return found
    database = sqlite3.connect(":memory:")
    database.row_factory = sqlite3.Row
    database.create_function("if", -1, lambda *given: given[1] if given[0] else given[2] if len(given) > 2 else None)
    database.create_function("from_unixtime", 1, lambda seconds: seconds)
    database.create_function("date_format", 2, lambda seconds, _: str(seconds))
    database.create_function("sqrt", 1, lambda value: None if value is None else math.sqrt(value))
    database.create_function("greatest", 2, lambda *given: None if None in given else max(given))
    database.create_aggregate("approx_percentile", 2, Percentile)
    fields = [*KEYS, "__time__"]
    database.execute(f"create table log ({', '.join(fields)})")
    for n, record in enumerate(found):
        database.execute(
            f"insert into log values ({', '.join('?' * len(fields))})",
            [{"__time__": 1000 + n, **record}.get(field) for field in fields],
        )
    sql = sql.replace(
        "count_if(", "total("
    )  # of no rows, SQLite's `total` is 0, and an aggregate of ours would be null
    if " from " not in sql:
        select, *clauses = re.split(r" (?=group by|order by|limit)", sql, maxsplit=1)
        sql = " ".join([select, "from log", *clauses])
    rows = database.execute(sql).fetchall()
    database.close()
    return [dict(row) for row in rows]


def as_indexed(key: str, value: Any) -> Any:
    """Return a value as SQL sees it: SLS has strings, and those that are no number are null in a field of numbers."""
    if not isinstance(value, str) or KEYS.get(key, {"type": "text"})["type"] == "text":
        return value
    return float(value) if value else None


def fires(name: str, records: list[dict[str, Any]], hours: float = 2 / 60) -> bool:
    """Return whether an alert's condition holds, so many hours after the first record; by then it is indexed."""
    configuration = ALERTS[name]["configuration"]
    condition = configuration["severityConfigurations"][0]["evalCondition"]["condition"]
    condition = condition.replace("&&", "and").replace("||", "or")
    found: list[dict[str, Any]] = [{}]
    first = min((record.get("__time__", 1000) for record in records), default=0)
    for query in configuration["queryList"]:
        start, end = (first + 3600 * (hours + since(query[name])) for name in ("start", "end"))
        within = [record for record in records if start <= record.get("__time__", 1000) <= end]
        found = [row | other for row in found for other in run(query["query"], within)]
    if configuration["queryList"][1:]:
        assert [each["type"] for each in configuration["joinConfigurations"]] == ["cross_join"]
    return any(eval(condition, dict(row)) for row in found)


def since(time: str) -> float:
    """Return the hours of a relative time of SLS."""
    return 0.0 if time == "now" else int(time[:-1]) / {"h": 1, "m": 60}[time[-1]]


def columns(alert: dict[str, Any]) -> set[str]:
    """Return the columns of an alert's queries."""
    records = [truth(error_bound=0.1), DRIFT, DEATH, request()]
    found = [run(query["query"], records) for query in alert["configuration"]["queryList"]]
    return {name for rows in found for row in rows for name in row}


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
        # The Wilson interval of 30 of 200 begins at 0.1071, of 28 of 200 at 0.0987, of 30 of 199 at 0.1077.
        ("prediction-error-rate", truths(200, 30), True),
        ("prediction-error-rate", truths(200, 28), False),
        ("prediction-error-rate", truths(199, 30), False),
        ("prediction-error-rate", truths(200, 30) * 2, True),  # stored twice
        ("prediction-error-rate", truths(199, 30) * 2, False),
        ("prediction-error-rate", truths(200, 30, error_bound=0.11), False),
        ("prediction-error-rate", truths(200, 30, error_bound=None), False),
        ("prediction-error-rate", truths(200, 1, error_bound=0.0), True),
        ("prediction-error-rate", truths(100, 15) + truths(100, 15, variant="canary"), False),  # the same receipts
        ("prediction-error-rate", [*truths(200, 0, model_version="2"), *truths(199, 199)], False),
        ("prediction-error-rate", [truth(n, rows=0, error_bound=0.1) for n in range(300)], False),
        ("prediction-error-rate", [*OTHERS * 100, *STABLE, *CANARY], False),
        # Off by 0 or 0.3, half of them each: the mean is 0.15 ± 0.0208.
        ("prediction-error-rate", errors(*[0.0, 0.3] * 100), True),
        ("prediction-error-rate", errors(*[0.0, -0.3] * 100), True),
        ("prediction-error-rate", errors(*[0.0, 0.3] * 100, error_bound=0.13), False),
        ("prediction-error-rate", errors(*[0.3] * 199), False),
        ("rejected-passwords", STABLE * 10, False),
        ("rejected-passwords", [UNAUTHENTICATED | {"requests": 50}] * 2, False),
        ("rejected-passwords", [UNAUTHENTICATED | {"requests": 50}] * 3, True),
        ("rejected-passwords", [failed("auth")] * 500, False),  # of which each had a password
        ("worker-deaths", [*STABLE, *OTHERS], False),
        ("worker-deaths", [*STABLE, DEATH], True),
        ("no-feedback", [], False),
        ("no-feedback", [truth()], False),
        ("no-feedback", [*STABLE, *OTHERS], False),
        ("prediction-drift", [*STABLE, DRIFT], True),
        ("prediction-drift", [DRIFT | {"psi": 0.2}], False),
        ("prediction-drift", [DRIFT | {"psi": None}], False),
        ("prediction-drift", [DRIFT | {"rows": 999, "psi": 3.0}, DRIFT | {"rows": 5000, "psi": 0.1}], False),
        ("prediction-drift", [DRIFT | {"psi": 0.1}, DRIFT | {"model_version": "2"}], True),
        ("prediction-drift", [*OTHERS, *STABLE, truth()], False),
        ("test", [*STABLE, TEST], True),
        ("test", [*STABLE, UNAUTHENTICATED, DROPPED, CHECK], False),
    ],
)
def test_alert_fires_when_it_should_and_not_otherwise(name: str, records: list[dict[str, Any]], expected: bool) -> None:
    assert fires(name, records) is expected


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ((90, 10), (60, 40), True),
        ((90, 10), (75, 25), False),
        ((50, 50), (40, 60), False),
        ((90, 10), (1, 18), False),
        ((18, 1), (0, 100), False),  # too few to compare with
        ((0, 0), (0, 100), False),
    ],
)
def test_version_whose_callers_cannot_use_it_is_compared_with_the_day_before(
    before: tuple[int, int], now: tuple[int, int], expected: bool
) -> None:
    earlier = [*[request()] * before[0], *[failed("client")] * before[1]]
    later = [*[request(model_version="2")] * now[0], *[failed("client", model_version="2")] * now[1]]
    others = [*OTHERS, *[failed("auth", model_version="")] * 500, *[failed("client", model_version="")] * 500]
    found = [each | {"__time__": 1000} for each in earlier + others]
    found += [each | {"__time__": 1000 + 86_400} for each in later + others]
    assert fires("rows-rejected", found, 24 + 2 / 60) is expected


@pytest.mark.parametrize(("hours", "expected"), [(23, False), (25, True), (47, True), (49, False)])
def test_missing_feedback_is_reported_for_a_day(hours: int, expected: bool) -> None:
    records = [*OTHERS, *STABLE, truth(), request(__time__=1000 + 3600 * hours)]
    assert fires("no-feedback", records, hours) is expected
    assert not fires("no-feedback", [*records, truth(2, __time__=1000 + 3600 * (hours - 1))], hours)


@pytest.mark.parametrize("seed", range(20))
def test_prediction_errors_and_their_intervals_are_those_of_error_rate(seed: int) -> None:
    chance = random.Random(seed)
    n, error = chance.randint(2, 500), chance.random() * chance.random()
    wrong = [chance.random() < error for _ in range(n)]
    off = [chance.gauss(0, 1) for _ in range(n)]
    records = [*truths(n, sum(wrong)), *errors(*off, model_version="2", variant="canary", age=9 * 86400.0)]
    for number, record in enumerate(records[n:]):
        record["__time__"] = 1000 + number
    chance.shuffle(records)
    absolute = [abs(value) for value in off]
    for name in ("prediction-errors-versions", "ls-feedback"):
        found = {row["version"]: row for row in run(QUERIES[name], [*records, *records[: n // 2]])}
        assert found.keys() == {"1", "2"}
        assert {row["served"] for row in found.values()} == {"stable", "canary"}
        assert found["1"]["errors"] == pytest.approx(sum(wrong) / n)
        assert [found["1"][side] for side in ("low", "high")] == pytest.approx(wilson(sum(wrong), n), abs=1e-12)
        assert found["2"]["errors"] == pytest.approx(sum(absolute) / n)
        expected = mean_interval(sum(absolute), sum(value * value for value in off), n)
        assert [found["2"][side] for side in ("low", "high")] == pytest.approx(expected)
    found = {row["version"]: row for row in run(QUERIES["prediction-errors-versions"], records)}
    assert {row["labelled_rows"] for row in found.values()} == {n}
    assert (found["1"]["age_days"], found["2"]["age_days"]) == (0.0, 9.0)
    (hour,) = run(QUERIES["prediction-errors"], records)
    assert hour["stable"] == pytest.approx(100 * sum(wrong) / n)
    assert hour["canary"] == pytest.approx(sum(absolute) / n)


def test_feedback_that_a_server_has_shipped_is_what_the_queries_take(
    sls: LoopbackSLS, operator: Operator, serve: Any
) -> None:
    classifier = DummyClassifier(strategy="constant", constant=0).fit([[0.0], [1.0]], [0, 1])
    regressor = DummyRegressor(strategy="constant", constant=0.0).fit([[0.0], [1.0]], [0.0, 1.0])
    for model, bound in ((classifier, 0.1), (regressor, 0.15)):
        client = serve(model)
        client.service.serving.choose()[0].about["error_bound"] = bound
        answers = [client.post({"data": [[0.0]] * 100}) for _ in range(3)]
        entries = [{"receipt": answer.headers["X-Feedback"], "truth": [0] * 80 + [1] * 20} for answer in answers]
        answer = client.post({"feedback": entries}, "/feedback", Authorization=basic("feedback"))
        assert answer.json["accepted"] == 3
        operator.client.send(written := records(client.journal_dir))
        operator.client.send(written)  # as a shipper that was killed before it saved its progress
    rows = run(QUERIES["prediction-errors-versions"], sls.logs)
    assert {(row["served"], row["labelled_rows"], row["errors"], row["unknown_labels"]) for row in rows} == {
        ("stable", 300.0, 0.2, 0.0),
        ("stable", 300.0, 0.2, None),
    }
    alerts = run(QUERIES["prediction-error-rate"], sls.logs)
    low = wilson(60, 300)[0], mean_interval(60, 60, 300)[0]
    assert [row["low"] - row["bound"] for row in alerts] == pytest.approx([low[0] - 0.1, low[1] - 0.15])
    assert fires("prediction-error-rate", sls.logs)
    assert [(row["served"], row["n"]) for row in run(QUERIES["ls-feedback"], sls.logs)] == [("stable", 300.0)] * 2


def test_records_that_are_not_requests_change_no_figure() -> None:
    requests = [*STABLE, *CANARY, *[failed("model")] * 3, *[failed("client")] * 5]
    for name, query in QUERIES.items():
        others = ("dropped", "outside", "test", "rejected-passwords", "worker-deaths", "ls-dropped", "ls-strangers")
        if name not in others and not re.search("feedback|drift", query):
            with_others = run(query, [*requests, *OTHERS * 10, *truths(50, 10), DRIFT, DEATH])
            assert with_others == run(query, requests), name
            assert with_others or name in ("ls-request", "ls-slow"), name


@pytest.mark.parametrize("days", [7, 30])
def test_charts_of_days_show_the_latest_minutes(days: int) -> None:
    records = [request(__time__=60 * n) for n in range(days * 1440)]
    times = [row["time"] for row in run(QUERIES["rate"], records)]
    assert times == list(range(60 * (days * 1440 - 10_000), 60 * days * 1440, 60))
    per_minute = [name for name, query in QUERIES.items() if "__time__ % 60 as time" in query]
    assert len(per_minute) == 5
    assert all("order by time desc limit 10000) order by time limit 10000" in QUERIES[name] for name in per_minute)


def test_windows_of_alerts_end_where_records_are_indexed() -> None:
    ends = {name: alert["configuration"]["queryList"][0]["end"] for name, alert in ALERTS.items()}
    assert {name for name, end in ends.items() if end != "-1m"} == {"test"}  # for which somebody waits


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
