"""A ledger played against a model of it that knows only the definitions of docs/architecture.md.

The model sums the history; it shares no code with a ledger. A ledger in another store is tested by
subclassing `LedgerMachine`.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from budget.errors import HoldRefused
from budget.ledger import Amounts, Limit, Unit, Window
from budget.ledgers.memory import MemoryHold, MemoryLedger

T = TypeVar("T")
NEW_YEAR_2024 = dt.datetime(2024, 1, 1, tzinfo=dt.UTC).timestamp()
SCOPES = ("key:a", "team:ml", "org:acme")
KINDS: list[tuple[Unit, Window | None]] = [
    ("tokens", "second"),
    ("tokens", "hour"),
    ("tokens", "total"),
    ("thinking_tokens", "day"),
    ("usd", "month"),
    ("requests", "minute"),
    ("concurrency", None),
]
LIMITS = st.lists(
    st.builds(
        lambda scope, kind, amount: Limit(scope=scope, unit=kind[0], window=kind[1], amount=amount),
        st.sampled_from(SCOPES),
        st.sampled_from(KINDS),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=5,
)
AMOUNTS = st.builds(Amounts, tokens=st.integers(0, 20), thinking_tokens=st.integers(0, 20), nano_usd=st.integers(0, 20))
SCOPE_SETS = st.lists(st.sampled_from(SCOPES), unique=True, min_size=1, max_size=3)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that must not wait for anything."""
    try:
        work.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("the memory ledger waited for something")


def label(window: Window | None, now: float) -> tuple[int, ...]:
    """Which calendar window holds `now`; labels of one kind are ordered."""
    time = dt.datetime.fromtimestamp(now, tz=dt.UTC).timetuple()
    parts = {"month": 2, "day": 3, "hour": 4, "minute": 5, "second": 6}
    return () if window is None else tuple(time[: parts.get(window, 0)])


def need_of(amounts: Amounts, unit: Unit) -> int:
    """What a hold takes of a unit."""
    return {"tokens": amounts.tokens, "thinking_tokens": amounts.thinking_tokens, "usd": amounts.nano_usd}.get(unit, 1)


@dataclass(eq=False)
class Account:
    """One limit of the model and everything that happened under it."""

    limit: Limit
    rolled_at: float
    entries: list[Entry] = field(default_factory=list)
    lowered: int = 0

    def touch(self, now: float) -> None:
        """A new window begins when the calendar says so; a clock that jumps back changes nothing."""
        window = self.limit.window
        if label(window, now) > label(window, self.rolled_at):
            self.rolled_at, self.entries, self.lowered = now, [], 0

    def held(self) -> int:
        """Of the holds that are open."""
        return sum(need_of(entry.ceiling, self.limit.unit) for entry in self.entries if entry.is_open)

    def settled(self) -> int:
        """Of the holds that have ended; concurrency is used up by nothing."""
        unit = self.limit.unit
        if unit == "concurrency":
            return 0
        return sum(need_of(entry.used, unit) for entry in self.entries if not entry.is_open)

    def debt(self) -> int:
        """What was used beyond the holds."""
        unit = self.limit.unit
        over = [need_of(e.used, unit) - need_of(e.ceiling, unit) for e in self.entries if not e.is_open]
        return 0 if unit == "concurrency" else sum(max(0, each) for each in over)

    def free(self) -> int:
        """Room for another hold."""
        return self.limit.amount - self.settled() - self.held()


@dataclass(eq=False)
class Entry:
    """One hold of the model."""

    hold: MemoryHold
    ceiling: Amounts
    accounts: list[Account]
    used: Amounts = field(default_factory=Amounts)
    is_open: bool = True


