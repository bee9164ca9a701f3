"""What libraries other than scikit-learn record about their models' columns. They are imported only to predict.

Tried with LightGBM 4.7, XGBoost 3.2, CatBoost 1.2, category_encoders 2.11, feature_engine 1.9 and skrub 0.11.
"""

import itertools
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..columns import Column, Kind
from ..formats import ModelLoadError


def booster_columns(part: Any) -> list[Column] | None:
    """Return the columns of a fitted booster, which knows its categories itself; None for anything else."""
    part = getattr(part, "raw", part)
    read = _READERS.get(_library(part))
    return read(part) if read else None


def _lightgbm(part: Any) -> list[Column] | None:
    booster = getattr(part, "booster_", part)
    if not hasattr(booster, "feature_name"):
        return None
    names = booster.feature_name()
    learned = _lightgbm_categories(booster, names) if booster.pandas_categorical else {}
    plain = names == [f"Column_{at}" for at in range(len(names))]
    return [_column(None if plain else name, learned.get(at)) for at, name in enumerate(names)]


def _lightgbm_categories(booster: Any, names: list[str]) -> dict[int, list[Any]]:
    """Find the columns of the categories that LightGBM keeps, in their order, but without their columns.

    They are the columns it treats as categories, unless some are ordered or were named in `categorical_feature`; then
    the codes that it saw must show it. Raises: ModelLoadError, they do not.
    """
    categories, infos = booster.pandas_categorical, booster.dump_model(num_iteration=1)["feature_infos"]
    given = booster.params.get("categorical_column") or booster.params.get("categorical_feature") or []
    positions = sorted(int(at) for at in given) if isinstance(given, list) else []
    highest = [infos.get(name, {}).get("max_value", 0) for name in names]
    if len(positions) == len(categories) and all(
        highest[at] < len(known) for at, known in zip(positions, categories, strict=True)
    ):
        return dict(zip(positions, categories, strict=True))
    first = _in_order(highest, categories)
    last = _in_order(highest[::-1], categories[::-1])
    # Another column of small whole numbers might be the one, if the last category of an ordered one never occurred.
    most = max(map(len, categories))
    others = [code for at, code in enumerate(highest) if at not in (first or ()) and 0 <= code < most]
    if others or first is None or last is None or first != [len(names) - 1 - at for at in last[::-1]]:
        raise ModelLoadError(
            "LightGBM does not keep which columns held pandas categories, as some are ordered or others were named in "
            "categorical_feature; train it on unordered categories, and name no other columns"
        )
    return dict(zip(first, categories, strict=True))


def _in_order(highest: list[float], categories: list[list[Any]]) -> list[int] | None:
    """Return the first columns, in order, whose highest codes are those of the categories; None if there are none."""
    left = enumerate(highest)
    found = [next((at for at, code in left if code == len(known) - 1), None) for known in categories]
    return [at for at in found if at is not None] if None not in found else None


def _xgboost(part: Any) -> list[Column] | None:
    if hasattr(part, "get_booster") and not part.__sklearn_is_fitted__():
        return None
    booster = part.get_booster() if hasattr(part, "get_booster") else part
    if not hasattr(booster, "num_features"):
        return None
    width = booster.num_features()
    names, types = booster.feature_names or [None] * width, booster.feature_types or ["float"] * width
    learned = _xgboost_categories(booster) if "c" in types else {}
    found = [_column(name, learned.get(at)) for at, name in enumerate(names)]
    return [
        Column(c.name, "boolean", dtype="boolean") if kind == "i" else c for c, kind in zip(found, types, strict=True)
    ]


def _xgboost_categories(booster: Any) -> dict[int, list[Any]]:
    """Read the categories from the model's JSON, the one form of them that needs no pyarrow."""
    model = json.loads(bytes(booster.save_raw("json")))["learner"]["gradient_booster"]["model"]
    found: dict[int, list[Any]] = {}
    for at, encoded in enumerate(model.get("cats", {}).get("enc", [])):
        values = encoded.get("values", [])
        if "offsets" in encoded and values:
            if min(values) < 0:  # XGBoost 3.2 cuts these off, since it counts characters where it stores bytes
                raise ModelLoadError(
                    "XGBoost does not keep categories that are not ASCII; train it on others, or put an OrdinalEncoder "
                    "before it in a pipeline"
                )
            text, ends = bytes(values).decode("ascii"), encoded["offsets"]
            found[at] = [text[start:end] for start, end in itertools.pairwise(ends)]
        elif values:
            found[at] = values
    return found


