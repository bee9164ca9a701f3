"""Alerts that SLS and Prometheus both have mean the same: the same requests fire both, or neither.

The requests go through the journal and the metrics as a server's do. SLS's queries are run over the journal's records
(tests/sls/test_console.py), and Prometheus' rules, by promtool, over what GET /metrics shows after each minute.
"""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from test_console import ALERTS as OF_SLS
from test_console import fires
from test_prometheus import ALERTS, needs_prometheus, page_of
from werkzeug.exceptions import default_exceptions

from monitor import BLANK, LOSSES, Journal, RequestLog, read_lines, segments
from operations import exits
from telemetry.metrics import Metrics

BOTH = {OF_SLS[name]["displayName"]: name for name in OF_SLS}
SERVED: dict[str, Any] = {"ready": True, "stable": None, "canary": None}
# Both are compared with endpoints/error_rate.py; and drift is of today in Prometheus, in SLS of yesterday.
ELSEWHERE = {"Prediction error rate", "No feedback", "Prediction drift"}


class Request(NamedTuple):
    """A request; `outcome` is "" for success, or the type of its error; with `user` None it had no valid password."""

    outcome: str = ""
    seconds: float = 0.01
    variant: str = "stable"
    version: str = "1"
    user: str | None = "alice"

    def record(self) -> dict[str, Any]:
        """Return its record, as server.py makes it."""
        status = {"": 200, "client": 422, "auth": 403, "model": 500, "overload": 503, "internal": 500}[self.outcome]
        known = {"status": status, "success": status < 400, "error_type": self.outcome, "path": "/predict", "rows": 1}
        known |= {"user": self.user, "error": self.outcome and "words"}
        if self.outcome != "auth":  # of a request that is rejected before, nothing is known
            known |= {"variant": self.variant, "model_version": self.version}
        return BLANK | known | ({"status": 401} if self.user is None else {})


OK, CANARY = Request(), Request(variant="canary", version="2")
FAULT, CLIENT, AUTH, STRANGER = Request("model"), Request("client"), Request("auth"), Request("auth", user=None)

Minute = list[Any]  # of requests, and of what else happens: a reason of LOSSES or of exits.REASONS


def steady(*requests: Any) -> list[Minute]:
    """Return half an hour of the same requests each minute."""
    return [list(requests)] * 30


def after_hours(now: list[Any]) -> list[Minute]:
    """Return four hours in which a tenth of the requests were rejected, and then twenty minutes of others."""
    return [[*[OK] * 9, CLIENT]] * 240 + [now] * 20


NEW, NEW_CLIENT = Request(version="2"), Request("client", version="2")

SCENARIOS: list[tuple[str, bool, list[Minute]]] = [
    ("Error rate", True, steady(*[OK] * 100, *[FAULT] * 6)),
    ("Error rate", False, steady(*[OK] * 100, *[FAULT] * 5)),
    ("Error rate", True, steady(*[OK] * 70, *[FAULT] * 4, *[AUTH] * 60)),  # who may not ask does not dilute it
    ("Error rate", True, steady(*[OK] * 70, Request("overload"), Request("internal"), *[FAULT] * 2, *[STRANGER] * 60)),
    ("Error rate", False, steady(*[OK] * 80, *[FAULT] * 4, *[CLIENT] * 60)),
    ("Error rate", False, steady(*[FAULT] * 3)),  # too few
    ("Error rate", True, steady(*[FAULT] * 5)),
    ("Slow answers", True, steady(*[OK] * 97, *[Request(seconds=2.0)] * 3)),
    ("Slow answers", False, steady(*[OK] * 997, *[Request(seconds=2.0)] * 3)),
    ("Slow answers", False, steady(*[OK] * 97, *[Request("client", 30.0)] * 50, *[Request("model", 30.0)])),
    ("Slow answers", False, steady(*[Request(seconds=2.0)] * 3)),
    ("No traffic", True, [*[[OK]] * 10, *[[]] * 20]),
    ("No traffic", True, [*[[OK]] * 10, *[[AUTH, STRANGER]] * 20]),
    ("No traffic", False, [*[[OK]] * 10, *[[]] * 10, [FAULT], *[[]] * 9]),
    ("Records dropped", True, [[OK], [OK, LOSSES[0]], *[[OK]] * 180]),
    ("Records dropped", True, [[OK], [OK, LOSSES[1]], *[[OK]] * 180]),
    ("Records dropped", False, steady(OK)),
    ("Canary worse than stable", True, steady(*[OK] * 50, *[CANARY] * 50, *[CANARY._replace(outcome="model")] * 2)),
    ("Canary worse than stable", False, steady(*[OK] * 50, *[CANARY] * 200, *[CANARY._replace(outcome="model")] * 3)),
    # Slow failures are no slow answers.
    (
        "Canary worse than stable",
        False,
        steady(*[OK] * 50, *[CANARY] * 98, *[CANARY._replace(outcome="model", seconds=30.0)] * 2),
    ),
    ("Canary worse than stable", True, steady(*[OK] * 50, *[CANARY] * 48, *[CANARY._replace(seconds=0.9)] * 2)),
    ("Canary worse than stable", False, steady(*[OK] * 50, *[CANARY._replace(outcome="model")] * 3)),
    ("Rows rejected", True, after_hours([*[NEW] * 6, *[NEW_CLIENT] * 4])),
    ("Rows rejected", False, after_hours([*[NEW] * 8, *[NEW_CLIENT] * 2])),
    ("Rows rejected", False, after_hours([*[NEW] * 6, *[Request("model", version="2")] * 4, *[AUTH] * 9])),
    ("Rows rejected", False, steady(*[CLIENT] * 10)),  # nothing to compare with
    ("Rejected passwords", True, steady(OK, *[STRANGER] * 23)),
    ("Rejected passwords", False, steady(OK, *[STRANGER] * 18)),
    ("Rejected passwords", False, steady(OK, *[AUTH] * 60)),
    ("Worker deaths", True, [*[[OK]] * 20, [exits.KILLED], *[[OK]] * 9]),
    ("Worker deaths", True, [*[[OK]] * 20, [exits.HANG, exits.PREDICT_TIMEOUT], *[[OK]] * 9]),
    ("Worker deaths", False, [*[[OK]] * 5, [exits.KILLED], *[[OK]] * 24]),
]


