"""Whether a caller still waits, as `web/callers.py` finds out."""

import subprocess
import sys

import pytest
from conftest import ROOT

# Another greenlet is ready to run all the time; the check must not let it.
PROGRAM = """
import socket
import gevent
from web.callers import caller_of
from werkzeug.exceptions import BadRequest

ran = []
gevent.spawn(ran.append, "another")
theirs, ours = socket.socketpair()
_, check = caller_of({"gunicorn.socket": ours}, "alice")
check()
theirs.sendall(b"the next request")
check()
theirs.shutdown(socket.SHUT_WR)
try:
    check()
    print("not noticed")
except BadRequest:
    print("noticed")
print(ran)
"""


@pytest.mark.parametrize("patch", ["", "from gevent import monkey\nmonkey.patch_all()"], ids=["threads", "gevent"])
def test_closed_sending_side_is_noticed_and_nobody_else_runs_meanwhile(patch: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", patch + PROGRAM], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("noticed\n[]\n", "")
