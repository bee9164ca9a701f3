"""The ledger: each receipt counts once, whoever writes, dies or fills the disk meanwhile, and in bounded space."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import ROOT, records
from ledger_tools import entry, open_ledger

from endpoints import ledger
from endpoints.error_rate import CLASSIFICATION, REGRESSION, Figures
from endpoints.id_tables import IdTables
from endpoints.ledger import ACCEPTED, DUPLICATE, OTHER_KIND, TOO_OLD, Ledger
from endpoints.row_counts import KEPT, PLACES, RowCounts, read_rows
from monitor import Journal


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The journal's directory."""
    return tmp_path / "journal"


def test_receipt_counts_once(place: Path) -> None:
    first, second = open_ledger(place), open_ledger(place)
    assert first.accept([entry(1), entry(2, wrong=1), entry(1)]) == [ACCEPTED, ACCEPTED, DUPLICATE]
    assert second.accept([entry(2), entry(7), entry(2**64 - 1, version="v2")]) == [DUPLICATE, ACCEPTED, ACCEPTED]
    assert second.accept([entry(7)]) == [DUPLICATE]
    figures = open_ledger(place).figures()
    assert (figures["v1", "stable"].rows, figures["v1", "stable"].wrong) == (3, 1)
    assert (figures["v2", "stable"].rows, figures["v2", "stable"].wrong) == (1, 0)
    assert sum(figures["v1", "stable"].ages) == figures["v1", "stable"].entries == 3
    assert figures["v1", "stable"].age_sum == 3 * 60.5
    assert figures["v1", "stable"].ages[1] == 3  # from a minute to an hour


def test_record_holds_neither_prediction_nor_truth(place: Path) -> None:
    open_ledger(place).accept([entry(255, wrong=1)])
    (record,) = records(place)
    for name in ("time", "record_id", "pid"):
        del record[name]
    known = {"event": "feedback", "receipt_id": "00000000000000ff", "age": 60.5, "user": "alice"}
    known |= {"model_version": "v1", "variant": "stable", "rows": 1, "wrong": 1, "unknown_labels": 0}
    assert record == known | dict.fromkeys(("abs_error", "sq_error", "signed_error", "error_bound"))


def test_receipt_of_another_kind_than_the_figures_is_rejected(place: Path) -> None:
    book = open_ledger(place)
    assert book.accept([entry(1), entry(2, kind=REGRESSION)]) == [ACCEPTED, OTHER_KIND]
    assert book.accept([entry(2, kind=REGRESSION)]) == [OTHER_KIND]
    assert book.figures()["v1", "stable"].rows == 1


def test_figures_of_a_later_release_are_read_and_added_to_after_a_rollback(place: Path) -> None:
    open_ledger(place).accept([entry(1, wrong=1)])
    path = place / "feedback" / "figures.json"
    state = orjson.loads(path.read_bytes())
    state["figures"]["stable v1"]["of_a_later_release"] = [1, 2]
    path.write_bytes(orjson.dumps(state))
    book = open_ledger(place)
    assert book.figures()["v1", "stable"].rows == 1
    assert book.accept([entry(1), entry(2)]) == [DUPLICATE, ACCEPTED]
    assert (book.figures()["v1", "stable"].rows, book.figures()["v1", "stable"].wrong) == (2, 1)


def test_writer_that_is_killed_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    run_killer(tmp_path, every=20)


@pytest.mark.long
def test_writer_that_is_killed_at_any_line_loses_nothing(tmp_path: Path) -> None:
    run_killer(tmp_path, every=1)


def run_killer(place: Path, every: int) -> None:
    """Run the script in a process without threads, which forks safely."""
    script = Path(__file__).with_name("kill_at_each_line.py")
    path = f"{ROOT}{os.pathsep}{script.parent}"
    command = [sys.executable, script, place, str(every)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 200


def test_writers_at_once_count_each_receipt_once(place: Path) -> None:
    results: list[list[str]] = []

    def write(seed: int) -> None:
        numbers = random.Random(seed).sample(range(1, 301), 300)
        results.append(open_ledger(place).accept([entry(number) for number in numbers]))

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(chain.from_iterable(results)) == {ACCEPTED: 300, DUPLICATE: 1200}
    assert open_ledger(place).figures()["v1", "stable"].rows == 300
    assert len({record["receipt_id"] for record in records(place)}) == len(records(place)) == 300


def test_lock_that_is_held_too_long_is_an_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.1)
    holder = open_ledger(place)
    with holder._locked(0.0), pytest.raises(TimeoutError):
        open_ledger(place).accept([entry(1)])
    assert open_ledger(place).accept([entry(1)]) == [ACCEPTED]


