"""How sure a model was: the lowest window of an answer's log probabilities."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.confidence import LEAST_LOGPROB, Confidence

LOGPROBS = st.lists(st.floats(-30, 0), max_size=60)


def told(logprobs: list[float], window: int) -> Confidence:
    """An answer of these tokens."""
    found = Confidence(window)
    for logprob in logprobs:
        found.add(logprob)
    return found


@given(LOGPROBS.filter(bool), st.integers(1, 12))
def test_it_is_the_lowest_mean_of_any_window(logprobs: list[float], window: int) -> None:
    """Told token by token it is what looking at every window at once gives; a short answer is one window."""
    clipped = [max(one, LEAST_LOGPROB) for one in logprobs]
    size = min(window, len(clipped))
    means = [sum(clipped[i : i + size]) / size for i in range(len(clipped) - size + 1)]
    assert told(logprobs, window).value == pytest.approx(math.exp(min(means)), rel=1e-6)


@given(LOGPROBS, st.integers(1, 12))
def test_it_never_rises_once_a_window_is_full(logprobs: list[float], window: int) -> None:
    """What is too low stays too low, so that a draft may be left at once."""
    found, before = Confidence(window), 1.0
    for logprob in logprobs:
        found.add(logprob)
        assert found.lowest <= before
        before = found.lowest
        if found.tokens >= window:
            assert found.value == found.lowest


def test_one_bad_stretch_is_not_hidden_by_a_long_good_answer() -> None:
    """Five unlikely tokens among two hundred sure ones count, as their mean over the answer would not."""
    found = told([-0.01] * 100 + [-3.0] * 5 + [-0.01] * 100, 5)
    assert found.value == pytest.approx(math.exp(-3.0))


def test_nothing_said_is_not_sure() -> None:
    """An empty answer has no confidence."""
    assert Confidence(4).value == 0.0


@pytest.mark.parametrize("odd", [-9999.0, float("-inf"), float("nan")])
def test_what_no_probability_is_counts_as_never(odd: float) -> None:
    """A backend's stand-in for "impossible" is bounded, and does not spoil the windows after it."""
    found = told([odd, *[-0.1] * 8], 4)
    assert found.value == pytest.approx(math.exp((LEAST_LOGPROB - 0.3) / 4))
    assert math.isfinite(found.value)
