"""What a `.pt2` file could run while PyTorch loads it: refused here.

The checks answer PyTorch 2.13; read its sources again at an upgrade. `torch.export.load` has no safe mode. It unpickles
payloads marked `use_pickle`, custom and opaque objects, legacy weights and sample inputs; loads `data/aotinductor` as
native libraries; evaluates sizes with `sympy.sympify`; imports the modules that tree specifications name; looks
operators up anywhere below `torch`, which includes `os.system`; and compiles Python source made of the names in the
graph. (`torch/export/pt2_archive/_package.py`, `torch/_export/serde/serialize.py`, `torch/utils/_pytree.py`,
`torch/fx/graph.py`.) `torch.jit.load` needs no check: its own unpickler builds tensors and script objects only.
"""

import io
import json
import re
from pathlib import Path
from typing import Any

from . import UnsupportedModel

# What torch.export.save writes. Entries in `extra/` are only read as strings.
_ENTRY = re.compile(
    r"(\.data/)?\w+|data/(weights|constants)/\w+_config\.json|data/weights/weight_\d+|data/constants/tensor_\d+|"
    r"data/sample_inputs/\w+\.pt|models/\w+\.json|extra/.*"
)

# `torch.ops.aten.linear.default`, and Python's arithmetic on sizes.
_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim)\.\w+\.\w+|torch\.ops\.higher_order\.\w+|torch\.(_?sym_\w+)|math\.\w+|"
    r"_operator\.(add|sub|mul|truediv|floordiv|mod|pow|neg|pos|abs|getitem|eq|ne|lt|le|gt|ge|and_|or_|not_|index)"
)

# `Max(Integer(1), Symbol('s31', integer=True))`: calls of sympy's classes only, whose names are capitalized; no
# attributes; and no string except a symbol's name, because sympy evaluates strings again.
_SIZE = re.compile(r"(Symbol\('\w+'|[A-Z]\w*\b|\w+=(True|False)\b|\d+(\.\d+)?\b|[-+*/%(), ])*")

# In JSON within JSON, the words that make PyTorch import a module, and escape sequences that could spell them.
_IMPORTS = re.compile(r"__enum__|default_factory|\\u00[0-7]")

# JSON within JSON that holds plain names only: those of keyword arguments become Python source.
_ARGUMENTS = re.compile(r'([\w .,:\[\]{}"+-]|\\")*')

# `p_0_weight`, `block.my-layer.weight`, `2.13.0+cpu`; in Python source it can call and assign nothing.
_NAME = re.compile(r"[\w .+-]*")


def check_export(path: Path) -> None:
    """Check that loading an archive of torch.export only makes tensors and a graph of PyTorch's own operators.

    The archive is read as torch.export.load reads it: another zip reader may find other entries in the same bytes.
    Raises: UnsupportedModel, the archive holds anything else.
    """
    import torch
    from torch.export.pt2_archive import PT2ArchiveReader

    reader = PT2ArchiveReader(str(path))
    for name in reader.get_file_names():
        if not _ENTRY.fullmatch(name):
            raise UnsupportedModel(f"holds compiled code, or objects that are not tensors ({name[:80]})")
        if name.startswith("data/sample_inputs/"):
            try:
                if content := reader.read_bytes(name):
                    torch.load(io.BytesIO(content), weights_only=True)
            except Exception as error:
                raise UnsupportedModel("holds sample inputs that are not plain tensors") from error
        elif name.startswith(("data/", "models/")) and name.endswith(".json"):
            _check_json(json.loads(reader.read_string(name)), key="", parent="")


def _check_json(value: Any, key: str, parent: str) -> None:
    """Check a value of decoded JSON and all within it; the value is under a key, and that one under a parent's."""
    if key == "use_pickle" and value is not False:
        raise UnsupportedModel("holds pickled objects")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_json(inner, name, key)
    elif isinstance(value, list):
        for inner in value:
            _check_json(inner, key, parent)
    elif isinstance(value, str):
        _check_string(value, key, parent)


def _check_string(value: str, key: str, parent: str) -> None:
    """Check a string by the rule of its key."""
    if key == "expr_str":
        if not _SIZE.fullmatch(value):
            raise UnsupportedModel("holds a size that is not plain arithmetic")
    elif key in ("target", "as_operator"):
        if not _OPERATOR.fullmatch(value):
            raise UnsupportedModel(f"calls {value[:80]}, which is not one of PyTorch's own operators")
    elif key in ("in_spec", "out_spec"):
        if _IMPORTS.search(value) or (key == "in_spec" and not _ARGUMENTS.fullmatch(value)):
            raise UnsupportedModel("takes or returns values in other containers than lists, tuples and dicts")
    # Free text: stack traces, the arguments of operators, and guards, which TorchExported leaves out.
    elif parent == "metadata" or key in ("as_string", "as_strings", "guards_code"):
        pass
    elif not _NAME.fullmatch(value):
        raise UnsupportedModel(f"holds {value[:80]!r} as a name")
