"""Random tables, models fitted on them, and requests, for test_random_models.py.

A seed gives a `Case`: a table of one to six columns, and a pipeline or booster that was fitted on it as a data frame or
as an array. `requests` then writes some of its rows as JSON, each form of them beside the table that it denotes.
"""

import json
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    ExtraTreesRegressor,
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    RandomForestClassifier,
)
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    FunctionTransformer,
    KBinsDiscretizer,
    MaxAbsScaler,
    MinMaxScaler,
    OneHotEncoder,
    OrdinalEncoder,
    PolynomialFeatures,
    QuantileTransformer,
    RobustScaler,
    StandardScaler,
    TargetEncoder,
)
from sklearn.svm import LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

N_ROWS = 120
WORDS = ["Oslo", "Zürich", "東京", "Москва", "القاهرة", "a b", "", "3", "true", "2026-01-01", "é", "e\u0301"]


@dataclass
class Case:
    """A fitted model, the table it was fitted on, and the kind of each column."""

    name: str
    model: Any
    frame: pd.DataFrame
    kinds: dict[str, str]  # name → "kind:dtype"
    encoded: set[str]  # the columns whose values an encoder learned
    array: str = ""  # the dtype of the array that it was fitted on; "": it was fitted on the frame
    exported: bool = False  # it is served as ONNX, whose answers may differ by what `python -m model export` allows

    def inputs(self, frame: pd.DataFrame) -> Any:
        """Return what the model takes for some rows of the table."""
        if not self.array:
            return frame
        # An array of whole numbers with a missing one is an array of floats.
        missing = self.array == "int64" and frame.isna().any(axis=None)
        return frame.to_numpy(dtype="float64" if missing else self.array)

    def predict(self, frame: pd.DataFrame) -> Any:
        """Return the model's own predictions, or the exception that it raises."""
        try:
            if type(self.model).__module__ == "xgboost.core":  # a raw Booster
                return self.model.predict(sys.modules["xgboost"].DMatrix(frame, enable_categorical=True))
            return self.model.predict(self.inputs(frame))
        except Exception as error:
            return error


# --- columns


def _numbers(rng: random.Random, dtype: str) -> Any:
    if dtype.startswith("float"):
        pool = [round(rng.uniform(-5, 5), 1) for _ in range(6)] if rng.random() < 0.5 else None
        return np.array([rng.choice(pool) if pool else rng.gauss(0, 3) for _ in range(N_ROWS)], dtype=dtype)
    low = 0 if dtype.startswith("u") else -3
    return np.array([rng.randint(low, 6) for _ in range(N_ROWS)], dtype=dtype)


