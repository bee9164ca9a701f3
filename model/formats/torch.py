"""TorchScript and torch.export, by PyTorch."""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..signature import Signature
from . import UnsupportedModel
from .archive_checks import check_export
from .base import TensorModel, first, first_line, import_library, signature_of

_EXPORT_AGAIN = (
    "In the program that trained it, write:\n"
    "    program = torch.export.export(model.eval(), (example_of_2_rows,), "
    'dynamic_shapes=({0: torch.export.Dim("rows")},))\n'
    '    torch.export.save(program, "model.pt2")'
)


def load_torch(path: Path, **_: bool) -> "TorchModel":
    """Load what `torch.jit.save` or `torch.export.save` wrote; the file's content decides which of them it was.

    Raises: UnsupportedModel, no torch, a file of another kind or with code in it, or a model that does not take rows.
    """
    model: Callable[[Any, Path], TorchModel] = TorchExported if _is_exported(path) else TorchScripted
    torch = import_library("torch", "requirements/torch.txt")
    try:
        return model(torch, path)
    except UnsupportedModel:
        raise
    except Exception as error:  # a reader written in C++, and one that fails on whatever it did not expect
        raise UnsupportedModel(
            f"is not taken by PyTorch {torch.__version__} ({first_line(error)}): it is damaged, needs operators of "
            f"another library, or was written by another version. {_EXPORT_AGAIN}"
        ) from error


def _is_exported(path: Path) -> bool:
    """Return True for a file of torch.export, False for TorchScript. Raises: UnsupportedModel, neither of them."""
    with path.open("rb") as file:
        is_pickle = file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [] if is_pickle else archive.infolist()
    except zipfile.BadZipFile:
        entries = []
    if not is_pickle and all(entry.header_offset > 0 for entry in entries):  # such as one within the truncated one
        raise UnsupportedModel("is damaged, incomplete, or not of the format that its suffix names")
    names = [entry.filename for entry in entries]
    inner = [name.partition("/")[2] for name in names]
    if "constants.pkl" in inner and any(name.startswith("code/") for name in inner):
        return False
    if "archive_format" in inner:
        return True
    if is_pickle or "data.pkl" in inner:
        raise UnsupportedModel(
            "holds what torch.save wrote: a state_dict, which is weights without a model, or a pickled module, which "
            f"only its own classes can read. {_EXPORT_AGAIN}"
        )
    if "serialized_exported_program.json" in names:
        raise UnsupportedModel(f"was written by torch.export before PyTorch 2.8. {_EXPORT_AGAIN}")
    raise UnsupportedModel("is a zip archive, but not one of PyTorch's")


class TorchModel(TensorModel):
    """A PyTorch program of one input, run without gradients on the CPU."""

    def __init__(self, torch: Any, program: Any, inputs: int) -> None:
        if inputs != 1:
            raise UnsupportedModel(f"takes {inputs} inputs; wrap it in a module that takes one tensor of rows")
        self._torch, self._program = torch, program

    def predict(self, rows: Any) -> Any:
        """Return the model's output as an array `(n_rows, …)`; of a tuple, list or dict the first."""
        torch = self._torch
        with torch.inference_mode():
            try:
                result = first(self._program(torch.from_numpy(np.array(rows))))  # copied: a body is read-only
            except (RuntimeError, AssertionError) as error:  # how it rejects shapes, and sizes out of range
                raise ValueError("PyTorch rejects the rows") from error
            return (result.float() if result.dtype == torch.bfloat16 else result).numpy(force=True)


class TorchExported(TorchModel):
    """A program of torch.export, which records the shape and type of its input."""

    def __init__(self, torch: Any, path: Path) -> None:
        # torch.export.load would log a traceback, and try to read an older format, which the check does not cover.
        from torch.export.pt2_archive._package import load_pt2

        check_export(path)
        exported = load_pt2(str(path)).exported_programs["model"]
        inputs = exported.graph_signature.user_inputs
        # Its guards are code in the file; bounds are checked without them.
        super().__init__(torch, exported.module(check_guards=False), len(inputs))
        value = next(node for node in exported.graph.nodes if node.name == inputs[0]).meta["val"]
        fix = f": its first dimension was not exported as open. {_EXPORT_AGAIN}"
        self.signature = signature_of(value.shape, str(value.dtype).removeprefix("torch."), fix)


class TorchScripted(TorchModel):
    """A TorchScript module. It does not record what it takes: that is guessed from a sample, or from its weights."""

    def __init__(self, torch: Any, path: Path) -> None:
        module = torch.jit.load(path, map_location="cpu").eval()
        arguments = module.forward.schema.arguments[1:]
        super().__init__(torch, module, sum(not each.has_default_value() for each in arguments))

    def signatures(self, sample: list[Any] | None) -> Sequence[Signature]:
        """Return the shape of the sample; else what the first weight suggests: columns, images, or a list of tokens."""
        weights = [weight for weight in self._program.state_dict().values() if weight.is_floating_point()]
        dtype = str(weights[0].dtype).removeprefix("torch.") if weights else "float32"
        if sample and isinstance(sample, list) and isinstance(sample[0], (list, int, float)):
            shape = np.shape(np.array(sample[0], dtype=object))
            return [signature_of((None, *shape), dtype), signature_of((None, *shape), "int64")]
        shape = next((tuple(weight.shape) for weight in weights if weight.ndim >= 2), ())
        if len(shape) == 2:  # of a linear layer (outputs, inputs), or of an embedding (words, size)
            return [signature_of((None, shape[1]), dtype), signature_of((None, None), "int64")]
        if shape:  # of a convolution (outputs, channels, …)
            return [signature_of((None, shape[1], *[None] * (len(shape) - 2)), dtype)]
        return [signature_of((None, None), dtype), signature_of((None,), dtype)]
