"""A fitted scikit-learn model as ONNX: `python -m model export model.joblib model.onnx --sample rows.json`.

An ONNX file runs no code when it is read, is served without a certain version of scikit-learn, and often predicts
faster. But its form of a model is another program. So both predict the same rows: yours, and others that are made up
near what the model keeps of its training data, with strings of its vocabulary and categories that it does not know. If
predictions differ, nothing is written.

What differs is usually precision. scikit-learn's forests compare float32 values, its linear models and boosted trees
float64 ones; a value such as 1600000001 has no float32 form, and falls on the other side of a threshold. Both are
tried, and the more similar one is kept. And a forest that was fitted without missing values sends them to the larger
branch, its ONNX form always to the right: such a file takes no `null`. A category that the model rejects may be
answered by its ONNX form: the file then names the categories, and others are rejected.
"""

import json
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import cli
from shared_files import replace_file

from .. import formats
from ..columns import BadRows, json_form
from ..formats import ModelLoadError, UnsupportedModel
from ..formats.base import TensorModel, first_line, import_library
from ..formats.onnx import METADATA
from ..formats.sklearn import estimators_in
from ..frames.parts import inspect
from ..infer_signature import infer_signature
from ..signature import Signature
from .synthetic_rows import synthetic_rows, unknown_rows

TOLERANCE = 1e-4  # by which a value may differ, relative to itself or to the sample's mean size, whichever is larger
# How the file takes numbers, and whether it takes those that are categories as whole numbers.
FORMS = (("float32", False), ("float64", False), ("float32", True))
# A word, as Python's `\\w` has it; ONNX's own is ASCII only. Other patterns are left as they are.
LETTER = r"[\p{L}\p{N}_]"
TOKENS = {
    r"(?u)\b\w\w+\b": LETTER + "{2,}",
    r"(?u)\b\w+\b": LETTER + "+",
    r"\b\w+\b": LETTER + "+",
    r"\w+": LETTER + "+",
}


class NotExported(ModelLoadError):
    """A model without an ONNX form, or without one that predicts the same. Nothing was written."""


@dataclass(frozen=True)
class Report:
    """How the predictions of an ONNX file differ from those of the model that it was made of."""

    rows: int = 0  # of the sample
    synthetic: int = 0  # rows that are made up
    precision: str = ""  # of the numbers that the file takes: float32 or float64
    labels: int | None = None  # that differ; None if the model predicts values
    undecided: int = 0  # labels of these for which the model itself finds two classes equal, within TOLERANCE
    compared: str = ""  # the method whose values were compared; "" if it has labels only
    absolute: float = 0.0  # the largest difference between two values
    relative: float = 0.0  # the same, by the larger of the value's own size and the sample's mean
    lost: tuple[str, ...] = ()  # methods that the file does not have
    unknown: tuple[str, ...] = ()  # what differs for categories that the model does not know, by column
    null: bool = True  # a missing value may be sent wherever the model takes one; else the file takes none

    @property
    def alike(self) -> bool:
        """Return whether no label differs, no value by more than `TOLERANCE`, and the same rows are rejected."""
        return not self.labels and self.relative <= TOLERANCE and not self.unknown

    @property
    def badness(self) -> tuple[bool, bool, int, int, float]:
        """Order the ONNX forms of a model: the smallest is the best."""
        return not self.alike, not self.null, self.labels or 0, len(self.unknown), self.relative

    def __add__(self, other: "Report") -> "Report":
        """Return the report on the rows of both, which were compared in the same way."""
        labels = None if self.labels is None else self.labels + (other.labels or 0)
        absolute, relative = max(self.absolute, other.absolute), max(self.relative, other.relative)
        undecided = self.undecided + other.undecided
        return replace(self, labels=labels, undecided=undecided, absolute=absolute, relative=relative)

    def __str__(self) -> str:
        counts = [f"{self.rows} rows of the sample"] if self.rows else []
        rows = " and ".join([*counts, f"{self.synthetic} synthetic rows"])
        lines = [f"{rows}, {self.precision} numbers"]
        if self.labels is not None:
            undecided = f" (for {self.undecided} the model itself is undecided)" if self.undecided else ""
            lines.append(f"{self.labels} labels differ{undecided}")
        if self.compared:
            lines.append(f"{self.compared} differs by {self.absolute:.2g} at most ({self.relative:.2g} of its size)")
        lines += self.unknown
        if self.lost:
            lines.append(f"without {', '.join(self.lost)}")
        if not self.null:
            lines.append("null is rejected, since the ONNX form predicts differently if a value is missing")
        if not self.rows:
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
        raise NotExported(f"{out.name}: an ONNX file's name ends in .onnx; name it {out.with_suffix('.onnx').name}")
    model = formats.load(path)
    if isinstance(model, TensorModel):
        raise NotExported(
            f"{path.name} is not a model of scikit-learn: its own library exports it, such as torch.onnx.export"
        )
    signature, valid = infer_signature(model, sample)
    made = _synthetic_rows(model, signature, _as_list(signature, valid[0]))
    forms = _forms(path, model, signature, [made, sample] if sample else [made])
    report, content = min(forms, key=lambda form: form[0].badness)
    if not report.alike and not force:
        raise NotExported(
            f"{path.name}: its ONNX form predicts differently ({report}). Nothing was written; --force writes it "
            f"anyway. {_serve_it(path)}"
        )
    replace_file(out, content)
    return report


