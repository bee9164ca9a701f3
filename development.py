"""What helps to try the server and to work on it: a command to paste at the start, and RELOAD=1.

An extension (EXTENSIONS in settings.py). With RELOAD=1 a worker whose code changes is replaced (gunicorn does that, see
gunicorn.conf.py), and a MODEL_PATH whose file changes is loaded and swapped in.
"""

import json
import locale
import logging
import netrc
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
from werkzeug.security import check_password_hash

from auth import UsersFileError, read_users
from model.batching import call_directly
from model.serving import Routes, Serving, SingleFile, Update

if TYPE_CHECKING:
    from flask import Flask

    from server import Service
    from settings import Settings

log = logging.getLogger(__name__)

MAX_EXAMPLE = 1500  # characters of a body that is part of the command
FETCH = 'import json, sys; print(json.dumps(json.load(sys.stdin)["stable"]["example"]))'


def init_app(app: "Flask", service: "Service") -> None:
    """With RELOAD=1, follow the file that MODEL_PATH names."""
    settings = service.settings
    if settings.reload and settings.model_path is not None:
        service.serving.source = WatchedFile(settings.model_path, settings.model_sample)


# --- a command to paste


def worker_starts(worker: Any) -> None:
    """Let gunicorn's first worker log how to call the server, and where its page is, once its model is there.

    Only a worker knows an example of a row. One that comes later, after a reload or a death, is not the first.
    """
    service, is_logged = worker.wsgi.extensions["service"], False

    def log_command(state: dict[str, Any]) -> None:
        nonlocal is_logged
        if state["ready"] and not is_logged:
            is_logged = True
            address, is_tls = worker.sockets[0].getsockname(), worker.cfg.is_ssl
            has_page = "endpoints.docs" in service.settings.extension_names() and isinstance(address, tuple)
            page = f"\nor, in a browser, {_url(address, is_tls)[1]}/docs\n" if has_page else ""
            log.info("serving; try\n\n  %s\n%s", command(service, address, is_tls, state["stable"]["example"]), page)

    if worker.age == 1:
        service.serving.on_update.append(log_command)


def command(service: "Service", address: Any, is_tls: bool, example: dict[str, Any]) -> str:
    """Return a command for a POSIX shell that sends an example to /predict.

    Args:
        address: that the server listens at: host and port, or the path of a socket.
        example: the body, as GET /model shows it. A long one is fetched from there into a file.
    """
    words = ["curl"]
    if is_tls:
        words.append("-k")  # a certificate is for another name than the loopback's
    host, url = _url(address, is_tls)
    if not isinstance(address, tuple):
        words += ["--unix-socket", os.fsdecode(address)]
    settings = service.settings
    if settings.auth == "basic":
        file = fitting_netrc(settings.users_file, host, service.run_in_thread)
        words += ["--netrc-file", str(file)] if file else ["-u", "NAME"]
    body = json.dumps(orjson.loads(orjson.dumps(example)), ensure_ascii=False)  # NaN is null in the server's JSON
    fetch = ""
    if len(body) <= MAX_EXAMPLE:
        body = _printable(body)
    else:
        body = "@example.json"
        fetch = f"{shlex.join([*words, f'{url}/model'])} | python3 -c {shlex.quote(FETCH)} > example.json && \\\n  "
    post = ["-H", "Content-Type: application/json", "-d", body, f"{url}/predict"]
    return fetch + shlex.join([*words, *post])


def _url(address: Any, is_tls: bool) -> tuple[str, str]:
    """Return the host of an address, as this machine reaches it, and a URL without a path."""
    scheme = "https" if is_tls else "http"
    if not isinstance(address, tuple):
        return "localhost", f"{scheme}://localhost"
    host = "127.0.0.1" if address[0] in ("0.0.0.0", "::") else address[0]
    return host, f"{scheme}://{f'[{host}]' if ':' in host else host}:{address[1]}"


def _printable(text: str) -> str:
    """Return JSON with what a terminal may not show, or not pass on, written as escapes."""
    only_ascii = locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8")
    return "".join(
        char if char.isprintable() and (char.isascii() or not only_ascii) else json.dumps(char)[1:-1] for char in text
    )


def fitting_netrc(users_file: Path, host: str, run_in_thread: Callable[..., Any] = call_directly) -> Path | None:
    """Return the file from which curl takes the demo user's password for a host; None if there is none, or it is stale.

    `python -m auth demo` makes it beside the users file. Logs a warning if the users file has another password by now.
    """
    path = users_file.with_name("demo.netrc").absolute()
    with suppress(OSError, ValueError, UsersFileError, netrc.NetrcParseError):  # ValueError: not UTF-8
        if not path.exists():
            return None
        found = netrc.netrc(str(path)).authenticators(host)
        if found is None:  # such as an address of this machine that others reach
            return None
        name, _, password = found
        user = read_users(users_file).get(name)
        if user and "predict" in user.roles and run_in_thread(check_password_hash, user.password, password):
            return path
    log.warning(
        "%s no longer fits %s: it names another user or password than that has, or cannot be read. Remove it, or both "
        "files for a new demo user (make run)",
        path,
        users_file,
    )
    return None


# --- RELOAD=1


def after_fork(settings: "Settings") -> None:
    """Forget the modules that gunicorn's master has imported, so that a worker imports them as they are by now.

    What their `before_fork` keeps in memory is forgotten too, so it is called again: the workers of an extension that
    share memory otherwise do not with RELOAD=1. Changes of the worker classes and of gunicorn.conf.py need a restart.
    """
    if not settings.reload:
        return
    here = str(Path(__file__).parent) + os.sep
    extensions = {name.partition(".")[0] for name in settings.extension_names()}  # a user's own may be elsewhere
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or ""
        is_ours = file.startswith(here) and "site-packages" not in file and name not in ("__main__", "__config__")
        if is_ours or name.partition(".")[0] in extensions:
            del sys.modules[name]
    with suppress(Exception):  # it is met again, and answered, when the application is loaded
        for extension in settings.load_extensions():
            getattr(extension, "before_fork", lambda settings: None)(settings)


class WatchedFile:
    """A model file that is loaded again when it, or its sample, has changed and then stayed the same for a moment."""

    interval: float | None = 0.5  # seconds

    def __init__(self, path: Path, sample: Path | None) -> None:
        """Nothing is read yet."""
        self._path, self._file = path, SingleFile(path, sample)
        self._watched = (path, sample or path.with_suffix(".sample.json"))
        self._loaded: Any = None  # what the files were when they were loaded
        self._last: Any = None  # … and when they were looked at last

    def update(self, serving: Serving) -> Update | None:
        """Load the file if it has changed. Raises: ModelLoadError, it does not load; the model that serves stays."""
        etags = self._etags()
        is_settled, self._last = etags == self._last, etags
        if serving.routes or serving.errors:
            if etags == self._loaded or not is_settled:
                return None
            log.info("%s or its sample has changed; loading it", self._path)
        self._loaded = etags
        model = serving.load(partial(self._file.load, self._path))
        return (Routes(model), []) if self._etags() == etags else None  # it was written to meanwhile: again

    def _etags(self) -> list[tuple[int, ...] | None]:
        etags: list[tuple[int, ...] | None] = []
        for path in self._watched:
            try:
                found = path.stat()
                etags.append((found.st_ino, found.st_size, found.st_mtime_ns))
            except OSError:
                etags.append(None)
        return etags
