"""Random models answer as the model called in-process does, whatever form a request has.

`make test` tries scikit-learn's, `make test-all` the boosters as well. More, here those of the seeds 1000 to 2999:

    PYTHONPATH=.:tests python tests/model/test_random_models.py 1000 3000

The truth of a request is the model called on a table of exactly that request's rows with the types it was fitted on.
Labels are compared exactly, numbers within 1e-9 of the answer's largest (1e-5 where single precision is involved).
"""

import json
import logging
import random
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import gunicorn
from random_models import FORMS, Case, Request, callers, random_case, requests, sample_of
from threadpoolctl import threadpool_limits

from model.formats import ModelLoadError
from model.loaded import RowsRefused, load_model
from model.signature import BadRows

BOOSTERS = ("lightgbm", "xgboost", "catboost")


Ask = Callable[[list[Any]], Any]  # rows as JSON → predictions; raises BadRows or RowsRefused


@dataclass
class Tally:
    """What became of the requests of some models."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(
        default_factory=list
    )  # answers that are not the model's, and failures: there must be none
    refused: list[str] = field(default_factory=list)  # what the model itself answers

    def add(self, case: Case, found: str) -> None:
        """Count an outcome, and keep what is not right."""
        kind, _, detail = found.partition(": ")
        self.counts[kind] += 1
        if kind in ("wrong", "failed"):
            self.faults.append(f"{found}\n    {case.name}")
        elif kind == "refused":
            self.refused.append(f"{detail}\n    {case.name}")

    @property
    def share_refused(self) -> float:
        """The share of (model, form) pairs that were refused though the model itself answers them."""
        return self.counts["refused"] / max(1, self.counts.total())


def is_same(answer: Any, expected: Any, case: Case) -> bool:
    """Return whether an answer is the model's: labels exactly, numbers within a tolerance of the largest."""
    answer, expected = np.asarray(answer), np.asarray(expected)
    if answer.shape != expected.shape:
        return False
    if expected.dtype.kind != "f":
        return bool(answer.tolist() == expected.tolist())
    # XGBoost and CatBoost compute in single precision.
    single = any(name in f"{case.name} {case.array}" for name in ("loat16", "loat32", "XGB", "CatBoost"))
    largest = max(1e-300, float(np.abs(expected).max()))
    return bool(np.allclose(answer.astype(float), expected, rtol=0, atol=(1e-5 if single else 1e-9) * largest))


def outcome(case: Case, ask: Ask, request: Request) -> str:
    """Return what became of a request: "right", "rightly refused", or "refused", "wrong" or "failed" with details."""
    expected = [case.predict(frame) for frame in request.frames]
    own = [each for each in expected if not isinstance(each, Exception)]
    try:
        answer = ask(request.data)
    except (BadRows, RowsRefused) as error:
        # Numbers take no true: a model that was fitted on booleans and shows no trace of it needs a sample.
        if not own or request.may_refuse or "true or false; expected a number" in str(error):
            return "rightly refused"
        return f"refused: {request.form}, {error} {error.__cause__!r}"
    except Exception as error:
        return f"failed: {request.form}, {error!r} {error.__cause__!r}"
    if any(is_same(answer, each, case) for each in own):
        return "right"
    return f"wrong: {request.form} {request.data} is answered {np.asarray(answer).tolist()}; the model says {expected}"


def outcomes_at_once(case: Case, ask: Ask, asked: list[Request]) -> list[str]:
    """Let callers ask at the same time, so that their rows go into one call of the model if it may be merged."""
    found: list[str] = []
    start = threading.Barrier(len(asked))

    def call(request: Request) -> None:
        start.wait(60)
        found.append(outcome(case, ask, request))

    threads = [threading.Thread(target=call, args=[request]) for request in asked]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(asked)
    return found


