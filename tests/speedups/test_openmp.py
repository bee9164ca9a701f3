"""Only a very large call of a model that treats each row by itself uses more than one OpenMP thread."""

from typing import Any

import pytest
from sklearn.ensemble import HistGradientBoostingRegressor
from threadpoolctl import ThreadpoolController

from model import loaded
from model.timings import MAX_BATCH_ROWS
from speedups.openmp import limit_threads


def threads() -> list[int]:
    """Return how many threads each OpenMP library would use for a call of this thread."""
    return [each.num_threads for each in ThreadpoolController().select(user_api="openmp").lib_controllers]


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Restore what the hooks change."""
    monkeypatch.setattr(loaded, "before_call", [])
    before = ThreadpoolController().select(user_api="openmp").lib_controllers
    yield loaded.before_call
    for each in before:
        each.set_num_threads(each.num_threads)


def test_threads_of_a_call_depend_on_its_rows(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    model = HistGradientBoostingRegressor(max_iter=1).fit([[0.0], [1.0]], [0, 1])
    for _ in range(2):
        limit_threads(model)
    (hook,) = hooks
    hook(model, 1)
    assert set(threads()) == {1}
    hook(model, MAX_BATCH_ROWS)
    assert set(threads()) == {1}
    hook(model, MAX_BATCH_ROWS + 1)
    assert set(threads()) == {3}


@pytest.mark.parametrize("setting", ["", "many", "0"])
def test_number_of_threads_that_is_none_counts_as_one(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", setting)
    model = HistGradientBoostingRegressor(max_iter=1).fit([[0.0], [1.0]], [0, 1])
    limit_threads(model)
    for hook in hooks:
        hook(model, MAX_BATCH_ROWS + 1)
    assert set(threads()) == {1}


def test_networks_keep_their_threads(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Network:
        signatures = None

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    limit_threads(HistGradientBoostingRegressor(max_iter=1).fit([[0.0], [1.0]], [0, 1]))
    before = threads()
    for hook in hooks:
        hook(Network(), 1)
    assert threads() == before


def test_without_spare_cores_nothing_is_done(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    limit_threads(None)
    assert hooks == []
