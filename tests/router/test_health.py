"""Breakers, outliers, slow start and retries, on a clock that the tests turn."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.health import Breaker, Outcomes, RetryBudget, outliers, slow_start

FEW = settings(max_examples=150, deadline=None)


def broken(at_s: float = 0.0) -> Breaker:
    """A breaker that has just opened for 2 s."""
    breaker = Breaker(3, pause_s=2.0, most_s=7.0)
    for _ in range(3):
        breaker.failed(at_s, at_s)
    return breaker


def test_failures_in_a_row_open_it() -> None:
    """The third failure in a row of three opens it; a success in between begins the row anew."""
    breaker = Breaker(3)
    for _ in range(2):
        breaker.failed(0.0, 0.0)
    breaker.succeeded(0.0, 0.0)
    breaker.failed(0.0, 0.0)
    assert breaker.allows(0.0)
    breaker = broken()
    assert (breaker.state(1.9), breaker.allows(1.9)) == ("open", False)


def test_a_backend_that_fails_every_other_time_is_stopped() -> None:
    """Half of the recent calls failing opens it, though never two of them in a row."""
    breaker = Breaker(5, enough=8)
    for i in range(16):
        (breaker.failed if i % 2 else breaker.succeeded)(i * 0.01, i * 0.01)
    assert breaker.state(0.16) == "open"


def test_one_probe_at_a_time_decides() -> None:
    """After the pause one call passes; while it runs no other does, and its end closes or opens the breaker."""
    for ends_well in (True, False):
        breaker = broken()
        assert (breaker.state(2.0), breaker.allows(2.0)) == ("half_open", True)
        breaker.placed(2.0)
        assert not breaker.allows(2.1)
        (breaker.succeeded if ends_well else breaker.failed)(2.2, 2.0)
        assert breaker.state(2.2) == ("closed" if ends_well else "open")


def test_a_probe_that_never_ends_does_not_lock_it_for_ever() -> None:
    """A probe whose end is never told makes way for another after ten pauses."""
    breaker = broken()
    breaker.placed(2.0)
    assert (breaker.allows(21.9), breaker.allows(22.0)) == (False, True)


def test_pauses_grow_to_a_bound_and_are_forgotten_once_it_is_well() -> None:
    """2, 4, 7, 7 seconds at most 7; after a probe that ended well the next pause is 2 seconds again."""
    breaker, now_s = broken(), 0.0
    for pause_s in (2.0, 4.0, 7.0, 7.0):
        assert (breaker.allows(now_s + pause_s - 0.01), breaker.allows(now_s + pause_s)) == (False, True)
        now_s += pause_s
        breaker.failed(now_s, now_s)
    breaker = broken()
    breaker.succeeded(2.0, 2.0)
    for _ in range(3):
        breaker.failed(3.0, 3.0)
    assert (breaker.allows(4.9), breaker.allows(5.0)) == (False, True)


def test_a_late_success_of_before_does_not_close_it() -> None:
    """An answer that began before it opened says nothing about now."""
    breaker = broken()
    breaker.succeeded(1.0, 1.0)
    assert breaker.state(1.0) == "open"


@pytest.mark.parametrize("ends_well", [True, False])
def test_only_the_probe_decides(ends_well: bool) -> None:
    """What was placed before and ends while the probe runs neither closes a breaker nor opens it anew."""
    breaker = broken()
    breaker.placed(2.0)
    (breaker.succeeded if ends_well else breaker.failed)(2.1, 0.0)
    breaker.left(0.0)
    assert (breaker.state(2.1), breaker.allows(2.1)) == ("half_open", False)


def test_a_probe_that_proves_nothing_makes_way() -> None:
    """A probe whose client left, or whose request was wrong, is followed by another at once."""
    breaker = broken()
    breaker.placed(2.0)
    breaker.left(2.0)
    assert (breaker.state(2.1), breaker.allows(2.1)) == ("half_open", True)


@FEW
@given(steps=st.lists(st.tuples(st.sampled_from(["ok", "bad", "place"]), st.floats(0, 5)), max_size=40))
def test_it_always_comes_back(steps: list[tuple[str, float]]) -> None:
    """Whatever happened, after the longest pause and ten more a call may be tried, and if that ends well all may."""
    breaker, now_s = Breaker(2, pause_s=1.0, most_s=8.0), 0.0
    for step, seconds in steps:
        now_s += seconds
        if step == "place":
            breaker.placed(now_s)
        else:
            (breaker.succeeded if step == "ok" else breaker.failed)(now_s, now_s)
    now_s += 18.0
    assert breaker.allows(now_s)
    breaker.placed(now_s)
    breaker.succeeded(now_s, now_s)
    assert breaker.state(now_s) == "closed"


def test_old_outcomes_weigh_less() -> None:
    """After a half-life a failure counts half."""
    outcomes = Outcomes(half_life_s=5.0)
    outcomes.add(0.0, failed=True)
    outcomes.add(5.0, failed=False)
    share, total = outcomes.share(5.0)
    assert share == pytest.approx(1 / 3)
    assert total == 1.5


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([(0.3, 20), (0.0, 20), (0.02, 20)], [0]),
        ([(0.3, 3), (0.0, 20), (0.02, 20)], []),
        ([(0.5, 20), (0.5, 20), (0.5, 20)], []),
        ([(0.4, 20), (0.9, 20), (0.0, 20), (0.0, 20)], [1]),
        ([(0.9, 20)], []),
        ([(0.9, 20), (0.0, 20)], [0]),
    ],
)
def test_outliers_are_those_that_fail_more_than_their_peers(
    shares: list[tuple[float, float]], expected: list[int]
) -> None:
    """Clearly worse than the others, by enough calls; nobody when all of them fail alike, or one is alone."""
    assert outliers(shares) == expected


@FEW
@given(shares=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 50)), max_size=9))
def test_at_most_half_are_outliers(shares: list[tuple[float, float]]) -> None:
    """Whatever the shares, half of the backends stay."""
    assert len(outliers(shares)) <= len(shares) // 2


def test_a_cold_backend_starts_slowly() -> None:
    """From a tenth of its weight, in proportion to its time, to all of it."""
    assert [slow_start(s, 10.0) for s in (0.0, 0.5, 5.0, 10.0, 99.0)] == [0.1, 0.1, 0.5, 1.0, 1.0]
    assert slow_start(0.0, 0.0) == 1.0


def test_retries_are_a_part_of_the_tries() -> None:
    """What was saved up may be spent at once, then a quarter of the first tries and two a second."""
    budget = RetryBudget(0.25, per_s=2.0, most=5.0)
    assert sum(budget.take(0.0) for _ in range(50)) == 5
    for _ in range(8):
        budget.tried()
    assert sum(budget.take(0.0) for _ in range(50)) == 2
    assert sum(budget.take(1.0) for _ in range(50)) == 2
    assert sum(budget.take(99.0) for _ in range(50)) == 5
