"""Rules, alerts and dashboard agree with the metrics, by promtool and by a real Prometheus."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest
import runbook
import yaml
from conftest import PASSWORD, ROOT, Gunicorn, Server, basic, free_port, gunicorn, write_users
from nginx_tools import substitute
from prometheus_client.parser import text_string_to_metric_families
from sklearn.dummy import DummyClassifier

from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures, wilson
from model.batching import call_directly
from model.loaded import Answer
from monitor import LOSSES, Journal
from operations import exits
from telemetry.certificate import families as certificate_families
from telemetry.drift import Drift
from telemetry.feedback_metrics import families
from telemetry.metrics import AUTH_STATUSES, OUTCOMES, RESPONSE_SECONDS, Metrics
from worker_slot import WorkerSlot

HERE = ROOT / "deploy/prometheus"
RULES = yaml.safe_load((HERE / "rules.yml").read_text())
RUNBOOKS = "https://git.example.org/prediction-server"  # until somebody puts in the address of a copy
CONFIGURATION = yaml.safe_load((HERE / "prometheus.yml").read_text())
DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboard.json").read_text())

ALERTS = [rule for group in RULES["groups"] for rule in group["rules"] if "alert" in rule]
RECORDED = {rule["record"] for group in RULES["groups"] for rule in group["rules"] if "record" in rule}
IN_RULES = [rule["expr"] for group in RULES["groups"] for rule in group["rules"]]
IN_DASHBOARD = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

NEW_CERTIFICATE = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "/dev/null", "-subj", "/CN=localhost"]

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("promtool") and shutil.which("prometheus")),
    reason="needs prometheus and promtool: sudo apt install prometheus",
)
needs_amtool = pytest.mark.skipif(
    shutil.which("amtool") is None, reason="needs amtool: sudo apt install prometheus-alertmanager"
)


def promtool(*arguments: Any) -> None:
    """Run promtool, which must find nothing wrong."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the files


@needs_prometheus
def test_prometheus_accepts_the_configuration_and_rules(tmp_path: Path) -> None:
    for file in HERE.glob("*.yml"):
        shutil.copy(file, tmp_path)
    (tmp_path / "password").write_text("not-a-real-one")
    promtool("check", "config", tmp_path / "prometheus.yml")
    promtool("check", "rules", tmp_path / "rules.yml")


@pytest.mark.long
@needs_prometheus
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", HERE / "rules_test.yml")


def minutes(time: str) -> float:
    """Return the minutes of a time of promtool, such as 1h15m."""
    return sum(int(n) * {"m": 1, "h": 60, "d": 1440}[unit] for n, unit in re.findall(r"(\d+)([mhd])", time))


def test_each_alert_is_tested_silent_then_firing_then_resolved() -> None:
    cases = yaml.safe_load((HERE / "rules_test.yml").read_text())["tests"]
    tested: dict[str, set[str]] = {"silent": set(), "firing": set(), "resolved": set()}
    for case in cases:
        fired: dict[str, float] = {}
        for each in case["alert_rule_test"]:
            name, at = each["alertname"], minutes(each["eval_time"])
            if each.get("exp_alerts"):
                tested["firing"].add(name)
                fired.setdefault(name, at)
            else:
                tested["resolved" if fired.get(name, math.inf) < at else "silent"].add(name)
    names = {alert["alert"] for alert in ALERTS}
    assert tested["firing"] == names
    assert tested["silent"] == tested["resolved"] == names - {"Watchdog"}  # which always fires


def page_of(alert: dict[str, Any]) -> str:
    """Return the title of an alert's page."""
    file, _, anchor = alert["annotations"]["runbook_url"].removeprefix(f"{RUNBOOKS}/").partition("#")
    headings = re.findall(r"^### (Alert: .*)$", (ROOT / file).read_text(), re.MULTILINE)
    (found,) = (each for each in headings if each.lower().replace(":", "").replace(" ", "-") == anchor)
    return str(found.removeprefix("Alert: "))


