"""Prepares the console of SLS: index, dashboard, saved searches, alerts and whom they tell.

    python -m sls setup              makes what is not there, and updates what is
    python -m sls setup --dry-run    prints all of it, and sends nothing

The files in `deploy/sls/` hold what SLS takes, with `$name` where a value goes in (`$$` is a `$`), and under `every`
what several have in common. Change the files, not the console: the next setup writes it anew.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

from aliyun.log import IndexConfig
from aliyun.log.resource_params import ResourceRecord

from settings import Settings, SettingsError
from sls.check import Say, explain
from sls.client import Client
from sls.shipper import SLSError

FILES = Path(__file__).resolve().parent.parent / "deploy/sls"
KEEP_DAYS = 30  # of a new logstore
# Whom alerts tell is the account's, not a project's, and written in one region for all; see the note in
# https://registry.terraform.io/providers/aliyun/alicloud/latest/docs/resources/log_resource_record
ACCOUNT_REGION = "cn-heyuan"
SETTLING = 60.0  # seconds until SLS knows everywhere of a project or logstore that it has made
NOBODY = (
    "nobody was named whom alerts tell: set SLS_ALERT_MAIL to an address or SLS_ALERT_DINGTALK to the URL of a group's "
    "robot and run it again, or choose an action policy for each alert in the console"
)


class Recipients(NamedTuple):
    """Whom alerts tell. With the robot's URL and secret anybody could write to the group: they are never printed."""

    mail: str = ""  # an address
    dingtalk: str = ""  # the URL of a group's robot
    secret: str = ""  # SEC…, if the robot checks signatures

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Recipients":
        """Read SLS_ALERT_MAIL, SLS_ALERT_DINGTALK and SLS_ALERT_DINGTALK_SECRET: everybody sees a command line."""
        return cls(*(environ.get(f"SLS_ALERT_{name}", "") for name in ("MAIL", "DINGTALK", "DINGTALK_SECRET")))

    def __bool__(self) -> bool:
        return bool(self.mail or self.dingtalk)

    def __repr__(self) -> str:
        return "Recipients(***)"

    def hide(self, text: str) -> str:
        """Return a text without the URL and the secret, nor the beginning of a token that was cut off."""
        for secret in filter(None, (self.dingtalk, self.secret)):
            text = text.replace(secret, "***")
        return re.sub(r"access_token=[^\s\"\\&]*", "access_token=***", text)


class Thing(NamedTuple):
    """What SLS is to have. Its kind is that of the SDK's methods, and for a record the name of its resource."""

    kind: str
    name: str
    body: dict[str, Any]


def setup(
    connect: Callable[[Settings], Client],
    settings: Settings,
    recipients: Recipients,
    *,
    make_project: bool = False,
    keep_days: int | None = None,
    dry_run: bool = False,
    say: Say = print,
) -> int:
    """Make or update everything, a line each, and return the exit status. After a failure, run it again: it goes on.

    Args:
        connect: makes a client; whom alerts tell needs one of its own.
        settings: where to.
        recipients: without any, new alerts get SLS's built-in action policy, and those that are there keep theirs.
        make_project: make the project too.
        keep_days: how long SLS keeps records; None leaves a logstore as it is, and gives a new one KEEP_DAYS.
        dry_run: print everything instead, and send nothing.
        say: takes the lines.

    Raises:
        SettingsError: the region is not known.
    """
    things = list(wanted(settings, recipients, make_project, keep_days))
    if dry_run:
        for kind, name, body in things:
            say(recipients.hide(f"{kind} {name} {json.dumps(body, indent=2, ensure_ascii=False)}"))
        return 0
    writer = Writer(
        connect(settings), connect(for_account(settings)), settings.sls_project, keep_days, bool(recipients)
    )
    for thing in things:
        try:
            say(f"{thing.kind} {thing.name}: {writer.write(thing)}")
        except SLSError as error:
            say(recipients.hide(f"{thing.kind} {thing.name}: {explain(error)}"))
            say("it ends there; run it again when that is mended")
            return 1
    if not recipients:
        say(NOBODY)
    return 0


