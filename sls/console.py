"""Sets the console of SLS up: index, dashboard, saved searches, alerts and their recipients.

The files in `deploy/sls/` hold what SLS takes, with `$name` in place of a value (`$$` is a `$`), and under `every` what
several resources have in common; `expressions.json` holds the SQL that several queries share, and `zh.json` the Chinese
of each text. Change the files, not the console: the next setup overwrites it.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import click
from aliyun.log import IndexConfig
from aliyun.log.resource_params import ResourceRecord

from settings import Settings, SettingsError
from sls.client import Client
from sls.shipper import SLSError

FILES = Path(__file__).resolve().parent.parent / "deploy/sls"
KEEP_DAYS = 30  # of a new logstore
# Alert recipients belong to the account, not to a project, and are written in one region for all; see the note in
# https://registry.terraform.io/providers/aliyun/alicloud/latest/docs/resources/log_resource_record
ACCOUNT_REGION = "cn-heyuan"
SETTLING = 60.0  # seconds until all of SLS knows a new project or logstore
NO_RECIPIENTS = (
    "no alert recipients: set SLS_ALERT_MAIL to an address or SLS_ALERT_DINGTALK to the URL of a group's robot and run "
    "it again, or choose an action policy for each alert in the console"
)


@dataclass(frozen=True)
class Recipients:
    """Alert recipients. With the robot's URL and secret anyone could write to the group: they are never printed."""

    mail: str = ""  # an address
    dingtalk: str = field(default="", repr=False)  # the URL of a group's robot
    secret: str = field(default="", repr=False)  # SEC…, if the robot checks signatures

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Recipients":
        """Read SLS_ALERT_MAIL, SLS_ALERT_DINGTALK and …_SECRET: all users of the host could see them as options."""
        return cls(*(environ.get(f"SLS_ALERT_{name}", "") for name in ("MAIL", "DINGTALK", "DINGTALK_SECRET")))

    def __bool__(self) -> bool:
        return bool(self.mail or self.dingtalk)

    def redact(self, message: str) -> str:
        """Return a message without the URL and the secret, and without the beginning of a token that was cut off."""
        for secret in filter(None, (self.dingtalk, self.secret)):
            message = message.replace(secret, "***")
        return re.sub(r"access_token=[^\s\"\\&]*", "access_token=***", message)


class Resource(NamedTuple):
    """Something that SLS is to have. Its kind is the name in the SDK's methods, for a record that of its collection."""

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
    language: str = "en",
    dry_run: bool = False,
) -> int:
    """Create or update each resource and print a line for it; return the exit status. After a failure, run it again.

    Args:
        connect: makes a client; alert recipients need one of their own.
        settings: the project and the logstore.
        recipients: without any, new alerts get SLS's built-in action policy, and existing ones keep theirs.
        make_project: create the project too.
        keep_days: how long SLS keeps records; None means KEEP_DAYS for a new logstore, and no change of another.
        language: of titles and descriptions, "en" or "zh". Names and queries are the same in both.
        dry_run: print everything instead, and send nothing.

    Raises: SettingsError, the region is not known.
    """
    resources = list(desired(settings, recipients, make_project, keep_days, language))
    if dry_run:
        for kind, name, body in resources:
            click.echo(recipients.redact(f"{kind} {name} {json.dumps(body, indent=2, ensure_ascii=False)}"))
        return 0
    writer = Writer(connect(settings), connect(for_account(settings)), keep_days, bool(recipients))
    for resource in resources:
        try:
            click.echo(f"{resource.kind} {resource.name}: {writer.write(resource)}")
        except SLSError as error:
            click.echo(recipients.redact(f"{resource.kind} {resource.name}: {error.explain()}"))
            click.echo("setup stopped; run it again when that is fixed")
            return 1
    if not recipients:
        click.echo(NO_RECIPIENTS)
    return 0


def desired(
    settings: Settings, recipients: Recipients, make_project: bool, keep_days: int | None, language: str = "en"
) -> Iterator[Resource]:
    """Yield the resources that SLS is to have, each after those that it needs. Raises: SettingsError."""
    words = {} if language == "en" else _read(language, {})
    project, logstore = settings.sls_project, settings.sls_logstore
    values = {"project": project, "logstore": logstore, "region": region(settings)} | vars(recipients)
    values |= _read("expressions", {})
    # Unique in the account, and of at most 60 characters.
    values["policy"] = f"alerts-{project}"[:60] if recipients else "sls.builtin"
    if make_project:
        yield Resource("project", project, _translate({"project_des": "Records of a prediction server"}, words))
    yield Resource("logstore", logstore, {"ttl": keep_days or KEEP_DAYS, "shard_count": 2})
    yield Resource("index", logstore, _read("index", {}))

    file = _read("dashboard", words)
    dashboard = fill(file["dashboard"], values)
    for given in file["charts"]:
        chart = fill(file["every"], values | file["usual"] | fill(given, values))
        chart["display"] |= fill(file["kinds"][given["type"]], given)
        dashboard["charts"].append(chart)
    yield Resource("dashboard", dashboard["dashboardName"], dashboard)
    for search in fill(_read("savedsearches", words), values):
        yield Resource("savedsearch", search["savedsearchName"], search)

    file = _read("action_policy", words)
    values["fire"] = "\n".join(fill(line, values) for recipient, line in file["fire"].items() if values[recipient])
    for record in file["records"]:
        if values[record["for"]]:
            value = fill(record["value"], values)
            if value.get("secret") == "":
                del value["secret"]  # SLS takes one or none
            yield Resource(record["resource"], values["policy"], {"tag": record["tag"], "value": value})
    yield from _alerts(_read("alerts", words), values)


