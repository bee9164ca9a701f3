"""pandas and scipy.stats are imported only for the models that use them."""

import json
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import ROOT
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    PowerTransformer,
    QuantileTransformer,
    StandardScaler,
)

X, Y = load_iris(return_X_y=True)
FRAME = pd.DataFrame({"colour": ["red", "blue"] * 10, "size": range(20)})
COLOURS = make_column_transformer((OneHotEncoder(), ["colour"]), remainder="passthrough")
QUANTILES = QuantileTransformer(n_quantiles=50, output_distribution="normal")
LATE = {  # what is imported late, by a model that uses it, and for which rows
    "pandas": ("pandas", make_pipeline(COLOURS, LogisticRegression()).fit(FRAME, [0, 1] * 10), FRAME[:2]),
    "an object of scipy.stats": ("scipy.stats", make_pipeline(QUANTILES, LogisticRegression()).fit(X, Y), X[::30]),
    "a function of scipy.stats": (
        "scipy.stats",
        make_pipeline(PowerTransformer(), LogisticRegression()).fit(X, Y),
        X[::30],
    ),
    "scipy.stats in the pickle": (
        "scipy.stats",
        make_pipeline(FunctionTransformer(scipy.stats.norm.cdf), LogisticRegression()).fit(X, Y),
        X[::30],
    ),
}
SCRIPT = """
import json
import sys
from pathlib import Path
from server import create_app
from settings import Settings
place, module, rows = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
for name in "simple", "late":
    app = create_app(Settings(model_path=place / f"{name}.joblib", auth="off", journal_dir=place / "journal"))
    service = app.extensions["service"]
    service.start()
    assert service.serving.finished.wait(60)
    print(module in sys.modules)
answer = app.test_client().post("/predict", json={"data": rows, "method": "predict_proba"})
print(json.dumps(answer.json["prediction"]))
print(module in sys.modules)
"""


@pytest.mark.long
@pytest.mark.parametrize("name", LATE)
def test_modules_that_few_models_use_are_imported_only_for_them(tmp_path: Path, name: str) -> None:
    module, late, rows = LATE[name]
    joblib.dump(late, tmp_path / "late.joblib")
    joblib.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y), tmp_path / "simple.joblib")
    given = json.dumps(np.asarray(rows, dtype=object).tolist())
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path, module, given], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    before, _, answer, after = done.stdout.splitlines()
    assert (before, after) == ("False", "True")
    assert json.loads(answer) == late.predict_proba(rows).tolist()


@pytest.mark.parametrize("change", ["sys.modules['sklearn.isotonic'] = None", "lean_imports._Postponed = len"])
def test_scikit_learn_that_needs_more_is_imported_as_ever(tmp_path: Path, change: str) -> None:
    joblib.dump(LATE["an object of scipy.stats"][1], tmp_path / "model.joblib")
    script = f"""
import sys
import speedups
from pathlib import Path
from model import formats
from model.formats import sklearn
from speedups import lean_imports
sklearn.before_import.append(speedups.import_sklearn)
{change}
model = formats.load(Path(sys.argv[1]))
print(sys.modules.get("pandas", "absent") is not None, model.predict([[5.1, 3.5, 1.4, 0.2]]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.joblib"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "True [0]\n", done.stderr
    assert done.stderr.count("lean_imports is left off") == 1


def test_requests_are_answered_while_another_thread_imports_pandas(tmp_path: Path) -> None:
    """As when a version that takes a data frame is loaded beside one that does not."""
    joblib.dump(make_pipeline(StandardScaler(), LogisticRegression()).fit(X, Y), tmp_path / "model.joblib")
    script = """
import sys
import speedups
from importlib import import_module
from pathlib import Path
from threading import Thread
from model import formats
from model.formats import sklearn
sklearn.before_import.append(speedups.import_sklearn)
model = formats.load(Path(sys.argv[1]))
importing = Thread(target=import_module, args=["pandas"])
before, calls = "pandas" in sys.modules, 0
importing.start()
while importing.is_alive():
    assert model.predict([[5.1, 3.5, 1.4, 0.2]]) == [0]
    calls += 1
import pandas
print(before, calls > 10, pandas.DataFrame({"a": [1]}).shape, pandas.Series([1]).sum())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.joblib"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("False True (1, 1) 1\n", "")
