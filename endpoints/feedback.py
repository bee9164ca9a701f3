"""POST /feedback: the truth comes later. An extension (EXTENSIONS in settings.py).

    X-Feedback: AQACdjcABj…                                                     in the answer to POST /predict
    POST /feedback                                                              role feedback
    {"feedback": [{"receipt": "AQACdjcABj…", "truth": [0]}]} → {"accepted": 1, "duplicates": 0, "rejected": []}

Receipts are made and verified (receipts.py), compared with the truth (truths.py), and counted once (ledger.py). GET
/model shows the figures.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from flask import Response, g, request
from werkzeug.exceptions import RequestEntityTooLarge, ServiceUnavailable, UnprocessableEntity

from auth import require
from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures
from endpoints.ledger import ACCEPTED, DUPLICATE, TOO_OLD, Entry, Ledger
from endpoints.receipts import BadReceipt, Issuer, KeyFile, verify
from endpoints.routes import runner
from endpoints.row_counts import RowCounts
from endpoints.truths import BadTruth, Known, compare, kind_of, labels_of
from model.limits import Limits
from model.loaded import Answer
from processes import LogLimit
from shared_files import replace_file
from web.decoding import parse_json, read_body, require_json
from web.errors import json_response
from worker_slot import WorkerSlot, slot_of

if TYPE_CHECKING:
    from flask import Flask

    from endpoints.openapi import Api
    from server import Service

log = logging.getLogger(__name__)

MAX_ENTRIES = 1000  # in one request
FORM = 'send {"feedback": [{"receipt": "…", "truth": […]}]}'
LARGE_ANSWER = 10_000  # rows; from here on their digest takes milliseconds and goes to a native thread
MAX_CLASSES_FILES = 200  # versions whose labels are kept


def init_app(app: "Flask", service: "Service") -> None:
    """Give each answer a receipt, take the truth, and show the figures, unless FEEDBACK=0."""
    if not service.settings.feedback:
        return
    feedback = Feedback(service, slot_of(app, service))
    service.on_start.append(feedback.start)
    service.every_second.append(feedback.tick)
    service.on_answer.append(feedback.add_receipt)
    service.serving.on_describe.append(feedback.describe)
    app.extensions.setdefault("on_metrics", []).append(feedback.expose)  # without telemetry, nobody calls it
    app.extensions.setdefault("on_openapi", []).append(describe_api)  # nor this, without endpoints.docs
    app.add_url_rule("/feedback", view_func=require("feedback")(feedback.feedback), methods=["POST"])


def describe_api(api: "Api") -> None:
    """Describe the route. An entry that is wrong does not make the request wrong, so it has no schema."""
    entries = {"type": "array", "maxItems": MAX_ENTRIES}
    schema = {"type": "object", "required": ["feedback"], "properties": {"feedback": entries}}
    example = {"feedback": [{"receipt": "the X-Feedback of an answer", "truth": [0]}]}
    body = {"application/json": {"schema": schema, "example": example}}
    summary = "How predictions turned out: for each receipt, the true value of each row"
    api.add("POST", "/feedback", summary, role="feedback", body=body, answer=api.json_object, statuses=[503])


class Feedback:
    """What a worker needs to make receipts and to take feedback."""

    def __init__(self, service: "Service", slot: WorkerSlot) -> None:
        """Remember where everything is. Nothing is read or written before `start`."""
        settings = service.settings
        self._service, self._slot, self._max_age = service, slot, settings.feedback_max_age
        self._keys = KeyFile(settings.feedback_key_file)
        self.ledger = Ledger(settings.journal_dir, service.journal.append)
        self._classes = ClassesFiles(self.ledger.directory)
        self._counts: RowCounts | None = None  # without it there are no receipts, whose share could not be known
        self._issuers: dict[tuple[str, str], tuple[Issuer, Callable[[int], None]]] = {}
        self._log_limit = LogLimit(log, math.inf)

    # --- beside the requests

    def start(self) -> None:
        """Read the keys, and find this worker's place to count."""
        self._keys.open()
        self._join()

    def tick(self) -> None:
        """Follow changes of the keys and of the directory, and put in order what a dead worker left. Once a second."""
        self._keys.refresh()
        self._join()
        if self._counts is not None:
            self._counts.note()
            self.ledger.tidy(self._max_age)

    def _join(self) -> None:
        path = self.ledger.directory / f"rows-{self._slot.number}"
        if self._counts is not None and self._counts.path == path and self._counts.exists():
            return
        self._counts, self._issuers = None, {}
        try:
            if self._slot.number < 0:
                raise OSError("this worker has no slot")
            self._counts = RowCounts(path)
        except OSError as error:
            message = "answers carry no receipt until %s can be written: %s"
            self._log_limit.error("", message, self.ledger.directory, error)
        else:
            self._log_limit.reset()

    # --- receipts

    def add_receipt(self, answer: Answer, response: Response, record: dict[str, Any]) -> None:
        """Add its receipt to an answer to `predict`, and count its rows."""
        keys, prediction = self._keys.keys, answer.prediction
        if answer.method != "predict" or not keys or type(prediction) is tuple or self._counts is None:
            return  # a tuple: a model with several results has no rows
        key, rows = (answer.model.version, record["variant"]), len(answer.rows)
        issuer, count = self._issuers.get(key) or self._add_issuer(*key, answer)
        if rows < LARGE_ANSWER:
            receipt = issuer.issue(keys[0], prediction)
        else:
            receipt = self._service.run_in_thread(issuer.issue, keys[0], prediction)
        count(rows)
        response.headers.add("X-Feedback", receipt)

    def _add_issuer(self, version: str, variant: str, answer: Answer) -> tuple[Issuer, Any]:
        kind, counts = kind_of(answer.prediction, answer.model.classes), self._counts
        assert counts is not None
        self._classes.keep(version, answer.model.classes)
        added = Issuer(version, variant, kind), counts.counter(version, variant, kind)
        self._issuers[version, variant] = added
        return added

    # --- truths

    def feedback(self) -> Response:
        """POST /feedback: count how the predictions of earlier answers turned out."""
        service, keys = self._service, self._keys.keys
        current = request._get_current_object()  # type: ignore[attr-defined]
        require_json(current)
        body = read_body(current.environ, service.bodies)
        run = runner(service, body)
        # An entry is an object with two lists, in which a row of several outputs is one more.
        limits = Limits(MAX_ENTRIES, 4 * MAX_ENTRIES + 2 * service.settings.max_rows)
        content = run(parse_json, body, limits, FORM)
        given = content.get("feedback") if isinstance(content, dict) else None
        if not isinstance(given, list):
            raise UnprocessableEntity(f"the body is not an object with a list, feedback; {FORM}")
        if len(given) > MAX_ENTRIES:
            raise RequestEntityTooLarge(f"feedback has {len(given)} entries; send at most {MAX_ENTRIES} in one request")
        if not keys or self._counts is None:
            raise ServiceUnavailable("feedback cannot be taken now; the server's log says why", retry_after=60)
        judged: list[Entry | str] = run(self._judge_all, given, keys, g.record["user"])
        entries = [each for each in judged if isinstance(each, Entry)]
        bounds = {model.version: model.about.get("error_bound") for model in service.serving.loaded()}
        for entry in entries:  # SLS, which sees nothing but records, alerts on them
            entry.error_bound = bounds.get(entry.receipt.version)
        try:
            results = iter(self.ledger.accept(entries))
        except OSError as error:
            self._log_limit.error("write", "feedback cannot be written to %s: %s", self.ledger.directory, error)
            detail = "the feedback could not be written; send it again, what was counted already counts once"
            raise ServiceUnavailable(detail, retry_after=5) from None
        outcomes = [next(results) if isinstance(each, Entry) else each for each in judged]
        rejected = [
            {"index": index, "detail": outcome}
            for index, outcome in enumerate(outcomes)
            if outcome not in (ACCEPTED, DUPLICATE)
        ]
        counts = {"accepted": outcomes.count(ACCEPTED), "duplicates": outcomes.count(DUPLICATE)}
        return json_response(counts | {"rejected": rejected})

    def _judge_all(self, given: list[Any], keys: Any, user: str) -> list[Entry | str]:
        """Return an entry for each that can be counted, and what is wrong with each other."""
        judged: list[Entry | str] = []
        labels: dict[str, Known] = {}
        for each in given:
            try:
                judged.append(self._judge(each, keys, user, labels))
            except (BadReceipt, BadTruth) as error:
                judged.append(str(error))
        return judged

    def _judge(self, given: Any, keys: Any, user: str, labels: dict[str, Known]) -> Entry:
        if not isinstance(given, dict):
            raise BadReceipt('this entry is not an object; send {"receipt": "…", "truth": […]}')
        if unknown := given.keys() - {"receipt", "truth", "prediction"}:
            raise BadReceipt(
                f"unknown key {min(unknown)[:80]!r}; an entry has receipt and truth, and may have prediction"
            )
        if missing := [name for name in ("receipt", "truth") if name not in given]:
            raise BadReceipt(f'{missing[0]} is missing; send {{"receipt": "…", "truth": […]}}')
        receipt = verify(given["receipt"], keys)
        age = max(0.0, time.time() - receipt.made)
        if age > self._max_age:
            raise BadReceipt(TOO_OLD)
        if receipt.version not in labels:
            labels[receipt.version] = self._classes.read(receipt.version)
        prediction = receipt.resolve(given.get("prediction"))
        return Entry(receipt, compare(prediction, given["truth"], receipt.kind, labels[receipt.version]), age, user)

    # --- figures

    def describe(self, found: dict[str, Any]) -> None:
        """Add the figures to what GET /model shows."""
        figures = self.ledger.figures()
        for variant in ("stable", "canary"):
            if served := found[variant]:
                kind = REGRESSION if served["classes"] is None else CLASSIFICATION
                served["feedback"] = figures.get((served["version"], variant), Figures(kind)).describe()

    def expose(self, add: Callable[[Any], None]) -> None:
        """Add the figures to what GET /metrics shows."""
        from telemetry.feedback_metrics import families

        add(families(self.ledger.figures()))


