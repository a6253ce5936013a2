"""The text scorer's artefact, and what it says."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.features import NAMES, features
from router.scorer import MOST_BYTES, WrongArtefact, parse_scorer, render_scorer, sigmoid

ROOT = Path(__file__).parents[2]
ARTEFACT = (ROOT / "router/scorer.json").read_bytes()
SCORER = parse_scorer(ARTEFACT)


def body():
    """The content of the artefact, to be changed."""
    content = json.loads(ARTEFACT)
    del content["sha256"]
    return content


def test_the_artefact_is_small_numbers_only_and_rendered_as_it_stands():
    """The file is far below a megabyte, and rendering its content gives the same bytes."""
    assert len(ARTEFACT) < MOST_BYTES
    assert render_scorer(body()) == ARTEFACT


def test_the_card_is_that_of_the_artefact():
    """The model card names the digest of the artefact beside it."""
    assert f"`{SCORER.digest}`" in (ROOT / "docs/router_card.md").read_text()


@pytest.mark.parametrize(
    "text",
    ["hi", "Hello!!!", "thanks, that was great", "What is the capital of France?", "Tell me a joke",
     "Write a short poem about autumn", "Explain photosynthesis to a ten-year-old", "Can you recommend a good book?",
     "Write an email to my boss asking for two days off", "How was your day?", "Translate 'good night' into Italian"],
)  # fmt: skip
def test_ordinary_chat_writing_and_explaining_are_instant(text):
    """What people mostly say is below the band."""
    assert SCORER.read(text).probability < SCORER.low


@pytest.mark.parametrize(
    "text",
    ["Prove that for all positive integers n the sum of the first n odd numbers is n^2.",
     "Let p be a prime such that p^2 + 2 is prime. Determine all possible values of p^3 + 2.",
     "def longest(s: str) -> int:\n    '''Return the length of the longest palindrome in the string s.'''\n",
     "Solve the equation 3*x^2 - 12*x + 9 = 0 and check that every root satisfies it."],
)  # fmt: skip
def test_mathematics_and_code_reason(text):
    """Work is above the band."""
    assert SCORER.read(text).probability >= SCORER.high


@given(st.text(max_size=300))
def test_a_score_can_be_repeated_from_its_features(text):
    """The features in a score give the same score again."""
    score = SCORER.read(text)
    assert SCORER.score(score.features) == score
    assert 0 <= score.probability <= 1
    assert 1 <= score.level <= 5


def test_features_are_rounded_before_they_are_weighed():
    """A record of four digits is exact."""
    assert SCORER.read("a sum of 3 + 4").features == tuple(round(value, 4) for value in features("a sum of 3 + 4"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "thinkgate-scorer-9"}, "not thinkgate-scorer-1"),
        ({"features_version": 0}, "not thinkgate-scorer-1"),
        ({"names": [*NAMES[1:], "other"]}, "its features"),
        ({"weights": [0.0]}, "a number"),
        ({"weights": ["x"] * len(NAMES)}, "a number"),
        ({"bias": None}, "a number"),
        ({"low": 0.9, "high": 0.1}, "its band"),
        ({"low": float("nan")}, "a number"),
        ({"bias": float("nan")}, "a number"),
        ({"level_bias": float("inf")}, "a number"),
        ({"slope": 10**400}, "a number"),
        ({"level_weights": [1e308] * len(NAMES)}, "a number"),
    ],
)
def test_an_artefact_for_something_else_is_refused(change, said):
    """Another version, other features, missing numbers and a band inside out are told."""
    with pytest.raises(WrongArtefact, match=said):
        parse_scorer(render_scorer({**body(), **change}))


@pytest.mark.parametrize(
    "damaged", [b"", b"[]", b"{}", b"\xff", ARTEFACT[:-200], ARTEFACT.replace(b"0.55", b"0.56"), b" " * 2_000_000]
)
def test_a_damaged_artefact_is_refused(damaged):
    """Truncated, changed or oversized bytes are no model."""
    with pytest.raises(WrongArtefact):
        parse_scorer(damaged)


@given(st.floats(-1e300, 1e300))
def test_the_logistic_function_never_overflows(logit):
    """Any logit has a probability, and its opposite the rest."""
    assert 0 <= sigmoid(logit) <= 1
    assert sigmoid(logit) + sigmoid(-logit) == pytest.approx(1)
