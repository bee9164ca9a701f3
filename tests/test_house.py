"""The house stands as it is described: arrows run from the extras to the core, and a reader can hold the core."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from conftest import ROOT, Client

from settings import EXTENSIONS

# What may be removed: each room, and each format of a tensor library. The rest of the product is the core.
EXTRAS = (
    *("telemetry/", "sls/", "speedups/", "endpoints/", "operations/"),
    *("model/versions/", "model/__main__.py", "model/demo.py"),
    *(f"model/formats/{name}.py" for name in ("base", "tensor_signature", "onnx", "torch", "keras", "archive_checks")),
    *("model/frames/", "model/formats/skops.py", "shared_files.py", "worker_slot.py", "platforms.py", "development.py"),
    *("auth_commands.py", "cli.py", "history.py", "log_format.py"),
)


def product() -> list[Path]:
    """List the files of the product."""
    folders = [path.parent for path in ROOT.glob("*/__init__.py")]
    return sorted([*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))])


def name_of(path: Path) -> str:
    """Return a file's name in the repository."""
    return path.relative_to(ROOT).as_posix()


def is_extra(name: str) -> bool:
    """Return whether a file belongs to an extra room."""
    return any(name == extra or (extra.endswith("/") and name.startswith(extra)) for extra in EXTRAS)


PRODUCT = {name_of(path): ast.parse(path.read_text("utf-8")) for path in product()}
CORE = [name for name in PRODUCT if not is_extra(name)]


def imports(name: str, everywhere: bool) -> Iterator[str]:
    """Yield the product's files that a file imports: when it is imported itself, or also later, in its functions."""
    package = Path(name).parent.parts
    nodes: list[ast.AST] = [PRODUCT[name]]
    while nodes:
        node = nodes.pop()
        if isinstance(node, (ast.FunctionDef, ast.Lambda)) and not everywhere:
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        found: list[str] = []
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            found = [origin, *(f"{origin}.{alias.name}" for alias in node.names)]
        for dotted in found:
            path = dotted.replace(".", "/")
            yield from {f"{path}.py", f"{path}/__init__.py"} & PRODUCT.keys()
        nodes.extend(ast.iter_child_nodes(node))


def test_core_imports_no_extra() -> None:
    wrong = {(name, other) for name in CORE for other in imports(name, everywhere=True) if is_extra(other)}
    assert not wrong


def test_imports_have_no_circle() -> None:
    arrows = {name: set(imports(name, everywhere=False)) - {name} for name in PRODUCT}
    # A package's own parts import it first; what matters is what its __init__ asks of them.
    while free := [name for name, others in arrows.items() if not others]:
        for name in free:
            del arrows[name]
        for others in arrows.values():
            others.difference_update(free)
    assert not arrows


def length(names: list[str]) -> int:
    """Count the lines of some files."""
    return sum(len((ROOT / name).read_text("utf-8").splitlines()) for name in names)


def test_reader_can_hold_it() -> None:
    assert length(["server.py"]) <= 298
    assert length(CORE) <= 3949
    functions = [(name, node) for name, tree in PRODUCT.items() for node in ast.walk(tree)]
    long = {
        f"{name}:{node.name}": lines
        for name, node in functions
        if isinstance(node, ast.FunctionDef) and (lines := (node.end_lineno or 0) - node.lineno + 1) > 45
    }
    assert not long


def test_way_of_a_request_is_short(serve: Any, iris_file: Path) -> None:
    client: Client = serve(iris_file, extensions=tuple(f"-{name}" for name in EXTENSIONS))
    called: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            called.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    sys.setprofile(note)
    try:
        answers = [client.post({"data": [[5.1, 3.5, 1.4, 0.2]]}) for _ in range(2)]
    finally:
        sys.setprofile(None)
    assert [answer.status_code for answer in answers] == [200, 200]
    whole = [name for name in CORE if name in ("server.py", "model/batching.py") or name.startswith("web/")]
    lines = {name: length([name]) for name in whole}
    for name in CORE:
        for node in ast.walk(PRODUCT[name]):
            if isinstance(node, ast.FunctionDef) and name not in whole:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                if (str(ROOT / name), first) in called:
                    lines[name] = lines.get(name, 0) + (node.end_lineno or 0) - first + 1
    print(lines)
    assert sum(lines.values()) <= 1348, lines
