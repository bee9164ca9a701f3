"""Models of several kinds, and rows for each, for the tests of the further endpoints."""

from typing import Any

import numpy as np
import pandas as pd
from sklearn.compose import make_column_transformer
from sklearn.datasets import load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder

IRIS_ROWS: list[list[float]] = load_iris().data[::30].tolist()
FRAME = pd.DataFrame(
    {
        "height": [1.5, 1.75, 2.25, 0.5, 1.0, 2.0],
        "colour": ["red", "green, dark", 'a "blue"', "red", "green, dark", 'a "blue"'],
        "size": [3, 4, 3, 5, 4, 5],
        "open": [True, False, True, True, False, False],
    }
)
FRAME_ROWS: list[list[Any]] = FRAME.astype(object).to_numpy().tolist()
TEXTS = ["good, very good", 'it is "bad"', "ni hao 你好", "bad"]
BIG = 2**53 + 1  # no float is this number


class OddNumbers:
    """Answers NaN and infinity."""

    n_features_in_ = 1

    def predict(self, rows: Any) -> Any:
        """Return the logarithm of each row's number."""
        with np.errstate(all="ignore"):
            return np.log(rows[:, 0])


def frame_model() -> Any:
    """Return a classifier of a data frame with numbers, strings, whole numbers as categories, and booleans."""
    encoder = make_column_transformer(
        (OneHotEncoder(handle_unknown="ignore"), ["colour", "size", "open"]), remainder="passthrough"
    )
    return make_pipeline(encoder, LogisticRegression()).fit(FRAME, ["yes", "no", "yes", "no", "no", "yes"])


def text_model() -> Any:
    """Return a classifier of strings."""
    return make_pipeline(TfidfVectorizer(token_pattern=r"\S+"), LogisticRegression()).fit(TEXTS, [1, 0, 1, 0])


def labels_model() -> Any:
    """Return a classifier whose labels are no floats."""
    return KNeighborsClassifier(1).fit([[0.0], [1.0], [2.0]], [BIG, BIG + 1, -BIG])


def outputs_model() -> Any:
    """Return a classifier of two outputs."""
    x = load_iris().data
    y = np.column_stack([load_iris().target, load_iris().target > 0])
    return RandomForestClassifier(5, random_state=0).fit(x, y)


def targets_model() -> Any:
    """Return a regressor of two targets."""
    x = load_iris().data
    return LinearRegression().fit(x, np.column_stack([x.sum(axis=1), x[:, 0] / 3]))