class ClassesFiles:
    """The classes of the versions that were served here, for truths that come after a version is gone.

    Format: `classes-<version>.json`, the model's classes as predictions show them; null if it has none.
    """

    def __init__(self, directory: Path) -> None:
        """Remember the directory."""
        self._directory = directory
        self._log_limit = LogLimit(log, math.inf)

    def _path(self, version: str) -> Path:
        return self._directory / f"classes-{version}.json"

    def keep(self, version: str, classes: Any) -> None:
        """Write the classes of a version."""
        try:
            content = orjson.dumps(classes, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError:  # dates or the like; such labels are not told from unknown ones
            content = b"null"
        try:
            path = self._path(version)
            if not path.exists() or path.read_bytes() != content:  # a version's name may be used again
                replace_file(path, content, durable=False)
                files = sorted(self._directory.glob("classes-*.json"), key=lambda path: path.stat().st_mtime)
                for path in files[:-MAX_CLASSES_FILES]:
                    path.unlink(missing_ok=True)
        except OSError as error:
            self._log_limit.error("", "the labels of %s are not kept: %s", version, error)

    def read(self, version: str) -> Known:
        """Return the labels of a version, None if they are not known."""
        try:
            return labels_of(orjson.loads(self._path(version).read_bytes()))
        except (OSError, ValueError):
            return None
