"""When every ledger frees what: rates run out, calendar windows end, clocks jump."""

from __future__ import annotations

import pytest

from budget.errors import HoldRefused
from budget.ledger import Amounts, Window
from tests.budget.clocks import TEN, tokens, utc
from tests.budget.places import Place


@pytest.mark.parametrize("window", ["second", "minute"])
async def test_a_short_window_is_a_rate(place: Place, window: Window) -> None:
    """A limit per second or minute refills as time passes; a refusal is `rate` and says when there is enough."""
    ledger = place.ledger(tokens(10, window))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    with pytest.raises(HoldRefused) as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert (refused.value.kind, refused.value.scope, refused.value.unit) == ("rate", "key:a", "tokens")
    assert refused.value.retry_after_s == (1 if window == "second" else 60)
    place.clock.now += refused.value.retry_after_s / 2
    async with ledger.hold(["key:a"], Amounts(tokens=5)):
        pass
    place.clock.now += refused.value.retry_after_s / 2
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_concurrency_is_a_rate_that_time_does_not_free(place: Place) -> None:
    """One request too many at once is refused as `rate`; only the end of another lets it in, not the clock."""
    ledger = place.ledger(tokens(1, None, unit="concurrency"))
    async with ledger.hold(["key:a"], TEN):
        place.clock.now += 10 * 365 * 86_400
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["key:a"], TEN).__aenter__()
        assert (refused.value.kind, refused.value.unit) == ("rate", "concurrency")
        assert refused.value.retry_after_s is not None
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_use_belongs_to_the_window_of_its_hold(place: Place) -> None:
    """A request that ends after midnight burdens neither the new day's budget nor what is held there."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        place.clock.now += 13 * 3600
        async with ledger.hold(["key:a"], Amounts(tokens=15)):
            hold.report(TEN)
    async with ledger.hold(["key:a"], Amounts(tokens=15)) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert (rest.remaining, rest.reset_s) == (0, 23 * 3600.0)


async def test_a_month_rolls_over_once_a_leap_february(place: Place) -> None:
    """A monthly budget is free again on 1 March, not on 29 February."""
    place.clock.now = utc(2024, 2, 28)
    ledger = place.ledger(tokens(10, "month"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    place.clock.now = utc(2024, 2, 29, 23, 59, 59)
    with pytest.raises(HoldRefused):
        await ledger.hold(["key:a"], TEN).__aenter__()
    place.clock.now = utc(2024, 3, 1)
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_clock_that_jumps_back_frees_nothing(place: Place) -> None:
    """Setting the clock back does not begin a window anew; it ends when its first reading said."""
    ledger = place.ledger(tokens(10, "hour"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    for back in (1, 3600, 80_000):
        place.clock.now -= back
        with pytest.raises(HoldRefused):
            await ledger.hold(["key:a"], TEN).__aenter__()
    place.clock.now = utc(2024, 5, 17, 13)
    async with ledger.hold(["key:a"], TEN):
        pass


@pytest.mark.parametrize("amount", [3, 7])
async def test_a_rate_admits_its_whole_burst_at_once(place: Place, amount: int) -> None:
    """As many single requests as the limit says fit into one instant, whether or not a unit is a round time."""
    ledger = place.ledger(tokens(amount, "minute", unit="requests"))
    for _ in range(amount):
        async with ledger.hold(["key:a"], TEN):
            pass
    with pytest.raises(HoldRefused) as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s == pytest.approx(60 / amount, abs=0.001)
    place.clock.now += refused.value.retry_after_s + 0.001
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_rate_gets_back_what_was_held_and_not_used(place: Place) -> None:
    """Settling less than was held makes room at once, and never more than the burst."""
    ledger = place.ledger(tokens(10, "minute"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(Amounts(tokens=4))
    async with ledger.hold(["key:a"], Amounts(tokens=6)) as hold:
        rest = hold.remaining("tokens")
        assert rest is not None
        assert rest.remaining == 0
        place.clock.now += 3600
    with pytest.raises(HoldRefused):
        await ledger.hold(["key:a"], Amounts(tokens=11)).__aenter__()
    async with ledger.hold(["key:a"], TEN):
        pass


async def test_a_clock_set_back_neither_frees_nor_blocks_a_rate(place: Place) -> None:
    """A full bucket stays full when the clock jumps back an hour, and runs out from there on as ever."""
    ledger = place.ledger(tokens(10, "minute"))
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    place.clock.now -= 3600
    with pytest.raises(HoldRefused) as refused:
        await ledger.hold(["key:a"], TEN).__aenter__()
    assert refused.value.retry_after_s == pytest.approx(60, abs=0.001)
    place.clock.now += 30
    async with ledger.hold(["key:a"], Amounts(tokens=5)):
        pass


async def test_an_extension_belongs_to_the_window_of_its_hold(place: Place) -> None:
    """After midnight a hold is extended in yesterday's budget, and refused there when that has no room."""
    ledger = place.ledger(tokens(15, "day"))
    async with ledger.hold(["key:a"], TEN) as hold:
        place.clock.now += 13 * 3600
        async with ledger.hold(["key:a"], Amounts(tokens=15)):
            await hold.extend(Amounts(tokens=5))
        with pytest.raises(HoldRefused, match="0 of 15 tokens per day left, and this request needs 1"):
            await hold.extend(Amounts(tokens=1))
        hold.report(Amounts(tokens=12))
    days = {int(utc(2024, 5, 17)): (12, 0, 0), int(utc(2024, 5, 18)): (0, 0, 0)}
    assert (await place.books())["key:a", "tokens", "day"] == days


async def test_old_windows_are_forgotten_but_not_what_is_held_in_them(place: Place) -> None:
    """Of each limit the three newest windows are kept, and an older one for as long as something is held in it."""
    ledger = place.ledger(tokens(15, "hour"))
    start = int(place.clock.now)
    async with ledger.hold(["key:a"], TEN):
        for _ in range(5):
            place.clock.now += 3600
            async with ledger.hold(["key:a"], TEN) as hold:
                hold.report(TEN)
        books = (await place.books())["key:a", "tokens", "hour"]
        assert books == {
            start: (0, 10, 0),
            **{start + hours * 3600: (10, 0, 0) for hours in (3, 4, 5)},
        }


async def test_a_clock_that_was_far_ahead_does_not_hide_the_present(place: Place) -> None:
    """After years of wrong time, set right again, budgets of the present are kept as ever."""
    ledger = place.ledger(tokens(15, "hour"))
    noon = place.clock.now
    for years in (9, 8, 7):
        place.clock.now = noon + years * 365 * 86_400
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(TEN)
    place.clock.now = noon
    async with ledger.hold(["key:a"], TEN) as hold:
        hold.report(TEN)
    for _ in range(2):
        with pytest.raises(HoldRefused, match="5 of 15"):
            await ledger.hold(["key:a"], TEN).__aenter__()
        place.clock.now -= 3600
