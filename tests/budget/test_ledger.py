"""What every ledger does: held before, settled after, never beyond a limit, in calendar windows and rates."""

from __future__ import annotations

import asyncio
import datetime as dt
import threading
from typing import Any

import pytest
from msgspec.structs import replace

from budget.errors import BudgetError, HoldRefused
from budget.ledger import Amounts, Remaining, UsageRow, Window
from budget.ledgers import memory, redis, sqlite_books
from tests.budget.clocks import NOON, TEN, tokens, utc
from tests.budget.places import LeasedPlace, Place


async def test_a_hold_is_replaced_by_what_was_used(place: Place) -> None:
    """Inside the block the ceiling is held; afterwards what was reported last is settled and the rest is free."""
    ledger = place.ledger(tokens(100))
    async with ledger.hold(["key:a"], Amounts(tokens=60)) as hold:
        assert ledger.held() == Amounts(tokens=60)
        assert hold.remaining("tokens") == Remaining(limit=100, remaining=40, reset_s=3600.0)
        hold.report(Amounts(tokens=5))
        hold.report(Amounts(tokens=20))
    assert ledger.held() == Amounts()
    async with ledger.hold(["key:a"], Amounts(tokens=80)) as hold:
        assert hold.remaining("tokens") == Remaining(limit=100, remaining=0, reset_s=3600.0)


async def test_a_hold_that_reports_nothing_releases_everything(place: Place) -> None:
    """A request that never reached a backend costs its scopes nothing but the request itself."""
    ledger = place.ledger(tokens(100), tokens(2, unit="requests"))
    async with ledger.hold(["key:a"], Amounts(tokens=100)):
        pass
    async with ledger.hold(["key:a"], Amounts(tokens=100)) as hold:
        rest = hold.remaining("requests")
        assert rest is not None
        assert rest.remaining == 0


async def test_without_limits_everything_is_held_and_nothing_refused(place: Place) -> None:
    """A scope that no limit names is free, and still shows in `held`."""
    ledger = place.ledger()
    async with ledger.hold(["key:a"], Amounts(tokens=10**12, nano_usd=5)) as hold:
        assert ledger.held() == Amounts(tokens=10**12, nano_usd=5)
        assert hold.remaining("tokens") is None
    assert ledger.held() == Amounts()


async def test_a_failing_request_is_settled_too(place: Place) -> None:
    """An exception inside the block passes through, after what was used is settled."""
    ledger = place.ledger(tokens(100))

    async def fail() -> None:
        async with ledger.hold(["key:a"], Amounts(tokens=60)) as hold:
            hold.report(Amounts(tokens=30))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    async with ledger.hold(["key:a"], TEN) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert rest.remaining == 60


async def test_a_cancelled_request_is_settled_too(place: Place) -> None:
    """Cancelling the task that holds settles what was reported, at once."""
    ledger = place.ledger(tokens(100))
    inside = asyncio.Event()

    async def request() -> None:
        async with ledger.hold(["key:a"], Amounts(tokens=60)) as hold:
            hold.report(Amounts(tokens=7))
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await inside.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ledger.held() == Amounts()
    async with ledger.hold(["key:a"], Amounts(tokens=93)):
        pass


async def test_many_requests_at_once_never_hold_more_than_the_limit(place: Place) -> None:
    """Of a hundred tasks that want ten tokens of a hundred, ten get in and ninety are refused."""
    ledger = place.ledger(tokens(100), tokens(1000, scope="org:acme"))
    inside, leave = 0, asyncio.Event()

    async def request() -> str:
        nonlocal inside
        try:
            async with ledger.hold(["key:a", "org:acme"], TEN) as hold:
                inside += 1
                hold.report(TEN)
                await leave.wait()
        except HoldRefused as refused:
            return refused.kind
        return "served"

    tasks = [asyncio.create_task(request()) for _ in range(100)]
    while sum(task.done() for task in tasks) < 90:
        await asyncio.wait([t for t in tasks if not t.done()], return_when=asyncio.FIRST_COMPLETED)
    assert (inside, ledger.held()) == (10, Amounts(tokens=100))
    leave.set()
    outcomes = await asyncio.gather(*tasks)
    assert (outcomes.count("served"), outcomes.count("budget_held")) == (10, 90)
    assert ledger.held() == Amounts()


async def test_a_budget_that_others_hold_may_come_back(place: Place) -> None:
    """While what is short is only held, the refusal is `budget_held` and names a time to retry."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN):
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["key:a"], TEN).__aenter__()
    assert refused.value.kind == "budget_held"
    assert refused.value.retry_after_s is not None


async def test_a_budget_that_is_spent_stays_spent_until_its_window_ends(place: Place) -> None:
    """Once settled use leaves no room, the refusal is `budget_spent` without a time; the next day it fits again."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    with pytest.raises(HoldRefused, match="5 of 15 tokens per day left, and this request needs 10") as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.retry_after_s) == ("budget_spent", None)
    place.clock.now += 12 * 3600
    async with ledger.hold(["key:a"], TEN):
        pass


