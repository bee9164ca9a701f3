"""Everything at once, for as long as one likes: swaps, kills, outages of SLS, changes of users and floods, under load.

    python tests/hostile/soak.py --minutes 60

prints a line a round: memory, descriptors, threads and files of the server. It ends with a message if one of them
grows, or if an answered request was not recorded and shipped. test_soak.py does a minute of it, or three rounds.
"""

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS.parent), str(TESTS), str(TESTS / "sls")]

from conftest import ROOT, Gunicorn, Load, basic, write_users  # noqa: E402
from loopback_sls import LoopbackSLS  # noqa: E402
from sls_tools import assert_all_arrive, shipping  # noqa: E402
from werkzeug.security import generate_password_hash  # noqa: E402

BODY = b'{"data": [[5.1, 3.5, 1.4, 0.2]]}'


@dataclass
class Sample:
    """What the server takes, all its processes together, but its descriptors and threads those of the largest."""

    memory: float  # MB, of which shared pages count by their share (PSS)
    descriptors: int
    threads: int
    journal: float  # MB
    files: int  # in all directories of its state

    def __str__(self) -> str:
        return (
            f"{self.memory:.0f} MB, {self.descriptors} descriptors, {self.threads} threads, "
            f"journal {self.journal:.1f} MB, {self.files} files"
        )


def take_sample(server: Gunicorn) -> Sample:
    """Measure a server."""
    memory, descriptors, threads = 0, 0, 0
    for pid in [server.process.pid, *server.workers()]:
        process = Path(f"/proc/{pid}")
        with suppress(OSError):  # it was killed just now
            lines = (process / "smaps_rollup").read_text().splitlines()
            memory += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            descriptors = max(descriptors, len(list((process / "fd").iterdir())))
            threads = max(threads, len(list((process / "task").iterdir())))
    files = [path for path in server.place.rglob("*") if path.is_file()]
    journal = sum(path.stat().st_size for path in files if path.parent == server.journal_dir and path.exists())
    return Sample(memory / 1024, descriptors, threads, journal / 1e6, len(files))


class Disturbances:
    """What happens to the server, one after the other; each returns how it went."""

    def __init__(self, server: Gunicorn, sls: LoopbackSLS, store: Path) -> None:
        self.server, self.sls = server, sls
        self._versions = itertools.cycle("21")
        self._environ = os.environ | {"MODEL_DIR": str(store), "JOURNAL_DIR": str(server.journal_dir)}
        self.all: list[Callable[[], None]] = [
            *(self.swap, self.kill_worker, self.sls_is_down, self.change_users, self.guess_passwords, self.send_garbage)
        ]

    def swap(self) -> None:
        """Promote the other version, and wait until it is served."""
        command = [sys.executable, "-m", "model", "promote", next(self._versions), "--wait"]
        subprocess.run(command, cwd=ROOT, env=self._environ, check=True, capture_output=True)

    def kill_worker(self) -> None:
        """Kill a worker; wait for its successor."""
        victim = random.choice(self.server.workers())
        os.kill(victim, signal.SIGKILL)
        self.server.wait_until(lambda: len({*self.server.workers()} - {victim}) == self.server.count)
        self.server.wait_until(self.server.is_ready)

    def sls_is_down(self) -> None:
        """Let SLS be away for two seconds, then slow it down."""
        self.sls.down()
        time.sleep(2.0)
        self.sls.up()
        self.sls.mode = "throttled"
        time.sleep(1.0)
        self.sls.mode = "ok"

    def change_users(self) -> None:
        """Give all users new hashes of their passwords."""
        path = self.server.place / "users.json"
        staging = write_users(path.with_name("users.new"), generate_password_hash("correct horse", "pbkdf2:sha256:1"))
        staging.rename(path)

    def guess_passwords(self) -> None:
        """Try a hundred wrong passwords."""
        for at in range(100):
            self._ask(Authorization=basic(f"user-{at % 7}", f"guess {at}"))

    def send_garbage(self) -> None:
        """Send what is no HTTP, what is half of a request, and what is no JSON."""
        half = b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
        for sent in (random.randbytes(4096), b"GET /healthz HTTP/1.1\r\nHost: ", half):
            with suppress(OSError), self.server.connect().sock or _connected(self.server) as connection:
                connection.sendall(sent)
        for body in (b"[" * 10_000, b'{"data": [[NaN]]}', b'{"data": [[1, 2, 3]]}', b"\xff" * 1000):
            self._ask(body, Authorization=basic("predict"))

    def _ask(self, body: bytes = BODY, **headers: str) -> None:
        # From another address: guesses slow down the sign-ins of those who share theirs.
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.server.port, timeout=30, source_address=("127.0.0.2", 0)
        )
        with suppress(OSError), closing(connection):
            connection.request("POST", "/predict", body, {"Content-Type": "application/json"} | headers)
            status = connection.getresponse().status
            assert status in (400, 401, 422, 429, 503), status