def test_batch_that_cannot_be_completed_is_completed_later(place: Path) -> None:
    book = open_ledger(place)
    book.accept([entry(1)])
    state = book.directory / "figures.json"
    saved = state.read_bytes()
    journal = Journal(place, 2**24)

    def append(record: dict[str, Any]) -> None:
        journal.append(record)
        state.unlink()
        state.mkdir()  # now the figures cannot be written

    with pytest.raises(IsADirectoryError):
        Ledger(place, append).accept([entry(2, wrong=1)])
    assert (book.directory / "intent.json").exists()
    state.rmdir()
    state.write_bytes(saved)
    assert len(records(place)) == 2
    after = open_ledger(place)
    assert after.accept([entry(2), entry(3)]) == [DUPLICATE, ACCEPTED]
    assert after.figures()["v1", "stable"].rows == 3
    assert len(records(place)) == 3


@pytest.mark.parametrize("damaged", [b"", b"\0" * 200, b"[]", b"[5]", b"null"])
def test_damaged_files_stop_nothing(place: Path, caplog: pytest.LogCaptureFixture, damaged: bytes) -> None:
    book = open_ledger(place)
    book.accept([entry(1)])
    (book.directory / "figures.json").write_bytes(damaged)
    (book.directory / "intent.json").write_bytes(b'{"pid": ')
    (book.directory / "rows-0").write_bytes(b"short")
    (book.directory / "ids-what").touch()
    again = open_ledger(place)
    assert again.accept([entry(1), entry(2)]) == [DUPLICATE, ACCEPTED]
    assert again.figures()["v1", "stable"].rows == 1
    assert "is damaged" in caplog.text
    assert (book.directory / "figures.damaged").exists()


def test_directory_that_is_removed_is_made_again(place: Path) -> None:
    book = open_ledger(place)
    book.accept([entry(1)])
    for path in book.directory.iterdir():
        path.unlink()
    book.directory.rmdir()
    assert book.accept([entry(2)]) == [ACCEPTED]


