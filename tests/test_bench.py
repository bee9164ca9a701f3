import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT, basic, write_users

from bench.profile import STAGES
from bench.report import offered, report


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
        command = [sys.executable, "-m", "bench.openloop", str(listener.getsockname()[1]), "--connections", "1"]
        command += ["--rate", "100", "--seconds", "2"]
        done = subprocess.run(
            command,
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


def test_rates_and_ratios_are_medians_and_the_chart_is_xml(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = {"ours": [900, 1000, 1200], "fastapi": [450, 1000, 400], "hello": [2000, 2000, 2000]}
    base: dict[str, Any] = {"kind": "closed", "run": "a", "model": "iris.joblib", "workers": 1, "rows": 1}
    base |= {"connections": 64, "cpu": 0.001, "others": 0.0, "not_2xx": 0, "broken": 0}
    found = [
        base | {"server": name, "round": number, "rate": rate}
        for name, each in rates.items()
        for number, rate in enumerate(each)
    ]
    report(found, tmp_path / "chart.svg")
    line = "| iris.joblib | 1 | 1 | 64 | 1000 | 2000 (×0.50) | 450 (×2.00) | fastapi 450 (×2.00) |"
    assert line in capsys.readouterr().out
    texts = [
        element.text for element in ElementTree.parse(tmp_path / "chart.svg").iter("{http://www.w3.org/2000/svg}text")
    ]
    assert texts[1:] == ["iris.joblib", "this server", "1000", "FastAPI + uvicorn", "450"]
    assert offered(found, "ours", "iris.joblib", 1) == {1: {"own": 700.0, "best": 315.0}}


@pytest.mark.long
def test_profile_times_every_stage_of_a_request(tmp_path: Path, iris_file: Path) -> None:
    script = """
import json, sys
from bench.profile import inside, request
headers = {"Content-Type": "application/json", "Authorization": sys.argv[1]}
plain, stages = inside(request(b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', headers), 50)
print(json.dumps({"plain": plain} | stages))
"""
    settings = {"MODEL_PATH": iris_file, "USERS_FILE": write_users(tmp_path / "users.json"), "JOURNAL_DIR": tmp_path}
    done = subprocess.run(
        [sys.executable, "-c", script, basic("predict")],
        cwd=ROOT,
        env=os.environ | {name: str(value) for name, value in settings.items()},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"plain", *STAGES}
    assert min(found.values()) > 0
