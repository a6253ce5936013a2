"""Limits that say that they are nearly used up."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from budget.ledger import Amounts, Limit
from budget.ledgers.memory import MemoryHold, MemoryLedger
from gateway.admin.limits import identity
from gateway.config.budgets import LimitConfig
from gateway.soft_limits import SoftLimitPassed, SoftLimits
from tests.budget.clocks import NOON, Clock

DAY_S = 86400.0


class Soft:
    """One limit with a soft mark over a ledger in memory, and what it told."""

    def __init__(self, **limit: Any) -> None:
        self.clock = Clock()
        self.told: list[SoftLimitPassed] = []
        self.limits = SoftLimits(self.told.append, clock=self.clock)
        self.ledger = MemoryLedger(clock=self.clock)
        self.put(**limit)

    def put(self, **limit: Any) -> None:
        """Another limit in its place."""
        known = {"scope": "team:ml", "unit": "tokens", "amount": 100, "window": "day", "soft": 0.8, **limit}
        said = LimitConfig.model_validate(known)
        amount = int(said.amount * 10**9) if said.unit == "usd" else int(said.amount)
        self.ledger.set_limits([Limit(scope=said.scope, unit=said.unit, amount=amount, window=said.window)])
        self.limits.set_marks({} if said.soft is None else {identity(said): said.soft})

    async def spend(self, tokens: int, *, nano_usd: int = 0, scope: str = "team:ml") -> str | None:
        """What the header says while so much is held; it is settled afterwards."""
        amounts = Amounts(tokens=tokens, nano_usd=nano_usd)
        hold: MemoryHold = self.ledger.hold([scope], amounts)
        async with hold:
            hold.report(amounts)
            headers = dict(self.limits.headers(hold))
        found = headers.get(b"x-thinkgate-soft-limit")
        return None if found is None else found.decode()


async def test_the_header_is_there_while_the_limit_is_past_its_mark() -> None:
    """Below the mark nothing is said, from it on every response says how much is used."""
    soft = Soft()
    assert [await soft.spend(79), await soft.spend(1), await soft.spend(15)] == [
        None,
        "team:ml;tokens;0.8",
        "team:ml;tokens;0.95",
    ]
    soft.clock.now += DAY_S
    assert await soft.spend(10) is None


async def test_it_is_told_once_in_each_window() -> None:
    """The first response past the mark tells, later ones of the same window do not, one of the next window does."""
    soft = Soft()
    for _ in range(3):
        await soft.spend(30)
        await soft.spend(1)
    assert [(passed.used, passed.window_ends_at) for passed in soft.told] == [
        (92.0, datetime.fromtimestamp(NOON.timestamp() + DAY_S / 2, UTC))
    ]
    soft.clock.now += DAY_S
    await soft.spend(85)
    assert len(soft.told) == 2


async def test_a_window_without_an_end_tells_once_for_ever() -> None:
    """A total has one window."""
    soft = Soft(window="total")
    await soft.spend(85)
    soft.clock.now += 400 * DAY_S
    await soft.spend(5)
    assert [passed.window_ends_at for passed in soft.told] == [None]


async def test_a_clock_that_wavers_makes_no_new_window() -> None:
    """A store whose clock is not quite the gateway's does not make the same window tell again."""
    soft = Soft()
    await soft.spend(85)
    soft.clock.now += -2.5
    await soft.spend(1)
    soft.clock.now += 5.5
    await soft.spend(1)
    assert len(soft.told) == 1


async def test_money_is_told_in_dollars() -> None:
    """Amounts are those of the configuration."""
    soft = Soft(unit="usd", amount=0.5)
    assert await soft.spend(1, nano_usd=450_000_000) == "team:ml;usd;0.9"
    assert [(passed.amount, passed.used, passed.soft) for passed in soft.told] == [(0.5, 0.45, 0.8)]


async def test_a_changed_limit_tells_anew_and_an_unchanged_one_does_not() -> None:
    """A reload that leaves the limit alone is no reason to tell again; another amount is another limit."""
    soft = Soft()
    await soft.spend(80)
    soft.put()
    await soft.spend(1)
    assert len(soft.told) == 1
    soft.put(amount=90)
    await soft.spend(1)
    assert [passed.amount for passed in soft.told] == [100, 90]
    soft.put(soft=None)
    assert await soft.spend(1) is None


async def test_a_scope_that_is_no_header_text_is_quoted() -> None:
    """Names with commas or letters beyond ASCII are percent-encoded."""
    soft = Soft(scope="team:mü,l")
    assert await soft.spend(90, scope="team:mü,l") == "team:m%C3%BC%2Cl;tokens;0.9"


async def test_a_limit_beside_a_tighter_one_is_seen() -> None:
    """Not only the tightest limit of a unit is looked at."""
    soft = Soft()
    limits = [
        Limit(scope="org:acme", unit="tokens", amount=1000, window="day"),
        Limit(scope="team:ml", unit="tokens", amount=100, window="day"),
    ]
    soft.ledger.set_limits(limits)
    soft.limits.set_marks({("org:acme", "tokens", "day"): 0.5})
    async with soft.ledger.hold(["org:acme"], Amounts(tokens=600)) as hold:
        hold.report(Amounts(tokens=600))
    async with soft.ledger.hold(["team:ml", "org:acme"], Amounts(tokens=10)) as both:
        assert soft.limits.headers(both) == [(b"x-thinkgate-soft-limit", b"org:acme;tokens;0.61")]


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ({"window": "minute"}, "an hour and longer"),
        ({"unit": "concurrency", "window": None}, "an hour and longer"),
        ({"soft": 1}, "less than 1"),
        ({"soft": 0}, "greater than 0"),
    ],
)
def test_marks_that_make_no_sense_are_refused(limit: dict[str, Any], problem: str) -> None:
    """A mark is a share below the whole, of a window long enough to do something about it."""
    with pytest.raises(ValueError, match=problem):
        Soft(**limit)
