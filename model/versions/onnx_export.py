"""A fitted scikit-learn model as ONNX: `python -m model export model.joblib model.onnx --sample rows.json`.

An ONNX file runs no code when it is read, is served without a certain version of scikit-learn, and often predicts
faster. But its form of a model is another program. So both predict the same rows, and if predictions differ, nothing is
written.

What differs is usually precision. scikit-learn's forests compare float32 values, its linear models and boosted trees
float64 ones; a value such as 1600000001 has no float32 form, and falls on the other side of a threshold. Both are
tried, and the more similar one is kept. And a forest that was fitted without missing values sends them to the larger
branch, its ONNX form always to the right: such a file takes no `null`.
"""

import json
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
from processes import replace_file

from .. import formats
from ..formats import ModelLoadError, UnsupportedModel
from ..formats.base import TensorModel, first_line, import_library
from ..formats.onnx import METADATA
from ..infer_signature import infer_signature, inspect, raw_parts
from ..signature import Signature

TOLERANCE = 1e-4  # by which a value may differ, relative to itself or to the sample's mean size, whichever is larger
SYNTHETIC_ROWS = 1000  # if no sample is given
PRECISIONS = ("float32", "float64")


class NotExported(ModelLoadError):
    """A model without an ONNX form, or without one that predicts the same. Nothing was written."""


@dataclass(frozen=True)
class Report:
    """How the predictions of an ONNX file differ from those of the model that it was made of."""

    rows: int = 0
    synthetic: bool = False  # the rows are made up, near what the model keeps of its training data
    precision: str = ""  # of the numbers that the file takes: float32 or float64
    labels: int | None = None  # that differ; None if the model predicts values
    undecided: int = 0  # labels of these for which the model itself finds two classes equal, within TOLERANCE
    compared: str = ""  # the method whose values were compared; "" if it has labels only
    absolute: float = 0.0  # the largest difference between two values
    relative: float = 0.0  # the same, by the larger of the value's own size and the sample's mean
    lost: tuple[str, ...] = ()  # methods that the file does not have
    null: bool = True  # a missing value may be sent wherever the model takes one; else the file takes none

    @property
    def alike(self) -> bool:
        """Return whether no label differs and no value by more than `TOLERANCE`."""
        return not self.labels and self.relative <= TOLERANCE

    @property
    def badness(self) -> tuple[bool, bool, int, float]:
        """Order the ONNX forms of a model: the smallest is the best."""
        return not self.alike, not self.null, self.labels or 0, self.relative

    def __str__(self) -> str:
        rows = "synthetic rows" if self.synthetic else "rows of the sample"
        lines = [f"{self.rows} {rows}, {self.precision} numbers"]
        if self.labels is not None:
            undecided = f" (for {self.undecided} the model itself is undecided)" if self.undecided else ""
            lines.append(f"{self.labels} labels differ{undecided}")
        if self.compared:
            lines.append(f"{self.compared} differs by {self.absolute:.2g} at most ({self.relative:.2g} of its size)")
        if self.lost:
            lines.append(f"without {', '.join(self.lost)}")
        if not self.null:
            lines.append("null is rejected, since the ONNX form predicts differently if a value is missing")
        if self.synthetic:
            lines.append("your own rows would show more: --sample rows.json")
        return "; ".join(lines)


