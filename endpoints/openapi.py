"""The description of this server as OpenAPI 3.1, made from the model that is served; docs.py answers with it.

An endpoint describes itself by a hook, which needs nothing of this module, and which nobody calls where docs.py is off:

    app.extensions.setdefault("on_openapi", []).append(describe)

    def describe(api):
        api.add("GET", "/metrics", "The metrics of all workers", role="metrics", answer={"text/plain": {}})

Source: https://spec.openapis.org/oas/v3.1.1.html, whose schemas are JSON Schema's, draft 2020-12.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from model.answers import ModelFailed
from model.columns import FORMS, ISO_DATE, BadRows, Column, json_form, rows_as_lists
from model.loaded import LoadedModel, RowsRefused
from model.signature import Signature
from web.decoding import NPY

if TYPE_CHECKING:
    from server import Service

Schema = dict[str, Any]

JSON_TYPES = {"number": float, "integer": int, "string": str, "boolean": bool, "null": type(None)}
VARIABLE = re.compile(r"<(?:\w+:)?(\w+)>")  # in a path, as Flask writes it
MAX_CATEGORIES = 100  # listed for a column, as in GET /model
UNKNOWN = "not one of the categories"
ERRORS = {  # as in docs/api.md; 404 and 406 are of protocols, docs/protocols.md
    400: "The body is empty, not what its Content-Type says, not UTF-8, or breaks off.",
    401: "No valid password.",
    403: "The role is missing.",
    404: "There is no such model, or version.",
    405: "Another method; `Allow` names the ones that this path has.",
    406: "There is no form of the answer that `Accept` takes.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "Another `Content-Type`, or a compressed body.",
    422: "JSON, but not rows that fit the model; `errors` names the places. Or rows that the model itself rejects.",
    429: "Too many wrong passwords from your address.",
    500: "The server or the model failed; the log has the reason under the same `request_id`.",
    503: "No model is loaded yet, or too much waits for it.",
}
OF_ROLES, OF_BODIES, OF_PREDICTIONS = (401, 403, 429), (400, 408, 413, 415, 422), (500, 503)
PLACE = {"row": {"type": "integer"}, "column": {"type": ["string", "integer"]}, "detail": {"type": "string"}}
PROBLEM = {
    "type": "object",
    "description": "problem+json, RFC 9457",
    "required": ["status", "title", "detail", "request_id"],
    "properties": {
        **{"status": {"type": "integer"}, "title": {"type": "string"}, "detail": {"type": "string"}},
        "request_id": {"type": "string"},
        "trace_id": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object", "required": ["detail"], "properties": PLACE}},
    },
}


class Api:
    """The document while it is made, of a model."""

    def __init__(self, service: "Service", model: LoadedModel) -> None:
        """Begin with what the endpoints share: `#/components/schemas/Rows`, `Prediction` and `Problem`."""
        self.model, self._has_users = model, service.users is not None
        self._paths: dict[str, dict[str, Any]] = {}
        rows = rows_schema(model.signature, closed_columns(model)) | {"maxItems": service.settings.max_rows}
        lists = {"prediction": {"type": "array"}, "classes": {"type": "array"}}
        prediction = {"type": "object", "required": ["prediction"], "properties": lists}
        self._schemas = {"Rows": rows, "Prediction": prediction, "Problem": PROBLEM}
        # For endpoints to use: an answer, and a body, whose method is in the query, ?method=predict_proba.
        self.json_object: Schema = {"application/json": {"schema": {"type": "object"}}}
        columns = model.signature.columns or ()
        takes_arrays = model.signature.layout != "texts" and all(c.accepted & {int, float} for c in columns)
        self.arrays: Schema = {NPY: {"schema": {}}} if takes_arrays else {}

    def add(
        self,
        method: str,
        path: str,
        summary: str,
        *,
        description: str = "",
        role: str = "",
        body: Schema | None = None,
        answer: Schema | None = None,
        statuses: Sequence[int] = (),
        problem: Schema | None = None,
        **values: str,
    ) -> None:
        """Describe what a method at a path does; a path may have variables, written as Flask writes them.

        Args:
            summary, description: for people.
            role: that a user needs; "" if it is open.
            body, answer: media type → its schema; of a body that is JSON also its `example` or `examples`.
            statuses: of errors, besides those that each body and role have.
            problem: media type → the schema of its errors, if they are no problem+json.
            values: of the variables in the path, examples that work; by default 1.
        """
        found = {405, *statuses, *(OF_BODIES if body else ()), *(OF_ROLES if role and self._has_users else ())}
        responses: Schema = {"200": {"description": "OK"} | ({"content": answer} if answer else {})}
        for status in sorted(found):
            ours = {"$ref": f"#/components/responses/{status}"}
            responses[str(status)] = {"description": ERRORS[status], "content": problem} if problem else ours
        operation: Schema = {"summary": summary, "x-role": role, "responses": responses}
        if description:
            operation["description"] = description
        operation["operationId"] = re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_")
        operation["security"] = [{"basic": []}] if role and self._has_users else []
        if body:
            operation["requestBody"] = {"required": True, "content": body}
        if names := VARIABLE.findall(path):
            known = {"in": "path", "required": True, "schema": {"type": "string"}}
            operation["parameters"] = [{"name": name, "example": values.get(name, "1")} | known for name in names]
        written = VARIABLE.sub(r"{\1}", path)
        self._paths.setdefault(written, {})[method.lower()] = operation

    def add_prediction(
        self, path: str, summary: str, description: str = "", *, statuses: Sequence[int] = (), **more: Any
    ) -> None:
        """Describe a POST that predicts, as `add` does; by default it answers as POST /predict."""
        more = {"answer": {"application/json": {"schema": ref("Prediction")}}, "description": description} | more
        self.add("POST", path, summary, role="predict", statuses=[*OF_PREDICTIONS, *statuses], **more)

    def document(self) -> Schema:
        """Return the document."""
        about = self.model.about
        info = {"title": "Prediction server", "version": self.model.version}
        info["description"] = f"Predictions of version {self.model.version}: {about['estimator']}, {about['file']}"
        error = {"application/problem+json": {"schema": ref("Problem")}}
        responses = {str(status): {"description": why, "content": error} for status, why in ERRORS.items()}
        components: Schema = {"schemas": self._schemas, "responses": responses}
        if self._has_users:
            components["securitySchemes"] = {"basic": {"type": "http", "scheme": "basic"}}
        return {"openapi": "3.1.1", "info": info, "paths": self._paths, "components": components}

    def body(self, key: str = "data") -> Schema:
        """Return the body of POST /predict, or one that has its rows under another key."""
        options: Schema = {"method": {"enum": list(self.model.methods), "default": "predict"}}
        if key != "data":
            options = {"parameters": {"type": ["object", "null"], "properties": options, "additionalProperties": False}}
        schema: Schema = {"type": "object", "required": [key], "properties": {key: ref("Rows")} | options}
        schema["additionalProperties"] = False
        if key == "data":
            schema = {"anyOf": [schema, ref("Rows")]}
        examples = {name: {"value": {key: rows}} for name, rows in _examples(self.model).items()}
        return {"application/json": {"schema": schema, "examples": examples}}


def ref(name: str) -> Schema:
    """Return a reference to one of the document's schemas."""
    return {"$ref": f"#/components/schemas/{name}"}


