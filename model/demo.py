"""Trains and publishes the model that a first run serves: iris, a scaler and a logistic regression.

python -m model.demo [DIRECTORY]
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import click

import cli
from history import History

from .versions.publishing import publish
from .versions.routing import ROUTING
from .versions.store import Store, StoreError


def train() -> tuple[Any, list[list[float]]]:
    """Fit the demo pipeline on all of iris; return it with three rows, one of each species."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    iris = load_iris(as_frame=True)  # a data frame, so that the model knows its columns by name
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(iris.data, iris.target)
    return model, iris.data.iloc[[0, 50, 100]].to_numpy().tolist()


@click.command()
@click.argument("directory", type=click.Path(path_type=Path), envvar="MODEL_DIR", default="var/models")
def demo(directory: Path) -> None:
    """Train a model on iris, publish it as version 1 in DIRECTORY (default: MODEL_DIR, or var/models), and promote it.

    If a version is served from there already, nothing is done.
    """
    if (directory / ROUTING).exists():
        return
    import joblib

    click.echo("training the demo model (iris), and trying it in a process of its own: some seconds")
    store = Store(directory, History().note)
    model, sample = train()
    if not (directory / "1").exists():  # it exists if a run was stopped between the two steps
        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch, "model.joblib")
            joblib.dump(model, artifact)
            publish(store, artifact, "1", sample, note="iris, for a first run")
    store.promote("1")
    click.echo(f"trained the demo model (iris) and published it as {directory / '1'}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    return cli.run("model.demo", demo, arguments, StoreError, OSError, status=1)


if __name__ == "__main__":
    sys.exit(main())
