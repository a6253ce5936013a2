"""A store that comes back to a process with much to tell: it is told in parts, and each part stands."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack
from itertools import count

import pytest

from budget.errors import StoreUnreachable
from budget.ledger import Amounts, LedgerHealth, Standing, UsageRow
from budget.ledgers import outbox
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.store import Booking, Settlement
from tests.budget.clocks import TEN, Clock
from tests.budget.virtual import play

SETTLES_PER_S = 1000


class SlowStore:
    """A store that takes its time, and forgets on demand.

    Attributes:
        is_away: it does not answer.
        forgot: what it says that it has lost, once.
        settled: hold ids, in order.
        taken: hold ids, in order.
        most_at_once: holds that were on their way to it.
    """

    is_prompt = False

    def __init__(self) -> None:
        self.is_away = False
        self.forgot: list[str] = []
        self.settled: list[str] = []
        self.taken: list[str] = []
        self.most_at_once = self._under_way = 0
        self._deliveries: set[asyncio.Task[None]] = set()

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        self._see()
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        await asyncio.sleep(0.01)
        self._under_way -= 1
        self.taken.append(booking.hold_id)
        return []

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        self._see()
        await asyncio.sleep(0.01)
        return []

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        delivery = asyncio.get_running_loop().create_task(self._settle(list(settlements)))
        self._deliveries.add(delivery)
        return delivery

    async def _settle(self, settlements: list[Settlement]) -> None:
        self._see()
        await asyncio.sleep(len(settlements) / SETTLES_PER_S)
        self.settled += [settlement.booking.hold_id for settlement in settlements]

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        self._see()
        forgot, self.forgot = self.forgot, []
        return forgot

    async def sweep(self, lease_s: float) -> int:
        self._see()
        return 0

    async def usage(self, first_day: object, last_day: object) -> list[UsageRow]:
        return []

    async def health(self) -> LedgerHealth:
        return LedgerHealth(kind="slow", is_reachable=True, holds=0, held=Amounts())

    async def close(self) -> None:
        """Nothing is open."""

    def _see(self) -> None:
        if self.is_away:
            raise StoreUnreachable("away")


async def lose(store: SlowStore, ledger: LeasedLedger) -> None:
    """The store does not answer, and the process has noticed."""
    store.is_away = True
    await ledger.beat()
    assert not ledger.figures().is_reachable


async def grant(ledger: LeasedLedger, times: int) -> None:
    """So many requests out of what is not limited."""
    for _ in range(times):
        async with ledger.hold(["key:a"], TEN):
            pass


def test_more_settlements_than_a_round_can_deliver_are_delivered_in_several() -> None:
    """What one round delivers stands, so that after some of them the store has all, each once and in order."""

    async def story() -> None:
        store = SlowStore()
        ledger = LeasedLedger(store, clock=Clock(), offline_share=0.5)
        await lose(store, ledger)
        await grant(ledger, 5500)
        store.is_away = False
        waiting = [ledger.figures().waiting]
        while ledger.figures().waiting and len(waiting) < 10:
            await ledger.beat()
            waiting.append(ledger.figures().waiting)
        assert waiting == [5500, 3500, 1500, 0]
        assert ledger.figures().is_reachable
        in_order = [f"{at:x}o" for at in range(5500)]
        assert [hold_id.split("-")[1] for hold_id in dict.fromkeys(store.settled)] == in_order

    play(story())


@pytest.mark.parametrize("how", ["granted offline", "lost by the store"])
def test_thousands_of_open_holds_are_entered_in_one_round(how: str) -> None:
    """They are entered many at a time, so that a healthy store is not taken for a lost one, and no more than that."""

    async def story() -> None:
        store = SlowStore()
        ledger = LeasedLedger(store, clock=Clock(), offline_share=0.5)
        async with AsyncExitStack() as streams:
            if how == "granted offline":
                await lose(store, ledger)
            for _ in range(3000):
                await streams.enter_async_context(ledger.hold(["key:a"], TEN))
            store.is_away, store.taken = False, []
            if how == "lost by the store":
                store.forgot = list(ledger.open)
            await ledger.beat()
            assert ledger.figures().is_reachable
            assert sorted(store.taken) == sorted(hold.booking.hold_id for hold in ledger.open.values())
            assert store.most_at_once == 100

    play(story())


def test_a_store_that_fails_among_many_holds_is_told_of_all_of_them_later() -> None:
    """Those that did not arrive are still this process's own, and are entered with the next round."""

    async def story() -> None:
        store = SlowStore()
        ledger = LeasedLedger(store, clock=Clock(), offline_share=0.5)
        numbers = count()

        async def take(booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
            if next(numbers) == 150:
                raise StoreUnreachable("once")
            store.taken.append(booking.hold_id)
            return []

        await lose(store, ledger)
        async with AsyncExitStack() as streams:
            for _ in range(300):
                await streams.enter_async_context(ledger.hold(["key:a"], TEN))
            store.is_away, store.take = False, take  # type: ignore[method-assign]
            await ledger.beat()
            assert (len(store.taken), ledger.figures().is_reachable) == (199, False)
            await ledger.beat()
            assert (len(set(store.taken)), len(store.taken), ledger.figures().is_reachable) == (300, 300, True)

    play(story())


def test_without_the_store_nothing_is_granted_that_could_not_be_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Beyond so many settlements that wait, requests are refused, which is said once; none is thrown away."""
    monkeypatch.setattr(outbox, "MOST_KEPT", 50)

    async def story() -> None:
        store = SlowStore()
        ledger = LeasedLedger(store, clock=Clock(), offline_share=0.5)
        await lose(store, ledger)
        async with ledger.hold(["key:a"], TEN):
            await grant(ledger, 50)
            for _ in range(3):
                with pytest.raises(StoreUnreachable):
                    await grant(ledger, 1)
        assert (ledger.figures().waiting, ledger.figures().offline) == (51, 51)
        store.is_away = False
        await ledger.beat()
        assert (ledger.figures().waiting, len(store.settled)) == (0, 51)
        await grant(ledger, 1)

    with caplog.at_level(logging.ERROR, logger="thinkgate.ledger"):
        play(story())
    assert [record.getMessage().split()[:2] for record in caplog.records] == [["the", "budget"], ["too", "many"]]
