"""Whether a version fits the callers of another one: each request that the old one answers, the new one answers too.

What the manifests describe is compared: columns, kinds, methods, classes, the form of a prediction. What they do not
show is tried in the fresh process that validates the new version: it is asked for the old version's sample, and for
categories that only the old one knows. More methods, and columns that take more than before, are no difference.
"""

from collections.abc import Iterator
from typing import Any

import orjson

from ..answers import ModelFailed
from ..columns import BadRows, Column, json_form
from ..loaded import LoadedModel, RowsRefused
from .loading import SIGNATURE_FORM

BY_CLASS = {"predict_proba", "predict_log_proba", "decision_function"}  # methods whose columns are the classes
MAX_NAMES = 8  # in one sentence
MAX_KEPT = 10_000  # categories of a version
MAX_TRIED = 100  # of those that another does not know

About = dict[str, Any]  # what a manifest holds


def differences(old: About, new: About) -> list[str]:
    """Return what callers of the old version would notice, a sentence each; [] if nothing in the descriptions differs.

    Of a manifest whose signature is described in another form only the names of the columns are compared. One that
    does not describe it at all is a difference, since nobody knows.
    """
    try:
        return [*_input(old, new), *_methods(old, new), *_classes(old, new), *_predictions(old, new)]
    except (KeyError, TypeError, AttributeError, ValueError):
        return ["a manifest does not describe what its version takes, so the two cannot be compared"]


def compare(model: LoadedModel, old: About, new: About) -> list[str]:
    """Return the `differences`, and those that show when the model is tried."""
    found = differences(old, new)
    if why := _refusal(model, old["sample"]):
        return found or [f"its recorded sample is refused: {why}"]
    return found + list(_lost_categories(model, old))


def categories(model: LoadedModel) -> list[list[Any]]:
    """Return what each column's encoder has learned, as JSON values, for later versions to be tried with.

    [] if that is too much, or has no form in JSON.
    """
    try:
        learned = [[json_form(value) for value in column.learned] for column in model.signature.columns or ()]
        orjson.dumps(learned)
    except TypeError:
        return []
    return learned if sum(map(len, learned)) <= MAX_KEPT else []


def _lost_categories(model: LoadedModel, old: About) -> Iterator[str]:
    """Try the first row of a sample with each category that the model has not learned, which it may take anyway."""
    columns, before = model.signature.columns or (), old.get("categories") or ()  # an older version has kept none
    learned = [{orjson.dumps(json_form(value)) for value in column.learned} for column in columns]
    pairs = [(at, value) for at, known in enumerate(before[: len(columns)]) for value in known]
    gone = [(at, value) for at, value in pairs if orjson.dumps(value) not in learned[at]][:MAX_TRIED]
    refused: dict[int, list[Any]] = {}
    for at, value in gone:
        if _refusal(model, [_with(old["sample"][0], at, columns[at].name, value)]):
            refused.setdefault(at, []).append(value)
    for at, values in refused.items():
        yield f"{_place(columns[at].name, at)} took {_list(values)}; it does not"


def _refusal(model: LoadedModel, rows: Any) -> str:
    try:
        model.call(model.signature.parse(rows))
    except (BadRows, RowsRefused, ModelFailed) as error:
        return str(error)
    return ""


def _with(row: Any, at: int, name: Any, value: Any) -> Any:
    return row | {name: value} if isinstance(row, dict) else [*row[:at], value, *row[at + 1 :]]


# --- what a request holds


def _input(old: About, new: About) -> Iterator[str]:
    before, now = old["signature"], new["signature"]
    shape, other = _shape(before), _shape(now)
    if len(shape) != len(other):
        yield f"data was {before['form']}; it is {now['form']}"
    elif len(shape) == 1:
        is_known = old.get("signature_form") == new.get("signature_form") == SIGNATURE_FORM
        yield from _columns(_as_columns(before), _as_columns(now), is_known)
    else:
        if not all(size in (None, was) for was, size in zip(shape, other, strict=True)):
            yield f"a row was {_sizes(shape)}; it is {_sizes(other)}"
        yield from _column(Column(None, _kind(before)), Column(None, _kind(now)), "the values")


def _shape(signature: About) -> tuple[int | None, ...]:
    """Return the shape of a row, as that of a tensor; None is a size that is open."""
    if "shape" in signature:
        return tuple(signature["shape"])
    if signature["layout"] in ("texts", "numbers"):
        return ()
    return (len(signature["columns"]) if signature["columns"] is not None else None,)


