"""A budget shared among steps: to the token, as published, and at the optimum."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.allocate import (
    CREDIT_TREND,
    LEVEL_TOKENS,
    SCHEDULES,
    Schedule,
    bayesian,
    level_budget,
    shares,
    whole,
    without_trend,
)

EVEN = [25, 25, 25, 25]
MANY = settings(max_examples=400, deadline=None)
CREDITS = st.lists(st.integers(1, 100), min_size=1, max_size=5)
WEIGHTS = st.lists(st.floats(0.001, 100), min_size=1, max_size=5)


@pytest.mark.parametrize(
    ("schedule", "published"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("weighted", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.40, 0.30, 0.20, 0.10]),
        ("polynomial", [0.53, 0.30, 0.13, 0.03]),
        ("exponential", [0.29, 0.26, 0.24, 0.21]),
        ("cosine", [0.46, 0.35, 0.15, 0.04]),
    ],
)
def test_the_published_shares_come_out(schedule: Schedule, published: list[float]) -> None:
    """Four steps with equal credits have the shares of Plan-and-Budget's table, to two decimals."""
    assert [round(share, 2) for share in shares(EVEN, schedule, keeps_trend=True)] == published


@pytest.mark.parametrize(
    ("schedule", "net"),
    [("polynomial", [0.35, 0.31, 0.21, 0.10, 0.03]), ("exponential", [0.16, 0.21, 0.23, 0.20, 0.20])],
)
def test_credits_that_rise_undo_a_schedule(schedule: Schedule, net: list[float]) -> None:
    """A planner's mean credits fight the decay: as published, little of it is left; without trend all is."""
    with_trend = shares(CREDIT_TREND, schedule, keeps_trend=True)
    assert with_trend == pytest.approx(net, abs=0.006)
    assert shares(CREDIT_TREND, schedule) == pytest.approx(shares([20] * 5, schedule, keeps_trend=True))


def test_without_its_trend_a_plan_says_what_is_harder_than_usual() -> None:
    """A step that has twice the credits of its place weighs twice as much, in plans of any length."""
    assert without_trend(CREDIT_TREND) == [1] * 5
    assert without_trend([13, 18, 44, 22, 24]) == [1, 1, 2, 1, 1]
    assert without_trend([13, 48]) == [1, 2]
    assert without_trend([26]) == [2]


def test_uniform_does_not_look_at_credits_and_weighted_looks_at_nothing_else() -> None:
    """`uniform` is the baseline without credits, `weighted` is credits alone, whatever their trend."""
    assert shares([1, 99], "uniform") == [0.5, 0.5]
    assert shares([1, 3], "weighted") == shares([1, 3], "weighted", keeps_trend=True) == [0.25, 0.75]


@MANY
@given(credits=CREDITS, schedule=st.sampled_from(SCHEDULES), total=st.integers(0, 40_000), keeps=st.booleans())
def test_no_token_is_lost_or_made(credits: list[int], schedule: Schedule, total: int, keeps: bool) -> None:
    """Every schedule hands out the whole budget, within two tokens of each exact share, and none below 0."""
    parts = shares(credits, schedule, keeps_trend=keeps)
    tokens = whole(total, parts)
    assert sum(tokens) == total
    assert min(tokens) >= 0
    assert all(abs(one - part * total) < 2 for one, part in zip(tokens, parts, strict=True))


@MANY
@given(weights=WEIGHTS, total=st.integers(0, 3000), more=st.integers(0, 40))
def test_no_step_gets_less_of_a_larger_budget(weights: list[float], total: int, more: int) -> None:
    """A budget that grows takes from no step, which plain largest remainders do not promise."""
    before, after = whole(total, weights), whole(total + more, weights)
    assert all(one <= other for one, other in zip(before, after, strict=True))


def test_the_alabama_paradox_does_not_happen() -> None:
    """Plain largest remainders give the third step 2 of 10 tokens and 1 of 11: here it loses none."""
    assert [whole(total, [6, 6, 2])[2] for total in (10, 11)] == [1, 1]