def wanted(settings: Settings, recipients: Recipients, make_project: bool, keep_days: int | None) -> Iterator[Thing]:
    """Yield what SLS is to have, each after what it needs. Raises: SettingsError."""
    project, logstore = settings.sls_project, settings.sls_logstore
    values = {"project": project, "logstore": logstore, "region": region(settings)} | recipients._asdict()
    # Unique in the account, and of at most 60 characters.
    values["policy"] = f"alerts-{project}"[:60] if recipients else "sls.builtin"
    if make_project:
        yield Thing("project", project, {"project_des": "Records of a prediction server"})
    yield Thing("logstore", logstore, {"ttl": keep_days or KEEP_DAYS, "shard_count": 2})
    yield Thing("index", logstore, _read("index"))

    file = _read("dashboard")
    dashboard = fill(file["dashboard"], values)
    for given in file["charts"]:
        chart = fill(file["every"], values | given)
        chart["display"] |= fill(file["kinds"][given["type"]], given)
        dashboard["charts"].append(chart)
    yield Thing("dashboard", dashboard["dashboardName"], dashboard)
    for search in fill(_read("savedsearches"), values):
        yield Thing("savedsearch", search["savedsearchName"], search)

    file = _read("action_policy")
    values["fire"] = "\n".join(fill(line, values) for recipient, line in file["fire"].items() if values[recipient])
    for record in file["records"]:
        if values[record["for"]]:
            value = fill(record["value"], values)
            if value.get("secret") == "":
                del value["secret"]  # SLS takes one or none
            yield Thing(record["resource"], values["policy"], {"tag": record["tag"], "value": value})
    file = _read("alerts")
    for given in file["alerts"]:
        alert = fill(file["every"], values | fill(given, values))
        yield Thing("alert", alert["name"], alert)


def fill(node: Any, values: Mapping[str, Any]) -> Any:
    """Put values in for `$name`. A text that is `$name` and no more becomes the value itself, of any type."""
    if isinstance(node, dict):
        return {key: fill(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [fill(value, values) for value in node]
    if isinstance(node, str):
        return values[node[1:]] if node[:1] == "$" and node[1:] in values else Template(node).substitute(values)
    return node


def region(settings: Settings) -> str:
    """Return the region of the project. Raises: SettingsError."""
    host = settings.sls_endpoint.rstrip("/").rpartition("/")[2]
    named = re.fullmatch(r"([a-z]+-[a-z0-9-]+?)(-intranet|-share)?\.log\.aliyuncs\.com", host)
    if not (settings.sls_region or named):
        raise SettingsError(f"SLS_ENDPOINT={settings.sls_endpoint!r} does not name a region: set SLS_REGION")
    return settings.sls_region or (named[1] if named else "")


def for_account(settings: Settings) -> Settings:
    """Return the settings that lead to what is the account's."""
    scheme = settings.sls_endpoint.rpartition("://")[0] or "https"
    endpoint = f"{scheme}://{ACCOUNT_REGION}.log.aliyuncs.com"
    return replace(settings, sls_endpoint=endpoint, sls_region=settings.sls_region and ACCOUNT_REGION)


def _read(name: str) -> Any:
    return json.loads((FILES / f"{name}.json").read_text("utf-8"))


class Writer:
    """Writes things, be they there or not."""

    def __init__(self, client: Client, account: Client, project: str, keep_days: int | None, tells: bool) -> None:
        self._client, self._account, self._project = client, account, project
        self._keep_days, self._tells = keep_days, tells
        self._settled = 0.0  # when a new project and logstore are known everywhere

    def write(self, thing: Thing) -> str:
        """Make a thing or update it, and say which. Raises: SLSError."""
        while True:
            try:
                self._create(*thing)
            except SLSError as error:
                # Of a dashboard that is there only the message says so: its code is ParameterInvalid.
                if "alreadyexist" in str(error).replace(" ", "").lower():
                    return self._update(*thing)
                if error.code not in ("ProjectNotExist", "LogStoreNotExist") or time.monotonic() >= self._settled:
                    raise
                time.sleep(1.0)
            else:
                if thing.kind in ("project", "logstore"):
                    self._settled = time.monotonic() + SETTLING
                return "written" if "." in thing.kind else "made"  # SLS does not say which for a record

    def _create(self, kind: str, name: str, body: dict[str, Any]) -> None:
        match kind:
            case "project":
                self._client.create_project(name, **body)
            case "logstore":
                self._client.create_logstore(self._project, name, **body)
            case "index":
                self._client.create_index(self._project, name, _index(body))
            case "dashboard" | "savedsearch" | "alert":
                getattr(self._client, f"create_{kind}")(self._project, body)
            case _:  # a record, which this updates if it is there
                self._account.upsert_resource_record(kind, [ResourceRecord(name, **body)])

    def _update(self, kind: str, name: str, body: dict[str, Any]) -> str:
        if kind == "project" or (kind == "logstore" and self._keep_days is None):
            return "is there"  # a shorter time than it has would delete what is older
        if kind == "logstore":
            self._client.update_logstore(self._project, name, ttl=self._keep_days)
        elif kind == "index":
            there = self._client.get_index_config(self._project, name).get_index_config()
            there.key_config_list |= _index(body).key_config_list  # keys that others added stay
            self._client.update_index(self._project, name, there)
        else:
            if kind == "alert":
                del body["state"]  # one that was switched off stays so
                if not self._tells:
                    there = self._client.get_alert(self._project, name).get_body()["configuration"]
                    body["configuration"]["policyConfiguration"] = there["policyConfiguration"]
            getattr(self._client, f"update_{kind}")(self._project, body)
        return "updated"


def _index(body: dict[str, Any]) -> Any:
    config = IndexConfig()
    config.from_json(body)
    return config
