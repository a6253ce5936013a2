"""The steps of a plan share one budget: what one leaves the others have, what one borrows they lack."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from budget.allocate import whole
from budget.steps import LEAST_STEP_TOKENS, Steps


def test_steps_that_use_their_caps_have_the_shares() -> None:
    """Where every step thinks as much as it may, the caps are the allocation."""
    steps = Steps(100, [5, 3, 2])
    for _ in range(2):
        steps.think(steps.room())
        assert steps.next()
    steps.think(steps.room())
    assert steps.caps == steps.used == whole(100, [5, 3, 2])
    assert not steps.next()


def test_what_a_step_leaves_is_shared_by_the_others() -> None:
    """A step that ends early hands its rest to the later ones, in their proportion."""
    steps = Steps(100, [5, 3, 2])
    steps.think(10)
    assert steps.next()
    assert steps.caps == [50, 54]
    steps.think(4)
    assert steps.next()
    assert steps.caps == [50, 54, 86]


def test_a_step_that_was_cut_may_borrow_once() -> None:
    """It gets half of its cap, or half of what the later ones can spare; a second time it gets nothing."""
    steps = Steps(100, [2, 4, 4])
    steps.think(20)
    assert steps.borrow() == 10
    assert steps.room() == 10
    steps.think(10)
    assert steps.borrow() == 0
    assert steps.next()
    assert steps.caps == [30, 35]
    assert steps.borrow() == (35 - LEAST_STEP_TOKENS) // 2


def test_nobody_borrows_from_a_step_that_has_hardly_any() -> None:
    """Later steps keep the least that is of use; the last step has nobody to borrow from."""
    steps = Steps(36, [20, 16])
    steps.think(20)
    assert steps.borrow() == 0
    assert steps.next()
    steps.think(16)
    assert steps.borrow() == 0
    assert Steps(100, [1, 1], borrows=0).borrow() == 0


def test_without_anything_left_no_step_begins() -> None:
    """A budget that one step has used up leaves the others unasked."""
    steps = Steps(10, [1, 1])
    steps.think(5)
    steps.caps[-1] += 5
    steps.think(5)
    assert not steps.next()
    assert Steps(-5, [1]).room() == 0


@settings(max_examples=300, deadline=None)
@given(
    budget=st.integers(0, 2000),
    weights=st.lists(st.floats(0.01, 50), min_size=1, max_size=5),
    moves=st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), max_size=30),
)
def test_steps_never_think_more_than_the_budget(
    budget: int, weights: list[float], moves: list[tuple[float, bool, bool]]
) -> None:
    """However steps end and borrow, all together stay within the budget, and a later step is not starved by a debt."""
    steps = Steps(budget, weights)
    for part, borrows, goes_on in moves:
        steps.think(int(part * steps.room()))
        if borrows:
            steps.think(steps.room())
            steps.borrow()
        if goes_on:
            steps.next()
        assert sum(steps.used) + steps.room() <= budget
        assert all(used <= cap for used, cap in zip(steps.used, steps.caps, strict=True))
    assert len(steps.caps) <= len(weights)