def _forms(path: Path, model: Any, signature: Signature, groups: list[list[Any]]) -> list[tuple[Report, bytes]]:
    """Make each ONNX form that works. Raises: NotExported, none does."""
    forms: list[tuple[Report, bytes]] = []
    why = ""
    with cli.progressbar(len(FORMS), "exporting") as bar:
        for precision, whole in FORMS:
            try:
                if not whole or any(column.dtype == "int64" for column in signature.columns or ()):
                    forms.append(_form(model, signature, groups, precision, whole))
            except NotExported as error:
                raise NotExported(f"{path.name}: {error}. {_serve_it(path)}") from error
            except UnsupportedModel as error:
                raise NotExported(f"{path.name} {error}") from error
            except Exception as error:  # converters raise anything at models that they do not know
                why = why or first_line(error)
            bar.update(1)
    if not forms:
        raise NotExported(f"{path.name} has no ONNX form that works: {why.rstrip('.')}. {_serve_it(path)}")
    return forms


def _serve_it(path: Path) -> str:
    return f"The model is served without it: python -m model publish {path}"


def _as_list(signature: Signature, row: Any) -> Any:
    """Return a row with an object's values in the order of the columns."""
    return [row.get(column.name) for column in signature.columns or ()] if isinstance(row, dict) else row


def _form(
    model: Any, signature: Signature, groups: list[list[Any]], precision: str, whole: bool
) -> tuple[Report, bytes]:
    """Make the ONNX form of one precision. It takes missing values if it predicts the same for them.

    Args:
        groups: synthetic rows and, if there is one, the sample. They are compared apart, so that large values of the
            one do not hide differences of the other.
        whole: take categories that are whole numbers as such, and not as floats.
    """
    rows = groups[-1]
    example = next((row for row in (_as_list(signature, row) for row in rows) if not _is_partial(row)), None)
    converted = _convert(model, signature, precision, whole, rows)

    def compare(given: list[Any]) -> Report:
        return _compare(model, exported, signature.parse(given), exported.signature.parse(given))

    def takes_null(rows: list[Any]) -> bool:
        missing = _with_one_missing(signature, rows)
        try:
            return not missing or compare([*rows, *missing]).alike
        except BadRows:  # a whole number cannot be missing
            return False

    known = _known(model, signature, example)
    exported = _loaded(_with_metadata(converted, known, closed={}, null=True))
    unknown = [] if example is None else unknown_rows(model, signature, example)
    differ = _differences(model, signature, exported, unknown)
    closed = {at: _categories(model, signature, at) for at, how in differ if how == ANSWERED}
    if closed:
        exported = _loaded(_with_metadata(converted, known, closed, null=True))
        differ = _differences(model, signature, exported, unknown)
    null = all(map(takes_null, groups))
    report = compare(groups[0]) if len(groups) == 1 else compare(groups[1]) + compare(groups[0])
    told = tuple(dict.fromkeys(f"column {_name(signature, at)!r}: an unknown category {how}" for at, how in differ))
    report = replace(report, synthetic=len(groups[0]), precision=precision, null=null, unknown=told)
    report = replace(report, rows=len(rows) if len(groups) > 1 else 0)
    return report, _with_metadata(converted, known, closed, null)


