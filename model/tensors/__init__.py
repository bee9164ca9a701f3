"""Models that take tensors: ONNX, TorchScript, torch.export and Keras, each behind scikit-learn's face.

`LOADERS` has a function for each suffix, which reads a file and returns a `TensorModel`. Its library is imported when
it is called, so that a server of a scikit-learn model needs none of them. What could run code while it is read (a
pickle, a Lambda layer, a compiled library) is looked for in the file first and refused; but a model is a program, and
TorchScript can read and write files: serve only what comes from people whom you trust.
"""

from collections.abc import Callable
from pathlib import Path

from .base import NotServable, TensorModel, import_library
from .keras import load_keras
from .onnx import METADATA, load_onnx
from .torch import load_torch

__all__ = ["LOADERS", "METADATA", "NotServable", "TensorModel", "import_library"]

LOADERS: dict[str, Callable[[Path], TensorModel]] = {
    ".onnx": load_onnx,
    ".pt": load_torch,
    ".pt2": load_torch,
    ".h5": load_keras,
    ".keras": load_keras,
}
