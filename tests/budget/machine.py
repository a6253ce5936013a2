"""A ledger played against a model of the books, in any order, through the port alone, by one process."""

from __future__ import annotations

import asyncio
import datetime as dt
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Hold, Ledger, Limit, Unit, Window
from tests.budget.model import DAY_S, PERIOD_S, Entry, Model, Page, Rate, began, counted
from tests.budget.places import MemoryPlace, Place
from tests.budget.virtual import Fault, FaultyStore, VirtualLoop

T = TypeVar("T")
MEMORY = Path("/dev/shm")  # where it is there, no play waits for a disk
NEW_YEAR_2024 = dt.datetime(2024, 1, 1, tzinfo=dt.UTC).timestamp()
SCOPES = ("key:a", "team:ml", "org:acme")
KINDS: list[tuple[Unit, Window | None]] = [
    ("tokens", "second"),
    ("tokens", "hour"),
    ("tokens", "total"),
    ("thinking_tokens", "day"),
    ("usd", "month"),
    ("requests", "minute"),
    ("requests", "hour"),
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
PICK = st.integers(0, 99)
NOTHING = Amounts()


@dataclass(eq=False)
class Process:
    """One process: its ledger, and its holds that are open.

    Attributes:
        pending: what it could not tell its store yet: which hold, and its use; None releases it.
    """

    ledger: Ledger
    store: FaultyStore | None = None
    open: list[Mine] = field(default_factory=list)
    pending: list[tuple[Entry | None, Amounts | None]] = field(default_factory=list)

    def is_lost(self) -> bool:
        """Its store did not answer, and it has not found it again."""
        return not self.ledger.figures().is_reachable

    def fault(self) -> Fault | None:
        """What befalls its next call."""
        if self.store is None:
            return None
        return self.store.faults[0] if self.store.faults else self.store.always

    def is_deaf(self) -> bool:
        """None of its calls arrives, or is even made."""
        return self.is_lost() or (self.store is not None and self.store.always == "before")

    def is_mute(self) -> bool:
        """It gets no answers."""
        return self.store is not None and self.store.always == "after"


@dataclass(eq=False)
class Mine:
    """A hold as its process has it."""

    hold: Hold
    entry: Entry
    ceiling: Amounts
    used: Amounts = NOTHING


class LedgerMachine(RuleBasedStateMachine):
    """Hold, extend, report, end, roll and reload in any order; the ledger always agrees with the model."""

    place_class: ClassVar[type[Place]] = MemoryPlace

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None)
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        self.place = self.place_class(Path(self.folder.name))
        self.place.clock.now = self.latest_s = NEW_YEAR_2024
        self.model = Model()
        self.limits: list[Limit] = []
        self.is_steady = True
        self.ended: list[Mine] = []
        self.processes = self.begin()

    def begin(self) -> list[Process]:
        """The processes at first."""
        return [Process(self.place.ledger())]

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return self.runner.run(work)

    @property
    def now_s(self) -> float:
        """The time of the place."""
        return self.place.clock.now

    # --------------------------------------------------------------------------------- what can happen

    @initialize(limits=LIMITS)
    def start(self, limits: list[Limit]) -> None:
        """Most runs begin with some limits."""
        self.set_limits(limits)

    @rule(seconds=st.sampled_from([0.25, 1.0, 9.0, 59.0, 3600.0, 86_400.0, 31 * 86_400.0]))
    def time_passes(self, seconds: float) -> None:
        """Windows and leases may end."""
        self.before_time_passes(self.now_s + seconds)
        self.place.clock.now += seconds
        self.latest_s = max(self.latest_s, self.now_s)

    def before_time_passes(self, until_s: float) -> None:
        """What cannot be told apart later."""

    @rule(seconds=st.sampled_from([0.5, 61.0, 7200.0, 80_000.0]))
    def the_clock_jumps_back(self, seconds: float) -> None:
        """As NTP or a migrated machine does; by no more than a day in all."""
        self.is_steady = False
        self.place.clock.now = max(self.now_s - seconds, self.latest_s - DAY_S)

    @rule(limits=LIMITS)
    def set_limits(self, limits: list[Limit]) -> None:
        """A reload."""
        self.is_steady = not self.limits and self.is_steady
        self.limits = limits
        self.model.set_limits(limits)
        for process in self.processes:
            process.ledger.set_limits(limits)

    @rule(pick=PICK, scopes=SCOPE_SETS, ceiling=AMOUNTS, mode=st.sampled_from(["instant", "reasoning"]))
    def hold(self, pick: int, scopes: list[str], ceiling: Amounts, mode: str) -> None:
        """A request arrives: it is held everywhere, or refused for the tightest limit and held nowhere."""
        process = self.processes[pick % len(self.processes)]
        hold = process.ledger.hold(scopes, ceiling, mode=mode)
        if process.is_deaf():
            if not process.is_lost():  # then the attempt is released later, as nobody knows whether it arrived
                process.pending.append((None, None))
            self.fail(process, hold.__aenter__())
            return
        pages = self.model.pages_for(scopes, self.now_s)
        short = self.model.short(pages, ceiling, self.now_s)
        entry = Entry(tuple(scopes), mode, ceiling, day_of(self.now_s), self.now_s + self.lease_s, pages)
        if not short:
            self.model.take(entry, self.now_s)
        if process.is_mute():
            self.fail(process, hold.__aenter__())
            process.pending.append((None if short else entry, None))
        elif short:
            with pytest.raises(HoldRefused) as refused:
                self.run(hold.__aenter__())
            check_refusal(refused.value, short, ceiling, self.now_s)
        else:
            assert self.run(hold.__aenter__()) is hold
            process.open.append(Mine(hold, entry, ceiling))
            self.check_remaining(hold, pages)

    def fail(self, process: Process, work: Coroutine[Any, Any, Any]) -> None:
        """The store does not answer."""
        with pytest.raises(StoreUnreachable):
            self.run(work)

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, used=AMOUNTS)
    def report(self, pick: int, used: Amounts) -> None:
        """A stream says what it used so far, now and then more than was held."""
        self.say(self.pick_open(pick)[1], used)

    def say(self, mine: Mine, used: Amounts) -> None:
        """Report."""
        mine.hold.report(used)
        mine.used = used

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, more=AMOUNTS)
    def extend(self, pick: int, more: Amounts) -> None:
        """A request grows, in the windows it was held in."""
        process, mine = self.pick_open(pick)
        entry = mine.entry
        if any(isinstance(page, Page) and is_old(page) for page in entry.pages):
            return  # whether books in which nothing is held are still there is not said
        if process.is_deaf() or not entry.is_held:
            self.fail(process, mine.hold.extend(more))
            return
        wanted = mine.ceiling.plus(more).beyond(entry.ceiling)  # an answer that was lost may have brought it already
        short = self.model.short(entry.pages, wanted, self.now_s, is_more=True) if wanted != NOTHING else []
        if not short and wanted != NOTHING:
            self.model.extend(entry, wanted, self.now_s)
        if process.is_mute():
            self.fail(process, mine.hold.extend(more))
        elif short:
            with pytest.raises(HoldRefused) as refused:
                self.run(mine.hold.extend(more))
            check_refusal(refused.value, short, wanted, self.now_s, is_more=True)
        else:
            self.run(mine.hold.extend(more))
            mine.ceiling = mine.ceiling.plus(more)
        assert mine.hold.ceiling == mine.ceiling

    @precondition(lambda self: self.any_open())
    @rule(pick=PICK, used=st.none() | AMOUNTS, how=st.sampled_from([None, asyncio.CancelledError, ValueError]))
    def end(self, pick: int, used: Amounts | None, how: type[BaseException] | None) -> None:
        """A request ends, is cancelled or fails, after a last report or without; no error is swallowed."""
        if used is not None:
            self.say(self.pick_open(pick)[1], used)
        self.finish(*self.pick_open(pick), how)

    def finish(self, process: Process, mine: Mine, how: type[BaseException] | None = None) -> None:
        """End one hold."""
        fault = "before" if process.is_lost() else process.fault()
        exc = None if how is None else how()
        assert not self.run(mine.hold.__aexit__(how, exc, None))
        self.run(self.place.books())  # what was sent has arrived, or is known to be lost
        process.open.remove(mine)
        self.ended.append(mine)
        if fault != "before":
            self.model.end(mine.entry, mine.used, self.now_s)
        if fault is not None:
            process.pending.append((mine.entry, mine.used))

    @precondition(lambda self: self.ended)
    @rule(pick=PICK, used=AMOUNTS)
    def speak_after_the_end(self, pick: int, used: Amounts) -> None:
        """A hold that has ended changes nothing any more, whatever is reported to it or however often it ends."""
        mine = self.ended[pick % len(self.ended)]
        mine.hold.report(used)
        self.run(mine.hold.__aexit__(None, None, None))

    # ------------------------------------------------------------------------------------ what must hold

    @invariant()
    def books_agree(self) -> None:
        """Every window has settled, holds and owes what the history says, within its limit but for debt."""
        books = self.run(self.place.books())
        for key, account in self.model.known.items():
            found = books.pop(key, {})
            for start_s, page in account.pages.items():
                settled, held, debt = page.counts()
                if start_s in found:
                    assert found.pop(start_s) == (settled, held, debt)
                else:
                    assert not held
                    is_over = began(account.limit.window, self.latest_s - DAY_S) > start_s
                    assert is_over or is_old(page)
                assert settled + held <= account.limit.amount + debt + page.lowered
            assert found == {}
        assert books == {}

    @invariant()
    def total_agrees(self) -> None:
        """`held()` counts each open hold of the process once, however many limits it falls under."""
        for process in self.processes:
            total = NOTHING
            for mine in process.open:
                total = total.plus(mine.ceiling)
            assert process.ledger.held() == total

    def rates_agree(self) -> None:
        """Where time went forward and limits stayed, no rate admitted more than its burst and what ran out since."""
        if not self.is_steady:
            return
        for account in self.model.known.values():
            moves = [] if account.rate is None else account.rate.moves
            per_s = account.limit.amount / PERIOD_S.get(account.limit.window or "", 1)
            for first, (first_s, _) in enumerate(moves):
                admitted = 0
                for later_s, change in moves[first:]:
                    admitted += change
                    assert admitted <= account.limit.amount + per_s * (later_s - first_s) + 1e-6

    def check_remaining(self, hold: Hold, pages: Sequence[Page | Rate]) -> None:
        """A hold tells how much the tightest of its limits has left, never less than nothing."""
        for unit in ("tokens", "requests"):
            mine = [page for page in pages if page.account.limit.unit == unit]
            rest = hold.remaining(unit)
            if not mine:
                assert rest is None
                continue
            assert rest is not None
            least = min(page.free(self.now_s) for page in mine)
            assert rest.remaining == max(0, least)
            assert rest.limit in {page.account.limit.amount for page in mine if page.free(self.now_s) == least}
            assert rest.reset_s >= 0

    @rule()
    def usage_agrees(self) -> None:
        """Usage adds up to what was settled."""
        today = day_of(self.now_s)
        first, last = today - dt.timedelta(days=300), today + dt.timedelta(days=2)
        rows = self.run(self.processes[0].ledger.usage(first, last))
        assert {(row.day, row.scopes, row.mode): row for row in rows} == self.model.usage(first, last)
        assert len({(row.day, row.scopes, row.mode) for row in rows}) == len(rows)

    def teardown(self) -> None:
        """When everything has ended nothing is held, and settled is what was reported."""
        try:
            self.end_everything()
            self.books_agree()
            self.total_agrees()
            self.usage_agrees()
            self.rates_agree()
            assert not any(entry.is_held for entry in self.model.entries)
        finally:
            self.run(self.place.close())
            self.runner.close()
            self.folder.cleanup()

    def end_everything(self) -> None:
        """Nothing runs any more."""
        for process in self.processes:
            for mine in list(process.open):
                self.finish(process, mine)

    # ------------------------------------------------------------------------------------ how to look

    lease_s: ClassVar[float] = float("inf")

    def any_open(self) -> bool:
        """Some process has an open hold."""
        return any(process.open for process in self.processes)

    def pick_open(self, pick: int) -> tuple[Process, Mine]:
        """One of the open holds."""
        found = [(process, mine) for process in self.processes for mine in process.open]
        return found[pick % len(found)]


