"""Running statistics of modes, and the choice between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.utility import MOST_WEIGHT, Arm, Estimate, Mode, Prior, Statistics, best

PRIORS: dict[Mode, Prior] = {
    "instant": Prior((0.9, 0.8, 0.7, 0.5, 0.3), (100, 200, 300, 400, 500)),
    "reasoning": Prior((0.95, 0.95, 0.9, 0.8, 0.7), (500, 900, 1500, 2500, 4000)),
}


def per_token(mode: Mode, tokens: float) -> float:
    """A millionth of a dollar for each."""
    return tokens / 1e6


def chosen(statistics: Statistics, level: int, lambda_per_usd: float, price: float = 1.0) -> str:
    """The mode of the greatest utility."""
    return best(statistics.arms("m", level, lambda mode, t: price * per_token(mode, t), lambda_per_usd), 0.0).mode


def test_the_prior_is_what_is_believed_at_first() -> None:
    """Before anything was seen, quality and tokens are the configuration's."""
    arms = Statistics(PRIORS).arms("m", 4, per_token, 100)
    assert arms == [
        Arm("instant", 0.5, 0.0004, 0.46),
        Arm("reasoning", 0.8, 0.0025, 0.55),
    ]


def test_when_prices_change_the_action_changes() -> None:
    """The same question is reasoned about while that is cheap, and answered at once when it is dear."""
    statistics = Statistics(PRIORS)
    assert chosen(statistics, 4, 100, price=1) == "reasoning"
    assert chosen(statistics, 4, 100, price=2) == "instant"
    assert chosen(statistics, 4, 0, price=1000) == "reasoning"


def test_feedback_moves_quality_and_tokens_move_cost() -> None:
    """Bad scores for instant answers, and dear thinking, are learnt per model and difficulty."""
    statistics = Statistics(PRIORS)
    assert chosen(statistics, 1, 500) == "instant"
    for _ in range(30):
        statistics.of("m", "instant", 1).saw_score(0)
    assert chosen(statistics, 1, 500) == "reasoning"
    for _ in range(300):
        statistics.of("m", "reasoning", 1).saw_tokens(5000)
    assert chosen(statistics, 1, 500) == "instant"
    assert statistics.of("other", "instant", 1).quality == pytest.approx(0.9)
    assert statistics.of("m", "instant", 2).quality == pytest.approx(0.8)


@given(st.floats(0, 1), st.lists(st.floats(0, 1), max_size=50), st.lists(st.integers(1, 10**6), max_size=50))
def test_estimates_stay_means(success: float, scores: list[float], tokens: list[int]) -> None:
    """Quality stays within 0 and 1, and tokens within what was seen and believed."""
    known = Estimate(success, 100)
    for score in scores:
        known.saw_score(score)
    for count in tokens:
        known.saw_tokens(count)
    assert -1e-9 <= known.quality <= 1 + 1e-9
    assert min([100, *tokens]) - 1e-6 <= known.tokens <= max([100, *tokens]) + 1e-6


def test_the_past_is_forgotten() -> None:
    """No more than so many requests count, so what changes is learnt again."""
    known = Estimate(0.5, 100)
    for _ in range(3000):
        known.saw_score(1)
    assert known.good + known.bad <= MOST_WEIGHT + 1
    for _ in range(3000):
        known.saw_score(0)
    assert known.quality < 0.1


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=5), st.floats(0, 1))
def test_the_floor_is_kept_where_it_can_be(arms: list[tuple[float, float]], floor: float) -> None:
    """An arm below the floor is taken only if none is above, and then the best there is."""
    made = [Arm("instant", quality, cost, quality - cost) for quality, cost in arms]
    taken = best(made, floor)
    highest = max(arm.quality for arm in made)
    assert taken.quality >= floor or taken.quality == highest


def test_drawn_qualities_come_from_the_distribution() -> None:
    """Exploring asks for a sample with what was seen as its parameters, never with zero."""
    asked: list[tuple[float, float]] = []

    def draw(good: float, bad: float) -> float:
        asked.append((good, bad))
        return 0.25

    arms = Statistics({"instant": Prior((1.0,) * 5, (1.0,) * 5)}).arms("m", 1, per_token, 0, draw)
    assert arms[0].quality == 0.25
    assert asked == [(10.0, 1e-6)]
