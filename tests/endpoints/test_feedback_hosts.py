"""Feedback end to end: hosts of two workers that are killed and restarted, keys that change, callers that try again."""

import base64
import hashlib
import http.client
import itertools
import json
import os
import random
import secrets
import signal
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from conftest import WORKER_CLASSES, Gunicorn, basic, gunicorn, records
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import zero_one_loss

RNG = np.random.default_rng(15)
ROWS = RNG.normal(size=(10_000, 3)).round(4)
TRUE = (ROWS @ [1.0, -2.0, 0.5] + RNG.normal(size=10_000) > 0).astype(int)
JSON = "application/json"


def ask(server: Gunicorn, path: str, body: Any, user: str) -> tuple[Any, Any]:
    """POST JSON, again and again until it is answered: workers die and hosts restart meanwhile."""
    sent = json.dumps(body).encode()
    for _ in range(300):
        try:
            status, headers, answer = server.ask("POST", path, sent, Content_Type=JSON, Authorization=basic(user))
        except (OSError, http.client.HTTPException):
            time.sleep(0.1)
            continue
        if status != 503:
            assert status == 200, answer
            return headers, json.loads(answer)
        time.sleep(0.1)
    raise AssertionError(f"no answer:\n{server.log.read_text()}")


def predict(server: Gunicorn, rows: np.ndarray) -> tuple[str, list[int]]:
    """Return the receipt and the predictions."""
    headers, answer = ask(server, "/predict", {"data": rows.tolist()}, "predict")
    return headers["X-Feedback"], answer["prediction"]


def shown(server: Gunicorn) -> Any:
    """Return the feedback that GET /model shows of the stable version."""
    _, _, answer = server.ask("GET", "/model", Authorization=basic("predict"))
    return json.loads(answer)["stable"]["feedback"]


@contextmanager
def hosts(place: Path, model: Path, **settings: Any) -> Iterator[list[Gunicorn]]:
    """Run two hosts of two workers with a key file that they share."""
    given = {"model_path": model, "web_concurrency": 2, "feedback_key_file": place / "feedback.key"} | settings
    for name in "ab":
        (place / name).mkdir(exist_ok=True)
    with gunicorn(place / "a", **given) as first, gunicorn(place / "b", **given) as second:
        yield [first, second]


def in_threads(function: Callable[[Any], Any], items: list[Any], count: int = 6) -> list[Any]:
    """Call a function with each item, in threads."""
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(function, items))


def aged(receipt: str, key: bytes, seconds: float) -> str:
    """Return a receipt as it would be if it had been made so long ago."""
    content = bytearray(base64.urlsafe_b64decode(receipt + "=" * (-len(receipt) % 4)))[:-12]
    at = 3 + content[2]
    (made,) = struct.unpack_from(">Q", content, at)
    struct.pack_into(">Q", content, at, made - int(seconds * 1e6))
    mac = hashlib.blake2b(content, key=key, digest_size=12).digest()
    return base64.urlsafe_b64encode(content + mac).decode().rstrip("=")


def calls(server: list[Gunicorn], first: int, last: int) -> list[tuple[str, list[int], range]]:
    """Predict rows in requests of one to nine, on both hosts; return receipts, predictions and numbers of rows."""
    sizes, at, jobs = random.Random(first), first, []
    while at < last:
        size = min(sizes.randint(1, 9), last - at)
        jobs.append((server[len(jobs) % 2], range(at, at + size)))
        at += size
    return in_threads(lambda job: (*predict(job[0], ROWS[list(job[1])]), job[1]), jobs)


@contextmanager
def killing(servers: list[Gunicorn]) -> Iterator[list[int]]:
    """Kill a worker of each host in turn, soon after all workers of that host serve."""
    ended, killed = threading.Event(), list[int]()
    expected = {server: server.log.read_text().count("serving version") for server in servers}

    def kill() -> None:
        while not ended.wait(0.2):
            server = servers[len(killed) % 2]
            workers = server.workers()
            if len(workers) == 2 and server.log.read_text().count("serving version") >= expected[server]:
                expected[server] += 1
                killed.append(random.choice(workers))
                os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        ended.set()
        thread.join()


