"""Rows that are made up, on which `python -m model export` compares a model with its ONNX form."""

import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..columns import Column, json_form
from ..frames.parts import inspect, raw_parts
from ..signature import Signature

SYNTHETIC_ROWS = 1000
MAX_UNKNOWN = 1000  # rows with an unknown category, each of which is a call of its own
SEPARATORS = (" ", " ", " ", ", ", ". ", "-", "_", "\n", "'", "")
# Strings of which a vectorizer seldom knows anything: other scripts, signs, and letters whose lower case is unusual.
OTHER_STRINGS = (
    *("", " ", "?!", "0", "3.14", "a", "it's", "snake_case", "e-mail@example.org", "naïve café", "Straße", "e\u0301a"),
    *("Привет, мир", "ΟΔΟΣ", "İstanbul", "日本語の文", "العربية", "हिन्दी", "한국어", "½ ² ٣", "ﬁne", "😀 ok"),
)


def synthetic_rows(model: Any, signature: Signature, valid: Any) -> list[Any]:
    """Make rows up: strings that the encoders and vectorizers know, and numbers near those that the model keeps.

    Args:
        valid: a row that the model answers, with an object's values in the order of the columns.
    """
    generator = np.random.default_rng(0)
    if signature.layout == "texts":
        return list(_strings(_vocabulary(model, 0, 1), generator)) or [valid] * 2
    if not signature.columns:
        return [valid] * 2
    width = len(signature.columns)
    numbers = _numbers_kept(model, width)
    by_column: list[list[Any]] = []
    for at, (column, facts) in enumerate(zip(signature.columns, inspect(model, width), strict=True)):
        if column.kind == "number" and len(facts.learned) < 2:  # else its values are categories
            near = np.array(numbers[at] or [-1.0, 0.0, 1.0])
            spread = near.std() or abs(near[0]) or 1.0
            away = generator.normal(size=SYNTHETIC_ROWS) * generator.integers(0, 2, SYNTHETIC_ROWS)
            by_column.append((generator.choice(near, SYNTHETIC_ROWS) + spread * away).tolist())
        elif words := _vocabulary(model, at, width):
            by_column.append(generator.permutation(_strings(words, generator)).tolist())
        else:
            known = [json_form(value) for value in facts.learned] or [valid[at]]
            by_column.append([known[pick] for pick in generator.integers(0, len(known), SYNTHETIC_ROWS)])
    return [list(row) for row in zip(*by_column, strict=True)]


def unknown_rows(model: Any, signature: Signature, valid: list[Any]) -> list[tuple[int, list[Any]]]:
    """Make rows in which one column holds a value that its encoder did not learn; return each with the column.

    Of very many columns each gets one such value before any gets a second one.
    """
    columns = signature.columns or ()
    rows: list[tuple[int, int, Any]] = []
    for at, (column, facts) in enumerate(zip(columns, inspect(model, len(columns)), strict=True)):
        known = [json_form(value) for value in facts.learned]
        rows += [(nth, at, value) for nth, value in enumerate(_unknown_values(column, known))]
    rows = sorted(rows, key=lambda row: row[0])[:MAX_UNKNOWN]
    return [(at, [*valid[:at], value, *valid[at + 1 :]]) for _, at, value in rows]


def _unknown_values(column: Column, known: list[Any]) -> Iterator[Any]:
    """Yield values like those that an encoder knows. A fraction, since some programs cut it off."""
    if not known or column.kind not in ("number", "integer", "text", "any"):
        return
    if all(isinstance(value, str) for value in known):
        near = ["unknown category", "", known[0] + " ", known[0].swapcase()]
    elif all(isinstance(value, (int, float)) for value in known):
        near = [max(known) + 1, min(known) - 1, max(known) + 0.25, min(known) - 0.25]
    else:
        return
    yield from (value for value in near if value not in known)


def _vocabulary(model: Any, at: int, width: int) -> list[str]:
    """Return the words, or other pieces, that the vectorizers of a column have learned."""
    raw = [raw for raw in raw_parts(model, range(width)) if at in raw.columns]
    return sorted({word for each in raw for word in getattr(each.part, "vocabulary_", None) or ()})


def _strings(words: list[str], generator: np.random.Generator) -> list[str]:
    """Make strings of words: alone and several, in capitals, with signs between them, accents composed and not."""
    if not words:
        return []
    forms = (str, str, str.upper, str.title, _decomposed, _composed)
    alone = [words[at] for at in generator.permutation(len(words))[: SYNTHETIC_ROWS // 4]]
    made = [*OTHER_STRINGS, *alone, *map(str.upper, alone), *map(_decomposed, alone)][:SYNTHETIC_ROWS]
    while len(made) < SYNTHETIC_ROWS:
        pieces = [words[at] for at in generator.integers(0, len(words), generator.integers(1, 8))]
        if generator.random() < 0.3:
            pieces.append(OTHER_STRINGS[generator.integers(len(OTHER_STRINGS))])
        separator = SEPARATORS[generator.integers(len(SEPARATORS))]
        made.append(forms[generator.integers(len(forms))](separator.join(pieces)))
    return made


def _decomposed(text: str) -> str:
    return unicodedata.normalize("NFD", text)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _numbers_kept(model: Any, width: int) -> list[list[float]]:
    """Collect, for each raw column, numbers of the size that the model was fitted on: means, neighbours, thresholds."""
    kept: list[list[float]] = [[] for _ in range(width)]
    for part, columns, *_ in raw_parts(model, range(width)):
        for at, values in _numbers_of(part, len(columns)):
            if (raw := columns[at]) is not None:
                kept[raw] += values[np.isfinite(values)].tolist()
    return kept


def _numbers_of(part: Any, width: int) -> Iterator[tuple[int, Any]]:
    """Yield arrays of numbers that a part keeps in the units of its input, each with the column that it belongs to."""
    names = ("data_min_", "data_max_", "_fit_X", "support_vectors_", "statistics_")
    arrays = [getattr(part, name, None) for name in names]
    centre, scale = getattr(part, "mean_", getattr(part, "center_", None)), getattr(part, "scale_", None)
    if centre is not None and scale is not None:
        arrays += [np.asarray(centre) + steps * np.asarray(scale) for steps in (-1, 0, 1)]
    for array in arrays:
        if isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape[-1:] == (width,):
            yield from enumerate(np.atleast_2d(array)[:200].T)
    tree = getattr(part, "tree_", None)
    if tree is not None:
        yield from ((at, tree.threshold[tree.feature == at]) for at in range(width))
    bins = getattr(part, "_bin_mapper", None)  # of histogram boosting: quantiles of what it was fitted on
    if bins is not None:
        yield from zip(range(width), bins.bin_thresholds_, strict=False)
