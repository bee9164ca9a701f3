"""Train the models that are served: `python bench/peers/train.py DIRECTORY NAME …`.

For each it writes NAME.joblib, NAME.onnx (not of the large ones) and NAME.json: a hundred rows, and what
`model.predict` answers to them. They are fitted on plain arrays, which every server can send.
"""

import json
import sys
from pathlib import Path

import joblib
import numpy as np
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from model.versions.onnx_export import export  # found by the line above

MODELS = {
    "iris": make_pipeline(StandardScaler(), LogisticRegression()),
    "forest": RandomForestClassifier(100, random_state=0),
    "hgb": HistGradientBoostingClassifier(random_state=0),
    "large-neighbours": KNeighborsClassifier(algorithm="brute"),  # 195 MB of arrays
    "large-forest": RandomForestClassifier(100, n_jobs=2, random_state=0),  # 158 MB of trees
}

directory, random = Path(sys.argv[1]), np.random.default_rng(0)
directory.mkdir(parents=True, exist_ok=True)
for name in [name for name in sys.argv[2:] if not (directory / f"{name}.json").exists()]:
    file, large = directory / f"{name}.joblib", name.startswith("large")
    if large:
        shape = (400_000, 60) if name == "large-neighbours" else (40_000, 30)
        data, labels = random.normal(size=shape), random.integers(0, 3, shape[0])
    else:
        data, labels = (load_iris if name == "iris" else load_breast_cancer)(return_X_y=True)
    model, rows = MODELS[name].fit(data, labels), data[random.permutation(len(data))[:100]]
    joblib.dump(model, file)
    if not large:
        print(name, export(file, file.with_suffix(".onnx"), rows.tolist()), flush=True)
    known = {"rows": rows.tolist(), "predictions": model.predict(rows).tolist()}
    file.with_suffix(".json").write_text(json.dumps(known))
