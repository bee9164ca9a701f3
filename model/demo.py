"""Train and publish the model that the first run serves: iris, a scaler and a logistic regression.

python -m model.demo [DIRECTORY]        default var/models; does nothing where a version is served already
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from .versions.publishing import publish
from .versions.store import Store


def train() -> tuple[Any, list[list[float]]]:
    """Fit the demo pipeline on all of iris; return it with three rows, one of each species."""
    from sklearn.datasets import load_iris
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    iris = load_iris(as_frame=True)  # a data frame, so that the model knows its columns by name
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=200)).fit(iris.data, iris.target)
    return model, iris.data.iloc[[0, 50, 100]].to_numpy().tolist()


def main(directory: Path) -> None:
    """Publish the demo model as version "1" and promote it."""
    if (directory / "routing.json").exists():
        return
    import joblib

    store = Store(directory)
    model, sample = train()
    if not (directory / "1").exists():  # there already when a run was stopped between the two steps
        with tempfile.TemporaryDirectory() as scratch:
            artifact = Path(scratch, "model.joblib")
            joblib.dump(model, artifact)
            publish(store, artifact, "1", sample, note="iris, for a first run")
    store.promote("1")
    print(f"trained the demo model (iris) and published it as {directory / '1'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("var/models"))
