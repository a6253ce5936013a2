"""What processes that share their books can rely on: books outlive them, holds do not outlive their lease."""

from __future__ import annotations

import asyncio
import datetime as dt

import pytest

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts
from budget.ledgers.leased import LeasedLedger
from tests.budget.clocks import NOON, TEN, tokens, utc
from tests.budget.places import LeasedPlace

TODAY = int(utc(2024, 5, 17))
NOBODY = ["key:nobody"]


async def in_books(place: LeasedPlace) -> tuple[int, int, int]:
    """Settled, held and debt of today's tokens."""
    return (await place.books())["key:a", "tokens", "day"][TODAY]


async def left_behind(place: LeasedPlace, reported: Amounts | None = None) -> LeasedLedger:
    """What another process finds after one died in the middle of a request that had reported so much."""
    dying = place.ledger(tokens(100, "day"))
    hold = await dying.hold(["key:a"], TEN, mode="reasoning").__aenter__()
    if reported is not None:
        hold.report(reported)
        await dying.beat()
    await place.kill(dying)
    return place.ledger(tokens(100, "day"))


async def test_books_outlive_their_process(shared: LeasedPlace) -> None:
    """A process that starts finds what others have settled, and what was settled last before a close."""
    first = shared.ledger(tokens(100, "day"))
    async with first.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=7))
    await first.close()
    second = shared.ledger(tokens(100, "day"))
    async with second.hold(["key:a"], TEN) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert rest.remaining == 83


async def test_processes_share_one_limit(shared: LeasedPlace) -> None:
    """What one process holds, another cannot."""
    first, second = shared.ledger(tokens(15, "day")), shared.ledger(tokens(15, "day"))
    async with first.hold(["key:a"], TEN):
        with pytest.raises(HoldRefused, match="5 of 15") as refused:
            await second.hold(["key:a"], TEN).__aenter__()
        assert refused.value.kind == "budget_held"
        assert (second.held(), (await second.health()).held) == (Amounts(), TEN)
    assert await in_books(shared) == (0, 0, 0)


async def test_a_dead_process_is_settled_at_its_last_report(shared: LeasedPlace) -> None:
    """Within its lease a hold stays; then whoever sweeps first settles it, once, as it was last reported."""
    heir = await left_behind(shared, Amounts(tokens=4, thinking_tokens=3))
    third = shared.ledger()
    await heir.beat()
    assert await in_books(shared) == (0, 10, 0)
    shared.clock.now += shared.lease_s
    await heir.beat()
    await third.beat()
    assert await in_books(shared) == (4, 0, 0)
    assert [each.figures().swept for each in (heir, third)] == [1, 0]
    (row,) = await heir.usage(NOON.date(), NOON.date())
    assert (row.mode, row.requests, row.tokens, row.thinking_tokens) == ("reasoning", 1, 4, 3)


async def test_a_process_that_died_before_its_first_report_costs_nothing(shared: LeasedPlace) -> None:
    """Nothing was reported, so nothing is settled, and all of the hold is free again."""
    heir = await left_behind(shared)
    shared.clock.now += shared.lease_s
    await heir.beat()
    assert await in_books(shared) == (0, 0, 0)


async def test_a_report_renews_the_lease(shared: LeasedPlace) -> None:
    """A process that goes on reporting keeps its holds, however long a request takes."""
    ledger, other = shared.ledger(tokens(100, "day")), shared.ledger()
    async with ledger.hold(["key:a"], TEN):
        for _ in range(5):
            shared.clock.now += shared.lease_s - 1
            await ledger.beat()
            await other.beat()
        assert await in_books(shared) == (0, 10, 0)


@pytest.mark.parametrize(
    ("told", "used", "debt"),
    [(4, 9, 5), (4, 4, 0), (4, 1, 0), (4, 12, 8), (13, 15, 5), (13, 13, 3), (13, 11, 1), (13, 7, 0)],
)
async def test_a_process_that_was_only_paused_corrects_what_was_swept(
    shared: LeasedPlace, told: int, used: int, debt: int
) -> None:
    """Its own settlement replaces the sweep's, exactly; what it used while nothing was held is debt."""
    paused, other = shared.ledger(tokens(100, "day")), shared.ledger()
    async with paused.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=told))
        await paused.beat()
        shared.clock.now += shared.lease_s
        await other.beat()
        await paused.beat()
        assert await in_books(shared) == (told, 0, max(0, told - 10))
        hold.report(Amounts(tokens=used))
    assert await in_books(shared) == (used, 0, debt)
    (row,) = await other.usage(NOON.date(), NOON.date())
    assert (row.requests, row.tokens) == (1, used)