def test_a_step_without_weight_gets_nothing_unless_none_has_any() -> None:
    """What weighs 0 gets 0; where all do, the budget is shared evenly."""
    assert whole(10, [0, 1, 0]) == [0, 10, 0]
    assert whole(10, [0, 0]) == [5, 5]
    assert whole(0, [1, 2]) == [0, 0]


@MANY
@given(
    total=st.floats(1, 1e5),
    steps=st.lists(st.tuples(st.floats(1e-3, 1e3), st.floats(0.05, 4)), min_size=1, max_size=5),
)
def test_in_the_optimum_one_more_token_is_worth_the_same_everywhere(
    total: float, steps: list[tuple[float, float]]
) -> None:
    """The exact allocation adds up and is stationary to one part in a million, whatever the exponents."""
    tokens = bayesian(total, [c for c, _ in steps], [a for _, a in steps])
    assert sum(tokens) == pytest.approx(total, rel=1e-9)
    worth = [math.log(c * a) - (a + 1) * math.log(b) for (c, a), b in zip(steps, tokens, strict=True)]
    assert max(worth) - min(worth) < 1e-6


def test_no_shift_of_tokens_leaves_less_uncertainty() -> None:
    """Moving tokens from one step to another away from the exact allocation only makes matters worse."""
    complexity, exponents = [5.0, 1.0, 20.0], [0.5, 1.5, 1.0]
    best = bayesian(600, complexity, exponents)

    def uncertainty(tokens: list[float]) -> float:
        return sum(c * math.exp(-a * math.log(b)) for c, b, a in zip(complexity, tokens, exponents, strict=True))

    for giver in range(3):
        for taker in {0, 1, 2} - {giver}:
            moved = list(best)
            moved[giver], moved[taker] = moved[giver] - 5, moved[taker] + 5
            assert uncertainty(moved) > uncertainty(best)


def test_with_equal_exponents_the_printed_formula_is_exact() -> None:
    """Where all exponents are equal, the shares are those of (c a)**(1 / (a + 1)), as printed."""
    complexity = [1.0, 4.0, 9.0]
    printed = [c**0.5 for c in complexity]
    assert bayesian(60, complexity, [1.0] * 3) == pytest.approx([10, 20, 30])
    assert bayesian(60, complexity, [1.0] * 3) == pytest.approx([60 * p / sum(printed) for p in printed])


def test_with_different_exponents_the_printed_formula_is_not() -> None:
    """Normalising the printed shares is off where exponents differ: the marginal worths fall apart."""
    complexity, exponents = [1.0, 1.0], [0.5, 2.0]
    printed = [(c * a) ** (1 / (a + 1)) for c, a in zip(complexity, exponents, strict=True)]
    naive = [100 * p / sum(printed) for p in printed]
    assert bayesian(100, complexity, exponents)[0] > naive[0] + 20


def test_a_step_without_complexity_gets_nothing() -> None:
    """What is certain already needs no tokens; where all is certain they are shared evenly."""
    assert bayesian(10, [0, 1], [1, 1]) == pytest.approx([0, 10])
    assert bayesian(10, [0, 0], [1, 1]) == [5, 5]


def test_a_level_names_a_budget() -> None:
    """The published tokens per level, in between in proportion, and the ends of the table beyond it."""
    assert [level_budget(level) for level in range(1, 6)] == [200, 250, 350, 450, 600]
    assert level_budget(2.5) == 300
    assert (level_budget(0), level_budget(9)) == (LEVEL_TOKENS[1], LEVEL_TOKENS[5])
    assert level_budget(3, {1: 10, 5: 90}) == 50
    assert level_budget(3, {2: 70}) == 70


@MANY
@given(weights=st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), total=st.integers(0, 3000))
def test_two_steps_share_by_largest_remainder(weights: tuple[float, float], total: int) -> None:
    """For two steps the larger remainder takes the odd token."""
    exact = [total * weight / sum(weights) for weight in weights]
    tokens = whole(total, weights)
    assert max(abs(one - share) for one, share in zip(tokens, exact, strict=True)) <= 0.5 + 1e-6
