"""Keras 3, over PyTorch."""

import json
import os
import platform
import re
import zipfile
from pathlib import Path
from typing import Any

from . import UnsupportedModel
from .base import TensorModel, first, first_line, import_library, import_torch, of_rows, values_of

# Layers that hold a program of another kind: marshalled bytecode, a pickle, a path to load from.
_NOT_LAYERS = {"Lambda", "__lambda__", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer"}


def load_keras(path: Path, **_: bool) -> "KerasModel":
    """Load a `.keras` or `.h5` file, with PyTorch beneath where `KERAS_BACKEND` does not say otherwise.

    A Lambda layer is Python bytecode in the file. Keras refuses it in safe mode, in `.h5` only from 3.11.3 on
    (CVE-2025-9905); here its description is searched before anything of it is built.

    Raises:
        UnsupportedModel: no Keras, an old one, weights without a model, layers that hold code, or several inputs.
    """
    os.environ.setdefault("KERAS_BACKEND", "torch")
    if os.environ["KERAS_BACKEND"] == "torch":
        import_torch()
    # At its import h5py asks for the processor's name. Python would start a program for that, which under gevent is not
    # possible on a native thread.
    vars(platform.uname()).setdefault("processor", "")
    keras = import_library("keras", "requirements/keras.txt")
    if tuple(map(int, re.findall(r"\d+", keras.__version__)[:3])) < (3, 11, 3):
        raise UnsupportedModel(
            f"needs Keras 3.11.3 or newer, this is {keras.__version__}: older ones may run code in a file"
        )
    described, version = _keras_config(path)
    held = sorted(set(map(str, values_of(described, "class_name"))) & _NOT_LAYERS)
    if held:
        raise UnsupportedModel(
            f"has a layer that holds code ({', '.join(held)}), which is not loaded. Write it with Keras's own layers "
            "or keras.ops, or export the model: model.versions.onnx_export('model.onnx', format='onnx')"
        )
    try:
        model = keras.saving.load_model(str(path.absolute()), compile=False, safe_mode=True)
    except Exception as error:  # what a layer's constructor raises at a description of another version
        if unknown := re.search(r"Could not locate class '(\w+)'|Unknown layer: '(\w+)'", str(error)):
            raise UnsupportedModel(
                f"has a layer of your own, {unknown[1] or unknown[2]}, whose code is not in the file. Export the model "
                "where that is: model.versions.onnx_export('model.onnx', format='onnx')"
            ) from error
        raise UnsupportedModel(
            f"(saved by Keras {version}) is not taken by Keras {keras.__version__}: {first_line(error)}. "
            "Layers change between versions; where it was made: model.versions.onnx_export('model.onnx', format='onnx')"
        ) from error
    return KerasModel(keras, model)


def _keras_config(path: Path) -> tuple[Any, str]:
    """Read the description of the layers from a file, and the version that wrote it."""
    damaged = UnsupportedModel("is damaged, incomplete, or not of the format that its suffix names")
    try:
        if path.suffix.lower() == ".keras":
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    raise damaged
                return json.loads(archive.read("config.json")), json.loads(archive.read("metadata.json"))[
                    "keras_version"
                ]
        h5py = import_library("h5py", "requirements/keras.txt")
        with h5py.File(path, "r") as file:
            described = file.attrs.get("model_config")
            version = str(file.attrs.get("keras_version", "of an unknown version"))
    except UnsupportedModel:
        raise
    except Exception as error:  # whatever two readers raise at what they did not write
        raise damaged from error
    if described is None:
        raise UnsupportedModel('holds weights without a model. Where it was made, write: model.save("model.keras")')
    return json.loads(described), version


class KerasModel(TensorModel):
    """A Keras model of one input."""

    def __init__(self, keras: Any, model: Any) -> None:
        self._keras, self._model = keras, model
        inputs = getattr(model, "inputs", None) or []
        if len(inputs) != 1:
            raise UnsupportedModel(f"takes {len(inputs)} inputs; build it over one, `keras.Input(shape)`")
        rows, *shape = inputs[0].shape
        if rows is not None:
            raise UnsupportedModel(
                f"takes exactly {rows} row(s) at a time; build it over keras.Input(shape) without batch_size"
            )
        self.signature = of_rows(tuple(shape), str(inputs[0].dtype))
        self.sizes_open = self.signature.sizes_open

    def predict(self, rows: Any) -> Any:
        """Return the model's output as an array `(n_rows, …)`; of several outputs the first."""
        try:
            if self._keras.backend.backend() == "torch":
                with import_torch().inference_mode():
                    return first(self._model(rows, training=False)).numpy(force=True)
            return self._keras.ops.convert_to_numpy(first(self._model(rows, training=False)))
        except RuntimeError as error:  # torch's, at sizes that do not fit
            if self.sizes_open:
                raise ValueError("Keras refuses the rows") from error
            raise
