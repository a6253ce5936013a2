"""Each rule stops where its paper says, and not before."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.stopping import (
    AdaptiveConsistency,
    ConfidentAnswer,
    MinimumThinking,
    ProbeWorth,
    RepetitionGuard,
    SlidingConfidence,
    StableAnswer,
    UnanimousWindow,
    majority_chance,
    threshold,
)


def test_answers_that_stay_the_same_stop_the_thinking() -> None:
    """Three equal answers in a row stop; another answer, none, or a doubt begins anew."""
    rule = StableAnswer(3)
    probes = ["7", "7", "8", "8", "", "8", "8", "8 but wait", "8", "8.0", "\\boxed{8}"]
    assert [rule.feed(said) for said in probes] == [False] * 10 + [True]
    assert rule.missing() == 0
    assert StableAnswer(2).missing() == 2


@given(st.lists(st.sampled_from(["1", "2", "", "hmm 1"]), max_size=30), st.integers(1, 8))
def test_it_stops_only_on_equal_sure_answers(probes: list[str], agree: int) -> None:
    """It says stop exactly when the last so many probes are one answer without a doubt."""
    rule = StableAnswer(agree)
    for at, said in enumerate(probes):
        last = probes[max(0, at + 1 - agree) : at + 1]
        assert rule.feed(said) == (len(last) == agree and len(set(last)) == 1 and last[0] in {"1", "2"})


def known(*lengths: int) -> ProbeWorth:
    """What is known after controls of these lengths."""
    worth = ProbeWorth(every=32, probe_tokens=30)
    for length in lengths:
        worth.learn_length(length)
    return worth


def test_probing_that_cannot_save_what_it_costs_is_off() -> None:
    """With little left to think, or with many answers missing, no probe is worth its tokens."""
    worth = ProbeWorth(every=32, probe_tokens=30)
    assert worth.is_worth(0, room=400, missing=3)
    assert not worth.is_worth(0, room=200, missing=3)
    assert worth.is_worth(0, room=200, missing=1)
    assert not worth.is_worth(0, room=0, missing=1)


def test_what_chains_think_by_themselves_counts_not_their_cap() -> None:
    """Short chains are not probed however high their cap is; one that outgrows all others is."""
    worth = known(80, 90, 85, 95)
    assert (worth.to_come(60, 4000), worth.to_come(90, 4000), worth.to_come(95, 4000)) == (27.5, 5, 4000)
    assert not worth.is_worth(32, room=4000, missing=3)
    assert worth.is_worth(100, room=4000, missing=3)
    assert known(1000, 2000, 1500, 900).is_worth(32, room=4000, missing=3)


def test_some_chains_are_controls() -> None:
    """The first four chains are not probed, then every sixteenth is not: how long they get is known from them."""
    worth = ProbeWorth(every=32, probe_tokens=30)
    probed = []
    for _ in range(32):
        probed.append(worth.begin())
        if not probed[-1]:
            worth.learn_length(100)
    assert [at for at, is_probed in enumerate(probed, 1) if not is_probed] == [1, 2, 3, 4, 16, 32]


def test_probing_that_never_stops_anything_is_switched_off_and_tried_again() -> None:
    """Chains that probing did not shorten make it not worth it; without probes that is slowly forgotten."""
    worth = known(2000, 2000, 2000, 2000)
    probed = 0
    while worth.is_worth(0, room=2000, missing=3):
        worth.learn(9, stopped=False)
        probed += 1
        assert probed < 64
    skipped = 0
    while not worth.is_worth(0, room=2000, missing=3):
        worth.begin()
        worth.learn_length(2000)
        skipped += 1
        assert skipped < 256
    for _ in range(100):
        worth.learn(3, stopped=True)
    assert worth.chance() > 0.9


def test_a_chain_that_probes_did_not_stop_is_given_up() -> None:
    """Where stops come at the third probe or never, a chain that had four is probed no more."""
    worth = known(2000, 2000, 2000, 2000)
    for at in range(20):
        worth.learn(3 if at % 2 else 8, stopped=bool(at % 2))
    assert worth.chance(0) == worth.chance(9) == 0.5
    assert worth.chance(3) == worth.chance(8) == pytest.approx(1 / 12)
    assert worth.is_worth(64, 900, missing=3)
    assert not worth.is_worth(160, 900, missing=3, made=4)


@settings(max_examples=40, deadline=None)
@given(chance=st.floats(0, 1), length=st.integers(10, 2000), seed=st.integers(0, 99))
def test_probes_cost_little_where_they_save_nothing(chance: float, length: int, seed: int) -> None:
    """Over many chains of any length, stopped as often as may be, probes cost at most a little more than they save."""
    rng, worth = random.Random(seed), ProbeWorth(every=32, probe_tokens=30)
    spent = saved = thought = 0
    for _ in range(400):
        own = int(rng.uniform(0.5, 1.5) * length)
        thought += own
        probes, may_probe, stops = 0, worth.begin(), rng.random() < chance
        for thinking in range(32, own, 32):
            missing = max(1, 3 - probes) if stops else 3
            if not (may_probe and worth.is_worth(thinking, 4000 - thinking, missing=missing, made=probes)):
                break
            probes += 1
            if stops and probes == 3:
                saved += own - thinking
                break
        spent += 30 * probes
        if probes:
            worth.learn(probes, stopped=stops and probes == 3)
        else:
            worth.learn_length(own)
    assert spent - saved < 0.1 * thought


def test_a_nearly_certain_answer_stops_at_a_break() -> None:
    """The mean probability must be above 0.95; the geometric mean is stricter; ten checks are all."""
    sure, doubtful = [math.log(0.99)] * 4, [math.log(0.999)] * 9 + [math.log(0.6)]
    assert ConfidentAnswer().feed(sure)
    assert ConfidentAnswer().feed(doubtful)
    assert not ConfidentAnswer(geometric=True).feed(doubtful)
    assert not ConfidentAnswer().feed([math.log(0.9)] * 4)
    assert not ConfidentAnswer().feed([])
    rule = ConfidentAnswer()
    for _ in range(10):
        assert rule.may_check()
        rule.feed([-1.0])
    assert not rule.may_check()


def test_a_sample_that_loses_confidence_is_aborted() -> None:
    """The mean over the window counts, not one token; before a whole window nothing happens."""
    rule = SlidingConfidence(below=5, window=4)
    assert [rule.feed([-value]) for value in (1, 1, 1)] == [False] * 3
    assert rule.feed([-1.0, -1.0])
    steady = SlidingConfidence(below=5, window=4)
    assert not any(steady.feed([-value]) for value in (9, 9, 9, 1, 9, 9, 9, 1))
    assert steady.least == 7
    assert [steady.feed([-value]) for value in (1, 1)] == [False, True]
    assert math.isinf(SlidingConfidence(1).least)


@given(st.lists(st.floats(0, 20), min_size=1, max_size=60))
def test_the_window_is_the_plain_mean(values: list[float]) -> None:
    """Sliding in O(1) is the same as the mean over every window."""
    rule = SlidingConfidence(below=0, window=5)
    for value in values:
        rule.feed([-value])
    means = [sum(values[at - 5 : at]) / 5 for at in range(5, len(values) + 1)]
    assert rule.least == pytest.approx(min(means, default=math.inf), abs=1e-9)


def test_the_threshold_is_a_percentile_of_the_warm_up() -> None:
    """The strict variant keeps a tenth of the warm-up, the lenient one nine tenths."""
    warm_up = [float(value) for value in range(11)]
    assert threshold(warm_up, keeps=0.1) == pytest.approx(9)
    assert threshold(warm_up, keeps=0.9) == pytest.approx(1)
    assert threshold([3.0]) == 3


@pytest.mark.parametrize("length", [1, 2, 7, 30, 64])
def test_thinking_in_circles_is_stopped(length: int) -> None:
    """A stretch that stands there four times stops, soon after; before it repeats, nothing does."""
    rule, fresh = RepetitionGuard(), list(range(1000, 1400))
    assert not any(rule.feed([one]) for one in fresh)
    stretch = list(range(length))
    at = next(at for at in range(1000) if rule.feed([stretch[at % length]]))
    assert at <= max(4 * length, 48) + 16


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=200), st.integers(1, 50))
def test_chunks_make_no_difference_to_what_repeats(ids: list[int], chunk: int) -> None:
    """A tail that is no repetition never stops, however tokens arrive."""
    rule = RepetitionGuard(times=3, longest=8, least=24)
    stopped = any(rule.feed(ids[at : at + chunk]) for at in range(0, len(ids), chunk))
    spans = [(p, max(3 * p, 24)) for p in range(1, 9)]
    ever = any(
        len(ids[:end]) >= span and all(ids[i] == ids[i - p] for i in range(end - span + p, end))
        for end in range(len(ids) + 1)
        for p, span in spans
    )
    assert not stopped or ever


def test_a_minimum_makes_thinking_go_on() -> None:
    """Thinking under the minimum goes on, but no more than so many times."""
    rule = MinimumThinking(10, most_waits=2)
    assert [rule.goes_on(9, 0), rule.goes_on(9, 1), rule.goes_on(9, 2), rule.goes_on(10, 0)] == [
        True,
        True,
        False,
        False,
    ]


def test_unanimous_samples_stop_at_four() -> None:
    """Four equal answers are a majority with 95 %, three are not; a dissenter needs more."""
    rule = AdaptiveConsistency()
    assert [rule.feed("a") for _ in range(4)] == [False, False, False, True]
    rule = AdaptiveConsistency()
    assert [rule.feed(answer) for answer in "abaaaaa"] == [False] * 6 + [True]


@given(st.integers(0, 40), st.integers(0, 40))
def test_the_majoritys_chance_is_that_of_its_distribution(first: int, second: int) -> None:
    """Against the other answer the chances add up to one, and one more vote never lowers them."""
    assert majority_chance(first, second) + majority_chance(second, first) == pytest.approx(1)
    assert majority_chance(first + 1, second) > majority_chance(first, second)


def test_a_unanimous_window_stops() -> None:
    """Five equal answers stop only where they are one window; windows do not overlap."""
    rule = UnanimousWindow(3)
    assert [rule.feed(answer) for answer in "abbbbcccc"] == [False] * 8 + [True]
