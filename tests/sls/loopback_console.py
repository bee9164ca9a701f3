"""The control plane of the loopback SLS: what it answers to the calls that prepare a project, and to queries.

The bodies are kept as they came, in `LoopbackSLS.console`; an update replaces the whole, as that of the service does.
The errors, by where they are from:

- the service's documentation: ProjectAlreadyExist (400; one older page says 404), ProjectNotExist, LogStoreNotExist,
  IndexAlreadyExist, LogStoreAlreadyExist (also spelt LogstoreAlreadyExist), and IndexConfigNotExist for an update
  since October 2025, without its status; it was InternalServerError before;
- what the vendor's SDKs for Python and Java and its Terraform provider compare with, without the status:
  JobAlreadyExist, JobNotExist, SavedSearchNotExist, DashboardNotExist, IndexConfigNotExist where an index is read, and
  ParameterInvalid with this message for a dashboard that exists;
- what users report: 400 for a query without an index, or for a key that has none;
- guessed: that a saved search that exists is answered as a dashboard is, all codes for records, and each status that
  is not named above (400 for what exists, 404 for what does not).
"""

import json
import re
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from loopback_sls import LoopbackSLS

NO_INDEX = 404, "IndexConfigNotExist", "The index configuration does not exist for this logstore."
Operation = tuple[str, str, Callable[..., Any]]  # method, pattern of the path, what it does


class Refused(Exception):
    """The service refuses the request: `status`, `code`, `message`."""


def require(condition: object, status: int, code: str, message: str) -> None:
    if not condition:
        raise Refused(status, code, message)


