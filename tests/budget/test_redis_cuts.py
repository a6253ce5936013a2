"""The connection to Redis breaks at every call: nothing is held twice, settled twice or lost."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from budget.errors import HoldRefused
from budget.ledger import Amounts
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.redis import RedisStore
from tests.budget.clocks import NOON, TEN, tokens, utc
from tests.budget.cutting import CuttingProxy, Where, cutting
from tests.budget.places import RedisPlace
from tests.budget.valkey import valkey
from tests.budget.virtual import FaultyStore, play

TODAY = int(utc(2024, 5, 17))
LIMITS = (tokens(40, "day"), tokens(100, "minute", unit="requests"), tokens(9, None, unit="concurrency"))


async def requests(ledger: LeasedLedger) -> None:
    """Two requests side by side, with everything that is ever said to a store."""
    async with ledger.hold(["key:a"], TEN) as first:
        await first.extend(TEN)
        first.report(Amounts(tokens=3))
        async with ledger.hold(["key:a"], TEN) as second:
            await ledger.beat()
            with pytest.raises(HoldRefused):
                await ledger.hold(["key:a"], Amounts(tokens=11)).__aenter__()
            second.report(Amounts(tokens=4))
        await ledger.beat()
        first.report(Amounts(tokens=16))
    await asyncio.sleep(0.01)  # the settlement leaves by itself
    await ledger.beat()
    await ledger.beat()


async def cut_story(place: RedisPlace, proxy: CuttingProxy) -> int:
    """The story through a proxy; how many calls it took."""
    store = FaultyStore(RedisStore(proxy.url, linger_s=0.0, clock=place.clock))
    ledger = place.ledger(*LIMITS, store=store)
    await requests(ledger)
    assert ledger.figures().is_reachable
    assert ledger.figures().waiting == 0
    books = await place.books()
    assert books["key:a", "tokens", "day"] == {TODAY: (20, 0, 0)}
    assert books["key:a", "concurrency", None] == {0: (0, 0, 0)}
    (row,) = await ledger.usage(NOON.date(), NOON.date())
    assert (row.requests, row.tokens) == (2, 20)
    async with ledger.hold(["key:a"], TEN) as hold:
        rest = hold.remaining("requests")
        assert rest is not None
        assert rest.remaining == 97  # a refused request counts in no rate
    return proxy.calls


def tell(folder: Path, where: Where, cut_at: int | None) -> int:
    """The story with a cut, in virtual time; how many calls it took."""

    async def told() -> int:
        place = RedisPlace(folder)
        async with cutting(valkey().connection_url) as proxy:
            proxy.where, proxy.cut_at = where, cut_at
            try:
                calls = await cut_story(place, proxy)
                assert proxy.cut_at is None
                assert proxy.connections == 1 + (cut_at is not None)
                return calls
            finally:
                await place.close()

    return play(told())


@pytest.mark.parametrize("where", ["before", "after", "within"])
def test_a_connection_that_breaks_at_any_call_changes_no_count(tmp_path: Path, where: Where) -> None:
    """Whether the call, its answer or half of that gets through, every count is as if nothing had happened."""
    calls = tell(tmp_path, where, None)
    assert calls > 10
    for cut_at in range(1, calls + 1):
        tell(tmp_path, where, cut_at)
