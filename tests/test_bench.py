import json
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from conftest import ROOT

from bench.compare import print_tables, rates_offered


def measure_a_stall() -> Any:
    """Ask a server for two seconds, at 100 requests a second, that answers nobody in the second half of the first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        came: list[float] = []

        def serve(connection: socket.socket) -> None:
            with connection:
                while connection.recv(65536):
                    came.append(time.monotonic())
                    if came[-1] - came[0] > 0.5:
                        time.sleep(max(0.0, came[0] + 1.0 - came[-1]))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        threading.Thread(target=lambda: serve(listener.accept()[0]), daemon=True).start()
        command = [sys.executable, "-m", "bench.openloop", str(listener.getsockname()[1]), "100", "2"]
        done = subprocess.run(
            [*command, "--connections", "1"],
            cwd=ROOT,
            input='["GET / HTTP/1.1\\r\\n\\r\\n"]',
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    return json.loads(done.stdout)


def test_stall_counts_for_every_request_that_was_due_meanwhile() -> None:
    for _ in range(3):
        found = measure_a_stall()
        if found["p50"] < 0.1 and found["p99"] < 1.0:  # else the machine was busy, and had a stall of its own
            break
    assert (found["requests"], found["failed"], found["unfinished"]) == (200, 0, 0)
    # Fifty were due in the stall. Who waits for answers would have asked one of them, which is no p99 of 150.
    assert found["p50"] < 0.1 < 0.3 < found["p99"] < 1.0


def test_rates_are_medians_and_ratios_those_of_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"ours": [900, 1000, 1200], "fastapi": [450, 1000, 400], "hello": [2000, 2000, 2000]}
    base: dict[str, Any] = {"kind": "closed", "run": "a", "model": "iris.joblib", "workers": 1, "rows": 1}
    base |= {"connections": 64, "cpu": 0.001, "not_2xx": 0, "broken": 0}
    found = [
        base | {"server": name, "round": number, "rate": rate}
        for name, each in rates.items()
        for number, rate in enumerate(each)
    ]
    print_tables(found)
    printed = capsys.readouterr().out
    assert "| iris.joblib | 1 | 1 | 64 | this server | 1000 | 1.00 |  |" in printed
    assert "| iris.joblib | 1 | 1 | 64 | FastAPI | 450 | 1.00 | 2.00 (1.25–2.75) |" in printed
    assert "| logistic regression with a scaler | 1000 | 450, FastAPI |" in printed
    assert rates_offered(found, "iris.joblib", 1) == {1: 315.0}


def test_bench_stays_short() -> None:
    files = [*ROOT.glob("bench/*.py"), *ROOT.glob("bench/peers/*.py")]
    assert sum(len(path.read_text().splitlines()) for path in files) <= 1200
