"""Compares predictions with the truth, row by row.

A row's truth has the form of the row's prediction: a label or a number, or for several outputs (multi-label and
multi-output models) a list with one for each output. None stands for a row whose truth is not known.

- Classification: a row is wrong unless each of its outputs equals the truth (scikit-learn's `1 - accuracy_score`, for
  several outputs as well). A label that the model does not know makes the row wrong, too, and is counted besides.
- Regression: a row's errors are the means over its outputs of |prediction - truth|, its square, and with its sign. A
  row whose prediction is null (NaN, or an infinity), or what an extension made of it and no number, cannot be
  measured; it counts as not known.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from endpoints.error_rate import CLASSIFICATION, REGRESSION

MAX_ERROR = 1e150  # whose square, a million times, is still a number


class BadTruth(Exception):
    """A truth that cannot be compared with the prediction. The message is for the caller."""


@dataclass
class Outcome:
    """How the labelled rows of one answer turned out."""

    rows: int = 0
    wrong: int | None = None  # of a classification
    unknown_labels: int | None = None  # of a classification; None if the labels of that version are not known here
    abs_error: float | None = None  # of a regression: sums over the rows
    sq_error: float | None = None
    signed_error: float | None = None


@dataclass(frozen=True)
class Labels:
    """The labels that one output may have, all of one kind: numbers, strings, or booleans."""

    kind: str
    values: frozenset[Any]

    @classmethod
    def of(cls, values: Any) -> "Labels | None":
        """Return the labels, or None if they are not of one kind."""
        kinds = {_kind(value) for value in values}
        return cls(kinds.pop(), frozenset(values)) if len(kinds) == 1 and kinds <= {NUMBER, STRING, BOOLEAN} else None


NUMBER, STRING, BOOLEAN = "a number", "a string", "true or false"
_KINDS = {int: NUMBER, float: NUMBER, str: STRING, bool: BOOLEAN, list: "a list", dict: "an object"}
_INDICATOR = Labels(NUMBER, frozenset((0, 1)))  # of multi-label models, whose classes name the outputs

Known = list[Labels | None] | Labels | None  # the labels of a model: a list has those of each output


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "null")


def labels_of(classes: Any) -> Known:
    """Return the labels of a model from its classes, decoded JSON; None if unknown."""
    try:
        if isinstance(classes, list) and classes and all(isinstance(each, list) for each in classes):
            return [Labels.of(each) for each in classes]
        return Labels.of(classes) if isinstance(classes, list) else None
    except TypeError:  # not hashable
        return None


def kind_of(prediction: Any, classes: Any) -> str:
    """Return what a model does: one without classes whose predictions are floats is a regression."""
    if classes is not None:
        return CLASSIFICATION
    if isinstance(prediction, np.ndarray):
        return REGRESSION if prediction.dtype.kind == "f" else CLASSIFICATION
    kinds = {type(leaf) for row in prediction for leaf in _leaves(row)} - {type(None)}
    return REGRESSION if kinds <= {int, float} else CLASSIFICATION


def compare(prediction: list[Any], truth: Any, kind: str, known: Known) -> Outcome:
    """Compare decoded JSON values. Raises: BadTruth, what is wrong with the truth."""
    if not isinstance(truth, list):
        raise BadTruth(f"truth is {_kind(truth)}; send a list with the truth of each row, null where it is not known")
    if len(truth) != len(prediction):
        raise BadTruth(
            f"truth has {len(truth)} entries, the prediction {len(prediction)} rows; send one for each row, null where "
            "it is not known"
        )
    outcome = _regression(prediction, truth) if kind == REGRESSION else _classification(prediction, truth, known)
    if not outcome.rows:
        raise BadTruth("no row's truth is known, so there is nothing to count; send the receipt again when one is")
    return outcome


def _classification(prediction: list[Any], truth: list[Any], known: Known) -> Outcome:
    outcome = Outcome(wrong=0, unknown_labels=0 if known is not None else None)
    for number, (answered, true) in enumerate(zip(prediction, truth, strict=True)):
        if true is None:
            continue
        wrong = unknown = False
        for output, (said, is_so) in enumerate(_pairs(answered, true, f"truth of row {number}")):
            labels = _labels(known, output if isinstance(answered, list) else None)
            if labels is not None and said is not None and labels.kind != _kind(said):
                labels = None  # an extension (`after_predict`) answers other labels than the model
            expected = labels.kind if labels else _kind(said)
            if _kind(is_so) != expected and (labels or said is not None):
                raise BadTruth(
                    f"truth of row {number} is {_kind(is_so)}, where the model answers {expected}; "
                    "send a label as the model spells it, null where the row's truth is not known"
                )
            if said is None or said != is_so:
                wrong = True
                unknown |= labels is not None and is_so not in labels.values
        outcome.rows += 1
        outcome.wrong = (outcome.wrong or 0) + wrong
        if outcome.unknown_labels is not None:
            outcome.unknown_labels += unknown
    return outcome


def _labels(known: Known, output: int | None) -> Labels | None:
    """Return the labels of an output, None for the only one."""
    if output is None:
        return known if isinstance(known, Labels) else None
    if isinstance(known, Labels):
        return _INDICATOR
    return known[output] if known and output < len(known) else None


def _regression(prediction: list[Any], truth: list[Any]) -> Outcome:
    outcome = Outcome(abs_error=0.0, sq_error=0.0, signed_error=0.0)
    for number, (answered, true) in enumerate(zip(prediction, truth, strict=True)):
        if true is None:
            continue
        errors = []
        for said, is_so in _pairs(answered, true, f"truth of row {number}"):
            if _kind(is_so) != NUMBER:
                raise BadTruth(f"truth of row {number} is {_kind(is_so)}; send a number, or null if it is not known")
            errors.append(float(said) - float(is_so) if _kind(said) == NUMBER else math.nan)
            if abs(errors[-1]) > MAX_ERROR:
                raise BadTruth(f"truth of row {number} is further from the prediction than can be squared; correct it")
        if errors and not math.isnan(sum(errors)):
            outcome.rows += 1
            outcome.abs_error = (outcome.abs_error or 0.0) + sum(map(abs, errors)) / len(errors)
            outcome.sq_error = (outcome.sq_error or 0.0) + sum(error * error for error in errors) / len(errors)
            outcome.signed_error = (outcome.signed_error or 0.0) + sum(errors) / len(errors)
    return outcome


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for each in value:
            yield from _leaves(each)
    else:
        yield value


def _pairs(answered: Any, true: Any, what: str) -> Iterator[tuple[Any, Any]]:
    """Yield the values of a row's prediction, each with its truth. Raises: BadTruth, their forms differ."""
    if not isinstance(answered, list):
        yield answered, true
    elif not isinstance(true, list) or len(true) != len(answered):
        form = f"a list of {len(true)}" if isinstance(true, list) else _kind(true)
        raise BadTruth(f"{what} is {form}; send a list of {len(answered)}, as the prediction has, or null for the row")
    else:
        for each, one in zip(answered, true, strict=True):
            yield from _pairs(each, one, what)
