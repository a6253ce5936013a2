"""Which backend serves a request: one that can, among the least loaded, without a favourite."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.placement import Bounded, Candidate, Placement, home, place

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
    """Where nothing else is known, fewest calls in flight wins, whatever is down and idle."""
    placement = place(backends(3, None, 1, 2), first)
    assert placement == Placement(2, "shortest expected wait")


def test_weight_is_capacity() -> None:
    """A backend of twice the weight takes twice the calls before the other is preferred."""
    assert [place(backends(a, b, weights=[1, 2]), first) for a, b in ((1, 1), (1, 3))] == [
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
    """Placing call after call, each backend ends up with about its weight's share of them."""
    chance, loads, weights = random.Random(3), [0, 0, 0], [1.0, 2.0, 5.0]
    for _ in range(800):
        placement = place(backends(*loads, weights=weights), chance.choice)
        assert placement is not None
        loads[placement.position] += 1
    assert loads == [pytest.approx(share, abs=12) for share in (100, 200, 500)]


def one(**facts: Any) -> Candidate:
    """A candidate that is up and idle, but for these facts."""
    return Candidate(**{"id": "x", "is_usable": True, "in_flight": 0, "weight": 1.0, **facts})


@pytest.mark.parametrize(
    "worse",
    [
        {"cached_tokens": 0},
        {"pending_tokens": 9000},
        {"in_flight": 20},
        {"waiting": 9},
        {"kv_use": 0.99},
        {"cost": 2.0},
        {"is_home": False},
    ],
)
def test_each_idea_counts(worse: dict[str, Any]) -> None:
    """Of two backends that differ in one fact only, the better one is taken, whichever stands first."""
    good: dict[str, Any] = {"cached_tokens": 500, "cost": 1.0, "is_home": True}
    for candidates in ([one(**good), one(**good | worse)], [one(**good | worse), one(**good)]):
        placement = place(candidates, first, 1000)
        assert placement is not None
        assert candidates[placement.position] == one(**good)


def test_what_cannot_serve_is_never_taken() -> None:
    """A backend that lacks what the call needs is left out, however much of the prompt it has."""
    assert place([one(can_serve=False, cached_tokens=999), one(in_flight=9)], never, 1000) == Placement(
        1, "the only usable backend"
    )


def test_a_hit_is_worth_a_wait_but_not_any_wait() -> None:
    """The backend with the prompt's beginning is taken though it has calls, until what waits there is more."""
    for pending, expected in ((3000, 0), (20000, 1)):
        hot, cold = one(cached_tokens=3000, in_flight=2, pending_tokens=pending), one()
        placement = place([hot, cold], first, 3200)
        assert placement is not None
        assert placement.position == expected
    assert place([one(cached_tokens=3000), one()], first, 3200) == Placement(
        0, "shortest expected wait, with 3000 of 3200 prompt tokens cached"
    )


def test_equal_prompts_do_not_all_go_to_one_backend() -> None:
    """A prompt that everybody sends is cached on one backend, and still nobody gets more than the bound."""
    chance, loads = random.Random(1), [0] * 4
    for _ in range(400):
        placement = place(
            [one(in_flight=load, cached_tokens=4000 * (i == 0)) for i, load in enumerate(loads)], chance.choice, 4096
        )
        assert placement is not None
        loads[placement.position] += 1
        bound = max(Bounded().side_by_side, math.ceil(Bounded().factor * sum(loads) / len(loads)))
        assert loads[placement.position] <= bound
    assert max(loads) <= 1.25 * 100 + 1


@FEW
@given(candidates=CANDIDATES, seed=st.integers(0, 9))
def test_never_an_unusable_one_and_never_one_beyond_its_bound(candidates: list[Candidate], seed: int) -> None:
    """Whatever the candidates: one is found if any is usable, it is usable, and within the bound on load."""
    placement = place(candidates, random.Random(seed).choice)
    usable = [candidate for candidate in candidates if candidate.is_usable]
    if placement is None:
        assert not usable
        return
    chosen = candidates[placement.position]
    assert chosen.is_usable
    bounded = Bounded()
    mean = (sum(each.in_flight for each in usable) + 1) / sum(each.weight for each in usable)
    assert chosen.in_flight + 1 <= max(bounded.side_by_side * chosen.weight, math.ceil(1.25 * mean * chosen.weight))


@FEW
@given(block=st.integers(0, 2**64 - 1), ids=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=9, unique=True))
def test_home_moves_only_when_home_itself_goes(block: int, ids: list[int]) -> None:
    """When a backend goes, calls at home elsewhere stay there."""
    at = ids[home(block, ids)]
    for gone in ids:
        left = [each for each in ids if each != gone]
        if gone != at:
            assert left[home(block, left)] == at


def test_homes_are_spread() -> None:
    """Different prompts have their homes all over the backends."""
    chance = random.Random(5)
    ids = [chance.getrandbits(64) for _ in range(8)]
    homes = Counter(home(block, ids) for block in range(4000))
    assert len(homes) == 8
    assert max(homes.values()) < 2 * min(homes.values())


class Counted(Candidate):
    """A candidate that counts how often its load is read."""

    reads = 0

    def __getattribute__(self, name: str) -> object:
        if name == "in_flight":
            Counted.reads += 1
        return super().__getattribute__(name)


@pytest.mark.parametrize("size", [10, 1000])
def test_the_work_grows_with_the_number_of_backends(size: int) -> None:
    """Placement looks at each backend's load a few times: O(backends), not O(backends squared)."""
    Counted.reads = 0
    assert place([Counted("x", True, i, 1.0) for i in range(size)], first) is not None
    assert Counted.reads <= 3 * size
