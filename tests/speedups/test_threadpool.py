"""Slow calls run on native threads under gevent, and logging can be used on both sides."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import joblib
import pytest
from conftest import ROOT, gunicorn

from speedups import UnexpectedInternals, threadpool


def run(script: str) -> str:
    """Run a script under gevent's patches; return what it prints."""
    script = f"from gevent import monkey; monkey.patch_all()\nfrom speedups import threadpool\n{script}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert not done.stderr
    return done.stdout


def test_native_thread_that_asks_for_loggers_does_not_hang_the_loop_that_does_too() -> None:
    script = """
import gevent, logging, time
from types import SimpleNamespace
threadpool.install(SimpleNamespace())
ends = time.monotonic() + 3

def ask(gives_way):
    while time.monotonic() < ends:
        logging.getLogger("one").debug("said")
        if gives_way:
            time.sleep(0)
    return "ended"

logging.basicConfig(level="ERROR")
asking = [gevent.spawn(ask, True) for _ in range(4)] + [gevent.spawn(threadpool.run_in_thread, ask, False)]
gevent.joinall(asking, raise_error=True)
print([each.value for each in asking])
"""
    assert run(script) == f"{['ended'] * 5}\n"


def test_result_or_exception_of_a_native_call_comes_back_while_the_loop_goes_on() -> None:
    script = """
import gevent
from gevent import monkey
sleep, ticks = monkey.get_original("time", "sleep"), []

def tick():
    while True:
        ticks.append(0)
        gevent.sleep(0.01)

def fail():
    raise SystemExit("from the thread")

gevent.spawn(tick)
threadpool.run_in_thread(sleep, 0.3)
print(len(ticks) > 3, threadpool.run_in_thread(divmod, 7, 2))
try:
    threadpool.run_in_thread(fail)
except SystemExit as error:
    print(error)
"""
    assert run(script) == "True (3, 1)\nfrom the thread\n"


def test_arguments_of_a_call_that_raised_are_freed_without_a_collection() -> None:
    script = """
import gc, gevent, weakref
gc.disable()

class Body(list):
    pass

def refuse(body):
    raise ValueError

body = Body()
alive = weakref.ref(body)
try:
    threadpool.run_in_thread(refuse, body)
except ValueError:
    del body
gevent.sleep(0.1)
print(alive())
"""
    assert run(script) == "None\n"


@pytest.mark.parametrize("name", threadpool.INTERNALS)
def test_logging_without_an_internal_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    create_lock = logging.Handler.createLock
    with monkeypatch.context() as patch:
        patch.delattr(logging, name)
        with pytest.raises(UnexpectedInternals, match=name):
            threadpool.install(SimpleNamespace())
    assert logging.Handler.createLock is create_lock


APPLICATION = """
import server
from speedups import threadpool

if {is_broken}:
    threadpool.INTERNALS.append("_of_an_older_python")

app = server.app
service = app.extensions["service"]

@app.get("/native")
def native():
    return str(service.thread_runner.__module__ == "speedups.threadpool")
"""


@pytest.mark.parametrize(("preload", "is_broken"), [(0, False), (1, False), (0, True)])
def test_worker_lets_the_service_use_native_threads(
    tmp_path: Path, iris_file: Path, preload: int, is_broken: bool
) -> None:
    (tmp_path / "application.py").write_text(APPLICATION.format(is_broken=is_broken))
    with gunicorn(tmp_path, "application:app", model_path=iris_file, preload=preload) as running:
        running.wait_until(running.is_ready)
        assert running.ask("GET", "/native")[2] == str(not is_broken).encode()
        assert running.predict([[5.1, 3.5, 1.4, 0.2]]) == (200, {"prediction": [0]})
        assert running.log.read_text().count("threadpool is left off") == is_broken


# As libraries do that look for a shared library or for fonts, or share work among processes. gevent's own functions for
# that work on the main thread only.
STARTS_PROGRAMS = """
import ctypes.util, multiprocessing, subprocess, sys
LIBRARY = ctypes.util.find_library("c")
AT_IMPORT = subprocess.run(["echo", "import"], capture_output=True, check=True, text=True).stdout

class Model:
    n_features_in_ = 1

    def predict(self, rows):
        lines = subprocess.check_output(["sh", "-c", "sleep 0.05; echo predict"], text=True)
        forked = multiprocessing.get_context("fork").Process(target=sys.exit, args=(3,))
        forked.start()
        forked.join()
        assert forked.exitcode == 3
        return [AT_IMPORT.strip() + " " + lines.strip()] * len(rows)
"""


@pytest.mark.parametrize("preload", [0, 1])
def test_model_may_start_programs_as_it_is_imported_and_in_predict_and_fork(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preload: int
) -> None:
    (tmp_path / "starts_programs.py").write_text(STARTS_PROGRAMS)
    monkeypatch.syspath_prepend(str(tmp_path))
    from starts_programs import Model  # type: ignore[import-not-found]  # just written

    joblib.dump(Model(), tmp_path / "model.joblib")
    sys.modules.pop("starts_programs")
    with gunicorn(tmp_path, model_path=tmp_path / "model.joblib", preload=preload, max_wait=60) as running:
        running.wait_until(running.is_ready)
        for _ in range(3):
            assert running.predict([[1.0]]) == (200, {"prediction": ["import predict"]})
        # On the loop's own thread as well: gevent's loop and the program's end must not wait for each other.
        with ThreadPoolExecutor(8) as pool:
            assert set(map(str, pool.map(lambda _: running.predict([[1.0]]), range(16)))) == {
                str((200, {"prediction": ["import predict"]}))
            }
        assert running.stop() == 0
