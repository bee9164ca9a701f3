"""A fitted scikit-learn model as ONNX: `python -m model export model.joblib model.onnx --sample rows.json`.

An ONNX file runs no code when it is read, needs no scikit-learn of one version to be served, and often answers faster.
But its form of a model is another program. So both answer the same rows, and where answers differ, nothing is written.

What differs is usually precision. scikit-learn's forests compare float32 values, its linear models and boosted trees
float64 ones; a value such as 1600000001 has no float32 form, and falls on the other side of a threshold. Both forms are
therefore tried, and the one that answers more alike is kept. And where a forest was fitted without missing values, it
sends them to the larger branch, its ONNX form always to the right: such a file takes no `null`.
"""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import formats
from ..formats import ModelLoadError, UnsupportedModel
from ..formats.base import TensorModel, import_library
from ..formats.onnx import METADATA
from ..infer_signature import known_values, learn, raw_parts
from ..signature import Signature

TOLERANCE = 1e-4  # by which a value may differ, relative to itself or to the sample's mean size, whichever is larger
MADE_UP = 1000  # rows, where no sample is given


class NotExported(ModelLoadError):
    """A model without an ONNX form, or without one that answers as it does. Nothing was written."""


@dataclass(frozen=True)
class Report:
    """How the answers of an ONNX file differ from those of the model that it was made of."""

    rows: int
    made_up: bool  # the rows are synthetic: near what the model keeps of its training data, but not of that data
    precision: str  # of the numbers that the file takes: float32 or float64
    labels: int | None  # that differ; None where the model predicts values
    undecided: int  # labels of these where two classes are equally probable for the model itself, within TOLERANCE
    compared: str  # the method whose values were compared, "" where it has labels only
    absolute: float  # the largest difference between two values
    relative: float  # the same, by the larger of the value's own size and the sample's mean
    lost: tuple[str, ...]  # methods that the file does not have
    null: bool  # a missing value may be sent wherever the model takes one; else the file takes none

    @property
    def alike(self) -> bool:
        """Tell whether no label differs and no value by more than `TOLERANCE`."""
        return not self.labels and self.relative <= TOLERANCE

    def __str__(self) -> str:
        lines = [f"{self.rows} {'synthetic rows' if self.made_up else 'rows of the sample'}, {self.precision} numbers"]
        if self.labels is not None:
            undecided = f" ({self.undecided} where the model itself is undecided)" if self.undecided else ""
            lines.append(f"{self.labels} labels differ{undecided}")
        if self.compared:
            lines.append(f"{self.compared} differs by {self.absolute:.2g} at most ({self.relative:.2g} of its size)")
        if self.lost:
            lines.append(f"without {', '.join(self.lost)}")
        if not self.null:
            lines.append("null is refused, since the ONNX form answers otherwise where a value is missing")
        if self.made_up:
            lines.append("rows of yours would show more: --sample rows.json")
        return "; ".join(lines)


def export(path: Path, out: Path, sample: list[Any] | None = None, force: bool = False) -> Report:
    """Write a fitted scikit-learn model as an ONNX file.

    The file tells its columns by name and its classes, so that it is served with the same requests as the model.

    Args:
        path: the model, in any format that `formats.load` reads.
        out: the file to write, ending in `.onnx`.
        sample: rows to compare on, as in the "data" of a request; without them some are made up.
        force: write it even where the answers differ.

    Raises:
        ModelLoadError: the model does not load, or no library to write ONNX with is here.
        NotExported: the model has no ONNX form, or its form answers otherwise.
    """
    if out.suffix.lower() != ".onnx":
        raise NotExported(f"{out.name}: an ONNX file's name ends in .onnx")
    model = formats.load(path)
    if isinstance(model, TensorModel):
        raise NotExported(f"{path.name} is not a model of scikit-learn: its own library exports it")
    signature, proof = learn(model, sample)
    rows = sample or _made_up(model, signature, proof[0])
    made_up = sample is None
    missing = _with_one_missing(signature, rows)
    reports: list[tuple[Report, Path]] = []
    failures: list[Exception] = []
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as beside:
        for precision in ("float32", "float64"):
            try:
                converted = _convert(model, signature, precision, rows)
                for null in (True, False) if missing else (True,):
                    candidate = Path(beside, f"{precision}-{null}.onnx")
                    candidate.write_bytes(_with_metadata(converted, model, signature, null))
                    answers = _answers(model, signature, candidate, [*rows, *missing] if null else rows)
                    reports.append((_compare(*answers, made_up, precision, null, len(rows)), candidate))
            except NotExported:
                raise
            except UnsupportedModel as error:
                raise NotExported(f"{path.name} {error}") from error
            except Exception as error:  # its converters raise anything at what they do not know
                failures.append(error)
        if not reports:
            why = str(failures[0]).strip().partition("\n")[0][:300]
            raise NotExported(f"{path.name} has no ONNX form that works: {type(failures[0]).__name__}: {why}")
        report, best = min(
            reports,
            key=lambda each: (
                not each[0].alike,
                each[0].alike and not each[0].null,
                each[0].labels or 0,
                each[0].relative,
            ),
        )
        if not report.alike and not force:
            raise NotExported(
                f"{path.name}: its ONNX form answers otherwise ({report}). Nothing was written; --force writes it all "
                "the same"
            )
        with best.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(best, out)
    return report