def check(case: Case, seed: int, ask: Ask, tally: Tally) -> None:
    """Send a model requests in every form, and those of eight callers at once."""
    for request in requests(case, seed):
        tally.add(case, outcome(case, ask, request))
    if seed % 3:  # they take a third of the time
        return
    at_once = outcomes_at_once(case, ask, callers(case, seed))
    worst_first = ("wrong", "failed", "refused", "rightly refused", "right")
    tally.add(case, min(at_once, key=lambda found: worst_first.index(found.partition(": ")[0])))


def check_in_process(case: Case, seed: int, path: Path, tally: Tally) -> None:
    """Load a model, every other one with a sample, and check it."""
    joblib.dump(case.model, path)
    try:
        model = load_model(path, sample=sample_of(case, random.Random(seed)) if seed % 2 else None)
    except ModelLoadError as error:
        tally.add(case, f"refused: at load, {error}")
        tally.counts["refused"] += len(FORMS) - 1
        return
    check(case, seed, lambda data: model.predict(model.signature.validate(data)), tally)


def check_over_http(case: Case, seed: int, place: Path, tally: Tally) -> None:
    """Serve a model with gunicorn, every other one with a sample beside it, and check it."""
    joblib.dump(case.model, place / "model.joblib")
    if seed % 2:
        (place / "model.sample.json").write_text(json.dumps(sample_of(case, random.Random(seed))))
    with gunicorn(place, model_path=place / "model.joblib") as server:

        def ask(data: Any) -> Any:
            status, answer = server.predict(data)
            if status == 422:
                raise BadRows(answer["detail"])
            assert status == 200, answer
            return answer["prediction"]

        check(case, seed, ask, tally)


def check_all(seeds: Iterable[int], foreign: bool, place: Path) -> Tally:
    """Check the models of some seeds."""
    tally = Tally()
    for seed in seeds:
        # Warnings: of one class only, of few rows, of unknown categories. Threads would mostly wait for each other.
        with warnings.catch_warnings(action="ignore"), threadpool_limits(1):
            case = random_case(seed, foreign)
            if case is not None:
                check_in_process(case, seed, place / "model.joblib", tally)
    return tally


def assert_right(tally: Tally, n_models: int) -> None:
    """Assert that no answer is wrong, no request fails, and few are refused."""
    assert not tally.faults, "\n".join(tally.faults[:10])
    assert tally.share_refused <= 0.1, "\n".join(tally.refused)
    assert tally.counts["right"] > 4 * n_models  # most tables can be fitted, and most of their forms be sent


def test_random_models_are_answered_as_they_answer_themselves(tmp_path: Path) -> None:
    assert_right(check_all(range(120), foreign=False, place=tmp_path), 120)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_random_models_of_other_libraries_are_answered_as_they_answer_themselves(tmp_path: Path, first: int) -> None:
    for name in BOOSTERS:
        pytest.importorskip(name, reason=f"{name} is not installed: pip install -r requirements/families.txt")
    assert_right(check_all(range(first, first + 100), foreign=True, place=tmp_path), 100)


@pytest.mark.long
def test_random_models_are_answered_so_by_gunicorn(tmp_path: Path) -> None:
    """Each seed is divisible by three, so that callers ask at once as well."""
    tally = Tally()
    for seed in range(1002, 1002 + 3 * 16, 3):
        with warnings.catch_warnings(action="ignore"):
            case = random_case(seed, foreign=False)
            if case is not None:
                (tmp_path / str(seed)).mkdir()
                check_over_http(case, seed, tmp_path / str(seed), tally)
    assert_right(tally, 16)


def main() -> None:
    """Check the models of the seeds between two numbers, and print what is not right."""
    logging.disable(logging.CRITICAL)
    foreign = all(find_spec(name) for name in BOOSTERS)
    with tempfile.TemporaryDirectory() as place:
        tally = check_all(range(int(sys.argv[1]), int(sys.argv[2])), foreign, Path(place))
    print(*tally.refused, *tally.faults, sep="\n")
    print(dict(tally.counts), f"{tally.share_refused:.1%} refused, {len(tally.faults)} faults")
    sys.exit(bool(tally.faults or tally.share_refused > 0.1))


if __name__ == "__main__":
    main()