def _loaded(content: bytes) -> Any:
    """Load an ONNX file as the server does."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(content)
        file.flush()
        return formats.load(Path(file.name))


def _convert(model: Any, signature: Signature, precision: str, whole: bool, rows: list[Any]) -> Any:
    skl2onnx = import_library("skl2onnx", "requirements/onnx.txt")
    from sklearn.base import is_classifier

    while hasattr(model, "best_estimator_"):  # the searches have no form of their own that takes options
        model = model.best_estimator_
    if isinstance(getattr(model, "classes_", None), list):
        raise NotExported("a classifier of several outputs is not exported: make a model of each")
    options: dict[int, dict[str, Any]] = {
        id(part): {"tokenexp": TOKENS[part.token_pattern]}
        for part in estimators_in(model)
        if hasattr(part, "build_analyzer") and part.analyzer == "word" and getattr(part, "token_pattern", "") in TOKENS
    }
    if is_classifier(model):
        options[id(model)] = {"zipmap": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # converters use attributes that scikit-learn deprecates
        converted = skl2onnx.to_onnx(
            model,
            initial_types=_inputs(signature, precision, whole, rows),
            options=options,
            # Some converters stop at a newer version of the operators for machine learning.
            target_opset={"": skl2onnx.__max_supported_opset__, "ai.onnx.ml": 3},
        )
    for node in converted.graph.node:
        if node.op_type == "StringNormalizer":  # else onnxruntime wants en_US.UTF-8, which Debian does not come with
            attribute = node.attribute.add()
            attribute.name, attribute.type, attribute.s = "locale", attribute.STRING, b"C.UTF-8"
    return converted


def _known(model: Any, signature: Signature, example: Any) -> dict[str, Any]:
    """Return what ONNX has no place for; `formats.onnx` reads it."""
    classes = getattr(model, "classes_", None)
    return signature.describe() | {
        "classes": None if classes is None else classes.tolist(),
        "methods": [method for method in ("predict", "predict_proba") if hasattr(model, method)],
        "example": example,
    }


def _with_metadata(converted: Any, known: dict[str, Any], closed: dict[int, list[Any]], null: bool) -> bytes:
    """Add what is known; `closed` names, by column, the only categories that the file may take."""
    columns = known["columns"] and [column | {"nullable": column["nullable"] and null} for column in known["columns"]]
    for at, categories in closed.items():
        columns[at]["only"] = categories
    if len(converted.graph.input) == len(columns):
        for column, each in zip(columns, converted.graph.input, strict=True):
            column["input"] = each.name  # "petal_width" for "petal width"
    del converted.metadata_props[:]
    entry = converted.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(known | {"columns": columns})
    content: bytes = converted.SerializeToString()
    return content


def _inputs(signature: Signature, precision: str, whole: bool, rows: list[Any]) -> list[tuple[str, Any]]:
    """Declare the inputs: one for all columns if they are numbers of an array, else one each."""
    types = import_library("skl2onnx.common.data_types", "requirements/onnx.txt")
    number = types.FloatTensorType if precision == "float32" else types.DoubleTensorType
    if signature.layout == "texts":
        return [("rows", types.StringTensorType([None, 1]))]
    if not signature.columns:
        raise NotExported("the model does not show how many columns it takes: fit it with a step of scikit-learn first")
    numbers = [column.kind in ("number", "boolean") and column.dtype != "bool" for column in signature.columns]
    if signature.layout == "array" and all(numbers) and not whole:
        return [("rows", number([None, len(signature.columns)]))]
    kinds = {"number": number, "text": types.StringTensorType, "boolean": types.BooleanTensorType}
    inputs = []
    for at, column in enumerate(signature.columns):
        kind: str = column.kind
        if kind in ("date", "category"):
            what = "dates" if kind == "date" else "pandas categories"
            raise NotExported(f"column {_name(signature, at)!r} holds {what}, which ONNX does not have")
        if kind == "boolean" and column.dtype in ("int64", "float64"):
            kind = "number"
        if kind == "any":  # a column that no part looks at
            value = rows[0][column.name] if isinstance(rows[0], dict) else rows[0][at]
            kind = "number" if isinstance(value, (int, float)) else "text"
        is_whole = whole and column.dtype == "int64"
        inputs.append((_name(signature, at), types.Int64TensorType([None, 1]) if is_whole else kinds[kind]([None, 1])))
    return inputs


def _name(signature: Signature, at: int) -> str:
    return (signature.columns or ())[at].name or f"column {at}"


ANSWERED = "is rejected by the model, and answered by its ONNX form"


def _differences(
    model: Any, signature: Signature, exported: Any, rows: Sequence[tuple[int, Any]]
) -> list[tuple[int, str]]:
    """Ask both for rows with an unknown category; return the columns of those that differ, and how."""
    found = []
    for at, row in rows:
        try:
            given, converted = signature.parse([row]), exported.signature.parse([row])
        except BadRows:  # the file's signature says what it takes, such as whole numbers only
            continue
        ours, theirs = _answers(model, given), _answers(exported, converted)
        if ours != theirs:
            found.append((at, "is answered by the model, and rejected by its ONNX form" if ours else ANSWERED))
        elif ours and not _compare(model, exported, given, converted).alike:
            found.append((at, "is answered differently"))
    return found


def _answers(model: Any, given: Any) -> bool:
    try:
        model.predict(given)
    except Exception:
        return False
    return True


def _categories(model: Any, signature: Signature, at: int) -> list[Any]:
    """Return the categories that a column's encoder has learned, as JSON values."""
    return [json_form(value) for value in inspect(model, len(signature.columns or ()))[at].learned]


def _is_partial(row: Any) -> bool:
    return isinstance(row, list) and None in row


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
    """Make rows up that the model answers.

    Rows for which the model is undecided are left out: which of two equal classes it names depends on the last bit.
    """
    rows = synthetic_rows(model, signature, valid)
    try:
        given = signature.parse(rows)
        model.predict(given)
        if hasattr(model, "predict_proba"):
            clear = _decided(np.asarray(model.predict_proba(given)))
            rows = [row for row, is_clear in zip(rows, clear, strict=True) if is_clear]
    except Exception:  # such as a logarithm's of a negative number
        rows = []
    return rows or [valid] * 2


def _with_one_missing(signature: Signature, rows: list[Any]) -> list[Any]:
    """Copy some rows, leaving out one number of each that may be missing. ONNX has no missing strings."""
    columns = list(enumerate(signature.columns or ()))
    open_to = [(at, column.name) for at, column in columns if column.nullable and column.kind == "number"]
    copies = []
    for count, row in enumerate(rows[:200] if open_to else ()):
        at, name = open_to[count % len(open_to)]
        copies.append(row | {name: None} if isinstance(row, dict) else [*row[:at], None, *row[at + 1 :]])
    return copies