def _convert(model: Any, signature: Signature, precision: str, rows: list[Any]) -> Any:
    skl2onnx = import_library("skl2onnx", "requirements/onnx.txt")
    from sklearn.base import is_classifier

    while hasattr(model, "best_estimator_"):  # the searches have no form of their own that takes options
        model = model.best_estimator_
    if isinstance(getattr(model, "classes_", None), list):
        raise NotExported("a classifier of several outputs is not exported: make a model of each")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converters look at attributes that scikit-learn is about to give up
        return skl2onnx.to_onnx(
            model,
            initial_types=_inputs(signature, precision, rows),
            options={id(model): {"zipmap": False}} if is_classifier(model) else None,
            # Some converters stop at a newer version of the operators for machine learning.
            target_opset={"": skl2onnx.__max_supported_opset__, "ai.onnx.ml": 3},
        )


def _with_metadata(converted: Any, model: Any, signature: Signature, null: bool) -> bytes:
    """Add what ONNX has no place for; `formats.onnx` reads it."""
    known = signature.describe()
    for column in known["columns"] or ():
        column["nullable"] &= null
    classes = getattr(model, "classes_", None)
    known["classes"] = None if classes is None else classes.tolist()
    known["methods"] = [method for method in ("predict", "predict_proba") if hasattr(model, method)]
    del converted.metadata_props[:]
    entry = converted.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(known)
    content: bytes = converted.SerializeToString()
    return content


def _inputs(signature: Signature, precision: str, rows: list[Any]) -> list[tuple[str, Any]]:
    """Declare the inputs: one for all columns where they are numbers without names to be looked at, else one each."""
    types = import_library("skl2onnx.common.data_types", "requirements/onnx.txt")
    number = types.FloatTensorType if precision == "float32" else types.DoubleTensorType
    if signature.layout == "texts":
        return [("rows", types.StringTensorType([None, 1]))]
    if not signature.columns:
        raise NotExported("the model does not tell how many columns it takes")
    if signature.layout == "array" and all(column.kind == "number" for column in signature.columns):
        return [("rows", number([None, len(signature.columns)]))]
    kinds = {"number": number, "text": types.StringTensorType, "boolean": types.BooleanTensorType}
    inputs = []
    for at, column in enumerate(signature.columns):
        kind = column.kind
        if kind == "any":  # a column that no part looks at
            value = rows[0][column.name] if isinstance(rows[0], dict) else rows[0][at]
            kind = "number" if isinstance(value, (int, float)) else "text"
        inputs.append((column.name or f"column {at}", kinds[kind]([None, 1])))
    return inputs


def _answers(model: Any, signature: Signature, path: Path, rows: list[Any]) -> tuple[Any, Any, Any, Any]:
    """Return both models, and the rows as each of them takes them."""
    exported = formats.load(path)
    theirs, _ = learn(exported, rows)
    return model, exported, signature.parse(rows), theirs.parse(rows)


def _compare(
    model: Any, exported: Any, given: Any, taken: Any, made_up: bool, precision: str, null: bool, n_rows: int
) -> Report:
    from sklearn.base import is_classifier

    expected, found = np.asarray(model.predict(given)), np.asarray(exported.predict(taken))
    labels: int | None = None
    undecided = 0
    compared = "predict"
    if is_classifier(model) or expected.dtype.kind != "f":
        same_shape = expected.shape == found.shape
        different = _different(expected, found) if same_shape else np.ones(len(expected), bool)
        labels = int(different.sum())
        compared = ""
        if hasattr(exported, "predict_proba"):
            compared = "predict_proba"
            expected, found = np.asarray(model.predict_proba(given)), np.asarray(exported.predict_proba(taken))
            undecided = int((different & ~_decided(expected)).sum())
    absolute, relative = _difference(expected, found) if compared else (0.0, 0.0)
    scores = ("predict_proba", "predict_log_proba", "decision_function", "score_samples")
    lost = tuple(name for name in scores if hasattr(model, name) and not hasattr(exported, name))
    return Report(n_rows, made_up, precision, labels, undecided, compared, absolute, relative, lost, null)


def _different(expected: Any, found: Any) -> Any:
    pairs = zip(expected.ravel().tolist(), found.ravel().tolist(), strict=True)
    return np.array([a != b or isinstance(a, bool) != isinstance(b, bool) for a, b in pairs])


