"""What is particular about the store in SQLite: its file, its transactions, what it forgets."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from budget.errors import StoreUnreachable
from budget.ledger import Amounts
from budget.ledgers import sqlite
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.sqlite import SqliteStore
from budget.ledgers.sqlite_books import ENDED, ENDED_KEPT_S, SWEPT, SWEPT_KEPT_S, VERSION
from tests.budget.clocks import TEN, Clock, tokens
from tests.budget.places import SqlitePlace


def rows(place: SqlitePlace, query: str) -> list[Any]:
    """What another connection reads."""
    with closing(sqlite3.connect(place.folder / "thinkgate.db")) as connection:
        return connection.execute(query).fetchall()


@pytest.mark.parametrize(("synchronous", "level"), [("normal", 1), ("full", 2)])
async def test_the_file_is_kept_as_configured(tmp_path: Path, synchronous: Any, level: int) -> None:
    """The file is in WAL mode, and commits are synchronous as asked for."""
    store = SqliteStore(tmp_path / "a.db", clock=Clock(), synchronous=synchronous)
    found = await store._call(lambda sheet: sheet._connection.execute("PRAGMA synchronous").fetchone())
    mode = await store._call(lambda sheet: sheet._connection.execute("PRAGMA journal_mode").fetchone())
    assert (found, mode) == ((level,), ("wal",))
    await store.close()


async def test_a_file_that_others_write_is_opened_all_the_same(tmp_path: Path) -> None:
    """A process that joins busy ones waits for none of them: the tables are there already."""
    path = tmp_path / "a.db"
    await SqliteStore(path, clock=Clock()).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        store = SqliteStore(path, clock=Clock(), busy_s=0.0)
        other.execute("COMMIT")
    await store.close()


@pytest.mark.parametrize("wrong", ["no folder", "no database", "another version"])
def test_a_file_that_cannot_be_used_is_said_at_the_start(tmp_path: Path, wrong: str) -> None:
    """A missing folder, a file of something else and a schema of another version are named with the path."""
    path = tmp_path / "a.db"
    if wrong == "no folder":
        path = tmp_path / "missing" / "a.db"
    elif wrong == "no database":
        path.write_text("something else, and long enough to not be taken for an empty database\n" * 20)
    else:
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    with pytest.raises(StoreUnreachable, match=r"a\.db"):
        SqliteStore(path, clock=Clock())


async def test_what_waits_is_committed_as_a_group(tmp_path: Path) -> None:
    """While one transaction runs, all calls that arrive wait together and take one more."""
    place = SqlitePlace(tmp_path)
    ledger = place.ledger(tokens(1000))
    seen: list[str] = []
    place.stores[0]._connection.set_trace_callback(seen.append)  # type: ignore[attr-defined]  # it is SQLite's
    holds = [ledger.hold(["key:a"], TEN) for _ in range(100)]
    await asyncio.gather(*(hold.__aenter__() for hold in holds))
    assert seen.count("COMMIT") <= 10
    assert (await place.books())["key:a", "tokens", "hour"].popitem()[1] == (0, 1000, 0)
    await place.close()


async def test_a_bug_in_one_call_does_not_take_the_others_along(tmp_path: Path) -> None:
    """Of calls in one transaction only the one that fails in an unforeseen way has failed."""
    place = SqlitePlace(tmp_path)
    ledger = place.ledger(tokens(1000))
    store = place.stores[0]
    assert isinstance(store, SqliteStore)
    good = [asyncio.create_task(ledger.hold(["key:a"], TEN).__aenter__()) for _ in range(3)]
    await asyncio.sleep(0)
    bad = store._call(lambda sheet: sheet._connection.execute("SELECT 1").fetchone()[1])
    with pytest.raises(IndexError):
        await bad
    await asyncio.gather(*good)
    assert (await place.books())["key:a", "tokens", "hour"].popitem()[1] == (0, 30, 0)
    await place.close()


async def test_a_file_that_another_process_keeps_to_itself_is_unreachable(tmp_path: Path) -> None:
    """After `busy_s` a call fails, nothing is held, and the next one works when the file is free again."""
    path = tmp_path / "a.db"
    store = SqliteStore(path, clock=Clock(), busy_s=0.0)
    ledger = LeasedLedger(store, [tokens(10)], clock=Clock(), timeout_s=0.0)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreUnreachable):
            await ledger.hold(["key:a"], TEN).__aenter__()
        health = await ledger.health()
        assert not health.is_reachable
        assert "locked" in health.detail
        other.execute("ROLLBACK")
    await ledger.beat()
    assert (await ledger.health()).holds == 0
    async with LeasedLedger(store, [tokens(10)], clock=Clock()).hold(["key:a"], TEN):
        pass
    await ledger.close()


async def test_a_closed_store_takes_nothing_any_more(tmp_path: Path) -> None:
    """Calls after the close fail at once, instead of waiting for a thread that has ended; a second close is none."""
    store = SqliteStore(tmp_path / "a.db", clock=Clock())
    await store.close()
    await store.close()
    with pytest.raises(StoreUnreachable):
        await store.sweep(10.0)
    assert not (await store.health()).is_reachable


async def test_settled_holds_are_remembered_for_two_minutes(tmp_path: Path) -> None:
    """So long a settlement may be told again; a sweep then forgets the hold, and its books stay."""
    place = SqlitePlace(tmp_path)
    ledger = place.ledger(tokens(100))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    await ledger.health()
    place.clock.now += ENDED_KEPT_S
    await ledger.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(1,)]
    place.clock.now += 1
    await ledger.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(0,)]
    assert rows(place, "SELECT settled FROM books") == [(10,)]
    await place.close()


async def test_swept_holds_are_remembered_for_a_day(tmp_path: Path) -> None:
    """So long an owner that was only paused may correct what was swept; later, its settlement changes nothing."""
    place = SqlitePlace(tmp_path)
    paused, other = place.ledger(tokens(100)), place.ledger()
    hold = await paused.hold(["key:a"], TEN).__aenter__()
    hold.report(Amounts(tokens=3))
    await paused.beat()
    place.clock.now += place.lease_s
    await other.beat()
    place.clock.now += SWEPT_KEPT_S
    await other.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(1,)]
    place.clock.now += 1
    await other.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(0,)]
    hold.report(TEN)
    await hold.__aexit__(None, None, None)
    await paused.health()
    assert rows(place, "SELECT settled, held FROM books") == [(3, 0)]
    await place.close()


def fill(place: SqlitePlace, number: int, state: int) -> None:
    """Holds that have ended just now."""
    row = "printf('%05d', value), '', ?, 0, ?, 0, '[]', '', '[]', 0, 0, 0, 0, 0, 0"
    numbers = "WITH RECURSIVE numbers(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < ?)"
    with closing(sqlite3.connect(place.address)) as connection, connection:
        connection.execute(
            f"{numbers} INSERT INTO holds SELECT {row} FROM numbers",
            (number, state, place.clock.now),
        )


@pytest.mark.parametrize(("state", "kept_s"), [(ENDED, ENDED_KEPT_S), (SWEPT, SWEPT_KEPT_S)])
async def test_a_sweep_forgets_all_that_is_old(tmp_path: Path, state: int, kept_s: float) -> None:
    """However many requests a second end, the holds that are kept do not grow without bound."""
    place = SqlitePlace(tmp_path)
    ledger = place.ledger()
    fill(place, 5500, state)
    place.clock.now += kept_s + 1
    await ledger.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(0,)]
    await place.close()


async def test_a_sweep_of_one_beat_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many, the next beat goes on: other calls are not kept waiting, whatever there is."""
    monkeypatch.setattr(sqlite, "MOST_SWEEPS", 2)
    place = SqlitePlace(tmp_path)
    ledger = place.ledger()
    fill(place, 2500, ENDED)
    place.clock.now += ENDED_KEPT_S + 1
    await ledger.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(500,)]
    await ledger.beat()
    assert rows(place, "SELECT count(*) FROM holds") == [(0,)]
    await place.close()


async def test_all_holds_of_the_dead_are_swept_at_once(tmp_path: Path) -> None:
    """Of a process with thousands of streams that died, none keeps its room for longer than the others."""
    place = SqlitePlace(tmp_path)
    dying, heir = place.ledger(), place.ledger()
    await asyncio.gather(*(dying.hold(["key:a"], TEN).__aenter__() for _ in range(1500)))
    await place.kill(dying)
    place.clock.now += place.lease_s
    await heir.beat()
    assert (heir.figures().swept, (await heir.health()).holds) == (1500, 0)
    await place.close()


async def test_what_was_swept_costs_later_sweeps_nothing(tmp_path: Path) -> None:
    """Swept holds, which are kept for a day, are not read by every sweep of that day."""
    place = SqlitePlace(tmp_path)
    ledger = place.ledger()
    store = place.stores[0]
    assert isinstance(store, SqliteStore)
    steps: list[int] = []

    async def sweep() -> int:
        steps.clear()
        await ledger.beat()
        return len(steps)

    store._connection.set_progress_handler(lambda: steps.append(1), 10)
    before = await sweep()
    fill(place, 2000, SWEPT)
    place.clock.now += ENDED_KEPT_S + 1
    assert await sweep() <= before + 10
    await place.close()
