"""Random models answer as the model called in-process does, whatever form a request has.

`make test` tries some of scikit-learn's, `make test-all` more, and the boosters as well. By hand, with the seeds 1000
to 2999:

    PYTHONPATH=.:tests:tests/model/frames python tests/model/frames/test_random_models.py 1000 3000

tests/model/versions/test_random_versions.py does the same through the version store, and with ONNX.
"""

import json
import random
from pathlib import Path
from typing import Any

import joblib
import pytest
from conftest import gunicorn
from random_checks import MAX_WAIT, Tally, asks, check, check_all, check_at_once, main, need_boosters
from random_models import FORMS, Case, sample_of

from model.batching import Batcher
from model.formats import ModelLoadError
from model.loaded import load_model
from model.signature import BadRows


def check_in_process(case: Case, seed: int, place: Path, tally: Tally) -> None:
    """Load a model, every other one with a sample, and check it."""
    joblib.dump(case.model, place / "model.joblib")
    sample = sample_of(case, random.Random(seed)) if seed % 2 else None
    try:
        model = load_model(place / "model.joblib", sample=sample, batcher=Batcher(max_wait=MAX_WAIT))
    except ModelLoadError as error:
        tally.add(case, f"refused: at load, {error}")
        tally.counts["refused"] += len(FORMS) - 1
        return
    check(case, seed, asks(model), tally)


def check_over_http(case: Case, seed: int, place: Path, tally: Tally) -> None:
    """Serve a model with gunicorn, every other one with a sample beside it, and let eight callers ask at once."""
    joblib.dump(case.model, place / "model.joblib")
    if seed % 2:
        (place / "model.sample.json").write_text(json.dumps(sample_of(case, random.Random(seed))))
    with gunicorn(place, model_path=place / "model.joblib", max_wait=MAX_WAIT) as server:

        def ask(data: Any) -> Any:
            status, answer = server.predict(data)
            if status == 422:
                raise BadRows(answer["detail"])
            assert status == 200, answer
            return answer["prediction"]

        check_at_once(case, seed, ask, tally)


def test_random_models_are_answered_as_they_answer_themselves(tmp_path: Path) -> None:
    check_all(check_in_process, range(30), tmp_path).assert_right(30)


@pytest.mark.long
@pytest.mark.parametrize("first", range(30, 230, 100))
def test_more_random_models_are_answered_as_they_answer_themselves(tmp_path: Path, first: int) -> None:
    check_all(check_in_process, range(first, first + 100), tmp_path).assert_right(100)


@pytest.mark.long
@pytest.mark.parametrize("first", range(0, 200, 100))
def test_random_models_of_other_libraries_are_answered_as_they_answer_themselves(tmp_path: Path, first: int) -> None:
    need_boosters()
    check_all(check_in_process, range(first, first + 100), tmp_path, foreign=True).assert_right(100)


@pytest.mark.long
def test_random_models_are_answered_so_by_gunicorn(tmp_path: Path) -> None:
    check_all(check_over_http, range(1002, 1008), tmp_path).assert_right(6)


if __name__ == "__main__":
    main(check_in_process)