def loads(text: str | bytes, complaint: str) -> dict[str, Any]:
    """Return a JSON object. Raises: Refused."""
    try:
        found = json.loads(text)
    except (TypeError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise Refused(400, "PostBodyInvalid", complaint)
    return found


class Request(NamedTuple):
    """A request as it is signed: decoded path and query, header names in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def json(self) -> dict[str, Any]:
        """Return the body. Raises: Refused."""
        return loads(self.body, "The request body is not valid JSON object.")


class Kind(NamedTuple):
    """What a project can hold: the key that names it in a body, the refusal when it is there, and when it is not."""

    name: str
    named_by: str
    there: tuple[int, str, str]
    not_there: tuple[int, str, str]


PROJECT = Kind(
    "project",
    "projectName",
    (400, "ProjectAlreadyExist", "Project {} already exist."),
    (404, "ProjectNotExist", "The Project does not exist : {}"),
)
LOGSTORE = Kind(
    "logstore",
    "logstoreName",
    (400, "LogStoreAlreadyExist", "logstore {} already exists"),
    (404, "LogStoreNotExist", "logstore {} does not exist"),
)
ENTITIES = {
    "logstores": LOGSTORE,
    "dashboards": Kind(
        "dashboard",
        "dashboardName",
        (400, "ParameterInvalid", "specified dashboard already exists"),
        (404, "DashboardNotExist", "specified dashboard does not exist"),
    ),
    "savedsearches": Kind(
        "savedsearch",
        "savedsearchName",
        (400, "ParameterInvalid", "specified savedsearch already exists"),
        (404, "SavedSearchNotExist", "specified savedsearch does not exist"),
    ),
    "jobs": Kind(  # an alert is one of them
        "job",
        "name",
        (400, "JobAlreadyExist", "Job {} already exists"),
        (404, "JobNotExist", "Job {} does not exist"),
    ),
}
RECORD = Kind(
    "record",
    "id",
    (400, "ResourceRecordAlreadyExist", "record {} already exists"),
    (404, "ResourceRecordNotExist", "record {} does not exist"),
)


def operations(sls: "LoopbackSLS") -> list[Operation]:
    """Return what is done for a method and a path; the path's groups follow the request."""
    index, records = "/logstores/([^/]+)/index", "/resources/([^/]+)/records"
    found: list[Operation] = [
        ("POST", "/", partial(create, sls, PROJECT)),
        ("GET", "/", partial(get_project, sls)),
        ("POST", index, partial(create_index, sls)),
        ("PUT", index, partial(update_index, sls)),
        ("GET", index, partial(get_index, sls)),
        ("POST", "/logstores/([^/]+)/logs", partial(get_logs, sls)),
        ("POST", records, partial(create_record, sls)),
        ("PUT", records, partial(upsert_records, sls)),
        ("GET", records, partial(list_records, sls)),
        ("PUT", f"{records}/([^/]+)", partial(update_record, sls)),
        ("GET", f"{records}/([^/]+)", partial(get_record, sls)),
    ]
    for collection, kind in ENTITIES.items():
        found.append(("POST", f"/{collection}", partial(create, sls, kind)))
        found.append(("PUT", f"/{collection}/([^/]+)", partial(update, sls, kind)))
        found.append(("GET", f"/{collection}/([^/]+)", partial(get, sls, kind)))
    return found


def add(sls: "LoopbackSLS", kind: Kind, name: str, body: Any) -> None:
    """Keep a body under a name that is not taken, also when two ask at once. Raises: Refused."""
    status, code, message = kind.there
    require(sls.console.setdefault((kind.name, name), body) is body, status, code, message.format(name))


def held(sls: "LoopbackSLS", kind: Kind, name: str) -> Any:
    """Return what is kept under a name. Raises: Refused."""
    status, code, message = kind.not_there
    require((kind.name, name) in sls.console, status, code, message.format(name))
    return sls.console[kind.name, name]


def create(sls: "LoopbackSLS", kind: Kind, request: Request) -> None:
    body = request.json()
    name = str(body.get(kind.named_by) or "")
    require(name, 400, "PostBodyInvalid", f"{kind.named_by} is missing.")
    only = {"project": sls.project, "logstore": sls.logstore}.get(kind.name, name)
    require(name == only, 400, "NotOnLoopback", f"the stand-in has no other {kind.name} than {only}")
    add(sls, kind, name, body)


def update(sls: "LoopbackSLS", kind: Kind, request: Request, name: str) -> None:
    held(sls, kind, name)
    body = request.json()
    require(body.get(kind.named_by) == name, 400, "ParameterInvalid", f"{kind.named_by} is not {name}.")
    sls.console[kind.name, name] = body


def get(sls: "LoopbackSLS", kind: Kind, request: Request, name: str) -> Any:
    return held(sls, kind, name)


def get_project(sls: "LoopbackSLS", request: Request) -> dict[str, Any]:
    always = {"status": "Normal", "region": sls.region, "owner": "1", "createTime": "", "lastModifyTime": ""}
    project: dict[str, Any] = held(sls, PROJECT, sls.project)
    return always | project


def create_index(sls: "LoopbackSLS", request: Request, logstore: str) -> None:
    held(sls, LOGSTORE, logstore)
    there = 400, "IndexAlreadyExist", "Logstore index is already created."
    add(sls, Kind("index", "", there, NO_INDEX), logstore, request.json())


def update_index(sls: "LoopbackSLS", request: Request, logstore: str) -> None:
    get_index(sls, request, logstore)
    sls.console["index", logstore] = request.json()


def get_index(sls: "LoopbackSLS", request: Request, logstore: str) -> Any:
    held(sls, LOGSTORE, logstore)
    require(("index", logstore) in sls.console, *NO_INDEX)
    return sls.console["index", logstore]


def get_logs(sls: "LoopbackSLS", request: Request, logstore: str) -> dict[str, Any]:
    """Return the logs of [from, to) that hold what a query such as `key: value and other: "value"` names.

    An index is in force at once and for all logs: that of the service needs a minute, and only finds what comes later.
    """
    held(sls, LOGSTORE, logstore)
    require(("index", logstore) in sls.console, 400, "IndexConfigNotExist", "logstore without index config")
    indexed = {"__topic__", "__source__", *sls.console["index", logstore].get("keys", {})}
    asked = request.json()
    require(asked["from"] < asked["to"], 400, "InvalidTimeRange", "request time range is invalid")
    require(1 <= asked.get("line", 100) <= 100, 400, "InvalidLine", "line is invalid")
    expected = terms(asked.get("query", "*"))
    for key in expected:
        require(key in indexed, 400, "ParameterInvalid", f"key ({key}) is not config as key value config")
    found = [
        {key: str(value) for key, value in log.items()}
        for log in sorted(sls.logs, key=lambda log: log["__time__"], reverse=asked.get("reverse", False))
        if asked["from"] <= log["__time__"] < asked["to"] and expected.items() <= log.items()
    ]
    page = found[asked.get("offset", 0) :][: asked.get("line", 100)]
    return {"meta": {"progress": "Complete", "count": len(page)}, "data": page}


def terms(query: str) -> dict[str, str]:
    """Return the keys and values that a query asks for. Raises: Refused."""
    if query.strip() in ("", "*"):
        return {}
    expected = {}
    for term in re.split(r"\s+and\s+", query.strip(), flags=re.IGNORECASE):
        match = re.fullmatch(r'([\w.]+)\s*:\s*(?:"([^"|]*)"|([^\s":|]+))', term)
        require(match, 400, "NotOnLoopback", f"the stand-in does not understand the query {query}")
        assert match is not None
        expected[match[1]] = match[2] or match[3] or ""
    return expected


def create_record(sls: "LoopbackSLS", request: Request, resource: str) -> dict[str, str]:
    record = checked(request.json(), resource)
    add(sls, RECORD, f"{resource}/{record['id']}", record)
    return {"id": record["id"]}


def update_record(sls: "LoopbackSLS", request: Request, resource: str, record_id: str) -> None:
    held(sls, RECORD, f"{resource}/{record_id}")
    sls.console["record", f"{resource}/{record_id}"] = checked(request.json() | {"id": record_id}, resource)


def upsert_records(sls: "LoopbackSLS", request: Request, resource: str) -> None:
    records = [checked(record, resource) for record in request.json().get("records", [])]
    require(1 <= len(records) <= 200, 400, "PostBodyInvalid", f"{len(records)} records are not 1 to 200.")
    for record in records:
        sls.console["record", f"{resource}/{record['id']}"] = record


def get_record(sls: "LoopbackSLS", request: Request, resource: str, record_id: str) -> Any:
    return held(sls, RECORD, f"{resource}/{record_id}")


def list_records(sls: "LoopbackSLS", request: Request, resource: str) -> dict[str, Any]:
    query = request.query
    found = [
        record
        for (kind, name), record in list(sls.console.items())
        if kind == "record"
        and name.startswith(f"{resource}/")
        and record["id"] in query.get("ids", record["id"]).split(",")
        and record.get("tag") == query.get("tag", record.get("tag"))
    ]
    page = found[int(query["offset"]) :][: int(query["size"])]
    return {"count": len(page), "total": len(found), "items": page}


def checked(record: dict[str, Any], resource: str) -> dict[str, Any]:
    """Return a record, with an id if it came without. Its value is JSON in a string. Raises: Refused."""
    # Only the service's own resources are there from the start; the stand-in can create no other.
    require(resource.startswith("sls."), 404, "ResourceNotExist", f"resource {resource} does not exist")
    loads(record.get("value", ""), "value is no JSON object in a string.")
    return {"id": uuid.uuid4().hex} | record
