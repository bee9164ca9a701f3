"""How gunicorn runs the server: `gunicorn` in this directory, or `gunicorn server:app`. Settings are in settings.py.

An extension may have WORKER_CLASSES, and any of these functions, called in this order:

    in the master     master_starts(server, settings)   before the application is imported
                      before_fork(settings)             once, before the first fork
                      master_ready(server)              once it listens
                      on_reload(settings)               at SIGHUP
    in a worker       after_fork(settings)              before it loads the application
                      worker_starts(worker)             before it loads the model
"""

import gc
import logging
import os
import resource
import ssl
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path

_here = os.path.dirname(os.path.abspath(__file__))
if _here not in sys.path:  # it was started in another directory, with -c
    sys.path.insert(0, _here)

from gunicorn.util import load_class

import auth
from processes import run_hooks
from settings import Settings, SettingsError, usable_cores

with suppress(ModuleNotFoundError):  # the module may be removed
    import_module("log_format").set_up(os.environ.get("LOG_FORMAT", ""))
logging.basicConfig(level="INFO")  # without it; in either case before the settings are read, which logs the platform
try:
    _settings = Settings.load(log_platform=True)
    # A worker's share of the cores for BLAS and OpenMP, which would else start a thread for each core in every worker.
    # With PRELOAD one: OpenMP's threads do not survive the fork, and a call that waits for them hangs. numpy looks at
    # this when it is imported, as by some extension.
    _share = "1" if _settings.preload else str(max(1, usable_cores() // _settings.web_concurrency))
    if _settings.preload and os.environ.get("OMP_NUM_THREADS", _share) != _share:
        logging.getLogger("gunicorn").warning("PRELOAD=1: OMP_NUM_THREADS=%s becomes 1", os.environ["OMP_NUM_THREADS"])
        del os.environ["OMP_NUM_THREADS"]
    os.environ.setdefault("OMP_NUM_THREADS", _share)
    if _settings.worker_class == "gevent" and not _settings.reload:
        from gevent import monkey

        monkey.patch_all()  # modules are imported before gunicorn's worker would do it (operations/upgrades.py)
    _extensions = _settings.load_extensions()
except SettingsError as _error:
    sys.exit(f"cannot start: {_error}")

# Whether systemd holds the socket (deploy/systemd/prediction-server.socket); then HOST and PORT are not used.
_socket_is_handed_in = os.environ.get("LISTEN_PID") == str(os.getpid())

wsgi_app = "server:app"
bind = [f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"]
workers = _settings.web_concurrency

# gunicorn's own, to which extensions may add subclasses of it: each calls those before it by `super`.
worker_class = load_class(_settings.worker_class)
for _extension in _extensions:
    if _path := getattr(_extension, "WORKER_CLASSES", {}).get(_settings.worker_class):
        worker_class = type(f"{_path} + {worker_class.__name__}", (load_class(_path), worker_class), {})

# One process loads the model and is forked; see on_starting.
preload_app = _settings.preload

# gthread only: requests at once in one worker. Under gevent a connection costs next to nothing.
threads = 32

# Connections of one worker, idle ones counted too; one more waits in the kernel without an answer. Each takes a file
# descriptor. This leaves some for files: with none left a worker could neither accept nor load.
worker_connections = max(16, min(4000, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 64))

# Seconds an idle connection is kept. It must be longer than the proxy in front keeps its own (nginx here, 10 s), or the
# proxy sends a POST into a connection that is being closed.
keepalive = _settings.keepalive

# Seconds that requests in flight have to finish at SIGTERM or SIGHUP.
graceful_timeout = _settings.graceful_timeout

# Seconds after which a worker whose event loop is blocked is killed. Loading is on a thread of its own and
# does not count. Not before PREDICT_TIMEOUT: a call of the model that was expected to be short is in the loop.
timeout = _settings.worker_timeout and max(_settings.worker_timeout, round(_settings.predict_timeout))

# While developing: a worker whose code or templates change ends, and another takes its place. It looks once a second;
# gunicorn's other engine would block the event loop.
reload = _settings.reload
reload_engine = "poll"
reload_extra_files = [f"{path}/**" for path in Path(_here).glob("*/templates") if reload]

# gunicorn's own HTTP parser, even if gunicorn_h1c is installed. Up to release 0.6.9 that takes folded headers and bare
# line feeds, which a proxy in front may read differently; gunicorn asks for 0.6.14.
http_parser = "python"

# Two masters on one machine would share the default control socket's path, and one would delete the other's.
control_socket_disable = True

# For TLS 1.2, if gunicorn speaks TLS itself: as in the nginx set-up. Debian's Python would take all of OpenSSL's.
ciphers = "ECDHE+AESGCM:ECDHE+CHACHA20"


def ssl_context(config, default_ssl_context_factory):
    """Set up TLS, where gunicorn is started with `--certfile` and `--keyfile`."""
    context = default_ssl_context_factory()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # web/body.py ends a late read by shutting that side of the connection down. OpenSSL would take this for an attack,
    # and end the connection without the answer; a body that is cut off is noticed by its length or last chunk.
    context.options |= ssl.OP_IGNORE_UNEXPECTED_EOF
    return context


def on_starting(server):
    """Refuse to start if it cannot work, and say why once. Not at a reload: a running server goes on."""
    try:
        _settings.check_files()
        if _settings.auth == "basic":
            auth.read_users(_settings.users_file)
            auth.shared = auth.Verified()
    except (SettingsError, auth.UsersFileError) as error:
        sys.exit(f"cannot start: {error}")
    _call_extensions("master_starts", server, _settings)
    if not os.path.samefile(".", _here):
        server.log.info("the server is in %s; relative paths, such as var/models, begin at %s", _here, os.getcwd())
    server.app.reload = lambda: None  # SIGHUP changes no setting, and this file may by now need a new version's modules
    _call_extensions("before_fork", _settings)
    if _settings.preload:
        server.app.wsgi().extensions["service"].serving.preload()
    gc.collect()
    gc.freeze()  # in a worker the collector would write to what it shares with the others


def on_reload(server):
    """Let the extensions prepare for the workers that take the others' place."""
    _call_extensions("on_reload", _settings)


def _call_extensions(function, *arguments):
    """Call a function of each extension that has it."""
    for extension in _extensions:
        getattr(extension, function, lambda *arguments: None)(*arguments)


def when_ready(server):
    """Let the extensions watch the workers."""
    _call_extensions("master_ready", server)


def post_fork(server, worker):
    """Let the extensions prepare a worker that is about to load the application."""
    _call_extensions("after_fork", _settings)


def post_worker_init(worker):
    """Load the model now, not at the first request.

    A worker that replaces another, after a reload or a death, waits for its model before it accepts connections: they
    wait in the listener's queue, where a worker without a model would answer 503. For 25 seconds, so that probes are
    answered, or as long as others answer; not at the first start, unless a socket that systemd holds has a queue.
    """
    from model.batching import call_directly  # not at the top: gevent has to patch first what it imports

    if not hasattr(worker.wsgi, "extensions"):  # gunicorn's own application: with RELOAD=1 it answers syntax errors
        return
    _call_extensions("worker_starts", worker)
    service = worker.wsgi.extensions["service"]
    is_gevent = any(each.__module__ == "gunicorn.workers.ggevent" for each in type(worker).__mro__)
    if is_gevent and service.thread_runner is call_directly:
        worker.log.info("a predict blocks this worker's other requests: no extension runs it on a thread")
    service.start()
    waits, until = _socket_is_handed_in or worker.age > worker.cfg.workers, time.monotonic() + 25.0
    while waits and worker.alive and (not service.serving.finished.wait(0.5) or service.keeps_waiting()):
        worker.notify()
        time.sleep(0.1)  # `finished` may be set
        waits = time.monotonic() < until or service.others_serve()


def worker_exit(server, worker):
    """Record what a worker that ends has counted."""
    if hasattr(getattr(worker, "wsgi", None), "extensions"):  # it may end because the application did not load
        run_hooks(worker.wsgi.extensions["service"].on_exit)
