"""ONNX, by onnxruntime. Format: https://onnx.ai/onnx/intro/concepts.html"""

import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

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
        reason = first_line(error)
        if "xternal data" in reason or "model_path must not be empty" in reason:
            raise UnsupportedModel(
                "keeps its weights in another file. Save both in one file: "
                f'onnx.save(onnx.load("{path.name}"), "whole.onnx", save_as_external_data=False)'
            ) from error
        raise UnsupportedModel(
            f"is not taken by onnxruntime {ort.__version__} ({reason}): the file is damaged, incomplete, or not of the "
            "format that its suffix names; or it needs an operator or an opset that this version does not have"
        ) from error
    known = json.loads(session.get_modelmeta().custom_metadata_map.get(METADATA, "{}"))
    is_classifier = _has_labels_and_scores(session) and "predict_proba" in known.get("methods", ["predict_proba"])
    return OnnxClassifier(session, known, content) if is_classifier else OnnxModel(session, known)


class OnnxModel(TensorModel):
    """An onnxruntime session. Its one input holds the rows, or each of its inputs is a column `(n_rows, 1)`."""

    def __init__(self, session: Any, known: dict[str, Any]) -> None:
        self._session = session
        self._inputs = session.get_inputs()
        self._outputs = [output.name for output in session.get_outputs()]
        self.signature = _signature_of(self._inputs, known)
        self.sizes_open = any(not isinstance(size, int) for each in self._inputs for size in each.shape[1:])
        # scikit-learn's regressors return one value a row, their ONNX form a column.
        self._flat = session.get_modelmeta().producer_name == "skl2onnx"

    def predict(self, rows: Any) -> Any:
        """Return the first output; `(n_rows,)` if scikit-learn's own would be."""
        result = self._run(rows, self._outputs[0])
        return result[:, 0] if self._flat and np.ndim(result) == 2 and result.shape[1] == 1 else result

    def _run(self, rows: Any, output: str) -> Any:
        feed = {}
        for each in self._inputs:
            array = rows[each.name] if len(self._inputs) > 1 else np.asarray(rows, dtype=_TYPES[each.type])
            feed[each.name] = array.reshape(-1, 1) if array.ndim < len(each.shape) else array
        try:
            return self._session.run([output], feed)[0]
        except Exception as error:  # its exceptions have no base of their own
            if self.sizes_open or type(error).__name__ == "InvalidArgument":
                raise ValueError("onnxruntime rejects the rows") from error
            raise


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
    nullable = {column["name"] for column in known.get("columns") or [] if column["nullable"]}
    columns = []
    for each in inputs:
        dtype = _TYPES[each.type]
        columns.append(Column(each.name, kind_of(dtype), "float" in dtype and each.name in nullable, dtype=dtype))
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