def _alerts(file: dict[str, Any], values: Mapping[str, Any]) -> Iterator[Resource]:
    for given in file["alerts"]:
        alert = fill(file["every"], values | file["usual"] | fill(given, values))
        if joined := given.get("joined"):  # another query, of another time: a query of an alert spans a day at most
            configuration = alert["configuration"]
            configuration["queryList"].append(configuration["queryList"][0] | fill(joined, values))
            configuration["joinConfigurations"] = [{"type": "cross_join", "condition": ""}]
        yield Resource("alert", alert["name"], alert)


def fill(node: Any, values: Mapping[str, Any]) -> Any:
    """Replace each `$name` by its value. A string that is only `$name` becomes the value itself, of any type."""
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
    """Return the settings for what belongs to the account."""
    scheme = settings.sls_endpoint.rpartition("://")[0] or "https"
    endpoint = f"{scheme}://{ACCOUNT_REGION}.log.aliyuncs.com"
    return replace(settings, sls_endpoint=endpoint, sls_region=settings.sls_region and ACCOUNT_REGION)


def _read(name: str, words: Mapping[str, str]) -> Any:
    """Read a file, each text in it replaced by what `words` has for it."""
    return json.loads((FILES / f"{name}.json").read_text("utf-8"), object_hook=partial(_translate, words=words))


def _translate(body: dict[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    return {key: words.get(value, value) if isinstance(value, str) else value for key, value in body.items()}


@dataclass
class Writer:
    """Writes resources, whether they exist or not."""

    client: Client
    account: Client  # for what belongs to the account
    keep_days: int | None
    has_recipients: bool
    settled: float = 0.0  # when all of SLS knows a new project and logstore, in seconds of the monotonic clock

    def write(self, resource: Resource) -> str:
        """Create a resource or update it; return which. Raises: SLSError."""
        while True:
            try:
                self._create(*resource)
            except SLSError as error:
                # Only the message says that a dashboard exists: its code is ParameterInvalid.
                if "alreadyexist" in str(error).replace(" ", "").lower():
                    return self._update(*resource)
                if error.code not in ("ProjectNotExist", "LogStoreNotExist") or time.monotonic() >= self.settled:
                    raise
                time.sleep(1.0)
            else:
                if resource.kind in ("project", "logstore"):
                    self.settled = time.monotonic() + SETTLING
                return "written" if "." in resource.kind else "created"  # for a record, SLS does not say which

    def _create(self, kind: str, name: str, body: dict[str, Any]) -> None:
        match kind:
            case "project":
                self.client.create_project(name, **body)
            case "logstore":
                self.client.create_logstore(self.client.project, name, **body)
            case "index":
                self.client.create_index(self.client.project, name, _index(body))
            case "dashboard" | "savedsearch" | "alert":
                getattr(self.client, f"create_{kind}")(self.client.project, body)
            case _:  # a record, which this updates if it exists
                self.account.upsert_resource_record(kind, [ResourceRecord(name, **body)])

    def _update(self, kind: str, name: str, body: dict[str, Any]) -> str:
        if kind == "project" or (kind == "logstore" and self.keep_days is None):
            return "exists"  # a shorter time than it has would delete older records
        if kind == "logstore":
            self.client.update_logstore(self.client.project, name, ttl=self.keep_days)
        elif kind == "index":
            existing = self.client.get_index_config(self.client.project, name).get_index_config()
            existing.key_config_list |= _index(body).key_config_list  # keys that others added stay
            self.client.update_index(self.client.project, name, existing)
        else:
            if kind == "alert":
                del body["state"]  # an alert that was switched off stays off
                if not self.has_recipients:
                    existing = self.client.get_alert(self.client.project, name).get_body()["configuration"]
                    body["configuration"]["policyConfiguration"] = existing["policyConfiguration"]
            getattr(self.client, f"update_{kind}")(self.client.project, body)
        return "updated"


def _index(body: dict[str, Any]) -> Any:
    config = IndexConfig()
    config.from_json(body)
    return config
