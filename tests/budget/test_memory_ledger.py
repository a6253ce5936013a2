"""The ledger in memory: held before, settled after, never beyond a limit, in calendar windows."""

from __future__ import annotations

import asyncio

import pytest

from budget.books import window_end, window_start
from budget.errors import BudgetError, HoldRefused
from budget.ledger import Amounts, Remaining, Window
from budget.ledgers.memory import MemoryLedger
from tests.budget.clocks import TEN, Clock, ledger_of, tokens, utc


async def test_a_hold_is_replaced_by_what_was_used() -> None:
    """Inside the block the ceiling is held; afterwards what was reported last is settled and the rest is free."""
    ledger, _ = ledger_of(tokens(100))
    async with ledger.hold(["key:a"], Amounts(tokens=60)) as hold:
        assert ledger.held() == Amounts(tokens=60)
        assert hold.remaining("tokens") == Remaining(limit=100, remaining=40, reset_s=3600.0)
        hold.report(Amounts(tokens=5))
        hold.report(Amounts(tokens=20))
    assert ledger.held() == Amounts()
    async with ledger.hold(["key:a"], Amounts(tokens=80)) as hold:
        assert hold.remaining("tokens") == Remaining(limit=100, remaining=0, reset_s=3600.0)


async def test_a_hold_that_reports_nothing_releases_everything() -> None:
    """A request that never reached a backend costs its scopes nothing but the request itself."""
    ledger, _ = ledger_of(tokens(100), tokens(2, unit="requests"))
    async with ledger.hold(["key:a"], Amounts(tokens=100)):
        pass
    async with ledger.hold(["key:a"], Amounts(tokens=100)) as hold:
        rest = hold.remaining("requests")
        assert rest is not None
        assert rest.remaining == 0


async def test_without_limits_everything_is_held_and_nothing_refused() -> None:
    """A scope that no limit names is free, and still shows in `held`."""
    ledger, _ = ledger_of()
    async with ledger.hold(["key:a"], Amounts(tokens=10**12, nano_usd=5)) as hold:
        assert ledger.held() == Amounts(tokens=10**12, nano_usd=5)
        assert hold.remaining("tokens") is None
    assert ledger.held() == Amounts()


async def test_a_failing_request_is_settled_too() -> None:
    """An exception inside the block passes through, after what was used is settled."""
    ledger, _ = ledger_of(tokens(100))

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


async def test_a_cancelled_request_is_settled_too() -> None:
    """Cancelling the task that holds settles what was reported, at once."""
    ledger, _ = ledger_of(tokens(100))
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


async def test_many_requests_at_once_never_hold_more_than_the_limit() -> None:
    """Of a hundred tasks that want ten tokens of a hundred, ten get in and ninety are refused."""
    ledger, _ = ledger_of(tokens(100), tokens(1000, scope="org:acme"))
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


@pytest.mark.parametrize("window", ["second", "minute"])
async def test_a_short_window_is_a_rate(window: Window) -> None:
    """A limit per second or minute refills as time passes; a refusal is `rate` and says when there is enough."""
    ledger, clock = ledger_of(tokens(10, window))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    with pytest.raises(HoldRefused) as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.scope, refused.value.unit) == ("rate", "key:a", "tokens")
    assert refused.value.retry_after_s == (1 if window == "second" else 60)
    clock.now += refused.value.retry_after_s / 2
    async with ledger.hold(["key:a"], Amounts(tokens=5)):
        pass
    clock.now += refused.value.retry_after_s / 2
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_concurrency_is_a_rate_that_time_does_not_free() -> None:
    """One request too many at once is refused as `rate`; only the end of another lets it in, not the clock."""
    ledger, clock = ledger_of(tokens(1, None, unit="concurrency"))
    async with ledger.hold(["key:a"], TEN):
        clock.now += 10 * 365 * 86_400
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["key:a"], TEN).__aenter__()
        assert (refused.value.kind, refused.value.unit) == ("rate", "concurrency")
        assert refused.value.retry_after_s is not None
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_budget_that_others_hold_may_come_back() -> None:
    """While what is short is only held, the refusal is `budget_held` and names a time to retry."""
    ledger, _ = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN):
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["key:a"], TEN).__aenter__()
    assert refused.value.kind == "budget_held"
    assert refused.value.retry_after_s is not None