async def test_a_swept_hold_cannot_be_extended(shared: LeasedPlace) -> None:
    """Nothing more is held under a hold that has ended in the store; the store is not lost for that."""
    paused, other = shared.ledger(tokens(100, "day")), shared.ledger()
    async with paused.hold(["key:a"], TEN) as hold:
        shared.clock.now += shared.lease_s
        await other.beat()
        with pytest.raises(StoreUnreachable):
            await hold.extend(TEN)
        assert hold.ceiling == TEN
    assert paused.figures().is_reachable
    assert await in_books(shared) == (0, 0, 0)


async def test_limits_that_change_during_an_extension_stay_changed(shared: LeasedPlace) -> None:
    """The next extension meets the limits that were set while the store was asked for this one."""
    ledger = shared.ledger(tokens(100, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        extending = asyncio.create_task(hold.extend(TEN))
        await asyncio.sleep(0)
        ledger.set_limits([tokens(25, "day")])
        await extending
        assert hold.ceiling == Amounts(tokens=20)
        with pytest.raises(HoldRefused, match="5 of 25"):
            await hold.extend(TEN)


async def test_a_clock_set_back_does_not_keep_the_holds_of_the_dead(shared: LeasedPlace) -> None:
    """After a jump of an hour back, a dead process's hold is gone a lease after the next sweep."""
    heir = await left_behind(shared, Amounts(tokens=4))
    shared.clock.now -= 3600
    await heir.beat()
    assert await in_books(shared) == (0, 10, 0)
    shared.clock.now += shared.lease_s
    await heir.beat()
    assert await in_books(shared) == (4, 0, 0)


async def test_a_request_cancelled_while_it_is_held_holds_nothing(shared: LeasedPlace) -> None:
    """Whether or not the store had taken the hold when its request was cancelled, it is released."""
    ledger = shared.ledger(tokens(100, "day"))
    for turns in range(4):
        task = asyncio.create_task(ledger.hold(["key:a"], TEN).__aenter__())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert (await ledger.health()).holds == 0
    assert ledger.held() == Amounts()
    async with ledger.hold(["key:a"], TEN):
        assert await in_books(shared) == (0, 10, 0)


async def test_usage_is_kept_for_400_days(shared: LeasedPlace) -> None:
    """Usage of the last 400 days can be asked for, and no longer."""
    ledger = shared.ledger()
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    shared.clock.now += 399 * 86_400
    await ledger.beat()
    assert len(await ledger.usage(NOON.date(), dt.date(2030, 1, 1))) == 1
    shared.clock.now += 86_400
    await ledger.beat()
    assert await ledger.usage(NOON.date(), dt.date(2030, 1, 1)) == []


async def test_a_month_rolls_over_exactly_once(shared: LeasedPlace) -> None:
    """Of two processes that both see the new month first, neither resets what the other has spent in it."""
    first, second = shared.ledger(tokens(15, "month")), shared.ledger(tokens(15, "month"))
    async with first.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    shared.clock.now = utc(2024, 6, 1)
    async with first.hold(["key:a"], TEN) as hold, second.hold(["key:a"], Amounts(tokens=5)) as other:
        hold.report(TEN)
        other.report(Amounts(tokens=5))
    for ledger in (first, second):
        with pytest.raises(HoldRefused, match="0 of 15"):
            await ledger.hold(["key:a"], Amounts(tokens=1)).__aenter__()
    months = {int(utc(2024, 5, 1)): (10, 0, 0), int(utc(2024, 6, 1)): (15, 0, 0)}
    assert (await shared.books())["key:a", "tokens", "month"] == months


async def test_many_requests_of_several_processes_never_hold_more_than_the_limit(shared: LeasedPlace) -> None:
    """Of a hundred tasks in four processes that want ten tokens of a hundred, ten get in."""
    ledgers = [shared.ledger(tokens(100, "day"), tokens(1000, "day", scope="org:acme")) for _ in range(4)]
    leave = asyncio.Event()

    async def request(ledger: LeasedLedger) -> str:
        try:
            async with ledger.hold(["key:a", "org:acme"], TEN) as hold:
                hold.report(TEN)
                await leave.wait()
        except HoldRefused as refused:
            return refused.kind
        return "served"

    tasks = [asyncio.create_task(request(ledgers[at % 4])) for at in range(100)]
    while sum(task.done() for task in tasks) < 90:
        await asyncio.wait([t for t in tasks if not t.done()], return_when=asyncio.FIRST_COMPLETED)
    assert await in_books(shared) == (0, 100, 0)
    leave.set()
    outcomes = await asyncio.gather(*tasks)
    assert (outcomes.count("served"), outcomes.count("budget_held")) == (10, 90)
    assert await in_books(shared) == (100, 0, 0)
