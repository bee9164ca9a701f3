"""One loader per file format, chosen by the file's suffix.

A loader's module is imported when a file of its format is loaded: a server needs only the libraries of its own model,
and the modules of formats that it does not serve may be removed. Loading a pickle runs whatever code its author put in
it: serve only files that you would run as a script.
"""

import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

# suffix → "module:function"; the function is called with the path and the keyword arguments of `load`.
LOADERS = {
    ".joblib": "model.formats.sklearn:load_joblib",
    ".pkl": "model.formats.sklearn:load_joblib",
    ".pickle": "model.formats.sklearn:load_joblib",
    ".skops": "model.formats.skops:load_skops",
    ".onnx": "model.formats.onnx:load_onnx",
    ".pt": "model.formats.torch:load_torch",
    ".pt2": "model.formats.torch:load_torch",
    ".h5": "model.formats.keras:load_keras",
    ".keras": "model.formats.keras:load_keras",
}


FAMILIES = ("lightgbm", "xgboost", "catboost", "category_encoders", "feature_engine", "skrub")  # that `frames` knows


class ModelLoadError(Exception):
    """A model that cannot be served. The message says how to fix it; it goes to the log, never to a caller."""


class UnsupportedModel(ModelLoadError):
    """A file that its loader cannot serve. The message continues the file's name: "model.pt holds a state_dict…"."""


def is_of_family(part: Any) -> bool:
    """Return whether a part of a model is of one of those libraries."""
    return type(getattr(part, "raw", part)).__module__.partition(".")[0] in FAMILIES


def has_frames() -> bool:
    """Return whether `model/frames` is there; it may be removed."""
    return (Path(__file__).parents[1] / "frames" / "__init__.py").exists()


def from_frames(function: str, *arguments: Any) -> Any:
    """Call a function of `model/frames`; None if that was removed."""
    return pkgutil.resolve_name(f"model.frames:{function}")(*arguments) if has_frames() else None


def load(path: Path, *, allow_version_mismatch: bool = False, immutable: bool = False) -> Any:
    """Load a fitted model from a file, ready to predict in one thread.

    Args:
        allow_version_mismatch: load a model that another minor version of scikit-learn made.
        immutable: the file is only ever replaced by another, never written to, so its large arrays may be mapped into
            memory and shared by all processes that load it.

    Raises: ModelLoadError, with the cause and what to do about it.
    """
    if path.suffix == ".pb" or (path / "saved_model.pb").exists():
        directory = path.parent if path.suffix == ".pb" else path
        raise ModelLoadError(
            f"{path.name} is TensorFlow's SavedModel, a directory; a model is served from one file. Make one:\n"
            "    pip install tf2onnx\n"
            f"    python -m tf2onnx.convert --saved-model {directory} --output model.onnx"
        )
    if path.suffix.lower() not in LOADERS:
        raise ModelLoadError(f"{path.name}: the suffix names the format; expected one of {', '.join(LOADERS)}")
    try:
        loader = pkgutil.resolve_name(LOADERS[path.suffix.lower()])
        model = loader(path, allow_version_mismatch=allow_version_mismatch, immutable=immutable)
    except UnsupportedModel as error:
        raise ModelLoadError(f"{path.name} {error}") from error
    except ModelLoadError:
        raise
    except Exception as error:
        raise ModelLoadError(_explain(path, error)) from error
    model = (is_of_family(model) and from_frames("servable", model)) or model
    if isinstance(model, type):
        raise ModelLoadError(f"{path.name} holds the class {model.__name__}; save the fitted model itself")
    if not callable(getattr(model, "predict", None)):
        raise ModelLoadError(_explain_parts(path, model))
    return model


def _explain_parts(path: Path, bundle: Any) -> str:
    """Explain how to save what was saved as several parts. A model alone would get raw rows."""
    parts: dict[str, Any] = {}
    if isinstance(bundle, dict):
        parts = {f"bundle[{key!r}]": part for key, part in bundle.items()}
    elif isinstance(bundle, (list, tuple)):
        parts = {f"bundle[{at}]": part for at, part in enumerate(bundle)}
    elif hasattr(bundle, "__dict__"):
        parts = {f"bundle.{name}": part for name, part in vars(bundle).items()}
    models = [name for name, part in parts.items() if callable(getattr(part, "predict", None))]
    transformers = [name for name, part in parts.items() if callable(getattr(part, "transform", None))]
    transformers = [name for name in transformers if name not in models]
    kind = f"{path.name} holds a {type(bundle).__name__} without predict()"
    if not models and hasattr(bundle, "get_params"):
        return f"{kind}, so it answers nothing; serve a model that has one, or a pipeline that ends in one"
    if not models:
        return f"{kind}; save the fitted model itself"
    load = f'    bundle = joblib.load("{path.name}")\n'
    if len(models) == 1 and not transformers:
        return f'{kind}, with a model in it. Save that:\n{load}    joblib.dump({models[0]}, "model.joblib")'
    found = ", ".join(f"{name} ({type(parts[name]).__name__})" for name in [*transformers, *models])
    return (
        f"{kind}, but several parts: {found}. In which order they belong together it does not say. Save them as one "
        "pipeline, each transformer in the order in which it is applied, and the model last:\n"
        f"    from sklearn.pipeline import make_pipeline\n{load}"
        f'    joblib.dump(make_pipeline({", ".join([*transformers, models[0]])}), "model.joblib")'
    )


def _explain(path: Path, error: Exception) -> str:
    """Explain why a file did not load: each of the usual causes has its own fix."""
    summary = f"{path.name} does not load: {type(error).__name__}: {error}"
    missing = str(error.name) if isinstance(error, ModuleNotFoundError) else ""
    if missing.startswith(f"{__name__}."):
        return f"{path.name} is not served: this server was installed without {missing}, which {path.suffix} files need"
    looked_in = re.search(r"<module '([^']+)'", str(error))  # "Can't get attribute 'Mine' on <module 'mine' from …>"
    module = missing or (looked_in[1] if looked_in else "")
    root = module.partition(".")[0]
    found_at = Path(getattr(sys.modules.get(root), "__file__", None) or "")
    server = Path(__file__).resolve().parents[2]
    if module.endswith("__main__"):
        return (
            f"{summary}. It uses a class or function that was defined in a notebook or script: move that into a module "
            "of its own, put the module beside server.py, import it from there, train and save again"
        )
    if found_at.parent in (server, server / root):  # a module or package of the server's own, or beside it
        return (
            f"{summary}. It was saved beside a module named {root}, and here that name means {found_at}. If yours is "
            "another one, rename it, put it beside server.py, train and save again"
        )
    if root in ("sklearn", "numpy", "scipy") or "incompatible dtype" in str(error):
        return (
            f"{summary}. It was made with another version of scikit-learn or numpy, whose parts have changed since: "
            "train and save it again with the versions in requirements.txt"
        )
    if missing and root.isidentifier():
        return (
            f"{summary}. If {root} is a file of yours, put {root}.py beside server.py; if it is a library, add it to "
            "requirements.in and run `make lock`, or install it beside the server"
        )
    if not missing and isinstance(error, (AttributeError, ImportError, OSError, MemoryError)):
        return summary
    return f"{summary}. The file is damaged, incomplete, or not of the format that its suffix names"
