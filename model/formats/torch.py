"""TorchScript and torch.export, by PyTorch."""

import ast
import itertools
import json
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from ..signature import Signature
from . import UnsupportedModel
from .base import TensorModel, first, first_line, import_torch, of_rows, values_of

_EXPORT_AGAIN = (
    "In the program that trained it, write:\n"
    "    program = torch.export.export(model.eval(), (example_of_2_rows,), "
    'dynamic_shapes=({0: torch.export.Dim("rows")},))\n'
    '    torch.export.save(program, "model.pt2")'
)


def load_torch(path: Path, **_: bool) -> "TorchModel":
    """Load what `torch.jit.save` or `torch.export.save` wrote; which of them, the file's content says.

    `torch.jit.load` reads pickles with a reader of its own that builds tensors and script objects only.
    `torch.export.load` would unpickle without limit, evaluate texts and load compiled libraries: `_check_exported`
    refuses those files.

    Raises:
        UnsupportedModel: no torch, a file of another kind, or a model that does not take rows.
    """
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise _pickled()
    try:
        with zipfile.ZipFile(path) as archive:
            if min((entry.header_offset for entry in archive.infolist()), default=1):
                raise zipfile.BadZipFile  # an archive within the truncated one
            names = [name.partition("/")[2] for name in archive.namelist()]
            if "constants.pkl" in names and any(name.startswith("code/") for name in names):
                exported = False
            elif "archive_format" in names:
                exported = True
                _check_exported(archive)
            elif "data.pkl" in names:
                raise _pickled()
            elif "serialized_exported_program.json" in archive.namelist():
                raise UnsupportedModel(f"was written by torch.export before PyTorch 2.8. {_EXPORT_AGAIN}")
            else:
                raise UnsupportedModel("is a zip archive, but not one of PyTorch's")
    except zipfile.BadZipFile:
        raise UnsupportedModel("is damaged, incomplete, or not of the format that its suffix names") from None
    torch = import_torch()
    try:
        return TorchExported(torch.export.load(path)) if exported else TorchScripted(_load_script(path))
    except UnsupportedModel:
        raise
    except Exception as error:  # a reader written in C++, and one that runs into what it did not expect
        raise UnsupportedModel(
            f"is not taken by PyTorch {torch.__version__} ({first_line(error)}): it is damaged, needs operators of "
            f"another library, or was written by another version. {_EXPORT_AGAIN}"
        ) from error


def _pickled() -> UnsupportedModel:
    return UnsupportedModel(
        "holds what torch.save wrote: a state_dict, which is weights without a model, or a pickled module, which "
        f"only its own classes can read. {_EXPORT_AGAIN}"
    )


def _check_exported(archive: zipfile.ZipFile) -> None:
    """Refuse an archive of torch.export that would do more at its load than make tensors.

    Read off `torch/export/pt2_archive/_package.py` and `torch/_export/serde/serialize.py` of PyTorch 2.13: payloads
    marked `use_pickle`, custom and opaque objects, legacy weights, and sample inputs are unpickled; sizes go through
    `sympy.sympify`, which evaluates; the name of an operator is looked up anywhere below `torch`, which is `os.system`,
    too; and what lies in `data/aotinductor` is loaded as a native library.
    """
    names = archive.namelist()
    short = {name: name.partition("/")[2] for name in names}
    if max(Counter(short.values()).values()) > 1:
        raise UnsupportedModel("has two entries of one name")
    for name, inside in short.items():
        if inside.startswith(("data/aotinductor/", "data/executorch/", "data/mtia/")):
            raise UnsupportedModel(f"holds compiled code ({inside}), which is not loaded. {_EXPORT_AGAIN}")
        if re.match(r"data/(weights|constants)/", inside):
            if inside.endswith("_config.json"):
                entries = json.loads(archive.read(name))["config"].values()
                if any(entry.get("use_pickle") is not False for entry in entries):
                    raise UnsupportedModel(f"holds pickled objects ({inside}), which are not read. {_EXPORT_AGAIN}")
            elif not re.fullmatch(r"data/(weights/weight|constants/tensor)_\d+", inside):
                raise UnsupportedModel(f"holds objects that are not tensors ({inside}). {_EXPORT_AGAIN}")
        elif inside.startswith("data/sample_inputs/"):
            _check_pickle_of_tensors(archive, name)
        elif inside.startswith("models/"):
            program = json.loads(archive.read(name))
            for text in values_of(program, "expr_str"):
                if not _is_arithmetic(text):
                    raise UnsupportedModel("holds a size that is not plain arithmetic")
            for node in itertools.chain.from_iterable(values_of(program, "nodes")):
                if not _OPERATOR.fullmatch(node["target"]):
                    raise UnsupportedModel(f"calls {node['target'][:80]}, which is not one of PyTorch's own operators")


# `torch.ops.aten.linear.default`, and Python's arithmetic on sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim)\.\w+\.\w+|torch\.ops\.higher_order\.\w+|torch\.(_?sym_\w+)|math\.\w+|"
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|index)"
)