def _dates(rng: random.Random, dtype: str) -> Any:
    zone = dtype.partition(", ")[2].rstrip("]")
    unit = {"D": 86_400, "h": 3600, "s": 1}[rng.choice("DDhs")]
    pool = [1_760_000_000 // unit * unit + unit * rng.randint(-50, 50) for _ in range(5)]
    values = pd.to_datetime([rng.choice(pool) for _ in range(N_ROWS)], unit="s")
    if zone:
        values = values.tz_localize("UTC").tz_convert(zone)
    return pd.Series(values).astype(dtype)


def _column(rng: random.Random, kind: str) -> pd.Series:
    name, _, dtype = kind.partition(":")
    if name in ("number", "integer"):
        return pd.Series(_numbers(rng, dtype))
    if name == "nullable":
        is_boolean = dtype == "boolean"
        values = pd.Series([rng.random() < 0.5 for _ in range(N_ROWS)] if is_boolean else _numbers(rng, dtype.lower()))
        return values.astype(dtype)
    if name == "boolean":
        return pd.Series([rng.random() < 0.5 for _ in range(N_ROWS)], dtype=dtype)
    if name == "date":
        return _dates(rng, dtype)
    if name == "category":
        pool: list[Any] = {"str": rng.sample(WORDS, 4), "int": [3, 5, 8], "bool": [False, True]}[dtype]
        return pd.Series(pd.Categorical([rng.choice(pool) for _ in range(N_ROWS)], categories=pool))
    pool = rng.sample(WORDS, 4)
    return pd.Series([rng.choice(pool) for _ in range(N_ROWS)], dtype=dtype)


KINDS = (
    *("number:float64", "number:float64", "number:float32", "number:float16"),
    *("integer:int64", "integer:int64", "integer:int32", "integer:int16", "integer:int8"),
    *("integer:uint8", "integer:uint16", "integer:uint32", "integer:uint64"),
    *("text:str", "text:str", "text:object", "text:string"),
    *("category:str", "category:int", "category:bool"),
    *("date:datetime64[ns]", "date:datetime64[us]", "date:datetime64[ms]", "date:datetime64[s]"),
    *("date:datetime64[ns, UTC]", "date:datetime64[us, Europe/Zurich]"),
    *("boolean:bool", "boolean:bool", "boolean:object"),
    *("nullable:Int64", "nullable:Int32", "nullable:UInt8", "nullable:Float64", "nullable:Float32"),
    *("nullable:boolean", "nullable:boolean"),
)


# What ONNX has: no dates, no categories of pandas, no nullable types.
ONNX_KINDS = (
    "number:float64",
    "number:float32",
    "integer:int64",
    "integer:int32",
    "text:str",
    "text:object",
    "boolean:bool",
)


def _with_missing(rng: random.Random, column: pd.Series, kind: str) -> pd.Series:
    if kind.startswith(("integer", "boolean:bool")) or rng.random() > 0.3:
        return column
    return column.mask(np.array([rng.random() < 0.15 for _ in range(len(column))]))


def random_frame(rng: random.Random, kinds: tuple[str, ...] = KINDS) -> tuple[pd.DataFrame, dict[str, str]]:
    """Make a frame of one to six columns, and the kind of each."""
    names = rng.sample(["age", "größe", "petal width (cm)", "city", "when", "x1", "flag", "0"], rng.randint(1, 6))
    found = {name: rng.choice(kinds) for name in names}
    return pd.DataFrame({n: _with_missing(rng, _column(rng, kind), kind) for n, kind in found.items()}), found


# --- pipelines


def _encoder(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: OneHotEncoder(handle_unknown="ignore"),
            lambda: OneHotEncoder(handle_unknown="ignore", min_frequency=20),
            lambda: OneHotEncoder(handle_unknown="infrequent_if_exist", max_categories=3),
            lambda: OneHotEncoder(),
            lambda: OneHotEncoder(drop="first"),
            lambda: OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1),
            lambda: OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1, encoded_missing_value=-2),
            lambda: OrdinalEncoder(),
            lambda: TargetEncoder(cv=2, random_state=0),
        ]
    )()


def _scaler(rng: random.Random) -> Any:
    return rng.choice(
        [
            lambda: StandardScaler(),
            lambda: MinMaxScaler(),
            lambda: RobustScaler(),
            lambda: MaxAbsScaler(),
            lambda: QuantileTransformer(n_quantiles=10),
            lambda: FunctionTransformer(np.abs),
            lambda: KBinsDiscretizer(3, quantile_method="averaged_inverted_cdf"),
            lambda: PolynomialFeatures(2),
            lambda: "passthrough",
        ]
    )()


def _imputer(rng: random.Random) -> Any:
    if rng.random() < 0.1:
        return KNNImputer(n_neighbors=2)
    strategy = rng.choice(["mean", "median", "most_frequent", "constant"])
    fill = 0 if strategy == "constant" else None
    return SimpleImputer(strategy=strategy, fill_value=fill, add_indicator=rng.random() < 0.2)


def _transformer(rng: random.Random, kind: str, missing: bool) -> Any:
    name = kind.partition(":")[0]
    numeric = name in ("number", "integer", "boolean") or (name == "nullable" and kind != "nullable:boolean")
    steps: list[Any] = []
    imputed = missing or rng.random() < 0.2
    if numeric and rng.random() < 0.6:
        if imputed and kind != "boolean:object":
            steps.append(_imputer(rng))
        steps.append(_scaler(rng))
    elif rng.random() < 0.05:
        return "drop"
    else:
        if imputed and name in ("text", "number") and rng.random() < 0.7:
            constant = rng.random() < 0.5
            fill = "missing" if name == "text" else -1
            steps.append(
                SimpleImputer(strategy="constant", fill_value=fill)
                if constant
                else SimpleImputer(strategy="most_frequent")
            )
        steps.append(_encoder(rng))
    return make_pipeline(*steps) if len(steps) > 1 or rng.random() < 0.2 else steps[0]


def _transformed(
    rng: random.Random,
    frame: pd.DataFrame,
    kinds: dict[str, str],
    estimator: Any,
    encoded: set[str],
    by_name: bool,
) -> Any:
    """Put a transformer before an estimator for each column, and add the columns that get an encoder to `encoded`."""
    parts: list[Any] = []
    for at, (name, kind) in enumerate(kinds.items()):
        part = _transformer(rng, kind, bool(frame[name].isna().any()))
        if hasattr(getattr(part, "steps", [(None, part)])[-1][1], "categories"):
            encoded.add(name)
        parts.append((f"c{at}", part, [name if by_name else at]))
    rng.shuffle(parts)
    return make_pipeline(ColumnTransformer(parts, sparse_threshold=0), estimator)