def _catboost(part: Any) -> list[Column] | None:
    names = part.feature_names_
    if not names:
        return None
    if part.get_embedding_feature_indices():
        raise ModelLoadError(
            "CatBoost's embedding features are lists within a column, which a request cannot hold; train it on a "
            "column for each of their numbers"
        )
    kinds: dict[int, Kind] = dict.fromkeys(part.get_cat_feature_indices(), "category")
    kinds |= dict.fromkeys(part.get_text_feature_indices(), "text")
    plain = names == [str(at) for at in range(len(names))]
    return [Column(None if plain else name, kinds.get(at, "number")) for at, name in enumerate(names)]


def keeps_no_categories(part: Any) -> bool:
    """Return whether a fitted booster has learned categories or texts, but does not keep them, as CatBoost."""
    is_fitted = _library(part) == "catboost" and hasattr(part, "is_fitted") and part.is_fitted()
    return is_fitted and bool(part.get_cat_feature_indices() or part.get_text_feature_indices())


def _column(name: str | None, categories: list[Any] | None) -> Column:
    if categories is None:
        return Column(name)
    return Column(name, "category", dtype="category", learned=tuple(categories))


def learned_categories(part: Any) -> dict[str, Any] | None:
    """Return what an encoder learned, as arrays of categories by column; None if it is none of those known here."""
    if _library(part) == "feature_engine" and hasattr(part, "encoder_dict_"):
        # {"city": {"Oslo": 0, …}} or {"city": ["Oslo", …]}
        return {str(name): _array(known) for name, known in part.encoder_dict_.items()}
    if _library(part) == "category_encoders":
        mapping = getattr(getattr(part, "ordinal_encoder", part), "mapping", None) or {}
        if isinstance(mapping, dict):  # of data frames with a row for each category
            return {str(name): _array(table.index) for name, table in mapping.items()}
        return {str(each["col"]): _array(each["mapping"].index, each["data_type"]) for each in mapping}
    return None


def _array(known: Iterable[Any], dtype: Any = None) -> Any:
    values = [value for value in known if value is None or value == value]
    if isinstance(dtype, np.dtype) and dtype.kind in "iub":  # where a NaN was added the index has become one of floats
        return np.array(values, dtype=dtype)
    array = np.array(values)
    return np.array(values, dtype=object) if array.dtype.kind in "US" else array


def column_kinds(part: Any) -> dict[str, Kind] | None:
    """Return the kinds of the columns that skrub's TableVectorizer told apart; None for anything else."""
    found = getattr(part, "kind_to_columns_", None)
    if _library(part) != "skrub" or not isinstance(found, dict):
        return None
    names: dict[str, Kind] = {
        "numeric": "number",
        "datetime": "date",
        "low_cardinality": "text",
        "high_cardinality": "text",
    }
    return {str(column): names[kind] for kind, columns in found.items() if kind in names for column in columns}


class XGBoostBooster:
    """A raw `xgboost.Booster`, whose own predict takes nothing but a DMatrix."""

    def __init__(self, booster: Any) -> None:
        self.raw = booster

    def predict(self, inputs: Any) -> Any:
        """Predict for an array or a data frame."""
        from xgboost import DMatrix

        return self.raw.predict(DMatrix(inputs, feature_names=self.raw.feature_names, enable_categorical=True))


def servable(model: Any) -> XGBoostBooster | None:
    """Return a model whose `predict` takes arrays or data frames, if this one's does not."""
    is_raw = _library(model) == "xgboost" and type(model).__name__ == "Booster"
    return XGBoostBooster(model) if is_raw else None


def _library(part: Any) -> str:
    return type(part).__module__.partition(".")[0]


_READERS = {"lightgbm": _lightgbm, "xgboost": _xgboost, "catboost": _catboost}
