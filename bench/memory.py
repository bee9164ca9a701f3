"""What each further worker costs in memory: models whose arrays are mapped from the file, and those that cannot be.

    python -m bench.memory [--workers 3] [--json FILE]        some two minutes

Each model is published to a version store and served by a real gunicorn with 1 and with N workers; every worker has
answered before the proportional set sizes (PSS, MB of 10**6 bytes, of master and workers) are summed. A further worker
costs a quotient of differences. Iris is what a worker costs by itself, so the last column is what a further worker adds
beyond that, as a share of the model's file.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # for what is measured and the real gunicorn

from model.versions.publishing import publish  # noqa: E402  # found by the line above
from model.versions.store import Store  # noqa: E402


def train(name: str) -> tuple[Any, list[list[float]]]:
    """Fit a model; return it with a sample of rows."""
    import numpy as np
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.neighbors import KNeighborsClassifier

    from model.demo import train as train_iris

    random = np.random.default_rng(0)
    if name == "iris":
        return train_iris()
    rows = 400_000 if name == "kNN" else 40_000
    data, labels = random.normal(size=(rows, 60)), random.integers(0, 3, rows)
    if name == "kNN":
        model = KNeighborsClassifier(algorithm="brute").fit(data, labels)
    else:
        model = RandomForestClassifier(100, n_jobs=2, random_state=0).fit(data[:, :30], labels)
    return model, data[:2, : model.n_features_in_].tolist()


def pss(server: Any) -> float:
    """Return the summed proportional set size of a server's processes, MB."""
    total = 0
    for pid in [server.process.pid, *server.workers()]:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total * 1024 / 1e6


def serve(place: Path, store: Path, row: list[float], workers: int, preload: bool) -> float:
    """Serve the store, let every worker answer, and return the PSS of it all, MB."""
    from conftest import gunicorn

    place.mkdir()
    with gunicorn(place, model_dir=store, web_concurrency=workers, preload=int(preload), ready=False) as server:
        server.wait_until(server.is_ready, 120)
        answered: set[int] = set()
        deadline = time.monotonic() + 60
        while len(answered) < workers and time.monotonic() < deadline:
            server.predict([row])  # 503 where another worker is not ready yet
            journal = place.glob("journal/*.jsonl")
            lines = [json.loads(line) for path in journal for line in path.read_text().splitlines()]
            answered = {line["pid"] for line in lines if line["success"]}
        assert len(answered) == workers, "a worker has answered nothing"
        return pss(server)


def main() -> None:
    """Measure, print a table, write JSON lines."""
    import joblib

    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=3, metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the figures to this file")
    given = parser.parse_args()
    many_workers = f"{given.workers} workers"
    print(f"{'model':<24}{'file':>9}{'1 worker':>10}{many_workers:>11}{'each further':>14}{'beyond iris':>13}")
    iris = 0.0
    with TemporaryDirectory() as scratch:
        for number, (name, preload) in enumerate(
            (("iris", False), ("kNN", False), ("forest", False), ("forest", True))
        ):
            place = Path(scratch, str(number))
            place.mkdir()
            model, sample = train(name)
            joblib.dump(model, place / "model.joblib")
            del model
            size = (place / "model.joblib").stat().st_size / 1e6
            store = Store(place / "store")
            publish(store, place / "model.joblib", "1", sample)
            store.promote("1")
            one, many = (
                serve(place / str(workers), store.directory, sample[0], workers, preload)
                for workers in (1, given.workers)
            )
            each = (many - one) / (given.workers - 1)
            iris = iris or each
            share = (each - iris) / size
            named = f"{name}, PRELOAD=1" if preload else name
            print(
                f"{named:<24}{size:>6.0f} MB{one:>7.0f} MB{many:>8.0f} MB{each:>11.0f} MB{100 * share:>11.0f} %",
                flush=True,
            )
            if given.json:
                with given.json.open("a") as file:
                    found = {"model": named, "file": size, "one": one, "many": many, "workers": given.workers}
                    file.write(json.dumps(found | {"each": each, "beyond_iris": share}) + "\n")


if __name__ == "__main__":
    main()
