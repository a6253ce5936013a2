"""Money is integer nano-USD, exact for the prices as they were written."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.price import NANO_PER_USD, PriceTable, nano_usd
from budget.tokens import TokenCounts

FEW = settings(max_examples=150, deadline=None)
PRICES = st.integers(0, 10_000_000).map(lambda micro: micro / 1e6)
COUNT = st.integers(0, 200_000)


@pytest.mark.parametrize(
    ("usd", "nano"),
    [(0, 0), (0.1, 100_000_000), (50, 50 * NANO_PER_USD), (1e-9, 1), (0.07, 70_000_000), (1e9, 10**18)],
)
def test_dollars_become_nano_dollars_exactly(usd: float, nano: int) -> None:
    """A decimal amount is converted as it was written, not as its binary fraction."""
    assert nano_usd(usd) == nano


def test_each_kind_has_its_price() -> None:
    """A million tokens of a kind cost its price in dollars; forced, planning, probing and wasted cost as answers."""
    prices = PriceTable.from_usd_per_mtok(1, 2, cached=0.5, thinking=4)
    million = 1_000_000
    costs = {
        kind: prices.cost_nano_usd(TokenCounts(**{kind: million})) / NANO_PER_USD
        for kind in TokenCounts.__struct_fields__
    }
    assert costs == {
        "prompt": 1,
        "cached": 0.5,
        "thinking": 4,
        "answer": 2,
        "planner": 2,
        "probe": 2,
        "injected": 2,
        "wasted": 2,
    }


def test_cached_defaults_to_prompt_and_thinking_to_answer() -> None:
    """Prices that are left out are those of their direction; a price of zero is not left out."""
    assert PriceTable.from_usd_per_mtok(1, 2) == PriceTable.from_usd_per_mtok(1, 2, cached=1, thinking=2)
    free = PriceTable.from_usd_per_mtok(1, 2, cached=0, thinking=0)
    assert (free.cached, free.thinking) == (0, 0)


def test_a_model_without_prices_costs_nothing() -> None:
    """The empty table prices every kind, and every ceiling, at zero."""
    assert PriceTable().cost_nano_usd(TokenCounts(prompt=10**9, answer=10**9)) == 0
    assert PriceTable().ceiling_nano_usd(prompt=10**9, thinking=10**9, answer=10**9) == 0


@pytest.mark.parametrize(("tokens", "nano"), [(1, 0), (2, 1), (3, 1), (4, 2), (10, 4), (100, 40)])
def test_a_request_is_rounded_once_half_up(tokens: int, nano: int) -> None:
    """At 0.4 nano-USD a token the sum is rounded, half up; rounding each token would give 0 for ever."""
    assert PriceTable.from_usd_per_mtok(0, 0.0004).cost_nano_usd(TokenCounts(answer=tokens)) == nano


def test_half_a_nano_dollar_is_rounded_up() -> None:
    """The tie goes up, so that many small requests do not come for free."""
    assert PriceTable.from_usd_per_mtok(0, 0.0005).cost_nano_usd(TokenCounts(answer=1)) == 1


@FEW
@given(prompt=PRICES, cached=PRICES, thinking=PRICES, answer=PRICES, counts=st.tuples(*[COUNT] * 4))
def test_cost_is_the_exact_sum_within_half_a_nano_dollar(
    prompt: float, cached: float, thinking: float, answer: float, counts: tuple[int, ...]
) -> None:
    """However the prices are chosen, the cost is off the exact rational sum by at most the one rounding."""
    table = PriceTable.from_usd_per_mtok(prompt, answer, cached=cached, thinking=thinking)
    cost = table.cost_nano_usd(TokenCounts(prompt=counts[0], cached=counts[1], thinking=counts[2], answer=counts[3]))
    exact = sum(
        Fraction(count) * Fraction(str(price)) * 1000
        for count, price in zip(counts, (prompt, cached, thinking, answer), strict=True)
    )
    assert abs(Fraction(cost) - exact) <= Fraction(1, 2)


@FEW
@given(
    prompt=PRICES,
    cached=PRICES,
    thinking=PRICES,
    answer=PRICES,
    held=st.tuples(COUNT, COUNT, COUNT),
    shares=st.tuples(*[st.floats(0, 1)] * 4),
)
def test_no_use_within_the_hold_costs_more_than_was_held(
    prompt: float,
    cached: float,
    thinking: float,
    answer: float,
    held: tuple[int, int, int],
    shares: tuple[float, ...],
) -> None:
    """The ceiling covers every way its tokens can fall: cached or not, thought or answered, forced or wasted."""
    table = PriceTable.from_usd_per_mtok(prompt, answer, cached=cached, thinking=thinking)
    ceiling = table.ceiling_nano_usd(prompt=held[0], thinking=held[1], answer=held[2])
    output = int((held[1] + held[2]) * shares[1])
    thought, forced = int(output * shares[2]), int(output * (1 - shares[2]) * shares[3])
    used = TokenCounts(
        cached=int(held[0] * shares[0]),
        prompt=held[0] - int(held[0] * shares[0]),
        thinking=thought,
        injected=forced,
        wasted=max(0, output - thought - forced),
    )
    assert table.cost_nano_usd(used) <= ceiling