def _decided(probabilities: Any) -> Any:
    """Tell of each row whether one class is more probable than all others."""
    best = np.sort(probabilities, axis=1)
    return best[:, -1] - best[:, -2] > TOLERANCE


def _difference(expected: Any, found: Any) -> tuple[float, float]:
    if expected.shape != found.shape or (np.isnan(expected) != np.isnan(found)).any():
        return float("inf"), float("inf")
    expected, found = np.nan_to_num(expected.astype(float)), np.nan_to_num(found.astype(float))
    apart, size = abs(expected - found), abs(expected)
    scale = np.maximum(size, size.mean())
    return float(apart.max()), float(np.divide(apart, scale, out=apart.copy(), where=scale > 0).max())


def _made_up(model: Any, signature: Signature, proof: Any) -> list[Any]:
    """Make rows up: texts that the encoders know, and numbers near those that the model keeps.

    A row on which the model is undecided is left out: which of two equal classes it names hangs on the last bit.
    """
    if not signature.columns:
        return [proof] * 2
    generator = np.random.default_rng(0)
    width = len(signature.columns)
    numbers = _numbers_kept(model, width)
    by_column = []
    for at, (column, known) in enumerate(zip(signature.columns, known_values(model, width), strict=True)):
        if column.kind == "number":
            near = np.array(numbers[at] or [-1.0, 0.0, 1.0])
            spread = near.std() or abs(near[0]) or 1.0
            values: list[Any] = (
                generator.choice(near, MADE_UP)
                + spread * generator.normal(size=MADE_UP) * generator.integers(0, 2, MADE_UP)
            ).tolist()
            if len(known) > 1:  # categories that are numbers
                values = [known[pick] for pick in generator.integers(0, len(known), MADE_UP)]
        else:
            known = known or [proof[at]]
            values = [known[pick] for pick in generator.integers(0, len(known), MADE_UP)]
        by_column.append(values)
    rows = [list(row) for row in zip(*by_column, strict=True)]
    try:
        given = signature.parse(rows)
        model.predict(given)
        if hasattr(model, "predict_proba"):
            clear = _decided(np.asarray(model.predict_proba(given)))
            rows = [row for row, is_clear in zip(rows, clear, strict=True) if is_clear]
    except Exception:  # such as a logarithm's of a negative number
        rows = []
    return rows or [list(proof)] * 2


def _with_one_missing(signature: Signature, rows: list[Any]) -> list[Any]:
    """Copy some rows, leaving out one number of each that may be missing. A missing text has no form in ONNX."""
    columns = list(enumerate(signature.columns or ()))
    open_to = [(at, column.name) for at, column in columns if column.nullable and column.kind == "number"]
    copies = []
    for count, row in enumerate(rows[:200] if open_to else ()):
        at, name = open_to[count % len(open_to)]
        copies.append(row | {name: None} if isinstance(row, dict) else [*row[:at], None, *row[at + 1 :]])
    return copies


def _numbers_kept(model: Any, width: int) -> list[list[float]]:
    """Collect, for each raw column, numbers of the size that the model was fitted on: means, neighbours, thresholds."""
    kept: list[list[float]] = [[] for _ in range(width)]
    for part, columns in raw_parts(model, list(range(width))):
        for rows in _arrays_of(part, len(columns)):
            for at, values in zip(columns, rows.T, strict=True):
                kept[at] += values[np.isfinite(values)].tolist()
        for feature, threshold in _thresholds_of(part):
            if feature < len(columns) and np.isfinite(threshold):
                kept[columns[feature]].append(float(threshold))
    return kept


def _arrays_of(part: Any, width: int) -> Iterator[Any]:
    """Yield the arrays `(some, width)` that a part keeps in the units of its input."""
    centre, scale = getattr(part, "mean_", getattr(part, "center_", None)), getattr(part, "scale_", None)
    found = [
        getattr(part, name, None) for name in ("data_min_", "data_max_", "_fit_X", "support_vectors_", "statistics_")
    ]
    if centre is not None and scale is not None:
        found += [np.asarray(centre) + np.multiply.outer([-1, 0, 1], np.asarray(scale))]
    for array in found:
        if isinstance(array, np.ndarray) and array.dtype.kind == "f":
            rows = np.atleast_2d(array)
            if rows.ndim == 2 and rows.shape[1] == width:
                yield rows[:200]


def _thresholds_of(part: Any) -> Iterator[tuple[int, float]]:
    tree = getattr(part, "tree_", None)
    if tree is not None:
        inner = tree.feature >= 0
        yield from zip(tree.feature[inner].tolist(), tree.threshold[inner].tolist(), strict=True)
    for predictors in getattr(part, "_predictors", ()):
        for predictor in predictors:
            nodes = predictor.nodes[predictor.nodes["is_leaf"] == 0]
            yield from zip(nodes["feature_idx"].tolist(), nodes["num_threshold"].tolist(), strict=True)