@pytest.mark.long
def test_error_rate_of_ten_thousand_predictions_is_scikit_learns(tmp_path: Path) -> None:
    models = [tmp_path / "first.joblib", tmp_path / "second.joblib"]
    joblib.dump(LogisticRegression().fit(ROWS[:200], TRUE[:200]), models[0])
    joblib.dump(LogisticRegression().fit(ROWS[:50], TRUE[:50]), models[1])
    keys = [secrets.token_bytes(32) for _ in range(2)]
    key_file, chance = tmp_path / "feedback.key", random.Random(15)
    key_file.write_text(keys[0].hex())
    with hosts(tmp_path, models[0]) as servers, killing(servers) as killed:
        answers = calls(servers, 0, 5000)  # of a version that is gone when their truths come
        versions = {receipt: "first" for receipt, _, _ in answers}
    assert len(killed) > 1
    with hosts(tmp_path, models[1]) as servers:
        answers += calls(servers, 5000, 10_000)
        assert shown(servers[0])["rows"] == 0
        chosen = chance.sample(answers, round(0.6 * len(answers)))
        entries = [{"receipt": receipt, "truth": TRUE[list(rows)].tolist()} for receipt, _, rows in chosen]
        late = [{"receipt": aged(receipt, keys[0], 31 * 86_400), "truth": [0]} for receipt, _, _ in chosen[:50]]
        forged = [{"receipt": aged(receipt, b"x" * 32, 5), "truth": [0]} for receipt, _, _ in chosen[:50]]
        # Each entry twice to one host, many at the same time; a fifth of them to the other host as well.
        jobs = []
        for at in range(0, len(entries), 25):
            server = chance.choice(servers)
            jobs += [(server, entries[at : at + 25] + late[:2] + forged[:2]), (server, entries[at : at + 25])]
            if at % 125 == 0:
                jobs.append((servers[server is servers[0]], entries[at : at + 25]))
        chance.shuffle(jobs)
        jobs = [job for pair in zip(jobs, jobs, strict=True) for job in pair]  # neighbours: to several workers at once
        key_file.write_text(f"{keys[0].hex()}\n{keys[1].hex()}\n")
        with killing(servers) as killed:
            half = len(jobs) // 2
            found = in_threads(lambda job: ask(job[0], "/feedback", {"feedback": job[1]}, "feedback")[1], jobs[:half])
            key_file.write_text(f"{keys[1].hex()}\n{keys[0].hex()}\n")
            time.sleep(2)
            found += in_threads(lambda job: ask(job[0], "/feedback", {"feedback": job[1]}, "feedback")[1], jobs[half:])
        assert len(killed) > 1
        assert all(len(each["rejected"]) in (0, 4) for each in found)
        new, _ = predict(servers[0], ROWS[:1])  # signed with the new key
        assert ask(servers[1], "/feedback", {"feedback": [{"receipt": new, "truth": [5]}]}, "feedback")[1] == {
            "accepted": 1,
            "duplicates": 0,
            "rejected": [],
        }
        check_figures(servers, answers, chosen, versions)


def check_figures(servers: list[Gunicorn], answers: list[Any], chosen: list[Any], versions: dict[str, str]) -> None:
    """Compare what the hosts count with scikit-learn's metric on the same rows."""
    on_host = [[each for each in records(server.journal_dir) if each.get("event") == "feedback"] for server in servers]
    for each in on_host:
        assert len({record["receipt_id"] for record in each}) == len(each)  # once within a host
    distinct = {record["receipt_id"]: record for record in itertools.chain(*on_host)}  # as SLS removes duplicates
    assert len(distinct) == len(chosen) + 1
    last = [record for record in distinct.values() if record["unknown_labels"]]
    assert [(record["rows"], record["wrong"]) for record in last] == [(1, 1)]
    for first in True, False:
        rows = [answer for answer in chosen if (answer[0] in versions) == first]
        answered = np.concatenate([prediction for _, prediction, _ in rows])
        true = TRUE[np.concatenate([list(numbers) for _, _, numbers in rows])]
        current = last[0]["model_version"]
        mine = [each for each in distinct.values() if (each["model_version"] != current) == first and each not in last]
        assert sum(each["rows"] for each in mine) == len(true)
        assert sum(each["wrong"] for each in mine) == zero_one_loss(true, answered, normalize=False)
    # What each host shows of the version that is served is the sum of its own records.
    time.sleep(2)
    for server, each in zip(servers, on_host, strict=True):
        mine = [record for record in each if record["model_version"] == last[0]["model_version"]]
        figures = shown(server)
        assert figures["rows"] == sum(record["rows"] for record in mine)
        assert figures["error_rate"] == sum(record["wrong"] for record in mine) / figures["rows"]
        assert 0 < figures["coverage"] <= 1
    predicted = sum(len(numbers) for receipt, _, numbers in answers if receipt not in versions)
    counted = sum(round(shown(server)["rows"] / shown(server)["coverage"]) for server in servers)
    assert counted >= predicted  # more where a worker died after it counted and before it answered