def export(path: Path, out: Path, sample: list[Any] | None = None, force: bool = False) -> Report:
    """Write a fitted scikit-learn model as an ONNX file.

    The file holds the names of its columns and its classes, so that it is served with the same requests as the model.

    Args:
        path: the model, in any format that `formats.load` reads.
        out: the file to write, ending in `.onnx`.
        sample: rows to compare on, as in the "data" of a request; without them, synthetic rows.
        force: write it even if the predictions differ.

    Raises: ModelLoadError, of the model or of a missing library; NotExported, no form of it predicts the same.
    """
    if out.suffix.lower() != ".onnx":
        raise NotExported(f"{out.name}: an ONNX file's name ends in .onnx")
    model = formats.load(path)
    if isinstance(model, TensorModel):
        raise NotExported(f"{path.name} is not a model of scikit-learn: its own library exports it")
    signature, valid = infer_signature(model, sample)
    rows = sample or _synthetic_rows(model, signature, valid[0])
    forms: list[tuple[Report, bytes]] = []
    why = ""
    with cli.progressbar(len(PRECISIONS), "exporting") as bar:
        for precision in PRECISIONS:
            try:
                forms.append(_form(model, signature, rows, precision))
            except NotExported:
                raise
            except UnsupportedModel as error:
                raise NotExported(f"{path.name} {error}") from error
            except Exception as error:  # converters raise anything at models that they do not know
                why = why or first_line(error)
            bar.update(1)
    if not forms:
        raise NotExported(f"{path.name} has no ONNX form that works: {why}")
    report, content = min(forms, key=lambda form: form[0].badness)
    report = replace(report, synthetic=sample is None)
    if not report.alike and not force:
        raise NotExported(
            f"{path.name}: its ONNX form predicts differently ({report}). Nothing was written; --force writes it anyway"
        )
    replace_file(out, content)
    return report


def _form(model: Any, signature: Signature, rows: list[Any], precision: str) -> tuple[Report, bytes]:
    """Make the ONNX form of one precision. It takes missing values if it predicts the same for them."""
    converted = _convert(model, signature, precision, rows)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(_with_metadata(converted, model, signature, null=True))
        file.flush()
        exported = formats.load(Path(file.name))

    def compare(given: list[Any]) -> Report:
        return _compare(model, exported, signature.parse(given), exported.signature.parse(given))

    missing = _with_one_missing(signature, rows)
    null = not missing or compare([*rows, *missing]).alike
    report = replace(compare(rows), rows=len(rows), precision=precision, null=null)
    return report, _with_metadata(converted, model, signature, null)


def _convert(model: Any, signature: Signature, precision: str, rows: list[Any]) -> Any:
    skl2onnx = import_library("skl2onnx", "requirements/onnx.txt")
    from sklearn.base import is_classifier

    while hasattr(model, "best_estimator_"):  # the searches have no form of their own that takes options
        model = model.best_estimator_
    if isinstance(getattr(model, "classes_", None), list):
        raise NotExported("a classifier of several outputs is not exported: make a model of each")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converters use attributes that scikit-learn deprecates
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
    """Declare the inputs: one for all columns if they are numbers of an array, else one each."""
    types = import_library("skl2onnx.common.data_types", "requirements/onnx.txt")
    number = types.FloatTensorType if precision == "float32" else types.DoubleTensorType
    if signature.layout == "texts":
        return [("rows", types.StringTensorType([None, 1]))]
    if not signature.columns:
        raise NotExported("the model does not say how many columns it takes")
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


def _compare(model: Any, exported: Any, given: Any, converted: Any) -> Report:
    """Compare the predictions for the same rows, each parsed by the model's own signature."""
    from sklearn.base import is_classifier

    expected, found = np.asarray(model.predict(given)), np.asarray(exported.predict(converted))
    report = Report(compared="predict")
    if is_classifier(model) or expected.dtype.kind != "f":
        different = _different(expected, found)
        report = Report(labels=int(different.sum()))
        if hasattr(exported, "predict_proba"):
            expected, found = np.asarray(model.predict_proba(given)), np.asarray(exported.predict_proba(converted))
            undecided = int((different & ~_decided(expected)).sum())
            report = replace(report, compared="predict_proba", undecided=undecided)
    absolute, relative = _difference(expected, found) if report.compared else (0.0, 0.0)
    scores = ("predict_proba", "predict_log_proba", "decision_function", "score_samples")
    lost = tuple(name for name in scores if hasattr(model, name) and not hasattr(exported, name))
    return replace(report, absolute=absolute, relative=relative, lost=lost)


