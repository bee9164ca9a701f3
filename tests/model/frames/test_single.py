"""Numbers too large for the float32 that trees make of them are refused before the model is called, if it is known."""

import copy
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    HistGradientBoostingClassifier,
    RandomForestClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.feature_selection import SelectFromModel
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.tree import DecisionTreeClassifier

from model.frames.columns import MAX_SINGLE
from model.infer_signature import infer_signature
from model.signature import BadRows

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4))
Y = (X[:, 0] + X[:, 1] > 0).astype(int)
LIMIT = float(np.nextafter(MAX_SINGLE, 0))  # which becomes the largest float32
HUGE = (MAX_SINGLE, -MAX_SINGLE, 1e39, -1e300, 2**200)


def tree() -> Any:
    return DecisionTreeClassifier(random_state=0)


def forest() -> Any:
    return RandomForestClassifier(3, random_state=0)


def passing(*columns: Any) -> Any:
    return ColumnTransformer([("imputed", SimpleImputer(), columns[:2]), ("as they are", "passthrough", columns[2:])])


class Router(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Asks a tree for some rows only."""

    def fit(self, x: Any, y: Any) -> "Router":
        self.n_features_in_, self.classes_ = x.shape[1], np.unique(y)
        self.estimators_ = [tree().fit(x, y), LogisticRegression().fit(x, y)]
        return self

    def predict(self, x: Any) -> Any:
        return np.array([self.estimators_[int(row[0] > 5)].predict([row])[0] for row in np.asarray(x)])


KNOWN = {
    "tree": tree(),
    "pipeline": make_pipeline(SimpleImputer(add_indicator=True), "passthrough", FunctionTransformer(), forest()),
    "nested": make_pipeline(make_pipeline(SimpleImputer()), forest()),
    "columns": make_pipeline(passing(0, 1, 2, 3), forest()),
    "bagging": BaggingClassifier(tree(), 3, random_state=0),
    "boosting": AdaBoostClassifier(tree(), n_estimators=3),
    "voting": VotingClassifier([("linear", LogisticRegression()), ("forest", forest())]),
    "stacking": StackingClassifier([("forest", forest()), ("linear", LogisticRegression())], cv=2),
    "calibrated": CalibratedClassifierCV(forest(), cv=2),
    "outputs": MultiOutputClassifier(forest()),
    "one against the rest": OneVsRestClassifier(forest()),
    "search": GridSearchCV(make_pipeline(SimpleImputer(), tree()), {"decisiontreeclassifier__max_depth": [2]}, cv=2),
}
UNKNOWN = {  # some of which answer, and some do not
    "scaled": make_pipeline(StandardScaler(), forest()),
    "linear": LogisticRegression(),
    "hgb": HistGradientBoostingClassifier(max_iter=3),
    "selected": make_pipeline(SelectFromModel(forest(), max_features=2), LogisticRegression()),
    "own wrapper": Router(),
    "own function": make_pipeline(FunctionTransformer(np.tanh), forest()),
    "marker": make_pipeline(SimpleImputer(missing_values=1e39), forest()),
    "beside": make_union(StandardScaler(), "passthrough"),
}
UNKNOWN["beside"] = make_pipeline(UNKNOWN["beside"], forest())


def fitted(model: Any, x: Any = X) -> Any:
    return copy.deepcopy(model).fit(x, np.column_stack([Y, 1 - Y]) if isinstance(model, MultiOutputClassifier) else Y)


def answers(model: Any, row: list[Any]) -> bool:
    """Return whether the model itself answers a row."""
    names = getattr(model, "feature_names_in_", None)
    try:
        with np.errstate(all="ignore"):
            model.predict(np.array([row], dtype=float) if names is None else pd.DataFrame([row], columns=names))
    except ValueError:
        return False
    return True


def refused(signature: Any, row: list[Any], as_array: bool) -> bool:
    try:
        signature.validate(np.array([row], dtype=float) if as_array else [row])
    except BadRows:
        return True
    return False


@pytest.mark.parametrize("as_array", [False, True], ids=["JSON", "array"])
@pytest.mark.parametrize("name", [*KNOWN, *UNKNOWN])
def test_rows_are_refused_beforehand_only_if_the_model_refuses_them(name: str, as_array: bool) -> None:
    model = fitted((KNOWN | UNKNOWN)[name])
    signature, _ = infer_signature(copy.deepcopy(model))
    for at in range(4):
        for value in (LIMIT, -LIMIT, *HUGE):
            row = [9.0, 0.5, 0.5, 0.5]
            row[at] = value
            early = refused(signature, row, as_array)
            assert not (early and answers(model, row)), (at, value)
            if name in KNOWN:
                assert early == (value in HUGE), (at, value)


def test_columns_that_no_tree_sees_are_not_bounded_and_the_others_are_named() -> None:
    frame = pd.DataFrame(X, columns=list("abcd"))
    model = make_pipeline(ColumnTransformer([("kept", "passthrough", ["d", "b"])]), forest()).fit(frame, Y)
    signature, _ = infer_signature(copy.deepcopy(model))
    row: dict[str, Any] = dict.fromkeys("abcd", 0.5)
    assert not refused(signature, [1e300, 0.5, 1e300, 0.5], as_array=False)
    with pytest.raises(BadRows, match="too large for float32") as error:
        signature.validate([row, row | {"b": 1e39, "a": 1e39}])
    assert [(each["row"], each["column"]) for each in error.value.errors] == [(1, "b")]