@pytest.mark.parametrize("worker_class", WORKER_CLASSES)
def test_receipt_that_several_workers_are_given_at_once_counts_once(tmp_path: Path, worker_class: str) -> None:
    model = tmp_path / "model.joblib"
    joblib.dump(LogisticRegression().fit(ROWS[:200], TRUE[:200]), model)
    with gunicorn(tmp_path, model_path=model, web_concurrency=2, worker_class=worker_class) as server:
        receipts = in_threads(lambda at: predict(server, ROWS[at : at + 1])[0], list(range(40)))
        entries = [{"receipt": receipt, "truth": [1]} for receipt in receipts]
        jobs = [[entry] for entry in entries for _ in range(6)] + [entries] * 6  # each six times at once
        found = in_threads(lambda job: ask(server, "/feedback", {"feedback": job}, "feedback")[1], jobs, 8)
        assert sum(each["accepted"] for each in found) == 40
        assert sum(each["duplicates"] for each in found) == 11 * 40
        assert len([each for each in records(server.journal_dir) if "event" in each]) == 40
        assert {record["pid"] for record in records(server.journal_dir)} == set(server.workers())
        time.sleep(2)
        assert [(shown(server)["rows"], shown(server)["coverage"]) for _ in range(9)] == [(40, 1.0)] * 9
        os.kill(server.process.pid, signal.SIGHUP)  # figures and ids outlive the workers
        server.wait_until(lambda: server.log.read_text().count("serving version") >= 4)
        assert ask(server, "/feedback", {"feedback": entries}, "feedback")[1]["duplicates"] == 40
        assert shown(server)["rows"] == 40


def test_preloaded_workers_count_together(tmp_path: Path) -> None:
    model = tmp_path / "model.joblib"
    joblib.dump(LogisticRegression().fit(ROWS[:200], TRUE[:200]), model)
    with gunicorn(tmp_path, model_path=model, web_concurrency=2, preload=1) as server:
        receipts: list[str] = []

        def both_answered() -> bool:
            receipts.extend(in_threads(lambda at: predict(server, ROWS[at : at + 1])[0], list(range(60))))
            return len({record["pid"] for record in records(server.journal_dir)}) == 2

        server.wait_until(both_answered)  # the second may come later than the first requests
        entries = [{"receipt": receipt, "truth": [0]} for receipt in receipts[:30]]
        assert ask(server, "/feedback", {"feedback": entries}, "feedback")[1]["accepted"] == 30
        server.wait_until(lambda: shown(server)["coverage"] == 30 / len(receipts), 4)


def test_keys_are_rotated_while_it_serves(tmp_path: Path, iris_file: Path) -> None:
    row, old, new = np.array([[5.1, 3.5, 1.4, 0.2]]), "a" * 64, "b" * 64
    path = tmp_path / "feedback.key"
    path.write_text(old)

    def send(receipt: str) -> Any:
        return ask(server, "/feedback", {"feedback": [{"receipt": receipt, "truth": [0]}]}, "feedback")[1]

    with gunicorn(tmp_path, model_path=iris_file) as server:
        before = [predict(server, row)[0] for _ in range(3)]
        path.write_text(f"{new}\n{old}")
        time.sleep(2)
        after = predict(server, row)[0]
        assert [send(before[0])["accepted"], send(after)["accepted"]] == [1, 1]
        path.write_text(new)
        time.sleep(2)
        assert "no longer accepted" in send(before[1])["rejected"][0]["detail"]
        path.write_text("no key")
        time.sleep(2)
        status, headers, _ = server.ask(
            "POST", "/predict", b'{"data": [[5.1, 3.5, 1.4, 0.2]]}', Content_Type=JSON, Authorization=basic("predict")
        )
        assert (status, headers["X-Feedback"]) == (200, None)
        path.write_text(old)
        time.sleep(2)
        assert send(before[1])["accepted"] == 1
        log = server.log.read_text()
        assert log.count("FEEDBACK_KEY_FILE") == 1
        assert old[:20] not in log
        assert new[:20] not in log
