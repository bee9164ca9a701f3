"""Keras 3, over PyTorch."""

import os
import platform
import re
from pathlib import Path
from typing import Any

from . import UnsupportedModel
from .base import TensorModel, first, first_line, import_library, signature_of

_EXPORT = "Where it was made, write: model.export('model.onnx', format='onnx')"


def load_keras(path: Path, **_: bool) -> "KerasModel":
    """Load a `.keras` or `.h5` file in Keras's safe mode, over PyTorch unless `KERAS_BACKEND` names another backend.

    Safe mode refuses Python bytecode and pickled PyTorch modules. It lets a Lambda layer call almost any function of
    Keras by its name, with arguments from the file, and some of them write files; and before 3.12.1 a TFSMLayer run a
    program from another directory (`keras/src/saving/serialization_lib.py`, 3.11.3 to 3.15.1). So the layers that call
    what a file names are refused in this process, however the file spells their class.

    Raises: UnsupportedModel, no Keras or an old one, a file that does not hold a whole model, code, or several inputs.
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "torch")
    torch = import_library("torch", "requirements/torch.txt") if backend == "torch" else None
    # h5py asks for the processor's name; Python would start a program for it, which gevent forbids on a native thread.
    vars(platform.uname()).setdefault("processor", "")
    keras = import_library("keras", "requirements/keras.txt")
    if tuple(map(int, re.findall(r"\d+", keras.__version__)[:3])) < (3, 11, 3):
        raise UnsupportedModel(
            f"needs Keras 3.11.3 or newer, and this is {keras.__version__}: older versions may run code in a file"
        )
    for layer in (keras.layers.Lambda, keras.layers.TFSMLayer, keras.layers.JaxLayer, keras.layers.FlaxLayer):
        layer.from_config = classmethod(_refuse)
    try:
        model = keras.saving.load_model(str(path.absolute()), compile=False, safe_mode=True)
    except Exception as error:  # a layer raises anything if its description is of another version
        raise UnsupportedModel(_explain(keras.__version__, error)) from error
    return KerasModel(keras, model, torch)


def _refuse(layer: type, *_: Any, **__: Any) -> Any:
    raise UnsupportedModel(layer.__name__)


def _explain(version: str, error: Exception) -> str:
    """Explain an exception of `keras.saving.load_model`."""
    message = str(error)
    if isinstance(error, UnsupportedModel) or "safe_mode=False" in message:
        return (
            f"has a layer that holds code ({message.partition('. ')[0]}), which is not loaded. Write it with Keras's "
            f"own layers or keras.ops, or export the model. {_EXPORT}"
        )
    if "No model config" in message:
        return 'holds weights without a model. Where it was made, write: model.save("model.keras")'
    if unknown := re.search(r"Could not locate class '(\w+)'|Unknown layer: '(\w+)'", message):
        return f"has a layer of your own, {unknown[1] or unknown[2]}, whose code is not in the file. {_EXPORT}"
    return (
        f"is not taken by Keras {version} ({first_line(error)}): it is damaged, incomplete, or was saved by another "
        f"version, whose layers differ. {_EXPORT}"
    )


class KerasModel(TensorModel):
    """A Keras model of one input."""

    def __init__(self, keras: Any, model: Any, torch: Any) -> None:
        self._keras, self._model, self._torch = keras, model, torch
        inputs = getattr(model, "inputs", None) or []
        if len(inputs) != 1:
            raise UnsupportedModel(f"takes {len(inputs)} inputs; build it over one, `keras.Input(shape)`")
        shape, fix = inputs[0].shape, "; build it over keras.Input(shape) without batch_size"
        self.signature = signature_of(shape, str(inputs[0].dtype), fix)
        self.sizes_open = None in shape[1:]

    def predict(self, rows: Any) -> Any:
        """Return the model's output as an array `(n_rows, …)`; of several outputs the first."""
        try:
            if self._torch is None:
                return self._keras.ops.convert_to_numpy(first(self._model(rows, training=False)))
            with self._torch.inference_mode():
                return first(self._model(rows, training=False)).numpy(force=True)
        except RuntimeError as error:  # torch's, at sizes that do not fit
            if self.sizes_open:
                raise ValueError("Keras refuses the rows") from error
            raise