def _is_arithmetic(text: Any) -> bool:
    """Tell whether a size is what sympy writes, such as `Max(Integer(1), Symbol('s31', integer=True))`.

    Evaluating it then only makes such objects: no attribute is taken, nothing but classes is called (sympy would take
    `eval` for the builtin), and a text, which sympy would evaluate in its turn, is only ever a symbol's name.
    """
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, TypeError, RecursionError):
        return False
    names = {id(call.args[0]) for call in ast.walk(tree) if _calls_symbol(call)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant):
            if isinstance(node.value, str) and not (id(node) in names and node.value.isidentifier()):
                return False
        elif isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id[:1].isupper()):
                return False
        elif not isinstance(node, _ARITHMETIC):
            return False
    return True


def _calls_symbol(node: ast.AST) -> TypeGuard[ast.Call]:
    return (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Symbol" and node.args != []
    )


_ARITHMETIC = (ast.Expression, ast.Name, ast.Load, ast.keyword, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)


def _check_pickle_of_tensors(archive: zipfile.ZipFile, name: str) -> None:
    torch = import_torch()
    with archive.open(name) as file:
        if not archive.getinfo(name).file_size:
            return
        try:
            torch.load(file, weights_only=True)  # the restricted reader: tensors and plain containers
        except Exception as error:
            raise UnsupportedModel(f"holds sample inputs that are not plain tensors. {_EXPORT_AGAIN}") from error


def _load_script(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript gets no new features; it is still read
        return import_torch().jit.load(path, map_location="cpu")


class TorchModel(TensorModel):
    """A PyTorch program of one input, run without gradients on the CPU."""

    def __init__(self, program: Any) -> None:
        self._torch, self._program = import_torch(), program

    def predict(self, rows: Any) -> Any:
        """Return the model's output as an array `(n_rows, …)`; of a tuple, list or dict the first."""
        torch = self._torch
        with torch.inference_mode():
            try:
                result = first(self._program(torch.from_numpy(np.ascontiguousarray(rows))))
            except (RuntimeError, AssertionError) as error:  # how it refuses shapes, and sizes out of range
                if self.sizes_open:
                    raise ValueError("PyTorch refuses the rows") from error
                raise
            return (result.float() if result.dtype == torch.bfloat16 else result).numpy(force=True)


class TorchExported(TorchModel):
    """A program of torch.export, which records the shape and type of its input."""

    def __init__(self, exported: Any) -> None:
        super().__init__(exported.module(check_guards=False))  # guards are code in the file; bounds are checked anyway
        inputs = [node for node in exported.graph.nodes if node.op == "placeholder"]
        wanted = exported.graph_signature.user_inputs
        if len(wanted) != 1 or not isinstance(wanted[0], str):
            raise UnsupportedModel(f"takes {len(wanted)} inputs; wrap it in a module that takes one tensor of rows")
        value = next(node for node in inputs if node.name == wanted[0]).meta["val"]
        sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
        if not sizes:
            raise UnsupportedModel("takes a single value, not rows")
        if sizes[0] is not None:
            raise UnsupportedModel(
                f"takes exactly {sizes[0]} row(s) at a time: its first dimension was not exported as open. "
                f"{_EXPORT_AGAIN}"
            )
        self.signature = of_rows(sizes[1:], str(value.dtype).removeprefix("torch."))
        self.sizes_open = True  # the number of rows itself may have bounds


class TorchScripted(TorchModel):
    """A TorchScript module. It does not tell what it takes: that is guessed from its weights, or from a sample."""

    sizes_open = True

    def __init__(self, module: Any) -> None:
        super().__init__(module.eval())
        needed = [given for given in module.forward.schema.arguments[1:] if not given.has_default_value()]
        if len(needed) != 1:
            raise UnsupportedModel(f"takes {len(needed)} inputs; wrap it in a module that takes one tensor of rows")

    def signatures(self, sample: list[Any] | None) -> Iterable[Signature]:
        """Yield the shape of the sample; else what the first weight suggests: columns, images, or a list of tokens."""
        weights = [weight for weight in self._program.state_dict().values() if weight.is_floating_point()]
        dtype = str(weights[0].dtype).removeprefix("torch.") if weights else "float32"
        if sample and isinstance(sample, list) and isinstance(sample[0], (list, int, float)):
            shape = np.shape(np.array(sample[0], dtype=object))
            yield of_rows(shape, dtype)
            yield of_rows(shape, "int64")
            return
        shaped = next((tuple(weight.shape) for weight in weights if weight.ndim >= 2), None)
        if shaped and len(shaped) == 2:
            yield of_rows((shaped[1],), dtype)  # a linear layer's weight is (outputs, inputs)
            yield of_rows((None,), "int64")  # an embedding's (words, size)
        elif shaped:
            yield of_rows((shaped[1], *[None] * (len(shaped) - 2)), dtype)  # a convolution's (outputs, channels, …)
        else:
            yield of_rows((None,), dtype)
            yield of_rows((), dtype)