def test_each_alert_has_its_page_and_a_severity() -> None:
    for alert in ALERTS:
        assert "".join(word.capitalize() for word in page_of(alert).split()) == alert["alert"]
        severities = ("none",) if alert["alert"] == "Watchdog" else ("critical", "warning")
        assert alert["labels"]["severity"] in severities


@pytest.mark.long
@needs_prometheus
@needs_amtool
def test_commands_of_the_page_end_in_a_prometheus_that_scrapes(tmp_path: Path, iris_file: Path) -> None:
    """Word for word in a copy of deploy/prometheus, with the settings of a server that runs here."""
    (block,) = runbook.commands(__file__, "operations.md", "Prometheus and Grafana")
    copy = Path(shutil.copytree(HERE, tmp_path / "deploy/prometheus"))
    with gunicorn(tmp_path, model_path=iris_file) as server:
        targets = {f"prediction-{number}.example.org:5000": f"127.0.0.1:{server.port}" for number in (1, 2)}
        (copy / "prometheus.yml").write_text(substitute((copy / "prometheus.yml").read_text(), targets))
        stand_ins = f'set -o pipefail; sudo() {{ "{sys.executable}" "${{@:2}}"; }}\n'
        environ = os.environ | {"PYTHONPATH": str(ROOT), "USERS_FILE": str(tmp_path / "users.json")}
        done = subprocess.run(
            ["bash", "-euc", stand_ins + block], cwd=tmp_path, env=environ, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "git.example.org" not in (copy / "rules.yml").read_text() + (copy / "rules_test.yml").read_text()
        with running_prometheus(copy) as watching:
            watching.wait_until(lambda: watching.value("sum(up)") == 1)  # of both targets, which are one


@needs_amtool
def test_alertmanager_routes_each_severity() -> None:
    file = HERE / "alertmanager.yml"

    def amtool(*arguments: str) -> str:
        done = subprocess.run(["amtool", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    amtool("check-config", str(file))
    routes = {"critical": "on-call", "warning": "mail"}
    for alert in ALERTS:
        labels = [f"alertname={alert['alert']}", f"severity={alert['labels']['severity']}", "job=prediction-server"]
        receiver = amtool("config", "routes", "test", f"--config.file={file}", *labels)
        assert receiver == routes.get(alert["labels"]["severity"], "dead-mans-switch"), alert["alert"]


def test_alerts_that_inhibit_others_are_there() -> None:
    names = {alert["alert"] for alert in ALERTS}
    for rule in yaml.safe_load((HERE / "alertmanager.yml").read_text())["inhibit_rules"]:
        for matcher in (*rule["source_matchers"], *rule["target_matchers"]):
            label, values = re.split("=~|=", matcher, maxsplit=1)
            assert label != "alertname" or set(values.strip('"').split("|")) <= names


def test_pages_say_which_alerts_only_prometheus_has() -> None:
    guide = (ROOT / "docs/alerts.md").read_text()
    only = set(re.findall(r"^### Alert: (.*)\n\nPrometheus only\.", guide, re.MULTILINE))
    of_sls = {alert["title"] for alert in json.loads((ROOT / "deploy/sls/alerts.json").read_text())["alerts"]}
    assert set(re.findall(r"^### Alert: (.*)$", guide, re.MULTILINE)) == only | of_sls
    assert {page_of(alert) for alert in ALERTS} == only | of_sls - {"Test alert"}


@needs_prometheus
def test_each_expression_of_the_dashboard_is_valid(tmp_path: Path) -> None:
    # In a file of rules, since this promtool does not check single expressions.
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m").replace("$job", "a-job")}
        for number, expression in enumerate(IN_DASHBOARD)
    ]
    assert len(rules) > 20
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    promtool("check", "rules", tmp_path / "rules.yml")


def test_panels_have_unique_ids_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


# --- the names in them


@pytest.fixture(scope="module")
def exposed(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Return the names of all samples of a server that ships."""
    place = tmp_path_factory.mktemp("exposed")
    Journal(place, 2**20).append({"n": 1})
    slot = WorkerSlot(place / "workers")
    slot.publish({"stable": "1", "canary": None, "error": None})
    metrics = Metrics(place, ships=True)
    figures = {("1", "stable"): Figures(CLASSIFICATION), ("2", "stable"): Figures(REGRESSION)}
    metrics.on_expose.append(lambda add: add(families(figures)))
    drift = Drift(place, slot, call_directly)
    drift.tick(lambda record: None)
    about = {"sha256": "", "reference": {"classes": ["a"], "counts": [40, 0]}}
    model: Any = SimpleNamespace(version="1", about=about, signature=SimpleNamespace(columns=None))
    drift.count(Answer(["a"], None, model, "predict", [[0.5]]))
    metrics.on_expose.append(lambda add: add(drift.families()))
    certificate = place / "certificate.pem"
    subprocess.run(["openssl", *NEW_CERTIFICATE, "-days", "1", "-out", certificate], check=True, capture_output=True)
    metrics.on_expose.append(lambda add: add(certificate_families(certificate)))
    state = {"configured": 1, "exits": dict.fromkeys(exits.REASONS, 0)}
    (place / "workers/exits.json").write_text(json.dumps(state))
    metrics.on_expose.append(lambda add: add(exits.families(place / "workers")))
    metrics.count_request(0.1, {"error_type": "", "model_version": "1", "variant": "stable"})
    stable = {"version": "1", "load_seconds": 1.0, "error_bound": 0.1}
    text = metrics.expose("", {"ready": True, "stable": stable, "canary": None})[0]
    found = text_string_to_metric_families(text.decode())
    return {sample.name for family in found for sample in family.samples}


@pytest.mark.parametrize("expression", IN_RULES + IN_DASHBOARD)
def test_names_and_values_are_those_of_the_metrics(expression: str, exposed: set[str]) -> None:
    names = set(re.findall(r"(?<![\w:])prediction_\w+(?![\w:])", expression))
    recorded = set(re.findall(r"\b\w+:prediction_\w+:\w+", expression))
    assert names <= exposed
    assert recorded <= RECORDED
    assert names or recorded or re.search(r"\bup\b|vector", expression)
    known = {"outcome": set(OUTCOMES.values()), "reason": {*LOSSES, *exits.REASONS}, "status": set(AUTH_STATUSES)}
    known |= {"variant": {"stable", "canary", ""}, "model_version": {""}, "day": {"today", "yesterday"}}
    known |= {"le": {f"{each}" for each in RESPONSE_SECONDS}}
    for label, values in re.findall(r'(\w+)(?:=~|!=|=)"([^"]*)"', expression):
        assert label == "job" or set(values.split("|")) <= known[label]


def test_each_metric_is_on_the_dashboard(exposed: set[str]) -> None:
    shown = " ".join(IN_DASHBOARD + [rule["expr"] for group in RULES["groups"] for rule in group["rules"]])
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in exposed if not name.endswith("_created")}
    assert {name for name in families if name not in shown} == set()


# --- a real Prometheus


class Prometheus(Server):
    """A running Prometheus."""

    def get(self, path: str, **query: str) -> Any:
        """Ask its API."""
        status, _, body = self.ask("GET", f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
        assert status == 200, body
        return json.loads(body)["data"]

    def value(self, expression: str) -> float | None:
        """Return the value of an expression that has one, or None."""
        found = self.get("query", query=expression)["result"]
        return float(found[0]["value"][1]) if found else None

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        return {alert["labels"]["alertname"] for alert in self.get("alerts")["alerts"] if alert["state"] == "firing"}

    def is_up(self) -> bool:
        """Return whether it answers."""
        try:
            return self.ask("GET", "/-/ready")[0] == 200
        except OSError:
            return False


@contextmanager
def prometheus(place: Path, *targets: int, change: Callable[[str], str] = str) -> Iterator[Prometheus]:
    """Run Prometheus with the files of deploy/prometheus; for alerts, a minute takes a tenth of a second.

    Args:
        place: a directory for it.
        targets: the ports of servers.
        change: makes other rules of those.
    """
    place.mkdir(exist_ok=True)
    configuration = json.loads(json.dumps(CONFIGURATION))
    configuration["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms", "scrape_timeout": "500ms"}
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{target}" for target in targets]}]
    rules = re.sub(r"^( *for): (\d+)m$", r"\1: \g<2>00ms", (HERE / "rules.yml").read_text(), flags=re.MULTILINE)
    (place / "prometheus.yml").write_text(json.dumps(configuration))
    (place / "rules.yml").write_text(change(rules))
    (place / job["basic_auth"]["password_file"]).write_text(PASSWORD)
    with running_prometheus(place) as server:
        yield server


@contextmanager
def running_prometheus(place: Path) -> Iterator[Prometheus]:
    """Run Prometheus with the configuration in a directory."""
    port = free_port()
    arguments = [f"--config.file={place / 'prometheus.yml'}", f"--storage.tsdb.path={place / 'data'}"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(
            ["prometheus", *arguments, f"--web.listen-address=127.0.0.1:{port}"], cwd=place, stdout=log, stderr=log
        )
    server = Prometheus(process, port, place / "log")
    try:
        server.wait_until(server.is_up)
        yield server
    finally:
        process.kill()
        process.wait()


MODULE = """
class Picky:
    n_features_in_ = 1

    def predict(self, rows):
        if rows[0][0] < 0:
            raise RuntimeError("negative")
        return [0] * len(rows)
"""


@needs_prometheus
def test_real_prometheus_sees_right_sums_and_alerts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "picky_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    from picky_module import Picky  # type: ignore[import-not-found]  # just written

    joblib.dump(Picky(), tmp_path / "picky.joblib")
    user = CONFIGURATION["scrape_configs"][0]["basic_auth"]["username"]
    write_user(tmp_path / "users.json", user)
    with (
        gunicorn(tmp_path, model_path=tmp_path / "picky.joblib", web_concurrency=2) as server,
        prometheus(tmp_path / "prometheus", server.port) as watching,
    ):
        for asked, total in (
            (1, 1),
            (30, 31),
        ):  # one first: an increase needs a value before it
            for _ in range(asked):
                assert server.predict([[1.0]])[0] == 200
            watching.wait_until(lambda n=total: watching.value('prediction_requests_total{outcome="success"}') == n)
        watching.wait_until(lambda: watching.value("up") == 1)  # a late scrape has no values
        watching.wait_until(lambda: watching.value("prediction_model_workers") == 2)
        watching.wait_until(
            lambda: watching.firing() == {"Watchdog"}
        )  # at first it has not yet seen that the server is up
        for _ in range(30):
            assert server.predict([[-1.0]])[0] == 500
        watching.wait_until(lambda: {"ErrorRate", "ErrorBudget"} <= watching.firing())
        failed = 'prediction_requests_total{outcome="model", variant="stable"}'
        watching.wait_until(lambda: watching.value(failed) == 30)
        watching.wait_until(lambda: abs((watching.value("job:prediction_faults:ratio5m") or 0) - 0.5) < 0.05)
        for group in watching.get("rules")["groups"]:
            assert [(rule["name"], rule.get("lastError")) for rule in group["rules"] if rule["health"] != "ok"] == []
        server.stop(signal.SIGQUIT)  # at once
        watching.wait_until(lambda: {"NoInstanceReady", "InstanceDown"} <= watching.firing())


BOUND = """
def init_app(app, service):
    service.serving.on_describe.append(lambda found: (found["stable"] or {}).update(error_bound=0.2))
"""


@pytest.mark.long
@needs_prometheus
def test_real_prometheus_sees_feedback_and_alerts_on_prediction_errors(tmp_path: Path) -> None:
    (tmp_path / "bound.py").write_text(BOUND)
    joblib.dump(DummyClassifier(strategy="constant", constant=0).fit([[0.0], [1.0]], [0, 1]), tmp_path / "zero.joblib")
    write_user(tmp_path / "users.json", CONFIGURATION["scrape_configs"][0]["basic_auth"]["username"])
    with (
        gunicorn(tmp_path, model_path=tmp_path / "zero.joblib", web_concurrency=2, extensions="+bound") as server,
        prometheus(tmp_path / "prometheus", server.port) as watching,
    ):
        receipts = [receipt(server, rows=10)]  # one first: an increase needs a value before it
        watching.wait_until(lambda: watching.value("prediction_feedback_rows_total") == 0)
        receipts += [receipt(server, rows=10) for _ in range(29)]
        # 80 rows, 40 % of them wrong; over some seconds Prometheus extrapolates them to more.
        send_truths(server, receipts[:8], [0] * 6 + [1] * 4)
        watching.wait_until(lambda: watching.value("prediction_feedback_wrong_rows_total") == 32)
        watching.wait_until(lambda: (watching.value("job_model_version:prediction_error:low1d") or 0) > 0.2)
        assert "PredictionErrorRate" not in watching.firing()  # since Prometheus sees less than 200 rows
        send_truths(server, receipts[:25], [0] * 6 + [1] * 4)  # some for the second time
        watching.wait_until(lambda: "PredictionErrorRate" in watching.firing())
        assert watching.value("prediction_feedback_rows_total") == 250
        assert watching.value("prediction_receipt_rows_total") == 300
        assert watching.value("prediction_feedback_age_seconds_count") == 25
        low = watching.value("job_model_version:prediction_error:low1d")
        assert low == pytest.approx(wilson(100, 250)[0], rel=0.05)  # over seconds, Prometheus extrapolates the rows
        assert "NoFeedback" not in watching.firing()


@pytest.mark.long
@needs_prometheus
def test_real_prometheus_alerts_on_missing_feedback(tmp_path: Path) -> None:
    """With samples of the last 32 hours, since nobody waits for a day."""
    lines = ["# TYPE prediction_feedback_age_seconds_count counter"]
    now = int(time.time())
    for job, last in (("prediction-server", 28 * 60), ("prediction-server-good", 60)):  # minutes
        for ago in range(32 * 60, -1, -1):
            value = 32 * 60 - max(ago, last)
            lines.append(f'prediction_feedback_age_seconds_count{{job="{job}"}} {value} {now - 60 * ago}')
    (tmp_path / "samples").write_text("\n".join([*lines, "# EOF\n"]))
    (tmp_path / "prometheus").mkdir()
    promtool("tsdb", "create-blocks-from", "openmetrics", tmp_path / "samples", tmp_path / "prometheus/data")
    with prometheus(tmp_path / "prometheus", free_port()) as watching:
        watching.wait_until(lambda: "NoFeedback" in watching.firing())
        (alert,) = (each for each in watching.get("alerts")["alerts"] if each["labels"]["alertname"] == "NoFeedback")
        assert alert["labels"]["job"] == "prediction-server"


def receipt(server: Gunicorn, rows: int) -> str:
    """Return the receipt of a prediction of so many rows."""
    body = json.dumps({"data": [[0.0]] * rows}).encode()
    headers = {"Content-Type": "application/json", "Authorization": basic("predict")}
    return str(server.ask("POST", "/predict", body, **headers)[1]["X-Feedback"])


def send_truths(server: Gunicorn, receipts: list[str], truth: list[int]) -> None:
    """Send the same truth for each receipt."""
    body = json.dumps({"feedback": [{"receipt": each, "truth": truth} for each in receipts]}).encode()
    headers = {"Content-Type": "application/json", "Authorization": basic("feedback")}
    status, _, answer = server.ask("POST", "/feedback", body, **headers)
    assert (status, json.loads(answer)["rejected"]) == (200, []), answer


def write_user(path: Path, name: str) -> None:
    """Write the users of the tests, and one more of this name with the role metrics."""
    entries = json.loads(write_users(path).read_text())
    path.write_text(json.dumps(entries | {name: entries["metrics"]}))
