"""Three replicas, of which some lose the store now and then: budgets hold at every instant, and nothing gets lost.

THINKGATE_STEPS=10000 plays so many steps instead of a few hundred.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import tempfile
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Limit
from budget.ledgers.leased import LeasedHold, LeasedLedger
from budget.ledgers.offline import Offline
from budget.ledgers.redis import RedisStore
from budget.ledgers.store import Booking
from tests.budget.clocks import tokens
from tests.budget.places import RedisPlace
from tests.budget.test_ledger_machine import FIND as FIND_LONG
from tests.budget.test_ledger_machine import steps
from tests.budget.virtual import Fault, FaultyStore, VirtualLoop

T = TypeVar("T")
FIND = settings(FIND_LONG, max_examples=200)
LIMITS = (
    tokens(60, "day"),
    tokens(20, "hour"),
    tokens(50, "day", unit="requests"),
    tokens(9, None, unit="concurrency"),
    tokens(300, "minute", scope="key:b"),
)
FIRST, LAST = dt.date(2020, 1, 1), dt.date(2100, 1, 1)
PICK = st.integers(0, 99)
AMOUNT = st.sampled_from([0, 2, 4, 6, 10, 14])
SHORT_S = 9.0  # a store that is lost for no longer than this sweeps nothing


@dataclass(eq=False)
class Replica:
    """One process.

    Attributes:
        lost_s: how long it has been cut off.
    """

    ledger: LeasedLedger
    store: FaultyStore
    lost_s: float = 0.0
    open: list[LeasedHold] = field(default_factory=list)


class OfflineMachine(RuleBasedStateMachine):
    """Honest requests, and stores that are lost for less than a lease: no debt, ever."""

    store_class: ClassVar[type[RedisStore]] = RedisStore
    pauses: ClassVar[tuple[float, ...]] = (0.5, 3.0)
    longest_s: ClassVar[float] = SHORT_S

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.runner = asyncio.Runner(loop_factory=VirtualLoop)
        place = type("Place", (RedisPlace,), {"store_class": self.store_class})
        self.place: RedisPlace = place(Path(self.folder.name))
        self.used = self.ended = 0
        self.replicas = [self.start_replica(share) for share in (0.3, 0.3, 0.0)]

    def start_replica(self, share: float) -> Replica:
        """A process."""
        store = FaultyStore(self.place.store())
        clock, lease_s = self.place.clock, self.place.lease_s
        ledger = LeasedLedger(store, LIMITS, clock=clock, lease_s=lease_s, offline_share=share, monotonic=clock)
        self.place.ledgers.append(ledger)
        return Replica(ledger, store)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine."""
        return self.runner.run(work)

    @initialize()
    def warm_up(self) -> None:
        """Everybody has its slices."""
        for number, replica in enumerate(self.replicas):
            self.hold(number, 0, is_rated=True)
            self.run(replica.ledger.beat())

    @rule(pick=PICK, amount=AMOUNT, is_rated=st.booleans())
    def hold(self, pick: int, amount: int, *, is_rated: bool) -> None:
        """A request arrives somewhere."""
        replica = self.replicas[pick % 3]
        hold = replica.ledger.hold(["key:a", "key:b"] if is_rated else ["key:a"], Amounts(tokens=amount))
        try:
            replica.open.append(self.run(hold.__aenter__()))
        except (HoldRefused, StoreUnreachable):
            return

    def pick_open(self, pick: int) -> tuple[Replica, LeasedHold]:
        """One of the open holds."""
        found = [(replica, hold) for replica in self.replicas for hold in replica.open]
        return found[pick % len(found)]

    @precondition(lambda self: any(replica.open for replica in self.replicas))
    @rule(pick=PICK, more=st.integers(0, 9))
    def extend(self, pick: int, more: int) -> None:
        """A request grows."""
        _, hold = self.pick_open(pick)
        try:
            self.run(hold.extend(Amounts(tokens=more)))
        except (HoldRefused, StoreUnreachable):
            return

    @precondition(lambda self: any(replica.open for replica in self.replicas))
    @rule(pick=PICK, share=st.floats(0, 1))
    def end(self, pick: int, share: float) -> None:
        """A request ends, having used no more than it held."""
        replica, hold = self.pick_open(pick)
        used = int(hold.ceiling.tokens * share)
        hold.report(Amounts(tokens=used))
        self.run(hold.__aexit__(None, None, None))
        replica.open.remove(hold)
        self.used += used
        self.ended += 1

    @rule(pick=PICK, fault=st.sampled_from(["before", "after"]))
    def lose(self, pick: int, fault: Fault) -> None:
        """A replica is cut off, in one direction or both."""
        self.replicas[pick % 3].store.always = fault

    @rule(
        pick=st.integers(0, 1),
        fault=st.sampled_from(["before", "after"]),
        amount=AMOUNT,
        used=st.none() | st.floats(0, 1),
    )
    def spend_offline(self, pick: int, fault: Fault, amount: int, used: float | None) -> None:
        """A replica that has slices is cut off, and a request arrives there, and ends or runs on."""
        self.beat(pick)
        self.lose(pick, fault)
        self.hold(pick, amount, is_rated=False)
        if self.replicas[pick].open and used is not None:
            self.end(sum(len(replica.open) for replica in self.replicas[: pick + 1]) - 1, used)

    @rule(pick=PICK, fault=st.sampled_from(["before", "after"]), calls=st.integers(0, 6))
    def stumble(self, pick: int, fault: Fault, calls: int) -> None:
        """One of its next calls gets lost."""
        self.replicas[pick % 3].store.faults.extend([None] * calls + [fault])

    @rule(pick=PICK)
    def find(self, pick: int) -> None:
        """A replica has its connection again."""
        replica = self.replicas[pick % 3]
        replica.store.always = None
        replica.store.faults.clear()
        self.beat(pick)

    @rule(pick=PICK)
    def beat(self, pick: int) -> None:
        """A replica reports, sweeps, recovers, and leases slices."""
        replica = self.replicas[pick % 3]
        self.run(replica.ledger.beat())
        if replica.store.always is None:
            replica.lost_s = 0.0

    @rule(data=st.data())
    def time_passes(self, data: st.DataObject) -> None:
        """Whoever can reach the store goes on reporting; nobody is cut off for too long."""
        seconds = data.draw(st.sampled_from(self.pauses))
        for number, replica in enumerate(self.replicas):
            if replica.lost_s + seconds > self.longest_s or replica.store.always is None:
                self.find(number)
        self.place.clock.now += seconds
        for replica in self.replicas:
            replica.lost_s += seconds

    @invariant()
    def no_limit_is_exceeded(self) -> None:
        """Settled and held never add up to more than the limit, and nobody owes anything."""
        for limit in LIMITS[:-1]:
            for counts in self.counts(limit).values():
                self.check(limit, *counts)

    def check(self, limit: Limit, settled: int, held: int, debt: int) -> None:
        """One window."""
        assert debt == 0
        assert 0 <= settled + held <= limit.amount

    def counts(self, limit: Limit) -> dict[int, tuple[int, int, int]]:
        """Settled, held and debt by window."""
        books = self.run(self.place.read())
        return books.get((limit.scope, limit.unit, limit.window), {})

    def teardown(self) -> None:
        """When everybody is back and has ended, nothing is held, and settled is what was used."""
        try:
            for number, replica in enumerate(self.replicas):
                self.find(number)
                while replica.open:
                    self.end(0, 0.5)
                self.run(replica.ledger.close())
            self.place.ledgers.clear()
            observer = self.start_replica(0.0)
            self.place.clock.now += 2 * 86_400
            self.run(observer.ledger.beat())
            self.no_limit_is_exceeded()
            assert {held for limit in LIMITS[:-1] for _, held, _ in self.counts(limit).values()} <= {0}
            rows = self.run(observer.ledger.usage(FIRST, LAST))
            assert sum(row.tokens for row in rows) == self.used
            assert sum(row.requests for row in rows) == self.ended
        finally:
            self.run(self.place.close())
            self.runner.close()
            self.folder.cleanup()


