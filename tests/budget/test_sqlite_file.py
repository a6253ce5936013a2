"""How files of SQLite are made and opened: for one user, by many processes."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from budget.ledgers.sqlite import SqliteStore
from budget.records.sqlite import open_file
from tests.budget.clocks import Clock

ROOT = Path(__file__).parents[2]
PROCESSES, FILES = 4, 30
WORKER = """
import asyncio, sys, time
from pathlib import Path
from budget.ledgers.sqlite import SqliteStore

async def main(folder, files):
    for number in range(files):
        await SqliteStore(Path(folder) / f"{number}.db", clock=time.time).close()

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


def test_waits_for_the_log_that_another_process_has_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To switch to WAL it tries again until whoever writes is done, which SQLite does not by itself."""
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE a (b)")
        other.execute("BEGIN IMMEDIATE")
        pauses: list[float] = []

        def sleep(pause_s: float) -> None:
            pauses.append(pause_s)
            other.execute("COMMIT")

        monkeypatch.setattr("budget.records.sqlite.time.sleep", sleep)
        with closing(open_file(path, busy_s=5.0)) as db:
            assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert len(pauses) == 1


def test_gives_up_on_a_file_that_stays_busy(tmp_path: Path) -> None:
    """After `busy_s` it says that the file is locked, and a connection is not left behind."""
    path = tmp_path / "a.db"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("CREATE TABLE a (b)")
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            open_file(path, busy_s=0.0)


async def test_the_file_of_budgets_is_for_its_user_only(tmp_path: Path) -> None:
    """Nobody else may read who spent what, not in the write-ahead log either."""
    store = SqliteStore(tmp_path / "a.db", clock=Clock())
    await store.sweep(10.0)
    files = list(tmp_path.iterdir())
    assert {path.name for path in files} == {"a.db", "a.db-wal", "a.db-shm"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    await store.close()


def test_a_file_that_is_there_keeps_its_mode_and_its_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not opened besides SQLite: to close it would free what other connections of this process have locked."""
    path = tmp_path / "a.db"
    open_file(path, busy_s=1.0).close()
    path.chmod(0o640)
    closed: list[Any] = []
    monkeypatch.setattr("budget.records.sqlite.os.close", closed.append)
    open_file(path, busy_s=1.0).close()
    assert (closed, stat.S_IMODE(path.stat().st_mode)) == ([], 0o640)


@pytest.mark.e2e
def test_processes_that_begin_together_open_fresh_files(tmp_path: Path) -> None:
    """Workers that start at the same moment all have the store, whoever comes first."""
    command = [sys.executable, "-c", WORKER, str(tmp_path), str(FILES)]
    running = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    assert errors == [""] * PROCESSES
