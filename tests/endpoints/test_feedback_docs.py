"""docs/feedback.md is true: its client runs as shown, and what it shows of figures and bodies."""

import json
import re
import subprocess
import sys
from pathlib import Path

from conftest import CHEAP, ROOT, gunicorn, records

from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures

PAGE = (ROOT / "docs/feedback.md").read_text("utf-8")
JSON = re.findall(r"^```json\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
USE = """
assert [predict(number, [5.1, 3.5, 1.4, 0.2]) for number in (17, 18, 19)] == [0, 0, 0]
print(send({17: 0, 19: 2, 20: 1}))
print(send({17: 0, 18: 0}))
"""


def test_client_keeps_the_receipt_and_sends_the_truth_later(tmp_path: Path, iris_file: Path) -> None:
    (client,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len([line for line in client.splitlines() if line.strip()]) <= 22
    users = tmp_path / "users.json"
    users.write_text(json.dumps({"alice": {"password": CHEAP, "roles": ["predict", "feedback"]}}))
    with gunicorn(tmp_path, model_path=iris_file, users_file=users) as server:
        command = [sys.executable, "-c", client.replace("5000", str(server.port)) + USE]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    first, second = (eval(line) for line in printed.splitlines())
    assert first == {"accepted": 2, "duplicates": 0, "rejected": []}
    assert second == {"accepted": 1, "duplicates": 1, "rejected": []}
    found = [record for record in records(tmp_path / "journal") if record.get("event") == "feedback"]
    assert sorted(record["wrong"] for record in found) == [0, 0, 1]


def test_figures_are_as_shown() -> None:
    shown = json.loads(JSON[1])
    figures = Figures(CLASSIFICATION, 2000, shown["rows"], 48, shown["unknown_labels"]).describe()
    assert {name: round(value, 6) for name, value in figures.items()} == shown
    (names,) = re.findall(r"^and for a regression (.*?);", PAGE, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", names) == list(Figures(REGRESSION).describe())


def test_fields_of_a_record_are_listed() -> None:
    table = PAGE.partition("| field | value |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\|([^|]*)\|", table, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == {
        *("event", "receipt_id", "model_version", "variant", "rows", "wrong", "unknown_labels", "abs_error"),
        *("sq_error", "signed_error", "age", "user", "error_bound"),
    }
