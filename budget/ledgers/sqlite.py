"""The store in one SQLite file: durable, and shared by the worker processes of one machine.

Owns: the file, its one writing thread per process, and transactions: calls wait in a queue, and whatever waits is
carried out in order and committed as a group, off the event loop. Several processes take turns by SQLite's own lock;
what is only read, and may be long, is read beside them.
Does not own: what a call does to the tables (sqlite_books.py).

Durability: in WAL mode a commit survives the death of the process, `kill -9` included. With `synchronous=normal` a
loss of power may take the last commits with it, never the consistency of the file; with `full` each group is on disk
before anybody is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, NamedTuple, TypeVar, cast

from budget.errors import BudgetError, StoreUnreachable
from budget.ledger import Amounts, LedgerHealth, Standing, UsageRow
from budget.ledgers.sqlite_books import SCHEMA, VERSION, Sheet, read_health, read_usage
from budget.ledgers.store import Booking, Settlement
from budget.records.sqlite import open_file

T = TypeVar("T")
MOST_CALLS = 128  # of one transaction: other processes want to write, too
MOST_SWEEPS = 20  # transactions; the next sweep goes on
BUSY_S = 2.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.0001, 0.001  # between two attempts to get it


class Call(NamedTuple):
    """One call of the store, waiting for its turn."""

    work: Callable[[Sheet], Any]
    future: asyncio.Future[Any]


class SqliteStore:
    """See budget.ledgers.store.Store. To be used from one event loop.

    Args:
        path: of the file; it is made, for this user only, and `-wal` and `-shm` beside it. On a local disk.
        clock: epoch seconds, the same for all processes.
        synchronous: what a loss of power may take: the last commits (`normal`), or nothing (`full`).
        busy_s: how long other processes may keep the file to themselves.

    Raises: StoreUnreachable when the file cannot be used.
    """

    is_prompt = False

    def __init__(
        self,
        path: Path,
        *,
        clock: Callable[[], float],
        synchronous: Literal["normal", "full"] = "normal",
        busy_s: float = BUSY_S,
    ) -> None:
        self._path = path
        self._clock = clock
        self._busy_s = busy_s
        self._calls: SimpleQueue[Call | None] = SimpleQueue()
        self._is_closed = False
        try:
            self._connection = self._open(synchronous)
        except (OSError, sqlite3.Error) as exc:
            raise StoreUnreachable(f"{path} cannot be used as a store: {exc}.") from exc
        self._sheet = Sheet(self._connection)
        self._thread = threading.Thread(target=self._work, name="thinkgate-sqlite", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------------------------- calls

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        """See Store."""
        return await self._call(lambda sheet: sheet.take(booking, lease_s, is_certain=is_certain))

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:  # noqa: ARG002  # the ceiling says it
        """See Store."""
        return await self._call(lambda sheet: sheet.extend(booking))

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """See Store."""
        return self._call(lambda sheet: sheet.settle(settlements))

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        """See Store."""
        return await self._call(lambda sheet: sheet.report(progress, lease_s))

    async def sweep(self, lease_s: float) -> int:
        """See Store."""
        swept = 0
        for _ in range(MOST_SWEEPS):
            late, is_more = await self._call(lambda sheet: sheet.sweep(lease_s))
            swept += late
            if not is_more:
                break
        return swept

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """See Store."""
        return await self._read(lambda connection: read_usage(connection, first_day, last_day))

    async def health(self) -> LedgerHealth:
        """See Store."""
        try:
            return await self._read(read_health)
        except StoreUnreachable as exc:
            return LedgerHealth(kind="sqlite", is_reachable=False, holds=0, held=Amounts(), detail=str(exc))

    async def close(self) -> None:
        """Carry out what waits, and close the file."""
        if not self._is_closed:
            self._is_closed = True
            self._calls.put(None)
            await asyncio.to_thread(self._thread.join)

    def _call(self, work: Callable[[Sheet], T]) -> asyncio.Future[T]:
        """In line from now on."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._is_closed:
            future.set_exception(StoreUnreachable("The budget store is closed."))
        else:
            self._calls.put(Call(work, future))
        return future

    async def _read(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """What a connection of its own finds after all that was called before; it keeps nobody from writing."""
        await self._call(lambda _: None)
        return await asyncio.to_thread(self._read_apart, read)

    def _read_apart(self, read: Callable[[sqlite3.Connection], T]) -> T:
        try:
            with closing(sqlite3.connect(f"{self._path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
                return read(connection)
        except sqlite3.Error as exc:
            raise StoreUnreachable(f"{self._path} cannot be read: {exc}.") from exc

    # ------------------------------------------------------------------------------------ the writing thread

    def _work(self) -> None:
        is_open = True
        while is_open:
            calls, is_open = self._waiting()
            if calls:
                outcomes = self._carry_out(calls)
                with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                    calls[0].future.get_loop().call_soon_threadsafe(_tell, calls, outcomes)
        self._connection.close()

    def _waiting(self) -> tuple[list[Call], bool]:
        """All calls that wait, up to MOST_CALLS; False when the store was closed after them."""
        calls: list[Call] = []
        call = self._calls.get()
        while call is not None:
            calls.append(call)
            if len(calls) == MOST_CALLS:
                return calls, True
            try:
                call = self._calls.get_nowait()
            except Empty:
                return calls, True
        return calls, False

    def _carry_out(self, calls: list[Call]) -> list[Any]:
        """The result of each call, or its exception; all in one transaction, unless one has a bug."""
        try:
            return self._transaction(calls)
        except sqlite3.Error as exc:
            return [StoreUnreachable(f"{self._path} cannot be written: {exc}.") for _ in calls]
        except Exception as exc:  # noqa: BLE001  # a bug in one call must not take the others along
            if len(calls) == 1:
                return [exc]
            return [outcome for call in calls for outcome in self._carry_out([call])]

    def _transaction(self, calls: list[Call]) -> list[Any]:
        connection = self._connection
        self._begin(self._connection)
        try:
            sheet, outcomes = self._sheet, []
            sheet.begin(self._clock())
            for call in calls:
                try:  # whoever does not wait any more has sent a release after it
                    outcomes.append(None if call.future.cancelled() else call.work(sheet))
                except BudgetError as exc:
                    outcomes.append(exc)
            sheet.close()
            connection.execute("COMMIT")
        except BaseException:
            self._sheet.forget()
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return outcomes

    def _begin(self, connection: sqlite3.Connection) -> None:
        """Begin to write, as soon as no other process does. Raises: sqlite3.OperationalError after `busy_s`.

        SQLite's own waiting doubles its pauses up to 100 ms, and so starves whoever has waited longest.
        """
        end_s = time.monotonic() + self._busy_s
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= end_s:
                    raise
                time.sleep(random.uniform(SHORTEST_PAUSE_S, LONGEST_PAUSE_S))  # noqa: S311  # to not meet again
            else:
                return

    def _open(self, synchronous: str) -> sqlite3.Connection:
        """Open the file and see that it has our tables. Raises: OSError, sqlite3.Error, StoreUnreachable."""
        connection = open_file(self._path, busy_s=self._busy_s)
        try:
            self._prepare(connection, synchronous)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection, synchronous: str) -> None:
        connection.execute(f"PRAGMA synchronous = {synchronous}")
        version = _version_of(connection)
        if version == 0:  # else nothing is written, and so nobody waited for: others may be busy with the file
            self._begin(connection)
            version = _version_of(connection)
            if version == 0:
                for statement in SCHEMA:
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        if version not in {0, VERSION}:
            raise StoreUnreachable(f"{self._path} was written by another version of thinkgate (schema {version}).")
        connection.execute("PRAGMA busy_timeout = 0")


def _version_of(connection: sqlite3.Connection) -> int:
    """Of the schema; 0 where there is none."""
    return cast("int", connection.execute("PRAGMA user_version").fetchone()[0])


def _tell(calls: list[Call], outcomes: list[Any]) -> None:
    for call, outcome in zip(calls, outcomes, strict=True):
        if call.future.done():
            continue
        if isinstance(outcome, Exception):
            call.future.set_exception(outcome)
        else:
            call.future.set_result(outcome)