def test_ids_are_forgotten_with_the_age_of_their_receipts(place: Path) -> None:
    book, now = open_ledger(place), int(time.time() // 3600)
    old, new = entry(1, hour=now - 50), entry(2, hour=now - 2)
    assert book.accept([old, new]) == [ACCEPTED, ACCEPTED]
    open_ledger(place).tidy(24 * 3600)
    assert list(IdTables(book.directory).hours()) == [now - 2]
    # Nor are they counted again if FEEDBACK_MAX_AGE is raised later.
    assert open_ledger(place).accept([old, new, entry(3, hour=now - 50)]) == [TOO_OLD, DUPLICATE, TOO_OLD]
    open_ledger(place).tidy(24 * 3600)
    assert open_ledger(place).figures()["v1", "stable"].rows == 2


def test_full_tables_forget_the_oldest_receipts_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_BYTES", 20_000)
    book = open_ledger(place)
    number, results = 0, Counter[str]()
    for hour in range(10, 25):
        for _ in range(10):
            batch = [entry(number := number + 1, hour=hour) for _ in range(19)]
            results.update(book.accept(batch))
            assert book.accept(batch[-2:]) == [DUPLICATE, DUPLICATE]
        assert sum(path.stat().st_size for path in book.directory.glob("ids-*")) <= 20_000
    assert results == {ACCEPTED: 15 * 190}
    assert book.accept([entry(1, hour=10), entry(9999, hour=11)]) == [TOO_OLD, TOO_OLD]
    assert book.figures()["v1", "stable"].rows == 15 * 190


def test_batch_of_many_hours_makes_room_for_all_of_them(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_BYTES", 20_000)  # nine tables
    book = open_ledger(place)
    assert book.accept([entry(1 + hour, hour=hour) for hour in range(8)]) == [ACCEPTED] * 8
    batch = [entry(100 + hour, hour=hour) for hour in (14, 7, 10, 11, 2, 12, 13, 14)]
    results = book.accept([*batch, batch[0]])
    assert results == [*[ACCEPTED] * 4, TOO_OLD, ACCEPTED, ACCEPTED, DUPLICATE, DUPLICATE]
    assert list(IdTables(book.directory).hours()) == [4, 5, 6, 7, 10, 11, 12, 13, 14]


def test_tables_hold_any_id_and_grow(tmp_path: Path) -> None:
    tables, rng = IdTables(tmp_path), random.Random(5)
    ids = [1, 2**64 - 1, *(rng.getrandbits(64) for _ in range(3000)), *range(256, 256 * 300, 256)]
    for at in range(0, len(ids), 50):
        tables.prepare(3, 50)
        with tables.open(3) as table:
            for each in ids[at : at + 50]:
                table.add(each)
                table.add(each)
    with tables.open(3) as table:
        assert all(each in table for each in ids)
        assert not any(rng.getrandbits(64) in table for _ in range(3000))
        assert table.count < 7
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert size < 8 * len(set(ids)) * 3
    with tables.open(4) as table:
        assert 1 not in table


def test_figures_of_versions_long_gone_are_dropped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_FIGURES", 3)
    book = open_ledger(place)
    for number in range(5):
        book.accept([entry(10 + number, version=f"v{number}"), entry(100 + number, version="v0")])
    assert set(book.figures()) == {(f"v{number}", "stable") for number in (0, 3, 4)}


# --- predicted rows


def test_rows_are_counted_on_after_a_restart_and_summed_over_workers(tmp_path: Path) -> None:
    paths = [tmp_path / "rows-0", tmp_path / "rows-1"]
    for path in [paths[0], paths[1], paths[0]]:
        counts = RowCounts(path)
        counts.counter("v1", "stable", CLASSIFICATION)(3)
        counts.counter("v1", "canary", CLASSIFICATION)(1)
        counts.counter("v" * 64, "canary", REGRESSION)(2)
    found = read_rows(paths)
    assert {key: count.rows for key, count in found.items()} == {
        ("v1", "stable"): 9,
        ("v1", "canary"): 3,
        ("v" * 64, "canary"): 6,
    }
    assert found["v" * 64, "canary"].kind == REGRESSION
    book = Ledger(tmp_path, print)
    book.directory.mkdir()
    os.rename(paths[0], book.directory / "rows-0")
    assert book.figures()["v1", "stable"] == Figures(CLASSIFICATION, predicted_rows=6)


def test_threads_of_a_worker_lose_no_row(tmp_path: Path) -> None:
    count = RowCounts(tmp_path / "rows-0").counter("v1", "stable", CLASSIFICATION)
    threads = [threading.Thread(target=lambda: [count(1) for _ in range(20_000)]) for _ in range(8)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert read_rows([tmp_path / "rows-0"])["v1", "stable"].rows == 160_000


def test_places_of_versions_long_gone_are_reused_at_a_start(tmp_path: Path) -> None:
    path = tmp_path / "rows-0"
    counts = RowCounts(path)
    for number in range(PLACES):
        counts.counter(f"v{number}", "stable", CLASSIFICATION)(number)
    with pytest.raises(OSError, match="too many versions"):
        counts.counter("one more", "stable", CLASSIFICATION)
    size = path.stat().st_size
    RowCounts(path).counter("new", "stable", CLASSIFICATION)(1)
    assert path.stat().st_size == size
    found = read_rows([path])
    assert len(found) == KEPT + 1
    assert found[f"v{PLACES - 1}", "stable"].rows == PLACES - 1


def test_place_of_a_version_that_is_still_counted_is_kept_at_a_start(tmp_path: Path) -> None:
    path = tmp_path / "rows-0"
    counts = RowCounts(path)
    first = counts.counter("first", "stable", CLASSIFICATION)
    first(1)
    for number in range(KEPT):
        counts.counter(f"v{number}", "canary", CLASSIFICATION)(1)
    counts.note()
    first(4)
    time.sleep(0.01)
    counts.note()
    found = read_rows([RowCounts(path).path])
    assert found["first", "stable"].rows == 5
    assert len(found) == KEPT


def test_state_is_json_that_people_can_read(place: Path) -> None:
    book = open_ledger(place)
    book.accept([entry(1)])
    state = orjson.loads((book.directory / "figures.json").read_bytes())
    assert state["figures"]["stable v1"]["rows"] == 1