class LongLossMachine(OfflineMachine):
    """The same, where leases of holds and slices may end before the store is back: that may leave debt."""

    pauses = (1.0, 11.0, 100.0, 400.0, 3600.0, 50_000.0)
    longest_s = 70_000.0

    def check(self, limit: Limit, settled: int, held: int, debt: int) -> None:
        """One window."""
        assert 0 <= settled + held <= limit.amount + debt


@pytest.mark.parametrize("machine", [OfflineMachine, LongLossMachine])
def test_budgets_hold_while_the_store_is_lost(machine: type[OfflineMachine]) -> None:
    """Whatever replicas spend offline, in any order of losses and returns, fits; and all of it is settled, once."""
    run_state_machine_as_test(machine, settings=steps(200))


class DrawsNothing(RedisStore):
    """Enters what was spent offline without taking it from the slice."""

    async def take(self, booking: Booking, *args: Any, **more: Any) -> Any:
        return await super().take(replace(booking, slices=()), *args, **more)

    def _send_unknown(self, wire: Any, settlements: Any, unknown: Any) -> Any:
        bare = [replace(each, booking=replace(each.booking, slices=())) for each in settlements]
        return super()._send_unknown(wire, bare, unknown)


class KeepsSlices(RedisStore):
    """Does not hold slices, so that others get their room too."""

    async def take(self, booking: Booking, *args: Any, **more: Any) -> Any:
        if booking.scopes == ():
            booking = replace(booking, ceiling=Amounts(), requests=0)
        return await super().take(booking, *args, **more)


@pytest.mark.e2e
@pytest.mark.parametrize("store", [DrawsNothing, KeepsSlices])
def test_the_machine_catches_a_store_that_cheats(store: type[RedisStore]) -> None:
    """The machine can fail."""
    machine = type(store.__name__, (OfflineMachine,), {"store_class": store})
    with pytest.raises(AssertionError):
        run_state_machine_as_test(machine, settings=FIND)


@pytest.mark.e2e
def test_the_machine_catches_a_replica_that_spends_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it does where a slice that was given back is spent all the same."""

    def keep(self: Offline, limit: Limit) -> None:
        part = self._slices[limit]
        assert part.booking is not None
        self._release(part.booking)

    monkeypatch.setattr(Offline, "_give_back", keep)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(OfflineMachine, settings=FIND)
