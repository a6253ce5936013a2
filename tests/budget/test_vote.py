"""Answers that are the same are the same text, and the vote is not taken in by those that finished first."""

from __future__ import annotations

import random
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.vote import Vote, boxed, hedge_rate, majority, normalised, race_weights


@pytest.mark.parametrize(
    "same",
    [
        [
            "42",
            " 42. ",
            "42.0",
            "+42",
            "$42$",
            "\\(42\\)",
            "**42**",
            "\\boxed{42}",
            "The answer is 42.",
            "4.2e1",
            "84/2",
        ],
        ["1/2", "0.5", ".5", "\\frac{1}{2}", "\\dfrac12", "50%", "50 \\%", "\\tfrac{2}{4}"],
        ["-3/4", "-0.75", "-\\frac{3}{4}", "\\frac{-3}{4}", "−0.75"],
        ["1,234,567", "1234567", "1 234 567", "1{,}234{,}567", "\\(1,234,567\\)"],
        ["B", "(B)", "b)", "B.", "Option B", "\\text{B}", "\\boxed{\\textbf{B}}", "Final answer: (b)"],
        ['{"a": 1, "b": [2]}', '{"b":[2.0],"a":1}', '\\boxed{{"b": [2], "a": 1.0}}'],
        ["Paris", "  paris ", "PARIS.", "\\text{Paris}"],
    ],
)
def test_equal_answers_are_equal(same: list[str]) -> None:
    """However an answer is written, it is one answer."""
    assert len({normalised(text) for text in same}) == 1


def test_different_answers_are_different() -> None:
    """Nothing that is told apart by a reader becomes the same."""
    texts = ["42", "-42", "4.2", "1/42", "A", "B", "x+1", "x-1", '{"a": 1}', '{"a": 2}', "[1, 2]", "[2, 1]", "Paris"]
    assert len({normalised(text) for text in texts}) == len(texts)


def test_the_last_box_counts() -> None:
    """A box may hold braces; one that is not closed is none."""
    assert boxed("\\boxed{1} no: \\boxed{\\frac{1}{2}} indeed") == "\\frac{1}{2}"
    assert boxed("\\boxed{1") is None
    assert boxed("none") is None
    assert normalised("\\boxed{}") == normalised("") == ""


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-/.,%(){}\\ efracboxdtx$\n[]\"':AZ", max_size=40))
def test_any_text_has_a_form_and_that_form_is_its_own(text: str) -> None:
    """Nothing breaks it, and spaces around a text change nothing."""
    assert normalised(f"  {text} ") == normalised(text)


@given(st.fractions(min_value=-999, max_value=999, max_denominator=999))
def test_every_fraction_is_the_same_in_latex(number: object) -> None:
    """A fraction written with a slash or in LaTeX is that fraction."""
    above, _, below = str(number).partition("/")
    assert normalised(f"\\frac{{{above}}}{{{below or 1}}}") == normalised(str(number)) == str(number)


def test_the_majority_wins() -> None:
    """Two that agree beat one that does not, whatever their form, and the share is told."""
    verdict = majority([Vote(answer="0.5"), Vote(answer="7"), Vote(answer="\\boxed{\\frac12}"), Vote(answer="")])
    assert (verdict.answer, verdict.share) == ("1/2", 0.5)
    assert majority([]).sample is None
    assert majority([Vote(answer=" ")]).answer == ""


def test_a_tie_goes_to_those_that_hedge_less_and_then_to_the_shorter() -> None:
    """Right answers are shorter and hedge less, so they have the casting vote."""
    hedging = Vote(answer="1", tokens=10, text="wait, maybe it is one")
    plain = Vote(answer="2", tokens=50, text="therefore it is two")
    short = Vote(answer="3", tokens=20, text="therefore it is three")
    assert majority([hedging, plain]).answer == "2"
    assert majority([plain, short]).answer == "3"
    assert majority([hedging, plain, weighing(hedging, 2)]).answer == "1"
    assert hedge_rate("wait maybe so be it") == 40
    assert hedge_rate("") == 0


def test_the_sample_to_quote_is_the_best_of_the_winners() -> None:
    """Among samples with the winning answer the one that hedges least, then the shortest, is given."""
    votes = [
        Vote(answer="1", tokens=5, text="hmm one"),
        Vote(answer="1", tokens=9, text="one"),
        Vote(answer="1", tokens=7, text="one"),
    ]
    assert majority(votes).sample == 2


def weighing(vote: Vote, weight: float) -> Vote:
    """The same vote with another weight."""
    return msgspec.structs.replace(vote, weight=weight)


@given(st.lists(st.integers(1, 100), min_size=1, max_size=20), st.integers(0, 20))
def test_no_weight_is_lost_in_a_race(lengths: list[int], cancelled: int) -> None:
    """Every sample that was launched weighs one, whoever finished, and a longer one never weighs less."""
    weights = race_weights(lengths, cancelled)
    assert sum(weights) == pytest.approx(len(lengths) + cancelled)
    assert min(weights) >= 0
    pairs = sorted(zip(lengths, weights, strict=True))
    assert all(one <= other or a == b for (a, one), (b, other) in pairwise(pairs))
    assert race_weights(lengths, 0) == pytest.approx([1] * len(lengths))
    assert race_weights([], 3) == []


def test_the_bias_towards_short_answers_is_corrected() -> None:
    """Where long samples are right and short ones wrong, the first half to finish misjudges; weighted, half as much."""
    rng = random.Random(7)
    bias, agreed, runs = {"first": 0.0, "weighted": 0.0}, {"first": 0, "weighted": 0}, 1000
    for _ in range(runs):
        lengths = [int(rng.lognormvariate(5, 0.5)) for _ in range(16)]
        samples = sorted((n, rng.random() < min(0.95, n / 250)) for n in lengths)
        share = sum(is_right for _, is_right in samples) / 16
        weights = race_weights([n for n, _ in samples[:8]], 8)
        for name, votes in (("first", [1.0] * 8), ("weighted", weights)):
            found = sum(w for w, (_, is_right) in zip(votes, samples[:8], strict=True) if is_right) / sum(votes)
            bias[name] += (found - share) / runs
            agreed[name] += (found > 0.5) == (share > 0.5)
    assert bias["first"] < -0.17
    assert abs(bias["weighted"]) < 0.6 * abs(bias["first"])
    assert agreed["weighted"] > agreed["first"] + 0.15 * runs
