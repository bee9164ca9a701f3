"""ONNX, by onnxruntime. Format: https://onnx.ai/onnx/intro/concepts.html"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..columns import Kind
from ..signature import Column, Signature
from . import UnsupportedModel
from .base import TensorModel, first_line, import_library, signature_of
from .tensor_signature import RecordSignature, kind_of

METADATA = "prediction-server"  # the key in an ONNX file's metadata under which `python -m model export` leaves more


def load_onnx(path: Path, **_: bool) -> "OnnxModel":
    """Load an ONNX file for the CPU.

    onnxruntime gets the model as bytes, so that it reads no weights from other files, which no hash would cover.
    Custom operators come in native libraries, and none is ever registered.

    Raises: UnsupportedModel, no onnxruntime, a model that it does not take, or inputs that are not rows.
    """
    ort = import_library("onnxruntime", "requirements/onnx.txt")
    options = ort.SessionOptions()
    threads = re.match(r"[1-9]\d*", os.environ.get("OMP_NUM_THREADS", ""))  # gunicorn.conf.py sets it
    options.intra_op_num_threads = options.inter_op_num_threads = int(threads[0]) if threads else 1
    options.log_severity_level = 4  # fatal only: it raises what it would log
    content = path.read_bytes()
    try:
        session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise UnsupportedModel(_explain(error, path)) from error
    known = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))
    is_classifier = _has_labels_and_scores(session) and "predict_proba" in known.get("methods", ["predict_proba"])
    return OnnxClassifier(session, known, content) if is_classifier else OnnxModel(session, known)


def _explain(error: Exception, path: Path) -> str:
    """Explain why onnxruntime does not take a file: the message continues the file's name."""
    reason = first_line(error)
    if locale := re.search(r"locale with name:([^:\s]+)", str(error)):
        language, _, charset = locale[1].partition(".")
        return (
            f"needs the locale {locale[1]}, which this machine does not have: sudo apt install locales && "
            f"sudo localedef -i {language} -f {charset or 'UTF-8'} {locale[1]}. Then start the server again"
        )
    if "xternal data" in reason or "model_path must not be empty" in reason:
        return (
            "keeps its weights in another file. Save both in one file: "
            f'onnx.save(onnx.load("{path.name}"), "whole.onnx", save_as_external_data=False)'
        )
    return (
        f"is not taken by onnxruntime {import_library('onnxruntime', 'requirements/onnx.txt').__version__} ({reason}): "
        "the file is damaged, incomplete, or not of the format that its suffix names; or it needs an operator or an "
        "opset that this version does not have"
    )


class OnnxModel(TensorModel):
    """An onnxruntime session. Its one input holds the rows, or each of its inputs is a column `(n_rows, 1)`."""

    def __init__(self, session: Any, known: dict[str, Any]) -> None:
        self._session = session
        self._inputs = session.get_inputs()
        self._outputs = [output.name for output in session.get_outputs()]
        self.signature = _signature_of(self._inputs, known)
        self.example = known.get("example")
        # The categories that a column may hold, by its name or index; the operator would answer others, which the
        # model rejects.
        self._closed = {
            (column["name"] or column.get("input")) if len(self._inputs) > 1 else at: column["only"]
            for at, column in enumerate(known.get("columns") or [])
            if column.get("only")
        }
        self.sizes_open = any(not isinstance(size, int) for each in self._inputs for size in each.shape[1:])
        # scikit-learn's regressors return one value a row, their ONNX form a column.
        self._flat = session.get_modelmeta().producer_name == "skl2onnx"

    def predict(self, rows: Any) -> Any:
        """Return the first output; `(n_rows,)` if scikit-learn's own would be."""
        result = self._run(rows, self._outputs[0])
        return result[:, 0] if self._flat and np.ndim(result) == 2 and result.shape[1] == 1 else result

    def _run(self, rows: Any, output: str) -> Any:
        self._check_categories(rows)
        feed = {}
        for at, each in enumerate(self._inputs):
            several = len(self._inputs) > 1
            array = rows[rows.dtype.names[at]] if several else np.asarray(rows, dtype=_TYPES[each.type])
            feed[each.name] = array.reshape(-1, 1) if array.ndim < len(each.shape) else array
        try:
            return self._session.run([output], feed)[0]
        except Exception as error:  # its exceptions have no base of their own
            # "Unknown Category and zeros = 0" is a plain Fail: a value that a OneHotEncoder did not learn.
            if self.sizes_open or type(error).__name__ == "InvalidArgument" or "Unknown Category" in str(error):
                raise ValueError("onnxruntime rejects the rows") from error
            raise

    def _check_categories(self, rows: Any) -> None:
        for column, known in self._closed.items():
            values = rows[column] if rows.dtype.names else rows[:, column]
            unknown = ~np.isin(values, np.array(known, dtype=values.dtype)) & (values == values)  # NaN is missing
            if unknown.any():
                raise ValueError(f"an unknown category in column {column!r}")


