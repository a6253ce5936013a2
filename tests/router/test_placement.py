"""Which backend serves a request: one that can, among the least loaded, without a favourite."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import Candidate, Placement, place

FEW = settings(max_examples=150, deadline=None)
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        id=st.just("x"),
        is_usable=st.booleans(),
        in_flight=st.integers(0, 50),
        weight=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    ),
    max_size=8,
)


def backends(*loads: int | None, weights: Sequence[float] = ()) -> list[Candidate]:
    """Candidates with these calls in flight; None for one that is down."""
    return [
        Candidate(chr(ord("a") + i), load is not None, load or 0, weights[i] if weights else 1.0)
        for i, load in enumerate(loads)
    ]


def first(positions: Sequence[int]) -> int:
    """A choice without chance."""
    return positions[0]


def never(positions: Sequence[int]) -> int:
    """A choice that must not be asked for."""
    raise AssertionError(positions)


@pytest.mark.parametrize("candidates", [[], backends(None), backends(None, None, None)])
def test_without_a_usable_backend_there_is_no_placement(candidates: list[Candidate]) -> None:
    """No candidate, or none that is up, gives None rather than a guess."""
    assert place(candidates, never) is None


def test_the_only_usable_backend_is_taken_however_busy() -> None:
    """One backend that is up is taken without a choice, and the reason says that there was none."""
    assert place(backends(None, 999, None), never) == Placement(1, "the only usable backend")


def test_the_least_loaded_backend_is_taken() -> None:
    """Fewest calls in flight wins, whatever is down and idle."""
    placement = place(backends(3, None, 1, 2), first)
    assert placement == Placement(2, "shortest expected wait")


def test_weight_is_capacity() -> None:
    """A backend of twice the weight takes twice the calls before the other is preferred."""
    assert [place(backends(a, b, weights=[1, 2]), first) for a, b in ((0, 0), (0, 2))] == [
        Placement(1, "shortest expected wait"),
        Placement(0, "shortest expected wait"),
    ]


def test_ties_are_broken_by_chance_over_all_of_them() -> None:
    """Equally loaded backends are all offered to the choice, busier ones are not."""
    offered: list[Sequence[int]] = []

    def choose(positions: Sequence[int]) -> int:
        offered.append(positions)
        return positions[-1]

    assert place(backends(2, 1, 1, None, 1), choose) == Placement(4, "shortest expected wait")
    assert offered == [[1, 2, 4]]


def test_no_backend_is_starved_among_equals() -> None:
    """With a real random choice, idle equals share the work instead of the first taking all of it."""
    chance = random.Random(7)
    counts = Counter(place(backends(0, 0, 0), chance.choice) for _ in range(300))
    assert len(counts) == 3
    assert min(counts.values()) > 60


def test_calls_spread_by_weight_over_time() -> None:
    """Placing call after call, each backend ends up with its weight's share of them."""
    chance, loads, weights = random.Random(3), [0, 0, 0], [1.0, 2.0, 5.0]
    for _ in range(800):
        placement = place(backends(*loads, weights=weights), chance.choice)
        assert placement is not None
        loads[placement.position] += 1
    assert loads == [100, 200, 500]


@FEW
@given(candidates=CANDIDATES, seed=st.integers(0, 9))
def test_never_an_unusable_one_and_never_a_busier_one(candidates: list[Candidate], seed: int) -> None:
    """Whatever the candidates, the chosen one is usable and nobody usable has clearly less load per weight."""
    placement = place(candidates, random.Random(seed).choice)
    usable = [candidate for candidate in candidates if candidate.is_usable]
    if placement is None:
        assert not usable
        return
    chosen = candidates[placement.position]
    assert chosen.is_usable
    least = min((each.in_flight + 1) / each.weight for each in usable)
    assert (chosen.in_flight + 1) / chosen.weight <= least * 1.001


class Counted(Candidate):
    """A candidate that counts how often its load is read."""

    reads = 0

    def __getattribute__(self, name: str) -> object:
        if name == "in_flight":
            Counted.reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("size", [10, 1000])
def test_the_work_grows_with_the_number_of_backends(size: int) -> None:
    """Placement looks at each backend's load once: O(backends), not O(backends squared)."""
    Counted.reads = 0
    assert place([Counted("x", True, i, 1.0) for i in range(size)], first) is not None
    assert Counted.reads == size
