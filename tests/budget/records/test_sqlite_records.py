"""What is particular to records in a file: it stays, it is private, it is shared, and it can fail."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from budget.errors import RecordsUnreachable
from budget.records.sqlite import SqliteRecords
from tests.budget.records.stores import Clock

ROOT = Path(__file__).parents[3]
PROCESSES, CLAIMS, COUNTS = 4, 60, 40
WORKER = """
import asyncio, json, sys, time
from pathlib import Path
from budget.errors import Conflict
from budget.records.port import Note
from budget.records.sqlite import SqliteRecords

async def main(path, claims, counts):
    records = SqliteRecords(Path(path), clock=time.time)
    won, versions = [], []
    for number in range(claims):
        try:
            versions.append(await records.put(f"claim/{number}", b"", expect=0, ttl_s=60))
            won.append(number)
        except Conflict:
            pass
    for _ in range(counts):
        while True:
            record = await records.get("count")
            count, version = (int(record.value), record.version) if record else (0, 0)
            try:
                note = Note("counted", b"%d" % (count + 1))
                versions.append(await records.put("count", b"%d" % (count + 1), expect=version, note=note))
                break
            except Conflict:
                pass
    await records.close()
    print(json.dumps({"won": won, "versions": versions}))

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


async def test_records_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    """What was put and appended is there when the file is opened again, versions going on where they were."""
    path, clock = tmp_path / "records.db", Clock()
    first = SqliteRecords(path, clock=clock)
    version = await first.put("a", b"1")
    await first.append("log", b"entry")
    await first.close()
    second = SqliteRecords(path, clock=clock)
    record = await second.get("a")
    assert record is not None
    assert (record.version, await second.log_size("log")) == (version, 1)
    assert await second.put("a", b"2") > version
    await second.close()


async def test_file_is_for_its_user_only(tmp_path: Path) -> None:
    """Nobody else may read what secrets are compared with, not in the write-ahead log either."""
    records = SqliteRecords(tmp_path / "records.db", clock=Clock())
    await records.put("a", b"1")
    files = list(tmp_path.iterdir())
    assert {path.name for path in files} == {"records.db", "records.db-wal", "records.db-shm"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    await records.close()


async def test_unusable_file_is_said_and_tried_again(tmp_path: Path) -> None:
    """A missing folder or a file that is no database is an error that names the file; once mended, all goes on."""
    path = tmp_path / "folder" / "records.db"
    records = SqliteRecords(path, clock=Clock())
    with pytest.raises(RecordsUnreachable, match=r"records\.db: .*No such file"):
        await records.get("a")
    path.parent.mkdir()
    path.write_bytes(b"this is not a database, but it is long enough to be looked at by one" * 20)
    with pytest.raises(RecordsUnreachable, match="not a database"):
        await records.get("a")
    path.unlink()
    assert await records.put("a", b"1") == 1
    await records.close()


async def test_a_failed_change_leaves_nothing(tmp_path: Path) -> None:
    """Where the file cannot be written, neither the record nor its version nor its note is there afterwards."""
    path = tmp_path / "records.db"
    records = SqliteRecords(path, clock=Clock())
    version = await records.put("a", b"1")
    with sqlite3.connect(path) as other:
        other.execute("CREATE TRIGGER broken BEFORE INSERT ON records BEGIN SELECT raise(ABORT, 'disk is full'); END")
    other.close()
    with pytest.raises(RecordsUnreachable, match="disk is full"):
        await records.put("b", b"2")
    with sqlite3.connect(path) as other:
        other.execute("DROP TRIGGER broken")
    other.close()
    assert await records.revision() == version
    assert await records.put("b", b"2") == version + 1
    await records.close()


async def test_event_loop_goes_on_while_another_process_writes(tmp_path: Path) -> None:
    """A change that waits for another's transaction waits in its thread, and is made when that is over."""
    path = tmp_path / "records.db"
    records = SqliteRecords(path, clock=Clock())
    await records.put("a", b"1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.ensure_future(records.put("a", b"2"))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not waiting.done()
    other.execute("COMMIT")
    other.close()
    assert await waiting == 2
    await records.close()


@pytest.mark.e2e
def test_processes_share_one_file(tmp_path: Path) -> None:
    """Processes that begin together on a new file: one wins each claim, no count is lost, the log has no gap."""
    path = tmp_path / "records.db"
    command = [sys.executable, "-c", WORKER, str(path), str(CLAIMS), str(COUNTS)]
    running = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(PROCESSES)]
    outputs = [process.communicate(timeout=60)[0] for process in running]
    assert [process.returncode for process in running] == [0] * PROCESSES
    answers = [json.loads(output) for output in outputs]
    assert sorted(number for answer in answers for number in answer["won"]) == list(range(CLAIMS))
    versions = [version for answer in answers for version in answer["versions"]]
    assert len(set(versions)) == len(versions) == CLAIMS + PROCESSES * COUNTS
    records = SqliteRecords(path, clock=Clock())

    async def read() -> tuple[bytes, list[tuple[int, bytes]]]:
        record = await records.get("count")
        assert record is not None
        log = await records.read_log("counted", after=0, limit=1000)
        await records.close()
        return record.value, log

    value, log = asyncio.run(read())
    assert value == b"%d" % (PROCESSES * COUNTS)
    assert log == [(number, b"%d" % number) for number in range(1, PROCESSES * COUNTS + 1)]


async def test_a_file_that_others_write_is_read_all_the_same(tmp_path: Path) -> None:
    """A process that joins busy ones waits for none of them: the tables are there already."""
    path = tmp_path / "records.db"
    first = SqliteRecords(path, clock=Clock())
    await first.put("a", b"1")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    second = SqliteRecords(path, clock=Clock())
    async with asyncio.timeout(2):
        record = await second.get("a")
    assert record is not None
    assert record.value == b"1"
    other.execute("COMMIT")
    other.close()
    for records in (first, second):
        await records.close()