@pytest.mark.parametrize("window", ["minute", "day", "total"])
async def test_a_request_larger_than_the_limit_is_told_to_shrink(place: Place, window: Window) -> None:
    """A hold above the whole limit never fits: no retry is promised, and the message names the remedy."""
    ledger = place.ledger(tokens(9, window))
    with pytest.raises(HoldRefused, match="Ask for fewer tokens") as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.retry_after_s) == ("budget_spent", None)
    assert isinstance(refused.value, BudgetError)


async def test_the_tightest_scope_is_named_and_the_others_hold_nothing(place: Place) -> None:
    """Two scopes are short: the one with the smaller share left is named, and nothing is held in any."""
    ledger = place.ledger(tokens(100, scope="key:a"), tokens(1000, scope="team:ml"), tokens(10_000, scope="org:acme"))
    async with ledger.hold(["team:ml"], Amounts(tokens=995)), ledger.hold(["key:a"], Amounts(tokens=50)):
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["org:acme", "key:a", "team:ml"], Amounts(tokens=80)).__aenter__()
        assert refused.value.scope == "team:ml"
        assert ledger.held() == Amounts(tokens=1045)
        async with ledger.hold(["org:acme"], Amounts(tokens=10_000)):
            pass


async def test_a_refused_hold_can_still_tell_what_is_left(place: Place) -> None:
    """After a refusal the hold knows its limits' remainders, for the headers of the answer, and settles nothing."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN):
        refused = ledger.hold(["key:a"], TEN)
        with pytest.raises(HoldRefused):
            await refused.__aenter__()
        assert refused.remaining("tokens") == Remaining(limit=15, remaining=5, reset_s=12 * 3600.0)
        assert refused.remaining("requests") is None
        refused.report(TEN)
        await refused.__aexit__(None, None, None)
        assert ledger.held() == TEN


async def test_an_overrun_becomes_debt_that_later_requests_pay_back(place: Place) -> None:
    """What a backend used beyond its hold is settled all the same, and leaves less room, or none, for others."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=40))
        assert hold.remaining("tokens") == Remaining(limit=15, remaining=5, reset_s=12 * 3600.0)
    with pytest.raises(HoldRefused, match="0 of 15 tokens"):
        await ledger.hold(["key:a"], Amounts(tokens=1)).__aenter__()


async def test_a_reload_keeps_what_is_settled_and_held(place: Place) -> None:
    """New amounts meet the old use, also when the limit was gone for a while."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=3))
        ledger.set_limits([tokens(12, "day")])
        with pytest.raises(HoldRefused, match="2 of 12"):
            await ledger.hold(["key:a"], TEN).__aenter__()
    with pytest.raises(HoldRefused, match="9 of 12"):
        await ledger.hold(["key:a"], TEN).__aenter__()
    ledger.set_limits([])
    async with ledger.hold(["key:a"], Amounts(tokens=1000)):
        pass
    ledger.set_limits([tokens(12, "day")])
    with pytest.raises(HoldRefused, match="9 of 12"):
        await ledger.hold(["key:a"], TEN).__aenter__()


async def test_a_limit_lowered_below_its_use_refuses_until_it_fits(place: Place) -> None:
    """Lowering a limit takes nothing from running requests; new ones wait until the rest is free again."""
    ledger = place.ledger(tokens(100, "day"))
    async with ledger.hold(["key:a"], Amounts(tokens=50)):
        ledger.set_limits([tokens(20, "day")])
        with pytest.raises(HoldRefused, match="0 of 20"):
            await ledger.hold(["key:a"], TEN).__aenter__()
    async with ledger.hold(["key:a"], Amounts(tokens=20)):
        pass


async def test_of_two_limits_on_the_same_thing_the_tighter_counts(place: Place) -> None:
    """A limit that stands twice is held once, also after a reload."""
    for _ in range(2):
        ledger = place.ledger(tokens(30), tokens(20), tokens(25))
        ledger.set_limits([tokens(30), tokens(20), tokens(25)])
        async with ledger.hold(["key:a"], TEN) as hold:
            rest = hold.remaining("tokens")
            assert rest is not None
            assert (rest.limit, rest.remaining) == (20, 10)
        await ledger.close()  # another ledger over the same books is another process: it sees what was delivered


async def test_a_hold_can_be_extended(place: Place) -> None:
    """An extension is held besides, counts as no further request, and is settled with the rest."""
    ledger = place.ledger(tokens(30, "day"), tokens(1, unit="requests"), tokens(1, None, unit="concurrency"))
    async with ledger.hold(["key:a"], TEN) as hold:
        await hold.extend(Amounts(tokens=15))
        assert hold.ceiling == ledger.held() == Amounts(tokens=25)
        with pytest.raises(HoldRefused, match="5 of 30"):
            await hold.extend(TEN)
        assert hold.ceiling == ledger.held() == Amounts(tokens=25)
        hold.report(Amounts(tokens=21))
    assert ledger.held() == Amounts()
    assert (await place.books())["key:a", "tokens", "day"] == {int(utc(2024, 5, 17)): (21, 0, 0)}


async def test_debt_is_booked(place: Place) -> None:
    """What was used beyond a hold is in the books as debt, and in the figures of the process."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=40, nano_usd=3))
    assert (await place.books())["key:a", "tokens", "day"] == {int(utc(2024, 5, 17)): (40, 0, 30)}
    assert ledger.figures().debt == Amounts(tokens=30, nano_usd=3)


