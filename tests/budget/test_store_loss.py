"""A store that does not answer: requests are refused, nothing is lost, nothing is counted twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from budget.errors import StoreUnreachable
from budget.ledger import Amounts
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.store import Settlement
from tests.budget.clocks import TEN, tokens, utc
from tests.budget.places import PLACES, SHARED, LeasedPlace
from tests.budget.virtual import Fault, FaultyStore, VirtualLoop, play

TODAY = int(utc(2024, 5, 17))
Story = Callable[[LeasedPlace, FaultyStore, LeasedLedger], Awaitable[None]]
pytestmark = pytest.mark.parametrize("kind", SHARED)


def tell(kind: str, folder: Path, story: Story) -> None:
    """Play a story about one process and its store, in virtual time."""

    async def told() -> None:
        place = PLACES[kind](folder)
        assert isinstance(place, LeasedPlace)
        store = FaultyStore(place.store())
        try:
            await story(place, store, place.ledger(tokens(100, "day"), store=store))
        finally:
            store.always = None
            await place.close()

    play(told())


async def in_books(place: LeasedPlace) -> tuple[int, int, int]:
    """Settled, held and debt of today's tokens."""
    return (await place.books())["key:a", "tokens", "day"][TODAY]


def now_s() -> float:
    """Virtual time."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    return loop.now_s


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_request_waits_so_long_for_a_lost_store_and_the_next_ones_not_at_all(
    kind: str, tmp_path: Path, fault: Fault, caplog: pytest.LogCaptureFixture
) -> None:
    """A hold is tried again within its time; then requests are refused at once, and a line in the log says so."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        store.always = fault
        with pytest.raises(StoreUnreachable):
            await ledger.hold(["key:a"], TEN).__aenter__()
        assert now_s() == pytest.approx(place.timeout_s, abs=0.1)
        assert not ledger.figures().is_reachable
        began_s = now_s()
        with pytest.raises(StoreUnreachable):
            await ledger.hold(["key:a"], TEN).__aenter__()
        assert now_s() == began_s
        store.always = None
        await ledger.beat()
        assert ledger.figures().is_reachable
        async with ledger.hold(["key:a"], TEN):
            assert await in_books(place) == (0, 10, 0)
        assert await in_books(place) == (0, 0, 0)

    with caplog.at_level(logging.WARNING, logger="thinkgate.ledger"):
        tell(kind, tmp_path, story)
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_lost_answer_is_asked_for_again(kind: str, tmp_path: Path, fault: Fault) -> None:
    """A call or an answer that gets lost now and then is not noticed, and holds and extends only once."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        store.faults.extend([fault, fault])
        async with ledger.hold(["key:a"], TEN) as hold:
            store.faults.append(fault)
            await hold.extend(TEN)
            assert await in_books(place) == (0, 20, 0)
        assert ledger.figures().is_reachable

    tell(kind, tmp_path, story)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_settlements_wait_for_a_lost_store(kind: str, tmp_path: Path, fault: Fault) -> None:
    """Requests that end while the store is lost are settled when it is back, each once, and counted as waiting."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        async with ledger.hold(["key:a"], TEN) as first, ledger.hold(["key:a"], TEN) as second:
            first.report(Amounts(tokens=3))
            second.report(Amounts(tokens=4))
            store.always = fault
        await asyncio.sleep(0.01)
        assert ledger.figures().waiting == 2
        await ledger.beat()
        assert ledger.figures().waiting == 2
        store.always = None
        await ledger.beat()
        assert ledger.figures().waiting == 0
        assert await in_books(place) == (7, 0, 0)

    tell(kind, tmp_path, story)


def test_what_is_pending_is_delivered_by_a_close(kind: str, tmp_path: Path) -> None:
    """A process that stops tells its store everything first, also what the store has missed."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(Amounts(tokens=3))
            store.faults.append("before")
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(Amounts(tokens=4))
        await ledger.close()
        place.ledgers.clear()
        place.ledger()
        assert await in_books(place) == (7, 0, 0)

    tell(kind, tmp_path, story)


def test_a_running_ledger_reports_every_half_second_and_sweeps_every_second(kind: str, tmp_path: Path) -> None:
    """While it runs, what a hold has used reaches the store within half a second, and the dead are swept."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        running = asyncio.create_task(ledger.run())
        await ledger.hold(["key:a"], TEN).__aenter__()
        for hold in ledger.open.values():
            hold.report(Amounts(tokens=6))
        await asyncio.sleep(0.51)
        running.cancel()
        await place.kill(ledger)
        heir = place.ledger(store=FaultyStore(place.store()))
        running = asyncio.create_task(heir.run())
        place.clock.now += place.lease_s
        await asyncio.sleep(1.01)
        running.cancel()
        assert await in_books(place) == (6, 0, 0)

    tell(kind, tmp_path, story)


def test_a_running_ledger_finds_its_store_again_by_itself(kind: str, tmp_path: Path) -> None:
    """Half a second after the store is back, requests are held again."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        running = asyncio.create_task(ledger.run())
        store.always = "before"
        await asyncio.sleep(4.3)
        assert not ledger.figures().is_reachable
        store.always = None
        await asyncio.sleep(0.51)
        assert ledger.figures().is_reachable
        running.cancel()

    tell(kind, tmp_path, story)


class BuggyStore(FaultyStore):
    """A store that fails in a way nobody has foreseen."""

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        told.set_exception(ZeroDivisionError())
        return told

    async def sweep(self, lease_s: float) -> int:
        raise ZeroDivisionError


def test_a_bug_in_a_store_stops_nothing(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A round or a settlement that fails in an unforeseen way is in the log, and requests go on being held."""

    async def story(place: LeasedPlace, store: FaultyStore, ledger: LeasedLedger) -> None:
        ledger = place.ledger(tokens(100, "day"), store=BuggyStore(place.store()))
        running = asyncio.create_task(ledger.run())
        for _ in range(2):
            async with ledger.hold(["key:a"], TEN):
                await asyncio.sleep(1.1)
        await asyncio.sleep(1.1)
        assert not running.done()
        assert (ledger.figures().is_reachable, ledger.figures().waiting) == (True, 0)
        assert await in_books(place) == (0, 20, 0)  # until a lease is over
        running.cancel()

    with caplog.at_level(logging.WARNING, logger="thinkgate.ledger"):
        tell(kind, tmp_path, story)
    assert {record.getMessage() for record in caplog.records} == {"a settlement failed", "the ledger's round failed"}
