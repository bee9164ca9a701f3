"""Alerts that SLS and Prometheus both have mean the same: the same requests fire both, or neither.

The requests go through the journal and the metrics as a server's do. SLS's queries are run over the journal's records
(tests/sls/test_console.py), and Prometheus' rules, by promtool, over what GET /metrics shows after each minute.
"""

import json
import re
import shutil
import subprocess
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from test_console import ALERTS as OF_SLS
from test_console import fires
from test_prometheus import ALERTS, needs_prometheus, page_of
from werkzeug.exceptions import default_exceptions

from endpoints.error_rate import CLASSIFICATION, REGRESSION
from endpoints.ledger import ACCEPTED, Entry, Ledger
from endpoints.receipts import Receipt
from endpoints.row_counts import RowCounts
from endpoints.truths import Outcome
from model.batching import call_directly
from model.loaded import Answer
from monitor import BLANK, LOSSES, Journal, RequestLog, read_lines, segments
from operations import exits
from telemetry import drift, feedback_metrics
from telemetry.metrics import Metrics

BOTH = {OF_SLS[name]["displayName"]: name for name in OF_SLS}
KINDS = {"1": CLASSIFICATION, "2": REGRESSION}  # by version
USED = set(re.findall(r"prediction_\w+", (ROOT / "deploy/prometheus/rules.yml").read_text()))
MIDNIGHT = 20_000 * drift.DAY  # when each scenario begins
LONG = 300  # minutes; over longer scenarios the rules are evaluated each half hour


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


class Truths(NamedTuple):
    """So many truths came for a version, with this share of errors: wrong rows, or rows that are off by 0.3."""

    rows: int
    share: float
    version: str = "1"


class Serves(NamedTuple):
    """From now on this version is served, with a bound of its errors."""

    version: str
    bound: float = 0.1


class Predictions(NamedTuple):
    """A version whose sample had as many a as b predicted so many of them."""

    a: int
    b: int


OK, CANARY = Request(), Request(variant="canary", version="2")
FAULT, CLIENT, AUTH, STRANGER = Request("model"), Request("client"), Request("auth"), Request("auth", user=None)

# What happens in it: what has a class above, and a reason of LOSSES or of exits.REASONS.
Minute = list[Any]


def steady(*requests: Any) -> list[Minute]:
    """Return half an hour of the same requests each minute."""
    return [list(requests)] * 30


def after_hours(now: list[Any]) -> list[Minute]:
    """Return four hours in which a tenth of the requests were rejected, and then twenty minutes of others."""
    return [[*[OK] * 9, CLIENT]] * 240 + [now] * 20


def hours(number: int, *minutes: Minute) -> list[Minute]:
    """Return so many hours, in which after these minutes nothing happens."""
    return [*minutes, *[[]] * (60 * number - len(minutes))]


