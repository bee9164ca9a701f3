"""Feed what reads callers' bytes, or files, with bytes that libFuzzer makes up, guided by the lines of ours they reach.

    .venv/bin/python tests/hostile/coverage_guided.py TARGET DIRECTORY -max_total_time=60

TARGET is one of `TARGETS`; inputs that reached something new are kept in DIRECTORY, and one that fails is written to
the working directory. It fails if anything but the reader's own exceptions is raised, or after more than a second.
Options: https://llvm.org/docs/LibFuzzer.html#options
"""

import io
import os
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
with atheris.instrument_imports(include=["auth", "endpoints", "model", "monitor", "speedups", "web"]):
    import numpy as np
    import orjson
    from gunicorn.config import Config
    from werkzeug.exceptions import BadRequest, HTTPException

    from auth import UsersFileError, read_users
    from endpoints.receipts import BadReceipt, KeyFile, verify
    from model.columns import BadRows
    from model.formats import ModelLoadError
    from model.limits import Limits
    from model.versions.routing import ROUTING, Routing
    from monitor import read_lines
    from speedups.fast_path import differences, of_connection, parse_head
    from web.decoding import decode_json, decode_npy

PLACE = Path(tempfile.mkdtemp())
KEYS = KeyFile(PLACE / "key")
KEYS.open()
CONFIG, SERVER, CALLER = Config(), ("127.0.0.1", 5000), ("192.0.2.7", 4321)
BASE, SCHEMES = of_connection(CONFIG, SERVER, CALLER)
np.save(ARRAY := io.BytesIO(), np.ones((2, 1)))


def read_json(data: bytes) -> None:
    """A request's body: its rows are those that orjson reads."""
    with suppress(HTTPException):
        rows, method = decode_json(data)
        assert isinstance(method, str)
        assert rows is not None
        orjson.dumps(rows)


def count_json(data: bytes) -> None:
    """A large body, counted before it is decoded."""
    with suppress(BadRows, BadRequest):
        Limits(100, 4, 400).check(data)


def read_npy(data: bytes) -> None:
    """An array: no larger than what was sent."""
    with suppress(HTTPException):
        assert decode_npy(data).nbytes <= len(data)


def read_head(data: bytes) -> None:
    """A request's head: what is taken, gunicorn reads in the same way."""
    environ = parse_head(data, BASE, SCHEMES)
    if environ is not None:
        head = data[: data.index(b"\r\n\r\n") + 4]
        assert not differences(head, environ, SERVER, CALLER, CONFIG)


def read_receipt(data: bytes) -> None:
    """A receipt: nobody but the holder of the key can make one."""
    with suppress(BadReceipt):
        verify(data.decode("latin-1"), KEYS.keys)
        raise AssertionError("it was signed")


def read_users_file(data: bytes) -> None:
    """The file of users."""
    (PLACE / "users").write_bytes(data)
    (PLACE / "users").chmod(0o600)
    with suppress(UsersFileError):
        read_users(PLACE / "users")


def read_routing(data: bytes) -> None:
    """The routing of a store: written again, it is the same."""
    (PLACE / ROUTING).write_bytes(data)
    with suppress(ModelLoadError):
        routing = Routing.read(PLACE)
        (PLACE / ROUTING).write_bytes(orjson.dumps(routing.to_json()))
        assert Routing.read(PLACE) == routing


def read_journal(data: bytes) -> None:
    """A segment of the journal: its whole lines are read, each once."""
    (PLACE / "segment").write_bytes(data)
    offsets = [offset for offset, _ in read_lines(PLACE / "segment")]
    assert offsets == [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]


# With an input each that reaches far.
TARGETS = {
    "json": (read_json, b'{"data": [[1, 2.5, "a"], {"b": null}], "method": "predict", "columns": ["b"]}'),
    "count": (count_json, b'{"data": [[1, "a\\"]", {"b": [true]}], [[], {}]]}'),
    "npy": (read_npy, ARRAY.getvalue()),
    "head": (read_head, b"POST /a?b=1 HTTP/1.1\r\nHost: a:1\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"),
    "receipt": (read_receipt, b"AQAxAAAAAAAAAAAAAAAAAFswXQAAAAAAAAAAAAAAAA"),
    "users": (read_users_file, b'{"a": {"password": "scrypt:2:1:1$a$00", "roles": ["predict"]}}'),
    "routing": (
        read_routing,
        b'{"stable": "2", "previous": ["1"], "canary": {"version": "3", "weight": 5, "guard": true}}',
    ),
    "journal": (read_journal, b'{"time": 1.0, "pid": 1}\n{"time": 2.0'),
}

if __name__ == "__main__":
    read, example = TARGETS[sys.argv[1]]
    directory = Path(sys.argv[2])
    directory.mkdir(exist_ok=True)
    (directory / "example").write_bytes(example)
    atheris.Setup([sys.argv[0], *sys.argv[2:], "-timeout=1", "-max_len=4096", f"-artifact_prefix={os.getcwd()}/"], read)
    atheris.Fuzz()