# --- rows


def rows_schema(signature: Signature, closed: frozenset[int] = frozenset()) -> Schema:
    """Return the schema of a list of rows: what `Signature.validate` accepts, and of `closed` columns the categories.

    Not said in it: rows of which a size is open all have the same one; and which dates there are.
    """
    if signature.layout == "texts":
        return _array({"type": "string"})
    number = _value_schema({int, float}, signature.precision)
    if signature.layout == "numbers":
        return _array(number)
    if (shape := signature.describe().get("shape")) is not None:
        kind = signature.describe()["type"]
        item = _value_schema({bool} if kind == "boolean" else FORMS[kind].accepted, signature.precision)
        for size in reversed(shape):
            item = _array(item, size)
        return _array(item)
    if signature.columns is None:
        return _array(_array(number))
    columns = [_column_schema(c, signature, at in closed) for at, c in enumerate(signature.columns)]
    names = [column.name for column in signature.columns]
    if len({repr(column) for column in columns}) == 1 and None in names:
        return _array(_array(columns[0], len(columns)))
    titled = [schema | ({"title": name} if name else {}) for schema, name in zip(columns, names, strict=True)]
    fixed = {"minItems": len(columns), "maxItems": len(columns)}
    lists = _array({"type": "array", "prefixItems": titled} | fixed)
    if None in names:
        return lists
    row: Schema = {"type": "object", "properties": dict(zip(names, columns, strict=True))}
    row["required"] = [column.name for column in signature.columns if not column.optional]
    row["additionalProperties"] = signature.ignores_extra
    return {"anyOf": [lists, _array(row)]}


