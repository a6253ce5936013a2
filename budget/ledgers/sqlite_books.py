"""What a store does, on the tables of one SQLite database, within one transaction.

Owns: the schema, every operation of a store on a `Sheet`, which is the accounts and usage that a transaction looks at,
changed by the rules of budget/accounts.py and written once when it ends, and what is only read. Does not own:
transactions, threads (sqlite.py).
Invariant: a row of `books` is one calendar window of one limit, or one rate; no row is ever reset.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
from collections.abc import Iterable, Sequence
from typing import cast

import msgspec

from budget.accounts import Account, Books, CalendarAccount, RateAccount, hold_in
from budget.books import KEPT_DAYS, RATES, window_end
from budget.errors import HoldEnded, HoldRefused
from budget.ledger import Amounts, LedgerHealth, Limit, Standing, Unit, UsageRow, Window
from budget.ledgers.store import Booking, Settlement

VERSION = 1
SCHEMA = (
    """CREATE TABLE books (
        scope TEXT NOT NULL, unit TEXT NOT NULL, window TEXT NOT NULL, start_s INTEGER NOT NULL,
        amount INTEGER NOT NULL, settled INTEGER NOT NULL, held INTEGER NOT NULL, debt INTEGER NOT NULL,
        level REAL NOT NULL, seen_s REAL NOT NULL,
        PRIMARY KEY (scope, unit, window, start_s)
    ) WITHOUT ROWID""",
    """CREATE TABLE holds (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, state INTEGER NOT NULL, lease_end_s REAL NOT NULL, ended_s REAL,
        day INTEGER NOT NULL, scopes TEXT NOT NULL, mode TEXT NOT NULL, books TEXT NOT NULL,
        tokens INTEGER NOT NULL, thinking_tokens INTEGER NOT NULL, nano_usd INTEGER NOT NULL,
        used_tokens INTEGER NOT NULL, used_thinking_tokens INTEGER NOT NULL, used_nano_usd INTEGER NOT NULL
    ) WITHOUT ROWID""",
    "CREATE INDEX open_holds ON holds (lease_end_s) WHERE state = 0",
    "CREATE INDEX swept_holds ON holds (ended_s) WHERE state = 1",
    "CREATE INDEX ended_holds ON holds (ended_s) WHERE state = 2",
    """CREATE TABLE usage (
        day INTEGER NOT NULL, scopes TEXT NOT NULL, mode TEXT NOT NULL, requests INTEGER NOT NULL,
        tokens INTEGER NOT NULL, thinking_tokens INTEGER NOT NULL, nano_usd INTEGER NOT NULL,
        PRIMARY KEY (day, scopes, mode)
    ) WITHOUT ROWID""",
)
OPEN, SWEPT, ENDED = range(3)
ENDED_KEPT_S = 120.0  # that what is told again is not counted again
SWEPT_KEPT_S = 86_400.0  # for owners that were only paused: their own settlement is the better one
FORGET = (  # by the state's own index, so that those kept for longer are not read each time
    ("DELETE FROM holds WHERE id IN (SELECT id FROM holds WHERE state = 2 AND ended_s < ? LIMIT ?)", ENDED_KEPT_S),
    ("DELETE FROM holds WHERE id IN (SELECT id FROM holds WHERE state = 1 AND ended_s < ? LIMIT ?)", SWEPT_KEPT_S),
)
MOST_KEPT = 10_000  # accounts in memory
MOST_AT_ONCE = 1000  # of what a sweep does in one transaction: others want to write, too
DAY_S = 86_400
EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()
ENDED_MESSAGE = "The hold has ended: its lease was over, and it was settled for its owner."

Key = tuple[str, Unit, str]
Place = tuple[str, Unit, str, int]  # a key, and when the window began
_places = msgspec.json.Decoder(list[Place])
_scopes = msgspec.json.Decoder(tuple[str, ...])


class Row(msgspec.Struct):
    """A hold as it is stored."""

    id: str
    state: int
    day: int
    scopes: str
    mode: str
    places: list[Place]
    ceiling: Amounts
    used: Amounts


class Sheet:
    """A connection's view of the tables, between `begin` and `close` of each transaction.

    Accounts are read once and kept until another connection writes.

    Args:
        connection: to the database.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._now_s = 0.0
        self._version = 0
        self._accounts: dict[Key, Account] = {}
        self._stored: dict[Key, set[int]] = {}
        self._changed: set[tuple[Key, Books]] = set()
        self._usage: dict[tuple[int, str, str], list[int]] = {}

    def begin(self, now_s: float) -> None:
        """A transaction has begun at `now_s`, in epoch seconds."""
        self._now_s = now_s
        (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        if version != self._version or len(self._accounts) > MOST_KEPT:
            self.forget()
            self._version = version

    def close(self) -> None:
        """Write down what changed; the transaction may be committed."""
        self._write_books()
        self._connection.executemany(
            "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " requests = requests + excluded.requests, tokens = tokens + excluded.tokens,"
            " thinking_tokens = thinking_tokens + excluded.thinking_tokens, nano_usd = nano_usd + excluded.nano_usd",
            [(*key, *sums) for key, sums in self._usage.items()],
        )
        self._usage.clear()

    def forget(self) -> None:
        """What was read or changed counts no more: others have written, or the transaction was rolled back."""
        for kept in (self._accounts, self._stored, self._changed, self._usage):
            kept.clear()

    # ------------------------------------------------------------------------------------- what a store does

    def take(self, booking: Booking, lease_s: float, *, is_certain: bool) -> list[Standing]:
        """See Store.take."""
        now_s, row = self._now_s, self._hold(booking.hold_id)
        if row is not None:
            if row.state != OPEN:
                raise HoldEnded(ENDED_MESSAGE)
            return [account.standing(page, now_s) for _, account, page in self._held_in(row, booking.limits)]
        keys = [_key(limit) for limit in booking.limits]
        accounts = [self._account(key, limit) for key, limit in zip(keys, booking.limits, strict=True)]
        pages = [account.turn(now_s) for account in accounts]
        if is_certain:
            need = booking.ceiling.by_unit()
            for account, page in zip(accounts, pages, strict=True):
                account.take(page, now_s, need[account.unit])
        else:
            self._hold_in(accounts, pages, booking.ceiling.by_unit())
        self._changed.update(zip(keys, pages, strict=True))
        places = [(*key, page.start_s) for key, page in zip(keys, pages, strict=True)]
        self._insert(booking, OPEN, places, now_s + lease_s)
        return [account.standing(page, now_s) for account, page in zip(accounts, pages, strict=True)]

    def extend(self, booking: Booking) -> list[Standing]:
        """See Store.extend."""
        row = self._hold(booking.hold_id)
        if row is None or row.state != OPEN:
            raise HoldEnded(ENDED_MESSAGE)
        held = self._held_in(row, booking.limits)
        accounts, pages = [account for _, account, _ in held], [page for _, _, page in held]
        more = booking.ceiling.beyond(row.ceiling)
        if more != Amounts():
            self._hold_in(accounts, pages, more.by_unit(requests=0))
            self._changed.update((key, page) for key, _, page in held)
            ceiling = row.ceiling.plus(more)
            self._connection.execute(
                "UPDATE holds SET tokens = ?, thinking_tokens = ?, nano_usd = ? WHERE id = ?",
                (ceiling.tokens, ceiling.thinking_tokens, ceiling.nano_usd, row.id),
            )
        return [account.standing(page, self._now_s) for account, page in zip(accounts, pages, strict=True)]

    def settle(self, settlements: Iterable[Settlement]) -> None:
        """See Store.settle; a hold that is unknown was settled before."""
        for one in settlements:
            row = self._hold(one.booking.hold_id)
            if row is not None:
                self._end(row, one.used, ENDED, was_taken=one.was_taken)
            elif not one.was_taken:  # should its take arrive after all, it finds this
                self._insert(one.booking, ENDED, [], 0.0)

    def report(self, progress: Iterable[tuple[str, Amounts]], lease_s: float) -> list[str]:
        """See Store.report; nothing is ever lost."""
        lease_end_s = self._now_s + lease_s
        self._connection.executemany(
            "UPDATE holds SET lease_end_s = ?, used_tokens = ?, used_thinking_tokens = ?, used_nano_usd = ?"
            " WHERE id = ? AND state = 0",
            [(lease_end_s, u.tokens, u.thinking_tokens, u.nano_usd, hold_id) for hold_id, u in progress],
        )
        return []

    def sweep(self, lease_s: float) -> tuple[int, bool]:
        """See Store.sweep; also forgets what nobody will ask for any more. Returns: besides, whether there is more."""
        execute, now_s = self._connection.execute, self._now_s
        execute("UPDATE holds SET lease_end_s = ?1 WHERE state = 0 AND lease_end_s > ?1", (now_s + lease_s,))
        over = execute("SELECT id FROM holds WHERE state = 0 AND lease_end_s <= ? LIMIT ?", (now_s, MOST_AT_ONCE))
        rows = [self._hold(hold_id) for (hold_id,) in over.fetchall()]
        for row in rows:
            assert row is not None
            self._end(row, row.used, SWEPT)
        forgotten = [execute(query, (now_s - kept_s, MOST_AT_ONCE)).rowcount for query, kept_s in FORGET]
        execute("DELETE FROM usage WHERE day <= ?", (now_s // DAY_S - KEPT_DAYS,))
        return len(rows), max(len(rows), *forgotten) == MOST_AT_ONCE

    # ------------------------------------------------------------------------------------------------ accounts

    def _account(self, key: Key, limit: Limit | None = None) -> Account:
        """An account as stored, under `limit` if it is known."""
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = self._read(key)
        if limit is not None:
            account.limit = limit
        if isinstance(account, RateAccount) and self._now_s < account.seen_s:
            account.seen_s = self._now_s  # the clock was set back: noted also by a hold that is refused
            self._changed.add((key, account.turn(self._now_s)))
        return account

    def _read(self, key: Key) -> Account:
        scope, unit, label = key
        rows = self._connection.execute(
            "SELECT start_s, amount, settled, held, debt, level, seen_s FROM books"
            " WHERE scope = ? AND unit = ? AND window = ?",
            key,
        ).fetchall()
        window = cast("Window | None", label or None)
        limit = Limit(scope=scope, unit=unit, window=window, amount=max((row[1] for row in rows), default=1))
        self._stored[key] = {row[0] for row in rows}
        if window in RATES:
            return RateAccount(limit, *(rows[0][5:] if rows else ()))
        return CalendarAccount(limit, [Books(row[0], window_end(window, row[0]), *row[2:5]) for row in rows])

    def _write_books(self) -> None:
        rows, gone = [], []
        for key, page in self._changed:
            account = self._accounts[key]
            if isinstance(account, RateAccount):
                rows.append((*key, 0, account.rate.amount, 0, 0, 0, account.level, account.seen_s))
            else:
                counts = (page.settled, page.held, page.debt)
                rows.append((*key, page.start_s, account.limit.amount, *counts, 0.0, 0.0))
                gone += [(*key, start_s) for start_s in self._stored[key] - account.books.keys()]
                self._stored[key] = set(account.books)
        self._changed.clear()
        self._connection.executemany(
            "INSERT INTO books VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
            " amount = excluded.amount, settled = excluded.settled, held = excluded.held, debt = excluded.debt,"
            " level = excluded.level, seen_s = excluded.seen_s",
            rows,
        )
        if gone:
            self._connection.executemany(
                "DELETE FROM books WHERE scope = ? AND unit = ? AND window = ? AND start_s = ?", gone
            )

    def _hold_in(self, accounts: Sequence[Account], pages: Sequence[Books], need: dict[Unit, int]) -> None:
        try:
            hold_in(accounts, pages, need, self._now_s)
        except HoldRefused as exc:
            exc.standings = [a.standing(page, self._now_s) for a, page in zip(accounts, pages, strict=True)]
            raise

    # --------------------------------------------------------------------------------------------------- holds

    def _hold(self, hold_id: str) -> Row | None:
        found = self._connection.execute(
            "SELECT state, day, scopes, mode, books, tokens, thinking_tokens, nano_usd,"
            " used_tokens, used_thinking_tokens, used_nano_usd FROM holds WHERE id = ?",
            (hold_id,),
        ).fetchone()
        if found is None:
            return None
        state, day, scopes, mode, places, *amounts = found
        ceiling = Amounts(tokens=amounts[0], thinking_tokens=amounts[1], nano_usd=amounts[2])
        used = Amounts(tokens=amounts[3], thinking_tokens=amounts[4], nano_usd=amounts[5])
        return Row(hold_id, state, day, scopes, mode, _places.decode(places), ceiling, used)

    def _held_in(self, row: Row, limits: Iterable[Limit] = ()) -> list[tuple[Key, Account, Books]]:
        """The accounts, under `limits` if those are known, and the books in which a hold is."""
        for limit in limits:
            self._account(_key(limit), limit)
        found = []
        for scope, unit, label, start_s in row.places:
            key = (scope, unit, label)
            account = self._account(key)
            if isinstance(account, RateAccount):
                page = account.turn(self._now_s)
            else:  # books in which nothing is held may be gone
                page = account.books.get(start_s) or Books(start_s, window_end(account.limit.window, start_s))
            found.append((key, account, page))
        return found

    def _end(self, row: Row, used: Amounts, state: int, *, was_taken: bool = True) -> None:
        """Replace a hold, or what a sweep settled for it, by its use; one that has ended stays as it is."""
        if row.state == ENDED:
            return
        held, before = row.ceiling.by_unit(), row.used.by_unit()
        after = used.by_unit() if was_taken else Amounts().by_unit(requests=0)
        for key, account, page in self._held_in(row):
            unit = account.unit
            if row.state == SWEPT:
                account.correct(page, self._now_s, held[unit], before[unit], after[unit])
            else:
                account.settle(page, self._now_s, held[unit], after[unit])
            if isinstance(account, RateAccount) or page.start_s in account.books:
                self._changed.add((key, page))
        self._enter_usage(row, after, before if row.state == SWEPT else Amounts().by_unit(requests=0))
        self._connection.execute("UPDATE holds SET state = ?, ended_s = ? WHERE id = ?", (state, self._now_s, row.id))

    def _enter_usage(self, row: Row, after: dict[Unit, int], before: dict[Unit, int]) -> None:
        sums = self._usage.setdefault((row.day, row.scopes, row.mode), [0, 0, 0, 0])
        for at, unit in enumerate(("requests", "tokens", "thinking_tokens", "usd")):
            sums[at] += after[cast("Unit", unit)] - before[cast("Unit", unit)]

    def _insert(self, booking: Booking, state: int, places: list[Place], lease_end_s: float) -> None:
        ceiling = booking.ceiling
        self._connection.execute(
            "INSERT INTO holds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 0, 0)",
            (
                booking.hold_id,
                booking.owner,
                state,
                lease_end_s,
                None if state == OPEN else self._now_s,
                self._now_s // DAY_S,
                msgspec.json.encode(booking.scopes).decode(),
                booking.mode,
                msgspec.json.encode(places).decode(),
                ceiling.tokens,
                ceiling.thinking_tokens,
                ceiling.nano_usd,
            ),
        )


def _key(limit: Limit) -> Key:
    return limit.scope, limit.unit, limit.window or ""


def read_usage(connection: sqlite3.Connection, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
    """See Store.usage."""
    rows = connection.execute(
        "SELECT day, scopes, mode, requests, tokens, thinking_tokens, nano_usd FROM usage"
        " WHERE day BETWEEN ? AND ? AND requests > 0 ORDER BY day, scopes, mode",
        (first_day.toordinal() - EPOCH_ORDINAL, last_day.toordinal() - EPOCH_ORDINAL),
    ).fetchall()  # so that the write-ahead log need not be kept for as long as the rows are made
    return [
        UsageRow(
            day=dt.date.fromordinal(EPOCH_ORDINAL + day),
            scopes=_scopes.decode(scopes),
            mode=mode,
            requests=requests,
            tokens=tokens,
            thinking_tokens=thinking_tokens,
            nano_usd=nano_usd,
        )
        for day, scopes, mode, requests, tokens, thinking_tokens, nano_usd in rows
    ]


def read_health(connection: sqlite3.Connection) -> LedgerHealth:
    """See Store.health."""
    holds, tokens, thinking_tokens, nano_usd = connection.execute(
        "SELECT count(*), total(tokens), total(thinking_tokens), total(nano_usd) FROM holds WHERE state = 0"
    ).fetchone()
    held = Amounts(tokens=int(tokens), thinking_tokens=int(thinking_tokens), nano_usd=int(nano_usd))
    return LedgerHealth(kind="sqlite", is_reachable=True, holds=holds, held=held)
