"""Train the models that the comparison serves: `python -m bench.train DIRECTORY`.

For each model it writes NAME.joblib, NAME.onnx (made and checked by `model.versions.onnx_export`) and NAME.json: a
hundred rows, and what `model.predict` answers to them. They are fitted on plain arrays, which every server can send.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from model.versions.onnx_export import export  # noqa: E402  # found by the line above


def main(directory: Path) -> None:
    """Write what is not there yet."""
    import joblib
    import numpy as np
    from sklearn.datasets import load_breast_cancer, load_iris
    from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    directory.mkdir(parents=True, exist_ok=True)
    for name, load, model in (
        ("iris", load_iris, make_pipeline(StandardScaler(), LogisticRegression())),
        ("forest", load_breast_cancer, RandomForestClassifier(100, random_state=0)),
        ("hgb", load_breast_cancer, HistGradientBoostingClassifier(random_state=0)),
    ):
        cases, file = directory / f"{name}.json", directory / f"{name}.joblib"
        if cases.exists():
            continue
        data, labels = load(return_X_y=True)
        joblib.dump(model.fit(data, labels), file)
        rows = data[np.random.default_rng(0).permutation(len(data))[:100]]
        print(name, export(file, file.with_suffix(".onnx"), rows.tolist()), flush=True)
        cases.write_text(json.dumps({"rows": rows.tolist(), "predictions": model.predict(rows).tolist()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