def _array(items: Schema, size: int | None = None) -> Schema:
    bounds = {"minItems": 1} if size is None else {"minItems": size, "maxItems": size}
    return {"type": "array", "items": items} | bounds


def _column_schema(column: Column, signature: Signature, is_closed: bool) -> Schema:
    """Return the schema of a column's values."""
    schema = _value_schema(column.accepted, signature.precision if signature.is_one_array else column.dtype)
    nothing = [None] if column.nullable else []
    if column.kind == "boolean":
        schema["enum"] = [True, False, 1, 0, *nothing]
    if column.kind == "date":
        schema["pattern"] = f"^{ISO_DATE.pattern}$"
    if column.kind in ("date", "integer"):
        schema["description"] = column.expected
    known = categories(column)
    if known and is_closed and len(known) == len(column.learned):
        schema["enum"] = [*known, *nothing]
    elif known:
        schema["examples"] = known
    return schema


def categories(column: Column) -> list[Any]:
    """Return categories that the model knows in a column, as JSON values; not those of dates, which have many forms."""
    return [json_form(value) for value in column.learned[:MAX_CATEGORIES] if column.kind not in ("boolean", "date")]


def _value_schema(accepted: set[type], dtype: str) -> Schema:
    """Return the schema of values of some types that become a dtype of numpy, or of pandas."""
    kinds = accepted - ({int} if float in accepted else set())  # "number" has the whole ones
    types = [name for name, kind in JSON_TYPES.items() if kind in kinds]
    schema: Schema = {"type": types[0] if len(types) == 1 else types}
    if re.fullmatch("u?int[0-9]+", dtype) and "integer" in types:
        schema |= {"minimum": int(np.iinfo(dtype).min), "maximum": int(np.iinfo(dtype).max)}
    elif dtype in ("float32", "float16"):
        schema |= {"minimum": float(np.finfo(dtype).min), "maximum": float(np.finfo(dtype).max)}
    return schema


# --- what only the model itself can say


def _examples(model: LoadedModel) -> dict[str, list[Any]]:
    """Return rows that the model answers, by the form in which they are written; the first is the easiest to read."""
    rows: list[Any] = model.about["example"]["data"]
    columns = model.signature.columns or ()
    names = [column.name for column in columns]
    if not columns or None in names:
        return {"rows": rows}
    lists = rows_as_lists(rows, columns)
    return {"objects": [dict(zip(names, row, strict=True)) for row in lists], "lists": lists}


def closed_columns(model: LoadedModel) -> frozenset[int]:
    """Return the columns of which the model takes no other categories than it knows: by trying one, in its example."""
    columns = model.signature.columns or ()
    (example,) = rows_as_lists(model.about["example"]["data"], columns)
    others = {at: _unknown(c) for at, c in enumerate(columns) if categories(c) and c.dtype != "category"}

    def rejects(changes: dict[int, Any]) -> bool:
        row = [changes.get(at, value) for at, value in enumerate(example)]
        try:
            model.predict(model.signature.validate([row]))
        except (BadRows, ModelFailed, RowsRefused):
            return True
        return False

    if not others or not rejects(others):
        return frozenset()
    return frozenset(at for at, value in others.items() if rejects({at: value}))


def _unknown(column: Column) -> Any:
    """Return a category that the model has not learned, of a type that it takes."""
    if str in column.accepted:
        return UNKNOWN
    return max(json_form(value) for value in column.learned) + 1