class OnnxClassifier(OnnxModel):
    """A classifier as skl2onnx and similar converters write it: labels first, then the probability of each class.

    The probabilities are an array `(n_rows, n_classes)` or, with "zipmap", a dict for each row. An SVC without
    probabilities has its scores in their place, and nothing in the file distinguishes them.
    """

    def __init__(self, session: Any, known: dict[str, Any], content: bytes) -> None:
        super().__init__(session, known)
        self._zipped = session.get_outputs()[1].type.startswith("seq(map(")
        self.classes_: list[Any] | None = known.get("classes") or (None if self._zipped else _class_labels(content))

    def predict(self, rows: Any) -> Any:
        """Return the labels, `(n_rows,)`."""
        if self._zipped and self.classes_ is None:
            self.predict_proba(rows)  # only its result names the classes
        return super().predict(rows)

    def predict_proba(self, rows: Any) -> Any:
        """Return the probabilities, `(n_rows, n_classes)`, in the order of `classes_`."""
        result = self._run(rows, self._outputs[1])
        if not self._zipped:
            return result
        if self.classes_ is None:
            self.classes_ = list(result[0])
        return np.array([[row[label] for label in self.classes_] for row in result], dtype=np.float32)


_TYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(string)": "object",
    "tensor(bool)": "bool",
} | {f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}


def _signature_of(inputs: list[Any], known: dict[str, Any]) -> Signature:
    signatures = []
    for each in inputs:
        if each.type not in _TYPES:
            raise UnsupportedModel(f"takes {each.type} in its input {each.name!r}, which cannot be made from rows")
        fix = (
            f": the first dimension of its input {each.name!r} is fixed. Export it again with an open one; from "
            'PyTorch: torch.onnx.export(model, (example,), "model.onnx", dynamo=True, dynamic_shapes=({0: "rows"},))'
        )
        signatures.append(signature_of(each.shape, _TYPES[each.type], fix, known if len(inputs) == 1 else None))
    if len(inputs) == 1:
        return signatures[0]
    if any(each.shape[1:] not in ([], [1]) for each in inputs):
        listed = ", ".join(f"{each.name!r} {each.shape}" for each in inputs)
        raise UnsupportedModel(f"takes several inputs that are not one column each, which rows do not have: {listed}")
    # The converter writes "petal_width" for "petal width"; callers write the names that the model was fitted with.
    recorded = {column.get("input", column["name"]): column for column in known.get("columns") or []}
    columns = []
    for each in inputs:
        dtype, column = _TYPES[each.type], recorded.get(each.name, {})
        nullable = "float" in dtype and bool(column.get("nullable"))
        kind: Kind = "boolean" if column.get("type") == "boolean" else kind_of(dtype)
        columns.append(Column(column.get("name") or each.name, kind, nullable, dtype=dtype))
    return RecordSignature("records", tuple(columns))


def _has_labels_and_scores(session: Any) -> bool:
    outputs = [(output.type, len(output.shape)) for output in session.get_outputs()]
    if len(outputs) != 2 or outputs[0] not in (("tensor(int64)", 1), ("tensor(string)", 1)):
        return False
    return outputs[1] in (("tensor(float)", 2), ("tensor(double)", 2)) or outputs[1][0].startswith("seq(map(")


def _class_labels(content: bytes) -> list[Any] | None:
    """Return the classes that a classifier's operators name, which onnxruntime does not show; None if unknown."""
    labels: list[list[Any]] = []
    with suppress(UnsupportedModel):  # without the library answers lack "classes"
        graph = import_library("onnx", "requirements/onnx.txt").load_model_from_string(content).graph
        for attribute in (each for node in graph.node for each in node.attribute):
            if attribute.name.startswith("classlabels_") and (attribute.ints or attribute.strings):
                labels.append(list(attribute.ints) or [label.decode() for label in attribute.strings])
    return labels[0] if labels and all(each == labels[0] for each in labels) else None