async def test_a_budget_that_is_spent_stays_spent_until_its_window_ends() -> None:
    """Once settled use leaves no room, the refusal is `budget_spent` without a time; the next day it fits again."""
    ledger, clock = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    with pytest.raises(HoldRefused, match="5 of 15 tokens per day left, and this request needs 10") as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.retry_after_s) == ("budget_spent", None)
    clock.now += 12 * 3600
    async with ledger.hold(["key:a"], TEN):
        pass


@pytest.mark.parametrize("window", ["minute", "day", "total"])
async def test_a_request_larger_than_the_limit_is_told_to_shrink(window: Window) -> None:
    """A hold above the whole limit never fits: no retry is promised, and the message names the remedy."""
    ledger, _ = ledger_of(tokens(9, window))
    with pytest.raises(HoldRefused, match="Ask for fewer tokens") as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.retry_after_s) == ("budget_spent", None)
    assert isinstance(refused.value, BudgetError)


async def test_the_tightest_scope_is_named_and_the_others_hold_nothing() -> None:
    """Two scopes are short: the one with the smaller share left is named, and nothing is held in any."""
    ledger, _ = ledger_of(tokens(100, scope="key:a"), tokens(1000, scope="team:ml"), tokens(10_000, scope="org:acme"))
    async with ledger.hold(["team:ml"], Amounts(tokens=995)), ledger.hold(["key:a"], Amounts(tokens=50)):
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["org:acme", "key:a", "team:ml"], Amounts(tokens=80)).__aenter__()
        assert refused.value.scope == "team:ml"
        assert ledger.held() == Amounts(tokens=1045)
        async with ledger.hold(["org:acme"], Amounts(tokens=10_000)):
            pass


async def test_a_refused_hold_can_still_tell_what_is_left() -> None:
    """After a refusal the hold knows its limits' remainders, for the headers of the answer, and settles nothing."""
    ledger, _ = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN):
        refused = ledger.hold(["key:a"], TEN)
        with pytest.raises(HoldRefused):
            await refused.__aenter__()
        assert refused.remaining("tokens") == Remaining(limit=15, remaining=5, reset_s=12 * 3600.0)
        assert refused.remaining("requests") is None
        refused.report(TEN)
        await refused.__aexit__(None, None, None)
        assert ledger.held() == TEN


async def test_an_overrun_becomes_debt_that_later_requests_pay_back() -> None:
    """What a backend used beyond its hold is settled all the same, and leaves less room, or none, for others."""
    ledger, _ = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=40))
        assert hold.remaining("tokens") == Remaining(limit=15, remaining=5, reset_s=12 * 3600.0)
    with pytest.raises(HoldRefused, match="0 of 15 tokens"):
        await ledger.hold(["key:a"], Amounts(tokens=1)).__aenter__()


async def test_use_belongs_to_the_window_of_its_hold() -> None:
    """A request that ends after midnight burdens neither the new day's budget nor what is held there."""
    ledger, clock = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        clock.now += 13 * 3600
        async with ledger.hold(["key:a"], Amounts(tokens=15)):
            hold.report(TEN)
    async with ledger.hold(["key:a"], Amounts(tokens=15)) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert (rest.remaining, rest.reset_s) == (0, 23 * 3600.0)


