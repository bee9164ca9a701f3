"""A stop drops new connections before its workers take the last of those that wait."""

import socket
from pathlib import Path

import pytest
from conftest import gunicorn
from test_stops import outcomes_of_a_stop
from test_systemd import handed_in

# A worker that closes its listener some time after it took what was in the queue, as a busy machine may make it.
LATE = """
import gevent
from gevent.server import StreamServer

def init_app(app, service):
    pass

def worker_starts(worker):
    close = StreamServer.close

    def close_late(server):
        gevent.sleep(0.5)
        close(server)

    StreamServer.close = close_late
"""


@pytest.mark.long
@pytest.mark.parametrize("stops", ["+operations.last_connections", "-operations.last_connections"])
def test_connections_that_come_while_the_listener_closes(
    tmp_path: Path, iris_file: Path, monkeypatch: pytest.MonkeyPatch, stops: str
) -> None:
    (tmp_path / "late.py").write_text(LATE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with gunicorn(tmp_path, model_path=iris_file, extensions=f"{stops},+late") as server:
        outcomes = outcomes_of_a_stop(server)
        assert server.process.wait(40) == 0
    assert (outcomes.keys() == {200}) == (stops[0] == "+"), outcomes


def test_socket_that_systemd_holds_still_takes_connections(tmp_path: Path, iris_file: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        with gunicorn(tmp_path, ready=False, model_path=iris_file, **handed_in(held)) as server:
            server.wait_until(lambda: "serving version" in server.log.read_text())
            assert server.stop() == 0
        socket.create_connection(held.getsockname(), timeout=0.5).close()
