"""What is usual for a first byte, and how many calls may be hedged."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from router.hedging import SAVED_UP, FirstBytes, Hedging

FEW = settings(max_examples=60, deadline=None)
WAITS = st.lists(st.floats(0, 1e3), max_size=300)


@FEW
@given(waits=WAITS)
def test_what_is_usual_is_the_quantile_of_the_last_calls(waits: list[float]) -> None:
    """Of the last calls that are remembered, so many waited no longer; before there are enough, nothing is usual."""
    found = FirstBytes(0.9, most=50, enough=20)
    for waited_s in waits:
        found.add(waited_s)
    last = sorted(waits[-50:])
    assert found.usual_s() == (None if len(waits) < 20 else last[math.ceil(0.9 * len(last)) - 1])
    assert (len(found._by_age), len(found._by_size)) == (len(last), len(last))


def test_calls_that_lost_their_race_keep_the_quantile_where_it_is() -> None:
    """Slow calls that always lose after the usual time leave it as it is; left out, they would shrink it for ever."""
    found, without, chance = FirstBytes(), FirstBytes(), random.Random(1)
    for _ in range(5000):
        waited_s = chance.random()
        usual_s, shrunk_s = found.usual_s(), without.usual_s()
        if usual_s is None or waited_s <= usual_s:
            found.add(waited_s)
        else:
            found.gave_up(usual_s)
        if shrunk_s is None or waited_s <= shrunk_s:
            without.add(waited_s)
    assert (found.usual_s() or 0.0) > 0.85
    assert (without.usual_s() or 1.0) < 0.5


def test_a_try_that_is_cut_early_says_nothing() -> None:
    """What gave up before the usual time might have been quick or slow, and is not counted."""
    found = FirstBytes()
    found.gave_up(5.0)
    for _ in range(32):
        found.add(1.0)
    found.gave_up(0.5)
    assert len(found._by_age) == 32
    found.gave_up(1.5)
    assert len(found._by_age) == 33


@FEW
@given(share=st.floats(0.01, 1), calls=st.integers(0, 400))
def test_hedges_are_a_share_of_the_calls(share: float, calls: int) -> None:
    """However many are wanted, there are no more than the share and what may be saved up, and not much less."""
    hedging = Hedging(share)
    taken = 0
    for _ in range(calls):
        hedging.called()
        taken += hedging.take(0.0)
    assert taken <= share * calls + SAVED_UP
    assert taken >= min(calls, share * calls - 1)