class LedgerMachine(RuleBasedStateMachine):
    """Hold, report, end, roll and reload in any order; the ledger always agrees with the model."""

    ledger_class: ClassVar[type[MemoryLedger]] = MemoryLedger

    def __init__(self) -> None:
        super().__init__()
        self.now = NEW_YEAR_2024
        self.accounts: dict[tuple[str, Unit, Window | None], Account] = {}
        self.open: list[Entry] = []
        self.ended: list[Entry] = []
        self.ledger = self.ledger_class(clock=lambda: self.now)

    # --------------------------------------------------------------------------------- what can happen

    @initialize(limits=LIMITS)
    def start(self, limits: list[Limit]) -> None:
        """Most runs begin with some limits."""
        self.set_limits(limits)

    @rule(seconds=st.sampled_from([0.25, 1.0, 59.0, 3600.0, 86_400.0, 31 * 86_400.0]))
    def time_passes(self, seconds: float) -> None:
        """Windows may end."""
        self.now += seconds

    @rule(seconds=st.sampled_from([0.5, 61.0, 7200.0]))
    def the_clock_jumps_back(self, seconds: float) -> None:
        """As NTP or a migrated machine does."""
        self.now -= seconds

    @rule(limits=LIMITS)
    def set_limits(self, limits: list[Limit]) -> None:
        """A reload; of two limits on the same thing the tighter one counts."""
        self.ledger.set_limits(limits)
        known, self.accounts = self.accounts, {}
        for limit in sorted(limits, key=lambda each: each.amount, reverse=True):
            key = (limit.scope, limit.unit, limit.window)
            account = known.get(key) or Account(limit, rolled_at=0.0)
            account.limit = limit
            self.accounts[key] = account
        for account in self.accounts.values():
            committed = account.settled() + account.held()
            account.lowered = max(0, committed - account.debt() - account.limit.amount)

    @rule(scopes=SCOPE_SETS, ceiling=AMOUNTS)
    def hold(self, scopes: list[str], ceiling: Amounts) -> None:
        """A request arrives: it is held everywhere, or refused for the tightest limit and held nowhere."""
        mine = [account for key, account in self.accounts.items() if key[0] in scopes]
        for account in mine:
            account.touch(self.now)
        short = [a for a in mine if need_of(ceiling, a.limit.unit) > a.free()]
        hold = self.ledger.hold(scopes, ceiling)
        if short:
            with pytest.raises(HoldRefused) as refused:
                at_once(hold.__aenter__())
            self.check_refusal(refused.value, short, ceiling)
            return
        assert at_once(hold.__aenter__()) is hold
        entry = Entry(hold, ceiling, mine)
        self.open.append(entry)
        for account in mine:
            account.entries.append(entry)

    @precondition(lambda self: self.open)
    @rule(pick=st.integers(0, 99), used=AMOUNTS)
    def report(self, pick: int, used: Amounts) -> None:
        """A stream says what it used so far, now and then more than was held."""
        entry = self.open[pick % len(self.open)]
        entry.hold.report(used)
        entry.used = used

    @precondition(lambda self: self.open)
    @rule(
        pick=st.integers(0, 99),
        used=st.none() | AMOUNTS,
        how=st.sampled_from([None, asyncio.CancelledError, ValueError]),
    )
    def end(self, pick: int, used: Amounts | None, how: type[BaseException] | None) -> None:
        """A request ends, is cancelled or fails, after a last report or without; no error is swallowed."""
        if used is not None:
            self.report(pick, used)
        entry = self.open.pop(pick % len(self.open))
        exc = None if how is None else how()
        assert not at_once(entry.hold.__aexit__(how, exc, None))
        entry.is_open = False
        self.ended.append(entry)

    @precondition(lambda self: self.ended)
    @rule(pick=st.integers(0, 99), used=AMOUNTS)
    def speak_after_the_end(self, pick: int, used: Amounts) -> None:
        """A hold that has ended changes nothing any more, whatever is reported to it or however often it ends."""
        hold = self.ended[pick % len(self.ended)].hold
        hold.report(used)
        at_once(hold.__aexit__(None, None, None))

    # ------------------------------------------------------------------------------------ what must hold

    @invariant()
    def books_agree(self) -> None:
        """Every account has settled and holds what the history says, within its limit but for debt."""
        books = self.books()
        assert books.keys() == self.accounts.keys()
        for key, account in self.accounts.items():
            settled, held, debt = books[key]
            assert (settled, held, debt) == (account.settled(), account.held(), account.debt())
            assert settled + held <= account.limit.amount + debt + account.lowered

    @invariant()
    def total_agrees(self) -> None:
        """`held()` counts each open hold once, however many limits it falls under."""
        assert self.ledger.held() == Amounts(
            tokens=sum(entry.ceiling.tokens for entry in self.open),
            thinking_tokens=sum(entry.ceiling.thinking_tokens for entry in self.open),
            nano_usd=sum(entry.ceiling.nano_usd for entry in self.open),
        )

    @invariant()
    def remaining_is_the_tightest(self) -> None:
        """An open hold tells how much the tightest of its limits has left, never less than nothing."""
        for entry in self.open:
            for unit in ("tokens", "requests"):
                mine = [a for a in entry.accounts if a.limit.unit == unit]
                rest = entry.hold.remaining(unit)
                if not mine:
                    assert rest is None
                    continue
                assert rest is not None
                least = min(account.free() for account in mine)
                assert rest.remaining == max(0, least)
                assert rest.limit in {a.limit.amount for a in mine if a.free() == least}
                assert rest.reset_s >= 0

    def teardown(self) -> None:
        """When everything has ended nothing is held, and settled is what was reported."""
        while self.open:
            self.end(0, None, None)
        self.total_agrees()
        self.books_agree()
        assert self.ledger.held() == Amounts()
        assert {held for _, held, _ in self.books().values()} <= {0}

    # ------------------------------------------------------------------------------------ how to look

    def books(self) -> dict[tuple[str, Unit, Window | None], tuple[int, int, int]]:
        """Settled, held and debt of each account."""
        books = {}
        for scope, accounts in self.ledger._accounts.items():
            for account in accounts:
                key = (scope, account.limit.unit, account.limit.window)
                assert key not in books, "one limit has two accounts"
                books[key] = (account.settled, account.held_in_window, account.debt)
        return books

    def check_refusal(self, refused: HoldRefused, short: Sequence[Account], ceiling: Amounts) -> None:
        """It names the tightest limit that is short, and when to try again."""
        tightness = [account.free() / account.limit.amount for account in short]
        tightest = [a for a, tight in zip(short, tightness, strict=True) if tight == min(tightness)]
        named = [a for a in tightest if (a.limit.scope, a.limit.unit) == (refused.scope, refused.unit)]
        assert named, "the refusal names a limit that is not among the tightest"
        account = named[0]
        limit, need = account.limit, need_of(ceiling, account.limit.unit)
        if need > limit.amount:
            assert (refused.kind, refused.retry_after_s) == ("budget_spent", None)
        elif limit.unit == "concurrency" or limit.window in {"second", "minute"}:
            assert refused.kind == "rate"
            assert refused.retry_after_s is not None
            assert refused.retry_after_s > 0
        elif need <= limit.amount - account.settled():
            assert refused.kind == "budget_held"
            assert refused.retry_after_s is not None
        else:
            assert (refused.kind, refused.retry_after_s) == ("budget_spent", None)
        assert limit.scope in str(refused)
        if limit.unit != "usd":  # those are said in dollars
            assert str(need) in str(refused)
