"""Records in an SQLite file, for one machine: durable, and shared by any number of processes on it.

Owns: the tables and their transactions; and how a file of SQLite is made and opened, that of the budgets
(ledgers/sqlite.py) too. Every statement runs in one thread of its own, off the event loop, and every
change in one `BEGIN IMMEDIATE` transaction. A change of a lasting record, or of a log, is on the disk before it is
answered; a change of a record with a time to live survives the process, but the last ones may be lost with the power.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from budget.errors import Conflict, RecordsUnreachable
from budget.records.port import Note, Record

Answer = TypeVar("Answer")

BUSY_S = 5.0  # how long one process waits for another's transaction
PAUSE_S = 0.01  # between two attempts to switch to WAL
PURGED_AT_ONCE = 200  # so that nobody waits long for the end of a purge
SCHEMA = (
    """CREATE TABLE IF NOT EXISTS records (
        key TEXT PRIMARY KEY, value BLOB NOT NULL, version INTEGER NOT NULL, ends_at REAL)""",
    "CREATE INDEX IF NOT EXISTS records_ending ON records (ends_at) WHERE ends_at IS NOT NULL",
    "CREATE INDEX IF NOT EXISTS records_lasting ON records (version) WHERE ends_at IS NULL",
    """CREATE TABLE IF NOT EXISTS entries (
        log TEXT NOT NULL, number INTEGER NOT NULL, entry BLOB NOT NULL, PRIMARY KEY (log, number))""",
    """CREATE TABLE IF NOT EXISTS counters (
        one INTEGER PRIMARY KEY CHECK (one = 1), sequence INTEGER NOT NULL, revision INTEGER NOT NULL)""",
    "INSERT OR IGNORE INTO counters VALUES (1, 0, 0)",
)


class SqliteRecords:
    """See budget.records.port.Records.

    Args:
        path: the file; made, for this user only, if it is not there.
        clock: seconds since the epoch; processes that share the file should agree on it.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="thinkgate-records")
        self._opened: sqlite3.Connection | None = None

    async def get(self, key: str) -> Record | None:
        """See the port. Raises: RecordsUnreachable."""
        query = "SELECT value, version FROM records WHERE key = ? AND (ends_at IS NULL OR ends_at > ?)"
        row = await self._run(lambda db: db.execute(query, (key, self._clock())).fetchone())
        return None if row is None else Record(*row)

    async def put(
        self, key: str, value: bytes, *, expect: int | None = None, ttl_s: float | None = None, note: Note | None = None
    ) -> int:
        """See the port. Raises: Conflict, RecordsUnreachable."""
        ends_at = None if ttl_s is None else self._clock() + ttl_s

        def write(db: sqlite3.Connection) -> int:
            with _change(db, synced=ends_at is None or note is not None):
                _check(db, key, expect, self._clock())
                version = _count(db, is_lasting=ends_at is None or _is_lasting(db, key))
                db.execute("REPLACE INTO records VALUES (?, ?, ?, ?)", (key, value, version, ends_at))
                _note(db, note)
                return version

        return await self._run(write)

    async def delete(self, key: str, *, expect: int | None = None, note: Note | None = None) -> bool:
        """See the port. Raises: Conflict, RecordsUnreachable."""

        def remove(db: sqlite3.Connection) -> bool:
            with _change(db, synced=True):
                _check(db, key, expect, self._clock())
                if not _version(db, key, self._clock()):
                    return False
                _count(db, is_lasting=_is_lasting(db, key))
                db.execute("DELETE FROM records WHERE key = ?", (key,))
                _note(db, note)
                return True

        return await self._run(remove)

    async def scan(self, prefix: str, *, after: int = 0) -> list[tuple[str, Record]]:
        """See the port. Raises: RecordsUnreachable."""

        def read(db: sqlite3.Connection) -> list[tuple[str, Record]]:
            rows = db.execute(
                "SELECT key, value, version FROM records WHERE ends_at IS NULL AND version > ?1"
                " AND substr(key, 1, length(?2)) = ?2",
                (after, prefix),
            )
            # Sorted here: to have them in order, SQLite would read all instead of those after that version.
            return sorted((key, Record(value, version)) for key, value, version in rows)

        return await self._run(read)

    async def append(self, log: str, entry: bytes) -> int:
        """See the port. Raises: RecordsUnreachable."""

        def write(db: sqlite3.Connection) -> int:
            with _change(db, synced=True):
                return _note(db, Note(log, entry))

        return await self._run(write)

    async def read_log(self, log: str, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """See the port. Raises: RecordsUnreachable."""
        query = "SELECT number, entry FROM entries WHERE log = ? AND number > ? ORDER BY number LIMIT ?"
        return await self._run(lambda db: list(db.execute(query, (log, after, limit))))

    async def log_size(self, log: str) -> int:
        """See the port. Raises: RecordsUnreachable."""
        return await self._run(lambda db: _log_size(db, log))

    async def revision(self) -> int:
        """See the port. Raises: RecordsUnreachable."""
        return await self._run(lambda db: int(db.execute("SELECT revision FROM counters").fetchone()[0]))

    async def purge(self) -> int:
        """See the port; some at a time, so that other changes get in between. Raises: RecordsUnreachable."""
        statement = "DELETE FROM records WHERE key IN (SELECT key FROM records WHERE ends_at <= ? LIMIT ?)"

        def free(db: sqlite3.Connection) -> int:
            with _change(db, synced=False):
                return db.execute(statement, (self._clock(), PURGED_AT_ONCE)).rowcount

        total = 0
        while freed := await self._run(free):
            total += freed
        return total

    async def close(self) -> None:
        """Close the file, after what still runs."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shut)
        self._thread.shutdown()

    async def _run(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        """`work` in the thread of the records."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._work, work)

    def _work(self, work: Callable[[sqlite3.Connection], Answer]) -> Answer:
        try:
            if self._opened is None:
                self._opened = _open(self._path)
            return work(self._opened)
        except (sqlite3.Error, OSError) as exc:
            self._shut()  # the next call opens it anew
            raise RecordsUnreachable(f"{self._path}: {exc}") from exc

    def _shut(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None


def open_file(path: Path, *, busy_s: float) -> sqlite3.Connection:
    """A connection, in WAL mode, to the file at `path`, which is made, for this user only, if it is not there.

    Transactions are the caller's. Any thread may use it, one at a time. For another process's transaction it waits
    `busy_s` seconds, now and later.

    Raises: OSError, sqlite3.Error.
    """
    # SQLite itself would make it readable for everybody. Where it is there already it is not opened here: to close it
    # again would take away the locks that other connections of this process have on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    db = sqlite3.connect(path, timeout=busy_s, isolation_level=None, check_same_thread=False)
    try:
        _use_wal(db, busy_s)
    except BaseException:
        db.close()
        raise
    return db


def _use_wal(db: sqlite3.Connection, busy_s: float) -> None:
    """Switch to a write-ahead log, for which SQLite does not wait by itself where processes start together."""
    give_up_at = time.monotonic() + busy_s
    while True:
        try:
            with closing(db.execute("PRAGMA journal_mode = WAL")):
                return
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > give_up_at:
                raise
            time.sleep(PAUSE_S)


def _open(path: Path) -> sqlite3.Connection:
    """A connection to the file, with its tables. Raises: sqlite3.Error, OSError."""
    db = open_file(path, busy_s=BUSY_S)
    try:
        # They are made in one step, so where one is all are; then nobody who is writing is waited for.
        if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'counters'").fetchone() is None:
            with _change(db, synced=True):
                for statement in SCHEMA:
                    db.execute(statement)
    except BaseException:
        db.close()
        raise
    return db


@contextmanager
def _change(db: sqlite3.Connection, *, synced: bool) -> Iterator[None]:
    """One transaction that writes; `synced`: it is on the disk when the block is left."""
    db.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        db.execute("ROLLBACK")
        raise
    try:
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _version(db: sqlite3.Connection, key: str, now: float) -> int:
    """The version of a record; 0 if there is none."""
    query = "SELECT version FROM records WHERE key = ? AND (ends_at IS NULL OR ends_at > ?)"
    row = db.execute(query, (key, now)).fetchone()
    return 0 if row is None else int(row[0])


def _is_lasting(db: sqlite3.Connection, key: str) -> bool:
    return db.execute("SELECT 1 FROM records WHERE key = ? AND ends_at IS NULL", (key,)).fetchone() is not None


def _check(db: sqlite3.Connection, key: str, expect: int | None, now: float) -> None:
    """Raises: Conflict when the record is not at the version that is expected."""
    if expect is not None and (version := _version(db, key, now)) != expect:
        raise Conflict(key, version)


def _count(db: sqlite3.Connection, *, is_lasting: bool) -> int:
    """The next version."""
    (version,) = db.execute(
        "UPDATE counters SET sequence = sequence + 1,"
        " revision = CASE WHEN ? THEN sequence + 1 ELSE revision END RETURNING sequence",
        (is_lasting,),
    ).fetchone()
    return int(version)


def _log_size(db: sqlite3.Connection, log: str) -> int:
    return int(db.execute("SELECT coalesce(max(number), 0) FROM entries WHERE log = ?", (log,)).fetchone()[0])


def _note(db: sqlite3.Connection, note: Note | None) -> int:
    """Append; returns the entry's number."""
    if note is None:
        return 0
    number = _log_size(db, note.log) + 1
    db.execute("INSERT INTO entries VALUES (?, ?, ?)", (note.log, number, note.entry))
    return number