def _different(expected: Any, found: Any) -> Any:
    if expected.shape != found.shape:
        return np.ones(len(expected), bool)
    pairs = zip(expected.ravel().tolist(), found.ravel().tolist(), strict=True)
    return np.array([a != b or isinstance(a, bool) != isinstance(b, bool) for a, b in pairs])


def _decided(probabilities: Any) -> Any:
    """Return for each row whether one class is more probable than all others."""
    best = np.sort(probabilities, axis=1)
    return best[:, -1] - best[:, -2] > TOLERANCE


def _difference(expected: Any, found: Any) -> tuple[float, float]:
    if expected.shape != found.shape or (np.isnan(expected) != np.isnan(found)).any():
        return float("inf"), float("inf")
    expected, found = np.nan_to_num(expected.astype(float)), np.nan_to_num(found.astype(float))
    apart, size = abs(expected - found), abs(expected)
    scale = np.maximum(size, size.mean())
    return float(apart.max()), float(np.divide(apart, scale, out=apart.copy(), where=scale > 0).max())


def _synthetic_rows(model: Any, signature: Signature, valid: Any) -> list[Any]:
    """Make rows up: strings that the encoders know, and numbers near those that the model keeps.

    Rows for which the model is undecided are left out: which of two equal classes it names depends on the last bit.
    """
    if not signature.columns:
        return [valid] * 2
    generator = np.random.default_rng(0)
    width = len(signature.columns)
    numbers = _numbers_kept(model, width)
    by_column = []
    for at, (column, facts) in enumerate(zip(signature.columns, inspect(model, width), strict=True)):
        if column.kind == "number" and len(facts.values) < 2:  # else its values are categories
            near = np.array(numbers[at] or [-1.0, 0.0, 1.0])
            spread = near.std() or abs(near[0]) or 1.0
            away = generator.normal(size=SYNTHETIC_ROWS) * generator.integers(0, 2, SYNTHETIC_ROWS)
            by_column.append((generator.choice(near, SYNTHETIC_ROWS) + spread * away).tolist())
        else:
            known = facts.values or [valid[at]]
            by_column.append([known[pick] for pick in generator.integers(0, len(known), SYNTHETIC_ROWS)])
    rows = [list(row) for row in zip(*by_column, strict=True)]
    try:
        given = signature.parse(rows)
        model.predict(given)
        if hasattr(model, "predict_proba"):
            clear = _decided(np.asarray(model.predict_proba(given)))
            rows = [row for row, is_clear in zip(rows, clear, strict=True) if is_clear]
    except Exception:  # such as a logarithm's of a negative number
        rows = []
    return rows or [list(valid)] * 2


def _with_one_missing(signature: Signature, rows: list[Any]) -> list[Any]:
    """Copy some rows, leaving out one number of each that may be missing. ONNX has no missing strings."""
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
        for at, values in _numbers_of(part, len(columns)):
            kept[columns[at]] += values[np.isfinite(values)].tolist()
    return kept


def _numbers_of(part: Any, width: int) -> Iterator[tuple[int, Any]]:
    """Yield arrays of numbers that a part keeps in the units of its input, each with the column that it belongs to."""
    names = ("data_min_", "data_max_", "_fit_X", "support_vectors_", "statistics_")
    arrays = [getattr(part, name, None) for name in names]
    centre, scale = getattr(part, "mean_", getattr(part, "center_", None)), getattr(part, "scale_", None)
    if centre is not None and scale is not None:
        arrays += [np.asarray(centre) + steps * np.asarray(scale) for steps in (-1, 0, 1)]
    for array in arrays:
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape[-1:] == (width,):
            yield from enumerate(np.atleast_2d(array)[:200].T)
    tree = getattr(part, "tree_", None)
    if tree is not None:
        yield from ((at, tree.threshold[tree.feature == at]) for at in range(width))
    bins = getattr(part, "_bin_mapper", None)  # of histogram boosting: quantiles of what it was fitted on
    if bins is not None:
        yield from zip(range(width), bins.bin_thresholds_, strict=False)