def is_old(page: Page) -> bool:
    """Whether three newer windows have begun."""
    return page.start_s not in sorted(page.account.pages)[-3:]


def day_of(now_s: float) -> dt.date:
    """The day in UTC."""
    return dt.datetime.fromtimestamp(now_s, tz=dt.UTC).date()


def check_refusal(
    refused: HoldRefused, short: Sequence[Page | Rate], amounts: Amounts, now_s: float, *, is_more: bool = False
) -> None:
    """It names the tightest limit that is short, and when to try again."""
    tightness = [page.free(now_s) / page.account.limit.amount for page in short]
    tightest = [page for page, tight in zip(short, tightness, strict=True) if tight == min(tightness)]
    named = [p for p in tightest if (p.account.limit.scope, p.account.limit.unit) == (refused.scope, refused.unit)]
    assert named, "the refusal names a limit that is not among the tightest"
    limit = named[0].account.limit
    need = counted(amounts, limit.unit, is_more=is_more)
    if need > limit.amount:
        assert (refused.kind, refused.retry_after_s) == ("budget_spent", None)
    elif limit.unit == "concurrency" or isinstance(named[0], Rate):
        assert refused.kind == "rate"
        assert refused.retry_after_s is not None
        assert refused.retry_after_s > 0
    elif need <= limit.amount - named[0].counts()[0]:
        assert refused.kind == "budget_held"
        assert refused.retry_after_s is not None
    else:
        assert (refused.kind, refused.retry_after_s) == ("budget_spent", None)
    assert limit.scope in str(refused)
    if limit.unit != "usd":  # those are said in dollars
        assert str(need) in str(refused)
