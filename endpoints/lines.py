"""Rows and predictions a line each: CSV without a header (RFC 4180) and JSON lines.

CSV has no types, so a field becomes what the model's column takes: "3" is a number in one column and a string in
another. What could be either, what is missing, and nan and inf are rejected rather than guessed.
"""

import csv
import io
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import orjson
from werkzeug.exceptions import BadRequest, NotAcceptable

from model.columns import BadRows, Column, Kind, json_form
from model.signature import Signature
from web.decoding import BYTE_ORDER_MARK

NUMBER = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)? *", re.ASCII)  # not nan, inf, 0x1 and 1_000 as in Python
BOOLEANS = {"true": True, "false": False}
EXACT = 2**53  # up to here a float is the whole number that was written


def parse_csv(body: bytes) -> tuple[list[list[str]], list[int]]:
    """Split CSV into records of fields, and the number of the line on which each begins.

    Lines end in LF or CR LF, the last one perhaps in neither. Raises: BadRequest, with the line's number.
    """
    records: list[list[str]] = []
    lines = [1]
    # newline="\n": a CR alone ends no line, as for those who cut a file into requests; the reader rejects it.
    reader = csv.reader(io.StringIO(_text(body), newline="\n"), strict=True)
    try:
        for record in reader:
            if not record:
                raise BadRequest(f"line {lines[-1]} is empty; each line is a row")
            records.append(record)
            lines.append(reader.line_num + 1)
    except csv.Error:
        raise BadRequest(
            f"line {lines[-1]} is not CSV: a quote is not closed, or stands before something else than a comma; or a "
            f"carriage return stands alone, or a field has more than {csv.field_size_limit()} characters"
        ) from None
    if not records:
        raise BadRequest("the body is empty; send CSV without a header, a line for each row")
    return records, lines[:-1]


def _text(body: bytes) -> str:
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        line = body.count(b"\n", 0, error.start) + 1
        raise BadRequest(f"line {line} is not UTF-8") from None


def csv_rows(lines: list[int], records: list[list[str]], signature: Signature) -> list[Any]:
    """Make the rows that a model takes of what `parse_csv` returned. Raises: BadRows, with the line's number."""
    columns = _columns(signature, len(records[0]))
    if records[0] == [column.name for column in columns]:
        raise BadRows("line 1 is a header; send the rows alone")
    readers = [_reader(column) for column in columns]
    is_plain = all(column.kind == "number" and str not in column.accepted for column in columns)
    rows = []
    for at, record in enumerate(records):
        if len(record) != len(columns):
            detail = f"{len(record)} values; expected {len(columns)}"
            raise BadRows(f"line {lines[at]}: {detail}", [{"row": at, "detail": detail}])
        row = _json_numbers(record) if is_plain else None
        if row is None:
            row = []
            for index, field in enumerate(record):
                try:
                    row.append(readers[index](field))
                except ValueError as error:
                    raise _wrong_field(at, lines[at], columns[index].place(index), str(error)) from None
        rows.append(row)
    return [row[0] for row in rows] if signature.layout in ("texts", "numbers") else rows


def _json_numbers(record: list[str]) -> list[Any] | None:
    """Return the numbers in a record by one call; None if they are not all written as in JSON."""
    with suppress(orjson.JSONDecodeError):
        row: list[Any] = orjson.loads(f"[{','.join(record)}]")
        if len(row) == len(record) and set(map(type, row)) <= {int, float}:
            return row
    return None


def _wrong_field(row: int, line: int, place: str | int, detail: str) -> BadRows:
    hint = " (is this a header? Send the rows alone)" if row == 0 and detail.startswith("expected") else ""
    where = f"line {line}, column {str(place)[:80]!r}"
    return BadRows(f"{where}: {detail}{hint}", [{"row": row, "column": place, "detail": detail}])


def _columns(signature: Signature, width: int) -> Sequence[Column]:
    """Return the columns of a line; those of a model without any are all of one kind."""
    if signature.columns:
        return signature.columns
    kind: Kind = "text" if signature.layout == "texts" else signature.describe().get("type", "number")
    return [Column(None, kind)] * (1 if signature.layout in ("texts", "numbers") else width)


def _reader(column: Column) -> Callable[[str], Any]:
    """Return the function that makes a column's value of a field. It raises ValueError: what is wrong with it."""
    accepted, learned = column.accepted, set(map(json_form, column.learned))

    def read(field: str) -> Any:
        if not field:
            raise ValueError("empty; a missing value has no form in CSV, in JSON it is null")
        value = parse_number(field) if accepted & {int, float} else None
        if value is None and bool in accepted:
            value = BOOLEANS.get(field.strip(" ").lower())
        if column.kind == "integer":
            value = as_integer(value)
        if value is None and str in accepted:
            return field
        if value is None:
            raise ValueError(f"expected {column.expected}")
        if str not in accepted or (value in learned and field not in learned):
            return value
        # A category that is not known by either form, or the same by both, as CatBoost's whole numbers are.
        is_same = type(value) is int and str(value) == field
        is_category = column.kind == "category" and (value not in learned if learned else is_same)
        if is_category or (field in learned and value not in learned):
            return field
        raise ValueError("a number or a string, which CSV does not distinguish and this column does; send JSON")

    return read


def parse_number(field: str) -> int | float | None:
    """Return the number that a field holds, as JSON's decoder would; None if it holds none.

    Raises: ValueError, it is too large.
    """
    match = NUMBER.fullmatch(field)
    if match is None:
        return None
    number = float(field)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number that is too large for a 64-bit float")
    if "." not in field and match[2] is None and -(2**63) <= number <= 2**64:
        with suppress(ValueError):  # thousands of noughts in front
            return int(field)
    return number


def as_integer(value: Any) -> Any:
    """Return the whole number that a float stands for; anything else as it is, also a float that may be rounded."""
    if type(value) is list:
        return [as_integer(each) for each in value]
    return int(value) if type(value) is float and abs(value) <= EXACT and value.is_integer() else value


def parse_json_lines(body: bytes) -> list[Any]:
    """Decode JSON lines, a row each. Raises: BadRequest, with the line's number."""
    lines = body.removeprefix(BYTE_ORDER_MARK).split(b"\n")
    if not lines[-1]:
        lines.pop()
    if not lines:
        raise BadRequest("the body is empty; send a line of JSON for each row")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            wrong = "not JSON in UTF-8, or holds a number that is too large" if line.strip() else "empty"
            raise BadRequest(f"line {number} is {wrong}; each line is a row") from None
    return rows


def encode_csv(values: list[Any]) -> bytes:
    """Write a line for each JSON value, without a newline at the end: a list as several fields, null as nan.

    Raises: NotAcceptable, a value is an object.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerows(_fields(value) for value in values)
    return file.getvalue().removesuffix("\n").encode()


def _fields(value: Any) -> list[Any]:
    values = value if type(value) is list else [value]
    types = set(map(type, values))
    if types <= {int, float, str}:
        return values
    if dict in types:
        raise NotAcceptable("a prediction is an object, which has no form in CSV; ask for JSON")
    if list in types:
        return [field for each in values for field in _fields(each)]
    return ["nan" if each is None else str(each).lower() if type(each) is bool else each for each in values]


def encode_json_lines(values: list[Any]) -> bytes:
    """Write a line for each JSON value, without a newline at the end."""
    return b"\n".join(map(orjson.dumps, values))