async def test_a_reload_keeps_what_is_settled_and_held() -> None:
    """New amounts meet the old use; a limit that is gone and comes back begins anew."""
    ledger, _ = ledger_of(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=3))
        ledger.set_limits([tokens(12, "day")])
        with pytest.raises(HoldRefused, match="2 of 12"):
            await ledger.hold(["key:a"], TEN).__aenter__()
    with pytest.raises(HoldRefused, match="9 of 12"):
        await ledger.hold(["key:a"], TEN).__aenter__()
    ledger.set_limits([])
    ledger.set_limits([tokens(12, "day")])
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_limit_lowered_below_its_use_refuses_until_it_fits() -> None:
    """Lowering a limit takes nothing from running requests; new ones wait until the rest is free again."""
    ledger, _ = ledger_of(tokens(100, "day"))
    async with ledger.hold(["key:a"], Amounts(tokens=50)):
        ledger.set_limits([tokens(20, "day")])
        with pytest.raises(HoldRefused, match="0 of 20"):
            await ledger.hold(["key:a"], TEN).__aenter__()
    async with ledger.hold(["key:a"], Amounts(tokens=20)):
        pass


async def test_of_two_limits_on_the_same_thing_the_tighter_counts() -> None:
    """A limit that stands twice is held once, also after a reload."""
    for _ in range(2):
        ledger, _ = ledger_of(tokens(30), tokens(20), tokens(25))
        ledger.set_limits([tokens(30), tokens(20), tokens(25)])
        async with ledger.hold(["key:a"], TEN) as hold:
            rest = hold.remaining("tokens")
            assert rest is not None
            assert (rest.limit, rest.remaining) == (20, 10)


async def test_closing_loses_nothing() -> None:
    """The memory ledger has nothing to write out, and closing it leaves the books as they are."""
    ledger, _ = ledger_of(tokens(15))
    async with ledger.hold(["key:a"], TEN):
        await ledger.close()
        assert ledger.held() == TEN


@pytest.mark.parametrize(
    ("window", "now", "end"),
    [
        ("second", utc(2024, 5, 17, 12, 0, 0) + 0.5, utc(2024, 5, 17, 12, 0, 1)),
        ("minute", utc(2024, 5, 17, 12, 0, 59), utc(2024, 5, 17, 12, 1)),
        ("minute", utc(2024, 5, 17, 12, 1), utc(2024, 5, 17, 12, 2)),
        ("hour", utc(2024, 12, 31, 23, 30), utc(2025, 1, 1)),
        ("day", utc(2024, 2, 28, 23, 59, 59), utc(2024, 2, 29)),
        ("day", utc(2023, 2, 28, 1), utc(2023, 3, 1)),
        ("month", utc(2024, 2, 29, 23, 59, 59), utc(2024, 3, 1)),
        ("month", utc(2023, 2, 1), utc(2023, 3, 1)),
        ("month", utc(2100, 2, 15), utc(2100, 3, 1)),
        ("month", utc(2024, 12, 31, 23, 59, 59), utc(2025, 1, 1)),
        ("month", utc(2024, 4, 30), utc(2024, 5, 1)),
        ("total", utc(2024, 1, 1), float("inf")),
        (None, utc(2024, 1, 1), float("inf")),
    ],
)
def test_windows_end_where_the_calendar_says(window: Window | None, now: float, end: float) -> None:
    """Windows are calendar windows in UTC: months have their own lengths, leap years included."""
    assert window_end(window, window_start(window, now)) == end


async def test_a_month_rolls_over_once_a_leap_february() -> None:
    """A monthly budget is free again on 1 March, not on 29 February."""
    clock = Clock(2024, 2, 28)
    ledger = MemoryLedger([tokens(10, "month")], clock=clock)
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    clock.now = utc(2024, 2, 29, 23, 59, 59)
    with pytest.raises(HoldRefused):
        await ledger.hold(["key:a"], TEN).__aenter__()
    clock.now = utc(2024, 3, 1)
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_clock_that_jumps_back_frees_nothing() -> None:
    """Setting the clock back does not begin a window anew; it ends when its first reading said."""
    ledger, clock = ledger_of(tokens(10, "hour"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    for back in (1, 3600, 80_000):
        clock.now -= back
        with pytest.raises(HoldRefused):
            await ledger.hold(["key:a"], TEN).__aenter__()
    clock.now = utc(2024, 5, 17, 13)
    async with ledger.hold(["key:a"], TEN):
        pass
