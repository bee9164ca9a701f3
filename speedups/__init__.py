"""What makes the server faster by reaching into other libraries; it runs without any of it."""

from typing import Any

from model.formats import sklearn

from .lean_imports import import_sklearn


def _spare_checks(model: Any) -> None:
    from .sklearn_checks import spare_checks  # imports scikit-learn

    spare_checks(model)


sklearn.before_import.append(import_sklearn)
sklearn.after_load.append(_spare_checks)