def _kind(signature: About) -> Any:
    return signature.get("type") or {"texts": "text"}.get(signature["layout"], "number")


def _sizes(shape: tuple[int | None, ...]) -> str:
    return " × ".join("any" if size is None else str(size) for size in shape) + " values"


def _as_columns(signature: About) -> list[Column] | None:
    """Return the columns that a signature describes; of a tensor of one dimension, columns without names."""
    if "shape" in signature:
        (size,) = signature["shape"]
        return None if size is None else [Column(None, _kind(signature))] * size
    if signature["columns"] is None:
        return None
    return [
        Column(each["name"], each["type"], each["nullable"] is True, learned=tuple(each.get("categories", ())))
        for each in signature["columns"]
    ]


def _columns(old: list[Column] | None, new: list[Column] | None, with_kinds: bool) -> Iterator[str]:
    """Compare rows of columns. How many an open number (None) stands for is tried with the sample."""
    before, now = old or [Column(None)] * len(new or ()), new or [Column(None)] * len(old or ())
    names, others = ([column.name for column in columns] for columns in (before, now))
    pairs = list(zip(before, now, strict=False))
    if all(names) and all(others) and sorted(map(str, names)) != sorted(map(str, others)):
        gone, added = ([name for name in one if name not in other] for one, other in ((names, others), (others, names)))
        yield from [f"columns that are gone: {_list(gone)}"] * bool(gone)
        yield from [f"columns that are new, and that each row needs: {_list(added)}"] * bool(added)
        by_name = {column.name: column for column in now}
        pairs = [(column, by_name[column.name]) for column in before if column.name in by_name]
    elif len(before) != len(now):
        yield f"a row had {len(before)} values; it has {len(now)}"
    elif all(names) and not all(others):
        yield "the columns have no names any more, so rows that are objects are refused"
    elif all(names) and names != others:
        yield f"the columns were {_list(names)}; they are {_list(others)}, so values in lists would mean others"
        return
    for at, (was, column) in enumerate(pairs if with_kinds else ()):
        yield from _column(was, column, _place(was.name, at))


def _column(old: Column, new: Column, place: str) -> Iterator[str]:
    takes = old.accepted - {type(None)} <= new.accepted
    if not takes or (old.kind != new.kind and new.kind not in ("number", "text", "any")):
        yield f"{place} took {old.expected}; it takes {new.expected}"
    if old.nullable and not new.nullable:
        yield f"{place} took null; it takes none"


# --- what an answer holds


def _methods(old: About, new: About) -> Iterator[str]:
    if gone := [method for method in old["methods"] if method not in new["methods"]]:
        yield f"methods that are gone: {', '.join(gone)}"


def _classes(old: About, new: About) -> Iterator[str]:
    before, now = old["classes"], new["classes"]
    was, others = _exact(before), _exact(now)
    if was == others or (sorted(was) == sorted(others) and not BY_CLASS & {*old["methods"]}):
        return
    if sorted(was) == sorted(others):
        yield f"the classes were {_list(before)}; they are {_list(now)}, and so are the columns of predict_proba"
    else:
        yield f"the classes were {_list(before)}; they are {_list(now)}"


def _exact(classes: Any) -> list[bytes]:
    """Return classes as JSON, which tells 1 from true and from 1.0."""
    return [orjson.dumps(each) for each in classes or ()]


def _predictions(old: About, new: About) -> Iterator[str]:
    was, now = (_form(each["predictions"]) for each in (old, new))
    if was and now and was != now:
        yield f"a prediction was {was}; it is {now}"


def _form(predictions: Any) -> str:
    """Return what a prediction is, by the first one that is known."""
    first = next((each for each in predictions if each is not None), None)
    if isinstance(first, list):
        return f"a list of {len(first)} values"
    return {bool: "true or false", str: "a string", int: "a number", float: "a number"}.get(type(first), "")


def _place(name: Any, at: int) -> str:
    return f"column {at if name is None else repr(name)}"


def _list(values: Any) -> str:
    """Show some values as JSON."""
    shown = [orjson.dumps(value).decode() for value in (values or ())[:MAX_NAMES]]
    more = len(values or ()) - len(shown)
    return ", ".join([*shown, *([f"and {more} more"] if more else [])]) or "none"