Booster = tuple[str, Callable[[], Any], tuple[str, ...]]  # its name, and what the kinds that it takes begin with
_PLAIN = ("number", "integer", "boolean:bool", "category")


@cache
def _boosters(foreign: bool) -> list[Booster]:
    """List what takes categories without an encoder, of scikit-learn or with the `foreign` libraries."""
    found: list[Booster] = [
        (
            "HistGradientBoosting from_dtype",
            lambda: HistGradientBoostingClassifier(max_iter=5, categorical_features="from_dtype"),
            _PLAIN,
        ),
        (
            "HistGradientBoostingRegressor from_dtype",
            lambda: HistGradientBoostingRegressor(max_iter=5, categorical_features="from_dtype"),
            _PLAIN,
        ),
    ]
    if not foreign:
        return found
    from catboost import CatBoostClassifier, CatBoostRegressor
    from lightgbm import LGBMClassifier, LGBMRegressor
    from xgboost import XGBClassifier, XGBRegressor

    nullable = (*_PLAIN, "nullable:Int64", "nullable:Float64")
    strings = ("number", "integer", "boolean:bool", "text", "category:str")
    cat = {"iterations": 5, "verbose": 0, "allow_writing_files": False}
    light, extreme = {"n_estimators": 5, "verbose": -1, "min_child_samples": 2}, {"n_estimators": 5}
    return [
        *found,
        ("LGBMClassifier", lambda: LGBMClassifier(**light), nullable),
        ("LGBMRegressor", lambda: LGBMRegressor(**light), nullable),
        ("XGBClassifier", lambda: XGBClassifier(enable_categorical=True, **extreme), nullable),
        ("XGBRegressor", lambda: XGBRegressor(enable_categorical=True, **extreme), nullable),
        ("LGBMRegressor, raw", lambda: LGBMRegressor(**light), nullable),
        ("XGBRegressor, raw", lambda: XGBRegressor(enable_categorical=True, **extreme), nullable),
        ("CatBoostClassifier", lambda: CatBoostClassifier(**cat), strings),
        ("CatBoostRegressor", lambda: CatBoostRegressor(**cat), strings),
    ]


def _estimator(rng: random.Random) -> tuple[str, Any]:
    made: BaseEstimator = rng.choice(
        [
            lambda: LogisticRegression(max_iter=50),
            lambda: Ridge(),
            lambda: DecisionTreeClassifier(random_state=0, max_depth=5),
            lambda: DecisionTreeRegressor(random_state=0, max_depth=5),
            lambda: RandomForestClassifier(5, random_state=0),
            lambda: ExtraTreesRegressor(5, random_state=0),
            lambda: GradientBoostingClassifier(n_estimators=5, random_state=0),
            lambda: LinearSVC(),
            lambda: HistGradientBoostingClassifier(max_iter=5),
            lambda: HistGradientBoostingRegressor(max_iter=5),
        ]
    )()
    return type(made).__name__, made


def _boosted(rng: random.Random, booster: Booster) -> Case:
    """Make a booster that is not fitted yet, and a frame of columns that it takes as they are."""
    name, make, starts = booster
    frame, kinds = random_frame(rng, tuple(kind for kind in KINDS if kind.startswith(starts)))
    model = make()
    if name.startswith("CatBoost"):  # it takes no missing category, and no categories of pandas
        texts = [column for column, kind in kinds.items() if kind.startswith(("text", "category", "boolean"))]
        for column in texts:
            frame[column] = frame[column].astype(object).where(frame[column].notna(), "none")
        model.set_params(cat_features=texts)
    return Case(name, model, frame, kinds, set())


def _piped(rng: random.Random, kinds: tuple[str, ...]) -> Case:
    """Make a pipeline that is not fitted yet, and a frame of such columns, or an array, for it."""
    array = rng.choice(["float64", "float32", "int64", "object"]) if rng.random() < 0.3 else ""
    held = {"int64": ("integer:int64",), "object": ("number:float64", "text:object"), "": kinds}
    frame, found = random_frame(rng, held.get(array, (f"number:{array}",)))
    name, estimator = _estimator(rng)
    encoded: set[str] = set()
    if array:  # of which a ColumnTransformer selects columns by their numbers
        frame.columns = numbered = [str(at) for at in range(len(found))]
        found = dict(zip(numbered, found.values(), strict=True))
    model = _transformed(rng, frame, found, estimator, encoded, by_name=not array)
    for column, kind in found.items():
        # scikit-learn computes in half precision, and a fitted model keeps no trace of it unless an encoder learned it.
        if kind == "number:float16" and column not in encoded:
            frame[column], found[column] = frame[column].astype("float32"), "number:float32"
    return Case(name, model, frame, found, encoded, array)


