"""What does a large request cost, as a multiple of what its decoding and its model take by themselves?

    python -m bench.large [--rounds 7]                                                      some two minutes

In turn a body is sent to a server, and given to `model.predict(orjson.loads(body)["data"])` in this process; a frame is
made of the rows if the model takes one, and an array is copied. Time is processor time; a ratio is that of neighbours:
the median (and the quartiles). Memory is the worker's peak above what it had before, as a multiple of the body.
"""

import io
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any

import click
import joblib
import numpy as np
import orjson
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from bench.running import Running, running
from bench.servers import OURS, prepare

Way = tuple[bytes, dict[str, str], Callable[[bytes], Any]]  # a body, its headers, and what its model takes by itself


def train(strings: bool) -> tuple[Any, pd.DataFrame]:
    """Fit a model of 30 numbers, or one of a frame of 25 numbers and 5 strings; return it with rows."""
    data, labels = load_breast_cancer(return_X_y=True, as_frame=True)
    if not strings:
        return make_pipeline(StandardScaler(), LogisticRegression()).fit(data.to_numpy(), labels), data
    numbers, words = list(data.columns[:25]), list(data.columns[25:])
    for name in words:
        data[name] = pd.qcut(data[name], 4, labels=["low", "middle", "high", "highest"]).astype(str)
    columns = make_column_transformer((StandardScaler(), numbers), (OneHotEncoder(), words))
    return make_pipeline(columns, LogisticRegression()).fit(data, labels), data


def ways(model: Any, rows: pd.DataFrame, strings: bool) -> dict[str, Way]:
    """Return the ways to ask for these rows."""
    if strings:
        body = orjson.dumps({"data": rows.to_dict("records")})
        return {"strings, JSON": (body, {}, lambda body: model.predict(pd.DataFrame(orjson.loads(body)["data"])))}
    array, file = rows.to_numpy(), io.BytesIO()
    np.save(file, array)
    npy = file.getvalue(), {"Content-Type": "application/x-npy"}, lambda body: model.predict(array.copy())
    body = orjson.dumps({"data": array.tolist()})
    return {"numbers, JSON": (body, {}, lambda body: model.predict(orjson.loads(body)["data"])), "numbers, npy": npy}


def measure(run: Running, way: Way, rounds: int) -> tuple[list[float], list[float], float]:
    """Return the seconds that the server takes, those that decoding and model take, and the peak of memory in bytes."""
    body, headers, alone = way
    ours, theirs, count = [], [], max(1, 400_000 // len(body))
    process = Path(f"/proc/{run.family()[-1]}")
    (process / "clear_refs").write_text("5")  # the peak becomes what it has now
    before = peak(process)
    for _ in range(rounds + 1):  # the first to warm up
        spent = run.cpu()
        for _ in range(count):
            run.post(body, **headers)
        ours.append((run.cpu() - spent) / count)
        spent = time.process_time()
        for _ in range(count):
            orjson.dumps(alone(body).tolist())
        theirs.append((time.process_time() - spent) / count)
    return ours[1:], theirs[1:], peak(process) - before


def peak(process: Path) -> float:
    return 1024 * float((process / "status").read_text().partition("VmHWM:")[2].split()[0])


@click.command(help=__doc__)
@click.option("--rounds", default=7, show_default=True)
@click.option("--rows", default="100,10000,100000", show_default=True, help="in a request")
def main(rounds: int, rows: str) -> None:
    prepare(set())
    server = replace(OURS, variables={**OURS.variables, "MAX_BODY_BYTES": str(2**28)})
    print("| rows | body, MB | server, ms | alone, ms | server / alone | memory / body |\n|---|---|---|---|---|---|")
    for strings in False, True:
        model, table = train(strings)
        row = table[:1].to_dict("records") if strings else table[:1].to_numpy().tolist()
        first = row, model.predict(table[:1] if strings else row).tolist()
        for count in map(int, rows.split(",")):
            for title, way in ways(model, table.sample(count, replace=True, random_state=0), strings).items():
                with TemporaryDirectory() as at:
                    joblib.dump(model, path := Path(at, "model.joblib"))
                    with running(server, path, first=first) as run:
                        ours, alone, memory = measure(run, way, rounds)
                low, middle, high = quantiles([a / b for a, b in zip(ours, alone, strict=True)], n=4)
                cells = f"{len(way[0]) / 1e6:.2f} | {median(ours) * 1e3:.2f} | {median(alone) * 1e3:.2f}"
                ratio = f"{middle:.2f} ({low:.2f}–{high:.2f}) | {memory / len(way[0]):.1f}"
                print(f"| {count:,}, {title} | {cells} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