def test_scenarios_have_each_alert_that_both_have_firing_and_silent() -> None:
    shared = {page_of(alert) for alert in ALERTS} & set(BOTH)
    assert {(title, expected) for title, expected, _ in SCENARIOS} == {
        (title, expected) for title in shared - ELSEWHERE for expected in (True, False)
    }


class Happening:
    """What a journal and the metrics hold of a scenario."""

    def __init__(self, place: Path, minutes: list[Minute]) -> None:
        place.mkdir()
        (place / "workers").mkdir()
        self.place, self.journal = place, Journal(place, 2**30)
        self.metrics, self.log = Metrics(place, ships=True), RequestLog(self.journal)
        self.metrics.on_expose.append(lambda add: add(exits.families(place / "workers")))
        self.journal.on_loss.append(self.metrics.count_loss)
        self.deaths = dict.fromkeys(exits.REASONS, 0)
        self.records: list[dict[str, Any]] = []  # as SLS has them
        self._offsets: dict[Path, int] = {}  # of the journal's segments
        self.series: dict[str, list[str]] = {}  # as Prometheus has them
        self._expose(0)
        for number, minute in enumerate(minutes, 1):
            for each in minute:
                self._happen(each)
            self.log.summarise()
            self._ship(number)
            self._expose(number)

    def _happen(self, what: Any) -> None:
        if isinstance(what, Request):
            record = what.record()
            if what.outcome:
                error = default_exceptions[record["status"]]()
                self.metrics.count_rejected(error, error, record)
            self.log.observe(what.seconds, record)
            self.metrics.count_request(what.seconds, record)
        elif what in LOSSES:
            self.journal._lose(what, 7)
        else:
            self.deaths[what] += 1
            self.journal.append({"event": "worker_exit", "model_version": "", "variant": "", "reason": what})

    def _ship(self, number: int) -> None:
        for path in segments(self.place):
            for offset, record in read_lines(path, self._offsets.get(path, 0)):
                assert record
                self.records.append({k: as_text(v) for k, v in record.items()} | {"__time__": 60 * number - 30})
                self._offsets[path] = offset

    def _expose(self, number: int) -> None:
        (self.place / "workers/exits.json").write_text(json.dumps({"configured": 1, "exits": self.deaths}))
        text = self.metrics.expose("", SERVED)[0].decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = {"job": "prediction-server", "instance": "a", **sample.labels}
                name = f"{sample.name}{{{', '.join(f'{k}={json.dumps(v)}' for k, v in labels.items())}}}"
                values = self.series.setdefault(name, [])
                values += ["_"] * (number - len(values)) + [f"{sample.value:.17g}"]


def as_text(value: Any) -> Any:
    """Return a value of a record as SLS has it."""
    return str(value).lower() if isinstance(value, bool) else value


@pytest.mark.long
@needs_prometheus
def test_alert_of_one_name_has_one_meaning(tmp_path: Path) -> None:
    tests, wrong = [], []
    for number, (title, expected, minutes) in enumerate(SCENARIOS):
        found = Happening(tmp_path / str(number), minutes)
        first = min(record["__time__"] for record in found.records)
        # A minute later, when all of it is indexed.
        if fires(BOTH[title], found.records, (60 * len(minutes) + 60 - first) / 3600) != expected:
            wrong.append(f"SLS, {title}, scenario {number}: expected {expected}")
        name = next(alert["alert"] for alert in ALERTS if page_of(alert) == title)
        expression = f'(count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)) > bool 0'
        tests.append(
            {
                "name": f"{title}, scenario {number}",
                "interval": "1m",
                "input_series": [{"series": k, "values": " ".join(v)} for k, v in found.series.items()],
                "promql_expr_test": [
                    {
                        "expr": expression,
                        "eval_time": f"{len(minutes)}m",
                        "exp_samples": [{"labels": "{}", "value": int(expected)}],
                    }
                ],
            }
        )
    shutil.copy(ROOT / "deploy/prometheus/rules.yml", tmp_path)
    given = {"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": tests}
    (tmp_path / "tests.yml").write_text(json.dumps(given))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True)
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stdout + done.stderr
