"""The ledger in memory: the reference for the others. Budgets end with the process.

Every operation on a hold is synchronous and O(limits of the request's scopes), so holds of one event loop never
interleave. Time comes from the `clock` passed in, as seconds since the epoch.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self
from weakref import WeakValueDictionary

from budget.accounts import Account, Books, account_of, hold_in
from budget.books import JUMP_BACK_S, KEPT_DAYS, tightest
from budget.ledger import Amounts, Figures, LedgerHealth, Limit, Remaining, Standing, Unit, UsageRow, Used, Window, told

NOTHING = Amounts()


class MemoryHold:
    """See budget.ledger.Hold."""

    __slots__ = ("_accounts", "_books", "_day", "_is_open", "_ledger", "_mode", "_scopes", "_used", "ceiling")
    is_offline = False

    def __init__(self, ledger: MemoryLedger, scopes: Sequence[str], ceiling: Amounts, mode: str) -> None:
        self._ledger = ledger
        self._scopes = scopes
        self._mode = mode
        self._day = 0
        self._accounts: Sequence[Account] = ()
        self._books: list[Books] = []
        self._used: Used = NOTHING
        self._is_open = False
        self.ceiling = ceiling

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused; then nothing is held anywhere."""
        ledger = self._ledger
        self._accounts = ledger.accounts(self._scopes)
        self._books = ledger.take(self._accounts, self.ceiling)
        self._day = int(ledger.clock() // 86400)
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle what was last reported, once."""
        if self._is_open:
            self._is_open = False
            used = told(self._used)
            self._ledger.settle(self._accounts, self._books, self.ceiling, used)
            self._ledger.enter_usage(self._day, self._scopes, self._mode, used)

    async def extend(self, more: Amounts) -> None:
        """Hold `more` besides. Raises: HoldRefused; then the hold is as it was."""
        assert self._is_open, "only a hold that was taken can be extended"
        self._ledger.extend(self._accounts, self._books, more)
        self.ceiling = self.ceiling.plus(more)

    def report(self, used: Used) -> None:
        """Say what was used so far, or how to find out."""
        self._used = used

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit` over the hold's scopes."""
        tightest: Account | None = None
        least, reset_s, now_s = 0, 0.0, self._ledger.clock()
        for account in self._accounts:
            if account.unit == unit:
                page = account.turn(now_s)
                free = account.free(page, now_s)
                if tightest is None or free < least:
                    tightest, least, reset_s = account, free, account.reset_s(page, now_s)
        if tightest is None:
            return None
        return Remaining(limit=tightest.limit.amount, remaining=least if least > 0 else 0, reset_s=reset_s)

    def standings(self) -> list[Standing]:
        """All limits over the hold's scopes, as they are now."""
        now_s = self._ledger.clock()
        return [account.standing(account.turn(now_s), now_s) for account in self._accounts]


class MemoryLedger:
    """See budget.ledger.Ledger."""

    def __init__(self, limits: Sequence[Limit] = (), *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._accounts: dict[str, list[Account]] = {}
        self._known: dict[tuple[str, Unit, Window | None], Account] = {}
        # Also those that only open holds know, so that a limit that comes back finds what they extend.
        self._alive: WeakValueDictionary[tuple[str, Unit, Window | None], Account] = WeakValueDictionary()
        self._figures = Figures()
        self._holds = self._held_tokens = self._held_thinking = self._held_nano_usd = 0
        self._usage: dict[int, dict[tuple[tuple[str, ...], str], list[int]]] = {}
        self.set_limits(limits)

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held under a scope, unit and window stays, also while it is gone."""
        now_s, wanted = self.clock(), tightest(limits)
        self._known = {key: a for key, a in self._known.items() if key in wanted or not a.is_over(now_s - JUMP_BACK_S)}
        self._accounts = {}
        for key, limit in wanted.items():
            account = self._alive.get(key)
            if account is None:
                account = self._alive[key] = account_of(limit)
            account.limit = limit
            self._known[key] = account
            self._accounts.setdefault(limit.scope, []).append(account)

    def hold(self, scopes: Sequence[str], ceiling: Amounts, *, mode: str = "") -> MemoryHold:
        """A hold to be entered with `async with`."""
        return MemoryHold(self, scopes, ceiling, mode)

    def held(self) -> Amounts:
        """Everything held now."""
        return Amounts(tokens=self._held_tokens, thinking_tokens=self._held_thinking, nano_usd=self._held_nano_usd)

    def figures(self) -> Figures:
        """What was overrun; a store in memory is always there."""
        return self._figures

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """What was settled on these days, both included."""
        first, last, found = first_day.toordinal(), last_day.toordinal(), list[UsageRow]()
        for day in sorted(day for day in self._usage if first <= day <= last):
            rows = [(key, row.copy()) for key, row in self._usage.get(day, {}).items()]
            found += await asyncio.to_thread(_usage_rows, dt.date.fromordinal(day), rows)
        return found

    async def health(self) -> LedgerHealth:
        """Always well: budgets end with the process."""
        return LedgerHealth(
            kind="memory", is_reachable=True, holds=self._holds, held=self.held(), detail="ends with the process"
        )

    async def run(self) -> None:
        """There is nothing to sweep: holds end with their process."""
        await asyncio.Event().wait()

    async def close(self) -> None:
        """Nothing is pending in memory."""

    def accounts(self, scopes: Sequence[str]) -> Sequence[Account]:
        """The accounts of `scopes`, O(scopes). Not remembered: with many keys each would be looked for in vain."""
        accounts, found = self._accounts, list[Account]()
        for scope in scopes:
            of = accounts.get(scope)
            if of is not None:
                found += of
        return found

    def take(self, accounts: Sequence[Account], ceiling: Amounts) -> list[Books]:
        """Hold `ceiling` in the present books of every account.

        Raises: HoldRefused for the tightest account that is short; then nothing is held.
        """
        if not accounts:
            self._count(ceiling, 1, 1)
            return []
        now_s = self.clock()
        books = [account.turn(now_s) for account in accounts]
        hold_in(accounts, books, ceiling.by_unit(), now_s)
        self._count(ceiling, 1, 1)
        return books

    def extend(self, accounts: Sequence[Account], books: Sequence[Books], more: Amounts) -> None:
        """Hold `more` in the books that a hold was taken in. Raises: HoldRefused; then nothing changed."""
        hold_in(accounts, books, more.by_unit(requests=0), self.clock())
        self._count(more, 1, 0)

    def settle(self, accounts: Sequence[Account], books: Sequence[Books], ceiling: Amounts, used: Amounts) -> None:
        """Replace the hold by actual use in the books it was taken in; overrun becomes debt."""
        self._count(ceiling, -1, -1)
        if used.exceeds(ceiling):
            self._figures.debt = self._figures.debt.plus(used.beyond(ceiling))
        if not accounts:
            return
        now_s, held, spent = self.clock(), ceiling.by_unit(), used.by_unit()
        for account, page in zip(accounts, books, strict=True):
            account.settle(page, now_s, held[account.unit], spent[account.unit])

    def enter_usage(self, epoch_day: int, scopes: Sequence[str], mode: str, used: Amounts) -> None:
        """Add a settled request to the usage of the day on which it was held."""
        day = EPOCH_ORDINAL + epoch_day
        rows = self._usage.get(day)
        if rows is None:
            rows = self._usage[day] = {}
            for old in sorted(self._usage)[:-KEPT_DAYS]:
                del self._usage[old]
        key = (tuple(scopes), mode)
        row = rows.get(key)
        if row is None:
            row = rows[key] = [0, 0, 0, 0]
        row[0] += 1
        row[1] += used.tokens
        row[2] += used.thinking_tokens
        row[3] += used.nano_usd

    def _count(self, amounts: Amounts, sign: int, holds: int) -> None:
        self._holds += holds
        self._held_tokens += sign * amounts.tokens
        self._held_thinking += sign * amounts.thinking_tokens
        self._held_nano_usd += sign * amounts.nano_usd


def _usage_rows(day: dt.date, rows: Iterable[tuple[tuple[tuple[str, ...], str], list[int]]]) -> list[UsageRow]:
    """The rows of one day. There may be many: to be called off the event loop."""
    return [
        UsageRow(
            day=day,
            scopes=scopes,
            mode=mode,
            requests=row[0],
            tokens=row[1],
            thinking_tokens=row[2],
            nano_usd=row[3],
        )
        for (scopes, mode), row in rows
    ]


EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()