def random_case(seed: int, foreign: bool = False, kinds: tuple[str, ...] = KINDS) -> Case | None:
    """Make a fitted model; None if it cannot be fitted on the table that was drawn.

    Args:
        foreign: also models of LightGBM, XGBoost and CatBoost, which must be installed then.
        kinds: of the columns; of all kinds some boosters are drawn as well, which take no encoder.
    """
    rng = random.Random(seed)
    direct = kinds == KINDS and rng.random() < (0.35 if foreign else 0.1)
    case = _boosted(rng, rng.choice(_boosters(foreign))) if direct else _piped(rng, kinds)
    if seed % 10 == 4 and "raw" not in case.name:  # what is behind a step that changes nothing
        case.model = make_pipeline(rng.choice(["passthrough", FunctionTransformer()]), case.model)
    # A target that depends on each column, so that a value that is read wrongly shows.
    codes = sum(pd.factorize(case.frame[column])[0] for column in case.frame)
    noise = np.array([rng.random() for _ in range(N_ROWS)])
    if "Regressor" in case.name or "Ridge" in case.name:
        target = codes + noise
    else:
        target = (codes + 2 * noise > np.median(codes)).astype(int)
        if rng.random() < 0.3 and not case.name.startswith("XGB"):  # XGBoost takes numbers only
            target = np.array(rng.choice([["no", "そう"], [False, True], [-1, 7]]))[target]
    try:
        case.model.fit(case.inputs(case.frame), target)
        if case.name == "LGBMRegressor, raw":
            case.model = case.model.booster_
        elif case.name == "XGBRegressor, raw":
            case.model = case.model.get_booster()
    except Exception:  # any: an encoder of dates beside strings, one class only, …
        return None
    if isinstance(case.predict(case.frame), Exception):
        return None
    case.name = f"{seed} {case.name} {case.array} {case.kinds}"
    return case


# --- requests


def to_json(value: Any, rng: random.Random, spell: bool, encoded: bool = True) -> Any:
    """Write a value of a frame as JSON.

    Args:
        spell: in one of the other spellings that denote the same value: 3.0 for 3, 1 for true, another offset, a blank
            for the T, no seconds.
        encoded: an encoder learned it. A number of less than 64 bits is then written as briefly as it can be, 0.1, as
            people write it; to any other part of a model 0.1 is another number than its float32.
    """
    if value is None or value is pd.NA or value is pd.NaT or value != value:
        return None
    if isinstance(value, (bool, np.bool_)):
        return rng.choice([bool, int, float])(value) if spell else bool(value)
    if isinstance(value, (int, np.integer)):
        return float(value) if spell and rng.random() < 0.5 else int(value)
    if isinstance(value, (float, np.floating)):
        if spell and float(value).is_integer() and rng.random() < 0.5:
            return int(value)
        exact = not encoded or (spell and rng.random() < 0.5)
        return float(value) if exact else float(str(value))
    return _spelled(value, rng, spell) if isinstance(value, pd.Timestamp) else value


def _spelled(date: pd.Timestamp, rng: random.Random, spell: bool) -> str:
    """Write a date as ISO 8601."""
    if spell and date.tzinfo is not None and rng.random() < 0.5:
        return str(date.tz_convert("UTC").isoformat()).replace("+00:00", "Z")
    if not date.tzinfo and date == date.normalize() and rng.random() < 0.5:
        return str(date.date())
    precision = rng.choice(["auto", "milliseconds", "minutes" if date.second == 0 else "seconds"]) if spell else "auto"
    if spell and date.tzinfo is not None and rng.random() < 0.5:
        date = date.tz_convert("Asia/Kolkata")
    return str(date.isoformat(sep=" " if spell and rng.random() < 0.5 else "T", timespec=precision))


def row_as_json(case: Case, row: pd.Series, rng: random.Random, spell: bool = False) -> list[Any]:
    """Write a row of the table as JSON, as a list."""
    return [to_json(value, rng, spell, name in case.encoded) for name, value in row.items()]


def sample_of(case: Case, rng: random.Random) -> list[Any]:
    """Write three rows as the sample of a model: as objects, or as lists if it has no names."""
    rows = case.frame.iloc[rng.sample(range(N_ROWS), 3)].astype(object)
    values = [row_as_json(case, row, rng) for _, row in rows.iterrows()]
    return values if case.array else [dict(zip(case.frame, row, strict=True)) for row in values]


