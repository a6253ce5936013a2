"""What the books of a ledger should say, by the definitions of docs/budgets.md: sums over the history.

It shares no code with a ledger. `Entry` is one hold as the store should know it; an `Account` is one limit with
everything that happened under it, in pages (calendar windows) or as a level (rates).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from budget.ledger import Amounts, Limit, Unit, UsageRow, Window

DAY_S = 86_400
PERIOD_S = {"second": 1, "minute": 60}
Key = tuple[str, Unit, Window | None]


def need_of(amounts: Amounts | None, unit: Unit) -> int:
    """What a hold takes of a unit; nothing is none."""
    if amounts is None:
        return 0
    return {"tokens": amounts.tokens, "thinking_tokens": amounts.thinking_tokens, "usd": amounts.nano_usd}.get(unit, 1)


def began(window: Window | None, now_s: float) -> int:
    """When the calendar window that holds a moment began."""
    time = dt.datetime.fromtimestamp(now_s, tz=dt.UTC)
    if window == "hour":
        return int(time.replace(minute=0, second=0, microsecond=0).timestamp())
    midnight = time.replace(hour=0, minute=0, second=0, microsecond=0)
    return {"day": int(midnight.timestamp()), "month": int(midnight.replace(day=1).timestamp())}.get(window or "", 0)


@dataclass(eq=False)
class Entry:
    """One hold as its store knows it.

    Attributes:
        told: what was last reported to the store.
        settled: what replaced it; None while it is held, and for one that is released.
        swept: what a sweep settled, and when.
    """

    scopes: tuple[str, ...]
    mode: str
    ceiling: Amounts
    day: dt.date
    lease_end_s: float
    pages: list[Page | Rate]
    told: Amounts = field(default_factory=Amounts)
    settled: Amounts | None = None
    swept: Amounts | None = None
    swept_s: float = 0.0
    is_held: bool = True
    is_over: bool = False

    def debt(self, unit: Unit) -> int:
        """What was used while it was not held."""
        used, held = need_of(self.settled, unit), need_of(self.ceiling, unit)
        swept = need_of(self.swept, unit)
        if self.swept is not None and used > swept:
            return max(0, swept - held) + used - swept
        return max(0, used - held)


@dataclass(eq=False)
class Page:
    """One calendar window of one limit."""

    account: Account
    start_s: int
    entries: list[Entry] = field(default_factory=list)
    lowered: int = 0

    def counts(self) -> tuple[int, int, int]:
        """Settled, held and debt."""
        unit = self.account.limit.unit
        held = sum(need_of(e.ceiling, unit) for e in self.entries if e.is_held)
        if unit == "concurrency":  # used up by nothing
            return 0, held, 0
        return sum(need_of(e.settled, unit) for e in self.entries), held, sum(e.debt(unit) for e in self.entries)

    def free(self, now_s: float) -> int:
        """Room for another hold."""
        settled, held, _ = self.counts()
        return self.account.limit.amount - settled - held

    def hold(self, now_s: float, entry: Entry, need: int) -> None:
        """Something more is held here."""
        if entry not in self.entries:
            self.entries.append(entry)
        self.account.pages[self.start_s] = self

    def end(self, now_s: float, entry: Entry, before: int, after: int) -> None:
        """The entry says it all."""


@dataclass(eq=False)
class Rate:
    """One rate: a bucket whose level runs out.

    Attributes:
        moves: what was admitted, and given back (below 0), and when; not what was used without being held.
    """

    account: Account
    level: Fraction = Fraction(0)
    seen_s: float = 0.0
    amount: int = 1
    moves: list[tuple[float, int]] = field(default_factory=list)

    def now(self, now_s: float) -> Fraction:
        """The level now; a clock that was set back takes the bucket along."""
        passed = Fraction(max(0.0, now_s - self.seen_s))
        return max(Fraction(0), self.level - passed * self.amount / PERIOD_S[self.account.limit.window or ""])

    def look(self, now_s: float) -> None:
        """Somebody wants to hold."""
        self.seen_s = min(self.seen_s, now_s)

    def free(self, now_s: float) -> int:
        """Room in the bucket."""
        return int((self.account.limit.amount - self.now(now_s)) // 1)

    def hold(self, now_s: float, entry: Entry, need: int) -> None:
        """Into the bucket."""
        self.level, self.seen_s, self.amount = self.now(now_s) + need, now_s, self.account.limit.amount
        self.moves.append((now_s, need))

    def end(self, now_s: float, entry: Entry, before: int, after: int) -> None:
        """What was not used is taken out again; where that is nothing, nobody looks."""
        if before != after or now_s < self.seen_s:
            self.level, self.seen_s = max(Fraction(0), self.now(now_s) + after - before), now_s
            self.moves.append((now_s, min(0, after - before)))

    def counts(self) -> tuple[int, int, int]:
        """A rate has no books."""
        return 0, 0, 0


@dataclass(eq=False)
class Account:
    """One limit."""

    limit: Limit
    pages: dict[int, Page] = field(default_factory=dict)
    rate: Rate | None = None

    def __post_init__(self) -> None:
        """A limit per second or minute is a rate."""
        if self.limit.window in PERIOD_S:
            self.rate = Rate(self)

    def present(self, now_s: float) -> Page | Rate:
        """Where a hold belongs now; a clock that jumps back stays in the newest window that anything is in."""
        if self.rate is not None:
            return self.rate
        known = [start_s for start_s in self.pages if start_s <= now_s + DAY_S]
        start_s = max([began(self.limit.window, now_s), *known])
        return self.pages.get(start_s) or Page(self, start_s)


class Model:
    """All limits and all holds."""

    def __init__(self) -> None:
        self.known: dict[Key, Account] = {}
        self.in_force: list[Account] = []
        self.entries: list[Entry] = []

    def set_limits(self, limits: Iterable[Limit]) -> None:
        """A reload; of two limits on the same thing the tighter one counts."""
        wanted: dict[Key, Limit] = {}
        for limit in sorted(limits, key=lambda each: each.amount, reverse=True):
            wanted[limit.scope, limit.unit, limit.window] = limit
        for key, limit in wanted.items():
            self.known.setdefault(key, Account(limit)).limit = limit
        self.in_force = [self.known[key] for key in wanted]
        for account in self.known.values():
            for page in account.pages.values():
                settled, held, debt = page.counts()
                page.lowered = max(0, settled + held - debt - account.limit.amount)

    def pages_for(self, scopes: Sequence[str], now_s: float) -> list[Page | Rate]:
        """Where a hold in these scopes belongs now."""
        return [account.present(now_s) for account in self.in_force if account.limit.scope in scopes]

    @staticmethod
    def short(pages: Iterable[Page | Rate], need: Amounts, now_s: float, *, is_more: bool = False) -> list[Page | Rate]:
        """Those that have no room for it; looking at a rate notes a clock that was set back."""
        found = []
        for page in pages:
            if isinstance(page, Rate):
                page.look(now_s)
            wanted = counted(need, page.account.limit.unit, is_more=is_more)
            if wanted > max(0, page.free(now_s)):
                found.append(page)
        return found

    def take(self, entry: Entry, now_s: float) -> None:
        """A hold is granted."""
        self.entries.append(entry)
        for page in entry.pages:
            page.hold(now_s, entry, need_of(entry.ceiling, page.account.limit.unit))

    def extend(self, entry: Entry, more: Amounts, now_s: float) -> None:
        """A hold is larger now."""
        for page in entry.pages:
            page.hold(now_s, entry, counted(more, page.account.limit.unit, is_more=True))
        entry.ceiling = entry.ceiling.plus(more)

    def end(self, entry: Entry, used: Amounts | None, now_s: float) -> None:
        """A hold is settled, or released (None), for good; once."""
        if not entry.is_over:
            self._replace(entry, used, now_s)
            entry.is_over = True

    def sweep(self, now_s: float, lease_s: float) -> int:
        """Holds whose lease is over are settled at what was last told."""
        swept = 0
        for entry in self.entries:
            if entry.is_held:
                entry.lease_end_s = min(entry.lease_end_s, now_s + lease_s)
                if entry.lease_end_s <= now_s:
                    self._replace(entry, entry.told, now_s)
                    entry.swept, entry.swept_s = entry.told, now_s
                    swept += 1
        return swept

    @staticmethod
    def _replace(entry: Entry, used: Amounts | None, now_s: float) -> None:
        before = entry.ceiling if entry.is_held else entry.settled
        for page in entry.pages:
            unit = page.account.limit.unit
            page.end(now_s, entry, need_of(before, unit), need_of(used, unit))
        entry.settled, entry.is_held = used, False

    def usage(self, first: dt.date, last: dt.date) -> dict[tuple[dt.date, tuple[str, ...], str], UsageRow]:
        """What was settled, by day, scopes and mode."""
        rows: dict[tuple[dt.date, tuple[str, ...], str], UsageRow] = {}
        for entry in self.entries:
            if entry.settled is None or not first <= entry.day <= last:
                continue
            key = (entry.day, entry.scopes, entry.mode)
            row, used = rows.get(key), entry.settled
            rows[key] = UsageRow(
                day=entry.day,
                scopes=entry.scopes,
                mode=entry.mode,
                requests=1 + (row.requests if row else 0),
                tokens=used.tokens + (row.tokens if row else 0),
                thinking_tokens=used.thinking_tokens + (row.thinking_tokens if row else 0),
                nano_usd=used.nano_usd + (row.nano_usd if row else 0),
            )
        return rows


def counted(amounts: Amounts, unit: Unit, *, is_more: bool = False) -> int:
    """As `need_of`; more of a hold is no further request."""
    return 0 if is_more and unit in {"requests", "concurrency"} else need_of(amounts, unit)
