"""Compares what a server answers with the model called in-process, for the models of random_models.py.

The truth of a request is the model called on a table of exactly that request's rows with the types it was fitted on.
Labels are compared exactly, numbers within 1e-9 of the answer's largest (1e-5 where single precision is involved).
"""

import logging
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from random_models import Case, Request, callers, random_case, requests
from threadpoolctl import threadpool_limits

from model.loaded import LoadedModel, RowsRefused
from model.signature import BadRows

BOOSTERS = ("lightgbm", "xgboost", "catboost")
AT_ONCE = 8  # callers
MAX_WAIT = 300.0  # seconds; a busy machine is no overload

OUTCOMES = ("wrong", "failed", "refused", "rightly refused", "right")  # the worst first
Ask = Callable[[list[Any]], Any]  # rows as JSON → predictions; raises BadRows or RowsRefused


@dataclass
class Tally:
    """What became of the requests of some models."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)  # answers that are not the model's, and failures
    refused: list[str] = field(default_factory=list)  # what the model itself answers, and what was not exported

    def add(self, case: Case, found: str) -> None:
        """Count an outcome, and keep what is not right."""
        kind, _, detail = found.partition(": ")
        self.counts[kind] += 1
        if kind in ("wrong", "failed"):
            self.faults.append(f"{found}\n    {case.name}")
        elif kind in ("refused", "not exported"):
            self.refused.append(f"{detail}\n    {case.name}")

    @property
    def share_refused(self) -> float:
        """The share of (model, form) pairs that were refused though the model itself answers them."""
        return self.counts["refused"] / max(1, self.asked)

    @property
    def asked(self) -> int:
        """How many (model, form) pairs were asked."""
        return sum(self.counts[kind] for kind in OUTCOMES)

    def assert_right(self, n_models: int) -> None:
        """Assert that no answer is wrong, no request fails, few are refused, and most of the models were asked."""
        assert not self.faults, "\n".join(self.faults[:10])
        assert self.share_refused <= 0.1, "\n".join(self.refused)
        assert self.counts["right"] > 4 * n_models  # most tables can be fitted, and most of their forms be sent


def asks(model: LoadedModel) -> Ask:
    """Return how a model in memory is asked."""
    return lambda data: model.predict(model.signature.validate(data))


def tolerance(case: Case, expected: Any) -> float:
    """Return by how much a number may differ."""
    largest = max(1e-300, float(np.abs(expected).max()))
    if case.exported:  # `python -m model export` compares with the mean size of the predictions as well
        return 1e-4 * max(largest, float(np.abs(case.predict(case.frame)).mean()))
    # XGBoost and CatBoost compute in single precision.
    single = any(name in f"{case.name} {case.array}" for name in ("loat16", "loat32", "XGB", "CatBoost"))
    return (1e-5 if single else 1e-9) * largest


def is_same(answer: Any, expected: Any, case: Case) -> bool:
    """Return whether an answer is the model's: labels exactly, numbers within a tolerance."""
    answer, expected = np.asarray(answer), np.asarray(expected)
    if answer.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(answer.tolist() == expected.tolist())
    return bool(np.allclose(answer.astype(float), expected, rtol=0, atol=tolerance(case, expected)))


def reply(ask: Ask, request: Request) -> Any:
    """Return what a request is answered, or the exception that is raised."""
    try:
        return ask(request.data)
    except Exception as error:
        return error


def outcome(case: Case, request: Request, answer: Any) -> str:
    """Return what became of a request: "right", "rightly refused", or "refused", "wrong" or "failed" with details."""
    expected = [case.predict(frame) for frame in request.frames]
    own = [each for each in expected if not isinstance(each, Exception)]
    if isinstance(answer, (BadRows, RowsRefused)):
        # Numbers take no true: a model that was fitted on booleans and shows no trace of it needs a sample.
        if not own or request.may_refuse or "true or false; expected a number" in str(answer):
            return "rightly refused"
        return f"refused: {request.form}, {answer} {answer.__cause__!r}"
    if isinstance(answer, Exception):
        return f"failed: {request.form}, {answer!r} {answer.__cause__!r}"
    if any(is_same(answer, each, case) for each in own):
        return "right"
    return f"wrong: {request.form} {request.data} is answered {np.asarray(answer).tolist()}; the model says {expected}"


def at_once(ask: Ask, asked: Sequence[Request]) -> list[Any]:
    """Let callers ask at the same time, so that their rows go into one call of the model if it may be merged."""
    replies: dict[int, Any] = {}
    start = threading.Barrier(len(asked))

    def call(at: int) -> None:
        start.wait(60)
        replies[at] = reply(ask, asked[at])

    threads = [threading.Thread(target=call, args=[at]) for at in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [replies[at] for at in range(len(asked))]


def check(case: Case, seed: int, ask: Ask, tally: Tally) -> None:
    """Send a model requests in every form, and those of eight callers at once."""
    for request in requests(case, seed):
        tally.add(case, outcome(case, request, reply(ask, request)))
    if seed % 3:  # they take a third of the time
        return
    asked = callers(case, seed, AT_ONCE)
    found = [outcome(case, *each) for each in zip(asked, at_once(ask, asked), strict=True)]
    tally.add(case, min(found, key=lambda each: OUTCOMES.index(each.partition(": ")[0])))


def check_at_once(case: Case, seed: int, ask: Ask, tally: Tally) -> None:
    """Let eight callers at once send a model requests, one in each form and some more."""
    asked = list(requests(case, seed))
    asked += callers(case, seed, AT_ONCE - len(asked))
    for request, answer in zip(asked, at_once(ask, asked), strict=True):
        tally.add(case, outcome(case, request, answer))


Check = Callable[[Case, int, Path, Tally], None]  # a case, its seed, an empty directory


def check_all(check: Check, seeds: Iterable[int], place: Path, show: bool = False, **options: Any) -> Tally:
    """Check the models of some seeds; `options` are those of `random_case`.

    With `show`, what is not right is printed as soon as it is found.
    """
    tally = Tally()
    for seed in seeds:
        # Warnings: of one class only, of few rows, of unknown categories. Threads would mostly wait for each other.
        with (
            warnings.catch_warnings(action="ignore"),
            threadpool_limits(1),
            tempfile.TemporaryDirectory(dir=place) as own,
        ):
            case = random_case(seed, **options)
            if case is not None:
                before = len(tally.refused), len(tally.faults)
                check(case, seed, Path(own), tally)
                if show and before != (len(tally.refused), len(tally.faults)):
                    print(*tally.refused[before[0] :], *tally.faults[before[1] :], sep="\n", flush=True)
    return tally


def need_boosters() -> None:
    """Skip a test where the boosters are not installed."""
    for name in BOOSTERS:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements/families.txt")


def main(check: Check, **options: Any) -> None:
    """Check the models of the seeds between two numbers, the command line's arguments, and print what is not right."""
    logging.disable(logging.CRITICAL)
    options.setdefault("foreign", all(map(find_spec, BOOSTERS)))
    with tempfile.TemporaryDirectory() as place:
        tally = check_all(check, range(int(sys.argv[1]), int(sys.argv[2])), Path(place), show=True, **options)
    print(dict(tally.counts), f"{tally.share_refused:.1%} refused, {len(tally.faults)} faults")
    sys.exit(bool(tally.faults))