def _connected(server: Gunicorn) -> Any:
    connection = server.connect()
    connection.connect()
    return connection.sock


def soak(place: Path, seconds: float, say: Callable[[str], None] = print) -> None:
    """Run a server for some time, with all that happens to it. Raises: AssertionError, something grows or is lost."""
    store, samples = place / "models", []
    for version in "12":
        publish(place, store, version)
    with (
        LoopbackSLS() as sls,
        shipping(place, None, sls, **settings(store)) as server,
        Load(server, pause=0.02) as load,
    ):  # type: ignore[arg-type]
        disturbances = Disturbances(server, sls, store)
        deadline, rounds = time.monotonic() + seconds, 0
        while time.monotonic() < deadline or rounds < 3:
            for disturb in random.sample(disturbances.all, len(disturbances.all)):
                disturb()
                time.sleep(1.0)
            rounds += 1
            assert_all_arrive(sls, list(load.answered), 60.0, twice=True)
            samples.append(take_sample(server))
            say(f"round {rounds}: {len(load.answered)} answered, {samples[-1]}")
    statuses = Counter(load.statuses)
    say(f"answers: {dict(statuses)}; connections that a killed worker broke: {len(load.errors)}")
    assert set(statuses) <= {200, 503}
    assert statuses[503] <= 0.02 * statuses[200]
    # A killed worker breaks off what its callers have under way: at most one request of each.
    assert len(load.errors) <= 3 * rounds
    check_flat(samples)


def settings(store: Path) -> dict[str, Any]:
    """Return the settings of the server: one version store, and a journal that becomes full within the hour."""
    return {"model_path": "", "model_dir": store, "web_concurrency": 2, "journal_max_bytes": 8 * 2**20}


def publish(place: Path, store: Path, version: str) -> None:
    """Publish a version, and promote the first."""
    environ = os.environ | {"MODEL_DIR": str(store), "JOURNAL_DIR": str(place / "journal")}
    train = (
        "import joblib, sys; from sklearn import datasets, linear_model; "
        "model = linear_model.LogisticRegression(max_iter=1000).fit(*datasets.load_iris(return_X_y=True)); "
        "joblib.dump(model, sys.argv[1])"
    )
    model, sample = place / f"model-{version}.joblib", place / "sample.json"
    sample.write_text(json.dumps([[5.1, 3.5, 1.4, 0.2]]))
    commands = [
        ["-c", train, str(model)],
        ["-m", "model", "publish", str(model), "--version", version, "--sample", str(sample)],
        *([["-m", "model", "promote", version]] if version == "1" else []),
    ]
    for command in commands:
        subprocess.run([sys.executable, *command], cwd=ROOT, env=environ, check=True, capture_output=True)


def check_flat(samples: list[Sample]) -> None:
    """Compare the last third of the samples with the first third, the first sample left out. Raises: AssertionError."""
    counted = samples[1:]
    third = max(1, len(counted) // 3)
    for name, allowed in {"memory": 40.0, "descriptors": 8, "threads": 4, "journal": 9.0, "files": 12}.items():
        early, late = (median(getattr(each, name) for each in part) for part in (counted[:third], counted[-third:]))
        assert late <= 1.15 * early + allowed, f"{name} grew from {early:.0f} to {late:.0f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        soak(Path(directory), 60 * parser.parse_args().minutes)