NEW, NEW_CLIENT = Request(version="2"), Request("client", version="2")
SOME_TRUTHS = [[Truths(1, 0)]] * 9

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
    ("Prediction error rate", True, [[Serves("1")], *[[Truths(10, 0.2)]] * 30]),
    ("Prediction error rate", False, [[Serves("1")], *[[Truths(10, 0.1)]] * 30]),  # by chance, perhaps
    ("Prediction error rate", False, [[Serves("1")], *[[Truths(10, 0.5)]] * 15]),  # too few
    ("Prediction error rate", True, [[Serves("2")], *[[Truths(10, 0.5, "2")]] * 30]),
    ("Prediction error rate", False, [[Serves("2", 0.14)], *[[Truths(10, 0.5, "2")]] * 30]),
    ("Prediction error rate", False, [[Serves("1")], *[[Truths(10, 0.2)]] * 30, [Serves("2")], *[[Truths(1, 0)]] * 9]),
    # Truths of the time when another was served count as well.
    (
        "Prediction error rate",
        True,
        [[Serves("2")], *[[Truths(10, 0.2)]] * 18, [Serves("1")], *[[Truths(10, 0.2)]] * 9],
    ),
    ("Prediction error rate", False, hours(25, [Serves("1")], *[[Truths(10, 0.2)]] * 30)),
    ("No feedback", True, hours(27, [OK], *SOME_TRUTHS)),
    ("No feedback", False, hours(22, [OK], *SOME_TRUTHS)),
    ("No feedback", False, [*hours(27, [OK], *SOME_TRUTHS), *hours(1, [Truths(1, 0)])]),
    ("No feedback", False, hours(49, [OK], *SOME_TRUTHS)),
    ("No feedback", False, hours(49, [OK])),
    ("Prediction drift", True, hours(26, [OK, Predictions(900, 300)])),
    ("Prediction drift", True, [*hours(26, [OK, Predictions(900, 300)]), *hours(1, [Predictions(9000, 9000)])]),
    ("Prediction drift", False, hours(20, [OK, Predictions(900, 300)])),  # the day is not over
    ("Prediction drift", False, hours(26, [OK, Predictions(800, 400)])),
    ("Prediction drift", False, hours(26, [OK, Predictions(700, 200)])),
    ("Prediction drift", False, hours(50, [OK, Predictions(900, 300)])),
]


def test_scenarios_have_each_alert_that_both_have_firing_and_silent() -> None:
    shared = {page_of(alert) for alert in ALERTS} & set(BOTH)
    assert {(title, expected) for title, expected, _ in SCENARIOS} == {
        (title, expected) for title in shared for expected in (True, False)
    }


class Happening:
    """What a journal and the metrics hold of a scenario."""

    def __init__(self, place: Path, minutes: list[Minute], monkeypatch: pytest.MonkeyPatch) -> None:
        place.mkdir()
        (place / "workers").mkdir()
        self.place, self.journal = place, Journal(place, 2**30)
        self.metrics, self.log = Metrics(place, ships=True), RequestLog(self.journal)
        self.metrics.on_expose.append(lambda add: add(exits.families(place / "workers")))
        self.journal.on_loss.append(self.metrics.count_loss)
        self.served: dict[str, Any] = {"ready": True, "stable": None, "canary": None}
        self.receipts = count(1)
        self.ledger = Ledger(place, self.journal.append)
        for version, kind in KINDS.items():
            RowCounts(self.ledger.directory / f"rows-{version}").counter(version, "stable", kind)(1000)
        self.metrics.on_expose.append(lambda add: add(feedback_metrics.families(self.ledger.figures())))
        self.drift = drift.Drift(place, SimpleNamespace(number=0), call_directly)  # type: ignore[arg-type]
        self.metrics.on_expose.append(lambda add: add(self.drift.families()))
        self.deaths = dict.fromkeys(exits.REASONS, 0)
        self.records: list[dict[str, Any]] = []  # as SLS has them
        self._offsets: dict[Path, int] = {}  # of the journal's segments
        self.series: dict[str, list[str]] = {}  # as Prometheus has them
        monkeypatch.setattr(drift.time, "time", lambda: MIDNIGHT + 60 * self.now)
        self.now = 0  # minutes
        self.drift.tick(self.journal.append)
        self._expose()
        for self.now, minute in enumerate(minutes, 1):
            if minute or self.now % 30 == 0:  # in between, nothing changes
                for each in minute:
                    self._happen(each)
                self.log.summarise()
                self.drift.tick(self.journal.append)
                self._ship()
                self._expose()
            else:
                for values in self.series.values():
                    values += values[-1:] if len(values) == self.now else []

    def _happen(self, what: Any) -> None:
        if isinstance(what, Request):
            record = what.record()
            if what.outcome:
                error = default_exceptions[record["status"]]()
                self.metrics.count_rejected(error, error, record)
            self.log.observe(what.seconds, record)
            self.metrics.count_request(what.seconds, record)
        elif isinstance(what, Truths):
            self._learn(what)
        elif isinstance(what, Serves):
            self.served["stable"] = {"version": what.version, "load_seconds": 1.0, "error_bound": what.bound}
        elif isinstance(what, Predictions):
            self._predict(["a"] * what.a + ["b"] * what.b)
        elif what in LOSSES:
            self.journal._lose(what, 7)
        else:
            self.deaths[what] += 1
            self.journal.append({"event": "worker_exit", "model_version": "", "variant": "", "reason": what})

    def _learn(self, what: Truths) -> None:
        """Take truths, as POST /feedback does."""
        errors = round(what.rows * what.share)
        squares = {"abs_error": 0.3 * errors, "sq_error": 0.09 * errors, "signed_error": 0.3 * errors}
        kind = KINDS[what.version]
        outcome = Outcome(what.rows, errors) if kind == CLASSIFICATION else Outcome(what.rows, **squares)
        receipt = Receipt(next(self.receipts), what.version, "stable", kind, drift.time.time(), b"", False)
        served = self.served["stable"] or {"version": ""}
        bound = served["error_bound"] if served["version"] == what.version else None
        assert self.ledger.accept([Entry(receipt, outcome, 0.0, "alice", bound)]) == [ACCEPTED]

    def _predict(self, labels: list[str]) -> None:
        about = {"sha256": "", "reference": {"classes": ["a", "b"], "counts": [500, 500, 0]}}
        model: Any = SimpleNamespace(version="1", about=about, signature=SimpleNamespace(columns=None))
        self.drift.count(Answer(labels, None, model, "predict", [[0.5]] * len(labels)))

    def _ship(self) -> None:
        for path in segments(self.place):
            for offset, record in read_lines(path, self._offsets.get(path, 0)):
                assert record
                self.records.append({k: as_text(v) for k, v in record.items()} | {"__time__": 60 * self.now - 30})
                self._offsets[path] = offset

    def _expose(self) -> None:
        self.drift._read = (-2.0, {})
        (self.place / "workers/exits.json").write_text(json.dumps({"configured": 1, "exits": self.deaths}))
        text = self.metrics.expose("", self.served)[0].decode()
        for family in text_string_to_metric_families(text):
            for sample in (each for each in family.samples if each.name in USED):
                labels = {"job": "prediction-server", "instance": "a", **sample.labels}
                name = f"{sample.name}{{{', '.join(f'{k}={json.dumps(v)}' for k, v in labels.items())}}}"
                values = self.series.setdefault(name, [])
                values += ["_"] * (self.now - len(values)) + [f"{sample.value:.17g}"]


