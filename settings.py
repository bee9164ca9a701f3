"""Every setting of the server: one environment variable each, read once at start.

    settings = Settings.load()

A field is the variable of the same name in capitals: `max_rows` is `MAX_ROWS`. A value that does not fit stops the
boot with the variable, the value and what was expected. An empty variable counts as unset.
"""

import importlib
import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

# By default, in this order.
EXTENSIONS = (
    *("operations.ownership", "telemetry", "model.versions", "sls", "speedups"),
    *("endpoints.feedback", "endpoints.docs", "endpoints.monitor_page", "development"),
    *("operations.failures", "operations.wrong_passwords", "operations.traces"),
    *("operations.readiness", "operations.upgrades", "operations.exits", "operations.workers"),
    *("operations.last_connections", "operations.freezes"),
)
ROOT = Path(__file__).resolve().parent


class SettingsError(Exception):
    """A setting that the server cannot start with. The message is for the operator."""


def usable_cores() -> int:
    """Count the cores this process may use: its CPU affinity, less what a container's quota takes away."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:  # cgroup v2: "<quota> <period>" in microseconds, or "max <period>"
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores


def _path(value: str) -> Path:
    return Path(os.path.expanduser(value))  # which leaves a user that does not exist as it is


def _number(lowest: float, highest: float, unit: str, kind: type = int) -> Callable[[str], Any]:
    def parse(value: str) -> Any:
        with suppress(ValueError):
            if lowest <= (number := kind(value)) <= highest:
                return number
        what = "a whole number" if kind is int else "a number"
        raise SettingsError(f"expected {what} of {unit} from {lowest} to {highest}")

    return parse


def _form(pattern: str, expected: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise SettingsError(f"expected {expected}")
        return value

    return parse


def _one_of(*choices: str) -> Callable[[str], str]:
    return _form("|".join(choices), " or ".join(choices))


def _switch(value: str) -> bool:
    return _form("0|1", "1 (on) or 0 (off)")(value) == "1"


def _list(value: str) -> tuple[str, ...]:
    return tuple(entry.strip() for entry in value.split(",") if entry.strip())


def _headers(value: str) -> tuple[str, ...]:
    parse = _form(r"[A-Za-z0-9-]+/?", "names of headers, separated by commas, each with or without / behind it")
    return tuple(map(parse, _list(value)))


def _extensions(value: str) -> tuple[str, ...]:
    entries = _list(value)
    if not all(part.isidentifier() for entry in entries for part in entry[entry[0] in "+-" :].split(".")):
        raise SettingsError("expected dotted module names, separated by commas, each with or without + or - before it")
    known = {*EXTENSIONS, *(entry[1:] for entry in entries if entry[0] == "+")}
    unknown = [entry for entry in entries if entry[0] == "-" and entry[1:] not in known]
    if unknown:
        raise SettingsError(f"{unknown[0]}: expected one of the default list to take away: {', '.join(EXTENSIONS)}")
    return entries


_name = _form(
    r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", "a name: 1 to 100 letters, digits, or (not at its beginning) any of . _ -"
)
_route = _form(r"(/[A-Za-z0-9._~:@-]*)+", "a path that begins with / and consists of letters, digits and - . _ ~ : @ /")


def _setting(parse: Callable[[str], Any], default: Any = MISSING, default_factory: Any = MISSING) -> Any:
    return field(default=default, default_factory=default_factory, metadata={"parse": parse})


@dataclass(frozen=True)
class Settings:
    """The server's settings. Tests make one directly or from a plain dict."""

    # Where it runs and listens; the defaults of most settings depend on the platform (platforms.py)
    platform: str = _setting(str, "")
    host: str = _setting(str, "127.0.0.1")  # basic auth in clear stays on the machine; 0.0.0.0 for all interfaces
    port: int = _setting(_number(0, 65535, "a TCP port"), 5000)
    web_concurrency: int = _setting(_number(1, 1024, "worker processes"), default_factory=usable_cores)
    worker_class: str = _setting(_one_of("gevent", "gthread"), "gevent")
    preload: bool = _setting(_switch, False)  # load before the fork: workers share what they do not write to
    reload: bool = _setting(_switch, False)  # while developing: when code or the model's file changes
    graceful_timeout: int = _setting(_number(0, 3600, "seconds"), 30)  # for requests in flight at SIGTERM
    keepalive: int = _setting(_number(0, 86_400, "seconds"), 20)  # for which an idle connection is kept
    worker_timeout: int = _setting(_number(0, 86_400, "seconds"), 30)  # for a blocked event loop; 0: for ever
    trusted_proxies: int = _setting(_number(0, 16, "proxies"), 0)  # in front, each appending X-Forwarded-For
    request_id_headers: tuple[str, ...] = _setting(_headers, ("X-Request-ID",))  # the first that has one; / cuts there
    fast_path: bool = _setting(_switch, True)  # for simple requests; 0: gunicorn reads all (speedups/fast_path.py)

    # What it consists of: + adds a module to the default list, - takes one away, names without a sign replace the list
    extensions: tuple[str, ...] = _setting(_extensions, EXTENSIONS)

    # What it serves
    model_path: Path | None = _setting(_path, None)  # one model file, without the version store
    model_sample: Path | None = _setting(_path, None)  # rows that it answers; by default NAME.sample.json beside NAME
    model_dir: Path = _setting(_path, Path("var/models"))  # the version store
    model_name: str = _setting(_name, "model")  # in the paths and answers of protocols that name the model
    extra_columns: str = _setting(_one_of("refuse", "ignore"), "refuse")  # of rows that are objects
    allow_version_mismatch: bool = _setting(_switch, False)  # serve a model made by another scikit-learn

    # Who may ask
    auth: str = _setting(_one_of("basic", "off"), "basic")  # off only where a platform authenticates the caller
    users_file: Path = _setting(_path, Path("var/users.json"))

    # How much at once
    max_rows: int = _setting(_number(1, 10_000_000, "rows"), 100_000)  # in one request
    merge_requests: str = _setting(_one_of("auto", "always", "never"), "auto")  # of several callers into one call
    max_wait: float = _setting(_number(0, 3600, "seconds", float), 1.0)  # for the model, as expected; beyond that 503
    predict_timeout: float = _setting(_number(1, 86_400, "seconds", float), 30.0)  # of a call, beyond what is expected
    max_body_bytes: int = _setting(_number(1, 2**31, "bytes"), 16 * 2**20)  # of one request
    body_timeout: float = _setting(_number(1, 3600, "seconds", float), 30.0)  # for a request's body to arrive

    # What it records
    log_format: str = _setting(_one_of("text", "json"), "text")  # log_format.py, which reads it before the others
    journal_dir: Path = _setting(_path, Path("var/journal"))
    journal_max_bytes: int = _setting(_number(2**20, 2**50, "bytes"), 10**9)  # then the oldest segments go
    certificate_file: Path | None = _setting(_path, None)  # that nginx presents; only to show when it expires

    # Whether answers carry a receipt, with which the truth can be sent later (endpoints/feedback.py)
    feedback: bool = _setting(_switch, True)
    feedback_key_file: Path = _setting(_path, Path("var/feedback.key"))  # made at the first start; hosts share it
    feedback_max_age: int = _setting(_number(1, 366 * 86_400, "seconds"), 30 * 86_400)  # of a receipt

    # Vertex AI's paths, by the names that it gives them (endpoints/vertex.py); by default the ones that it documents
    aip_health_route: str = _setting(_route, "")
    aip_predict_route: str = _setting(_route, "")

    # Where the records go (sls/); shipping is on when the first three are set
    sls_endpoint: str = _setting(str, "")  # such as cn-hangzhou.log.aliyuncs.com; without a scheme, https
    sls_project: str = _setting(str, "")
    sls_logstore: str = _setting(str, "")
    sls_region: str = _setting(str, "")  # such as cn-hangzhou; then requests are signed with version 4

    @property
    def ships(self) -> bool:
        """Whether records are shipped to SLS."""
        return bool(self.sls_endpoint and self.sls_project and self.sls_logstore)

    @classmethod
    def load(cls, log_platform: bool = False) -> "Settings":
        """Read the settings of this process: its environment, and what its platform sets below that (platforms.py).

        Raises: SettingsError, as `from_environ` does.
        """
        defaults: dict[str, str] = {}
        with suppress(ModuleNotFoundError):  # it may be taken away
            defaults, message = importlib.import_module("platforms").defaults_for(os.environ)
            if message and log_platform:
                log.info(message)
        given = {name: value for name, value in os.environ.items() if value}
        return cls.from_environ(given | defaults)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> "Settings":
        """Read the settings. Raises: SettingsError, a value does not fit, or two contradict each other."""
        values = {}
        for each in fields(cls):
            name = each.name.upper()
            if given := environ.get(name):
                try:
                    values[each.name] = each.metadata["parse"](given)
                except SettingsError as error:
                    raise SettingsError(f"{name}={given!r}: {error}") from None
        if "model_path" in values and "model_dir" in values:
            raise SettingsError(
                "MODEL_PATH and MODEL_DIR are both set: unset MODEL_DIR to serve that one file, or "
                "MODEL_PATH to serve from the version store"
            )
        if values.get("reload") and values.get("preload"):
            raise SettingsError("RELOAD=1 and PRELOAD=1: what is loaded before the fork is not reloaded; set one")
        if len(values.keys() & {"sls_endpoint", "sls_project", "sls_logstore"}) in (1, 2):
            raise SettingsError("SLS_ENDPOINT, SLS_PROJECT and SLS_LOGSTORE: expected all three, or none")
        return cls(**values)

    @classmethod
    def load_for_app(cls) -> "Settings":
        """Read the settings for `server.app`, which any server of WSGI applications may ask for.

        Ends the process if gunicorn has not read gunicorn.conf.py, or if what that checks at the start is not right.
        """
        try:
            settings = cls.load()
            if "__config__" not in sys.modules:  # gunicorn's name for its configuration file
                if os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn"):
                    raise SettingsError(
                        f"gunicorn has not read {ROOT}/gunicorn.conf.py, since it was started elsewhere (here: "
                        f"{Path.cwd()}): start it in {ROOT}, or: gunicorn -c {shlex.quote(str(ROOT))}/gunicorn.conf.py"
                    )
                settings.check_files()
        except SettingsError as error:
            print(f"cannot start: {error}", file=sys.stderr)
            sys.exit(4)  # from any other status gunicorn would start a worker again, and again
        return settings

    def extension_names(self) -> list[str]:
        """Return the modules of the extensions, in order."""
        replaced = any(entry[0] not in "+-" for entry in self.extensions)
        names = [*([] if replaced else EXTENSIONS), *(entry[entry[0] in "+-" :] for entry in self.extensions)]
        return [name for name in dict.fromkeys(names) if f"-{name}" not in self.extensions]

    def load_extensions(self) -> list[ModuleType]:
        """Import the extensions. A default one whose module was removed is left out; one that was named must be there.

        Raises: SettingsError, a module that was named does not exist, or one has no `init_app`.
        """
        found = []
        for name in self.extension_names():
            try:
                module = importlib.import_module(name)
                if not getattr(module, "__file__", None):  # only a directory: git may leave one
                    raise ModuleNotFoundError(name=name)
            except ModuleNotFoundError as error:
                if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                    raise  # a library that it needs
                if self.extensions is not EXTENSIONS and {name, f"+{name}"}.intersection(self.extensions):
                    raise SettingsError(f"EXTENSIONS: there is no module {name!r}") from None
                log.info("without the extension %s: its module is not installed", name)
                continue
            if not hasattr(module, "init_app"):
                raise SettingsError(f"EXTENSIONS: the module {name!r} has no init_app(app, service)")
            found.append(module)
        return found

    def check_files(self) -> None:
        """Check that the files exist, at the start: later, a running server goes on. Raises: SettingsError."""
        here = Path.cwd()
        where = "" if here.samefile(ROOT) else f" (relative paths begin at {here}; the server is in {ROOT})"
        if self.model_path is not None and not os.path.isfile(self.model_path):
            path = str(self.model_path)
            raise SettingsError(f"MODEL_PATH={path!r}: expected the path of a model file to read{where}")
        if self.auth == "basic" and not os.path.isfile(self.users_file):
            raise SettingsError(
                f"USERS_FILE={str(self.users_file)!r}: there is no such file that can be read{where}. So nobody "
                "could log in. Make a user with: python -m auth add NAME --role predict"
            )