async def test_debt_of_thinking_alone_is_booked(place: Place) -> None:
    """Thinking beyond a hold is debt also where the tokens in total and the money are within it."""
    ledger = place.ledger()
    async with ledger.hold(["key:a"], Amounts(tokens=10, thinking_tokens=4, nano_usd=9)) as hold:
        hold.report(Amounts(tokens=10, thinking_tokens=6, nano_usd=9))
    assert ledger.figures().debt == Amounts(thinking_tokens=2)


async def test_usage_adds_up_by_day_scopes_and_mode(place: Place) -> None:
    """Settled requests are summed under all their scopes, their mode and the day of their hold."""
    ledger = place.ledger(tokens(1000))
    used = Amounts(tokens=5, thinking_tokens=3, nano_usd=70)
    for mode in ("instant", "reasoning", "reasoning"):
        async with ledger.hold(["key:a", "model:m"], TEN, mode=mode) as hold:
            hold.report(used)
            place.clock.now = utc(2024, 5, 17, 23, 59) if mode == "instant" else utc(2024, 5, 18)
    with pytest.raises(HoldRefused):
        await ledger.hold(["key:a", "model:m"], Amounts(tokens=1001)).__aenter__()
    rows = await ledger.usage(NOON.date(), NOON.date())
    both = UsageRow(
        day=NOON.date(), scopes=("key:a", "model:m"), mode="", requests=0, tokens=0, thinking_tokens=0, nano_usd=0
    )
    once = replace(both, mode="instant", requests=1, tokens=5, thinking_tokens=3, nano_usd=70)
    assert sorted(rows, key=lambda row: row.mode) == [once, replace(once, mode="reasoning")]
    assert await ledger.usage(NOON.date() + dt.timedelta(days=1), dt.date(2030, 1, 1)) == [
        replace(once, mode="reasoning", day=dt.date(2024, 5, 18))
    ]
    assert await ledger.usage(dt.date(2020, 1, 1), dt.date(2024, 5, 16)) == []


async def test_a_long_table_of_usage_holds_up_nobody(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its rows are made, requests are held and settled, in this process and in others."""
    begun, goes_on = threading.Event(), threading.Event()

    def row(**fields: Any) -> UsageRow:
        begun.set()
        assert goes_on.wait(10)
        return UsageRow(**fields)

    for module in (memory, redis, sqlite_books):
        monkeypatch.setattr(module, "UsageRow", row)
    ledger = place.ledger(tokens(1000))
    async with ledger.hold(["key:a"], TEN):
        pass
    asked = asyncio.create_task(ledger.usage(NOON.date(), NOON.date()))
    assert await asyncio.to_thread(begun.wait, 10)
    for each in {ledger, place.ledger(tokens(1000)) if isinstance(place, LeasedPlace) else ledger}:
        async with each.hold(["key:a", "org:new"], TEN) as hold:
            hold.report(TEN)
    goes_on.set()
    (found,) = await asked
    assert (found.scopes, found.requests, found.tokens) == (("key:a",), 1, 0)


async def test_health_counts_what_is_open(place: Place) -> None:
    """Health names the kind of store and sums the open holds."""
    ledger = place.ledger()
    async with ledger.hold(["key:a"], TEN), ledger.hold(["key:b"], Amounts(tokens=1, nano_usd=2)):
        health = await ledger.health()
        assert (health.is_reachable, health.holds, health.held) == (True, 2, Amounts(tokens=11, nano_usd=2))
    health = await ledger.health()
    assert (health.holds, health.held) == (0, Amounts())
    assert ledger.figures().is_reachable
