"""Processes on one Valkey server, each of which may lose it, and stories told of them in virtual time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from budget.errors import StoreUnreachable
from budget.ledger import Amounts, Limit, Unit
from budget.ledgers.leased import LeasedHold, LeasedLedger
from tests.budget.clocks import TEN, utc
from tests.budget.places import RedisPlace
from tests.budget.virtual import FaultyStore, play

TODAY = int(utc(2024, 5, 17))
SHARE = 0.2
Story = Callable[["Replicas"], Awaitable[None]]


class Replicas:
    """Processes on one Valkey server, each behind a connection of its own that may break."""

    def __init__(self, place: RedisPlace) -> None:
        self.place = place
        self.clock = place.clock
        self.stores: list[FaultyStore] = []

    def start(self, *limits: Limit, share: float = SHARE) -> LeasedLedger:
        """A replica."""
        self.stores.append(FaultyStore(self.place.store()))
        ledger = LeasedLedger(
            self.stores[-1],
            limits,
            clock=self.clock,
            lease_s=self.place.lease_s,
            offline_share=share,
            monotonic=self.clock,
        )
        self.place.ledgers.append(ledger)
        return ledger

    async def warm(self, *limits: Limit, share: float = SHARE) -> LeasedLedger:
        """A replica that has seen its limits in use, and leased its slices."""
        ledger = self.start(*limits, share=share)
        async with ledger.hold(["key:a"], Amounts()):
            pass
        await ledger.beat()
        return ledger

    async def lose(self, ledger: LeasedLedger) -> None:
        """Its store does not answer, and it has noticed."""
        self.stores[self.place.ledgers.index(ledger)].always = "before"
        with pytest.raises(StoreUnreachable):
            await ledger.hold(["key:a"], Amounts(tokens=10**9)).__aenter__()
        assert not ledger.figures().is_reachable

    async def find(self, ledger: LeasedLedger) -> None:
        """Its store is back, and it has noticed."""
        self.stores[self.place.ledgers.index(ledger)].always = None
        await ledger.beat(sweeps=False)
        assert ledger.figures().is_reachable

    async def in_books(self, unit: Unit = "tokens") -> tuple[int, int, int]:
        """Settled, held and debt of today."""
        return (await self.place.books())["key:a", unit, "day"][TODAY]


def tell(folder: Path, story: Story) -> None:
    """Play a story in virtual time."""

    async def told() -> None:
        replicas = Replicas(RedisPlace(folder))
        try:
            await story(replicas)
        finally:
            for store in replicas.stores:
                store.always = None
            await replicas.place.close()

    play(told())


async def taken(ledger: LeasedLedger, amounts: Amounts = TEN) -> LeasedHold:
    """A hold that is open."""
    return await ledger.hold(["key:a"], amounts).__aenter__()


async def ended(hold: LeasedHold, used: int) -> None:
    """End a hold."""
    hold.report(Amounts(tokens=used))
    await hold.__aexit__(None, None, None)