def as_text(value: Any) -> Any:
    """Return a value of a record as SLS has it."""
    return str(value).lower() if isinstance(value, bool) else value


@pytest.mark.long
@needs_prometheus
def test_alert_of_one_name_has_one_meaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests: dict[str, list[Any]] = {"1m": [], "30m": []}  # by how often the rules are evaluated
    wrong = []
    for number, (title, expected, minutes) in enumerate(SCENARIOS):
        found = Happening(tmp_path / str(number), minutes, monkeypatch)
        first = min(record["__time__"] for record in found.records)
        # A minute later, when all of it is indexed.
        if fires(BOTH[title], found.records, (60 * len(minutes) + 60 - first) / 3600) != expected:
            wrong.append(f"SLS, {title}, scenario {number}: expected {expected}")
        name = next(alert["alert"] for alert in ALERTS if page_of(alert) == title)
        expression = f'(count(ALERTS{{alertname="{name}", alertstate="firing"}}) or vector(0)) > bool 0'
        tests["1m" if len(minutes) < LONG else "30m"].append(
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
    files = []
    for interval, given in tests.items():
        files.append(tmp_path / f"{interval}.yml")
        content = {"rule_files": ["rules.yml"], "evaluation_interval": interval, "tests": given}
        files[-1].write_text(json.dumps(content))
    done = subprocess.run(["promtool", "test", "rules", *files], capture_output=True, text=True)
    assert not wrong, "\n".join(wrong)
    assert done.returncode == 0, done.stdout + done.stderr