@dataclass
class Request:
    """Rows as JSON, and the tables that they may denote: the answer must be the model's own for one of them."""

    form: str
    data: list[Any]
    frames: list[pd.DataFrame]
    may_refuse: bool = False  # a category that the model does not know, or a null where none was missing at fit


FORMS = ("lists", "objects", "spellings", "one row", "nulls", "unknown")


def requests(case: Case, seed: int) -> Iterator[Request]:
    """Yield a request in each form that the model takes."""
    rng = random.Random(seed)
    for form in FORMS:
        if request := _request(case, form, rng):
            yield request


def callers(case: Case, seed: int, count: int = 8) -> list[Request]:
    """Make the requests of some callers who ask at once, in different forms."""
    rng = random.Random(seed + 10**9)
    forms = [form for form in FORMS if form != "unknown"]
    made = (_request(case, forms[at % len(forms)], rng, n_rows=rng.randint(1, 3)) for at in range(count))
    return [request for request in made if request is not None]


def _request(case: Case, form: str, rng: random.Random, n_rows: int = 5) -> Request | None:
    """Make a request of one form; None if the model's columns have no such value."""
    if case.array and form == "objects":  # without names
        return None
    names = list(case.frame)
    chosen = sorted(rng.sample(range(N_ROWS), 1 if form == "one row" else n_rows))
    rows = case.frame.iloc[chosen].reset_index(drop=True)
    data: list[Any] = [row_as_json(case, rows.astype(object).iloc[at], rng, form == "spellings") for at in rows.index]
    frames, may_refuse, column = [rows], False, rng.choice(names)
    if form == "nulls":
        for row in data[:2]:
            row[names.index(column)] = None
        may_refuse = not case.frame[column].isna().any()
        frames = list(_with_nulls(rows, column, first=may_refuse))
    elif form == "unknown":
        new = _unknown(case.kinds[column], rows[column])
        if new is None:
            return None
        frames = list(_with_unknown(rows, column, new))
        may_refuse = isinstance(rows[column].dtype, pd.CategoricalDtype)
        data[0][names.index(column)] = to_json(new, rng, False, column in case.encoded)
    if form in ("objects", "nulls") and not case.array:
        order = rng.sample(names, len(names))
        data = [{name: row[names.index(name)] for name in order} for row in data]
    return Request(form, json.loads(json.dumps(data)), frames, may_refuse)


def _with_nulls(rows: pd.DataFrame, column: str, first: bool) -> Iterator[pd.DataFrame]:
    """Yield the rows without the first two values of a column, in each way that pandas has for what is missing.

    `first`: none was missing when the model was fitted. Nothing shows then which of None, NaN and NA it would be.
    """
    missing = rows.index < 2
    yield rows.assign(**{column: rows[column].mask(missing)})
    if first and rows[column].dtype.kind in "biuf":
        yield rows.assign(**{column: rows[column].astype(float).mask(missing)})
    if rows[column].dtype == object or str(rows[column].dtype).startswith("str"):
        yield rows.assign(**{column: rows[column].astype(object).where(~missing, None)})
        yield rows.assign(**{column: rows[column].astype(object).where(~missing, np.nan)})


def _with_unknown(rows: pd.DataFrame, column: str, new: Any) -> Iterator[pd.DataFrame]:
    """Yield the rows with a new first value of a column; one that is no category counts as missing, or as a new one."""
    if not isinstance(rows[column].dtype, pd.CategoricalDtype):
        changed = rows.copy()
        changed.loc[0, column] = new
        yield changed
        return
    yield rows.assign(**{column: rows[column].mask(rows.index == 0)})
    wider = [*rows[column].cat.categories, new]
    values = rows[column].astype(object).where(rows.index != 0, new)
    yield rows.assign(**{column: pd.Categorical(values, categories=wider)})


def _unknown(kind: str, column: pd.Series) -> Any:
    """Return a value that no frame holds, of the column's type; None if there is none."""
    name = kind.partition(":")[0]
    if name == "text" or kind == "category:str":
        return "never seen"
    if kind == "category:int":
        return 99
    if name == "date":
        return pd.Timestamp("2031-05-05", tz=getattr(column.dtype, "tz", None)).as_unit(column.dt.unit)
    if kind in ("integer:int64", "integer:int32", "nullable:Int64"):
        return 77
    if name == "number":
        return column.dtype.type(4.25)
    return None
