"""Verdicts on texts, and what else they follow from."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.features import NAMES
from router.judge import LONG_CHARS, Policy, judge, judge_score
from router.mode import ModeDecision, ModeFacts, decide_mode
from router.scorer import Score, parse_scorer
from router.utility import Arm

SCORER = parse_scorer((Path(__file__).parents[2] / "router/scorer.json").read_bytes())
ZEROS = tuple(0.0 for _ in NAMES)
CHEAP, DEAR = Arm("instant", 0.5, 0.001, 0.4), Arm("reasoning", 0.9, 0.01, 0.3)


def score(probability: float) -> Score:
    """A score of this probability."""
    return Score(probability, 3, ZEROS)


@pytest.mark.parametrize(("probability", "mode"), [(0.0, "instant"), (SCORER.high, "reasoning"), (1.0, "reasoning")])
def test_a_certain_text_decides(probability: float, mode: str) -> None:
    """Below the band is instant and above it reasoning, whatever on_uncertain says, with the default cap."""
    for uncertain in ("instant", "reasoning"):
        verdict = judge_score(SCORER, score(probability), Policy(on_uncertain=uncertain, uncertain_tokens=9))
        assert (verdict.mode, verdict.by, verdict.most_thinking) == (mode, "text", None)


@pytest.mark.parametrize(("uncertain", "cap"), [("instant", None), ("reasoning", 9)])
def test_an_uncertain_text_gets_what_is_configured_with_a_small_cap(uncertain: str, cap: int | None) -> None:
    """Inside the band the mode is on_uncertain; reasoning has the small cap."""
    verdict = judge_score(SCORER, score(SCORER.low), Policy(on_uncertain=uncertain, uncertain_tokens=cap or 9))  # type: ignore[arg-type]  # a mode
    assert (verdict.mode, verdict.by, verdict.most_thinking) == (uncertain, "uncertain", cap)
    assert verdict.reason.endswith("routing.on_uncertain")


@pytest.mark.parametrize(("text", "has_media"), [("what is this?", True), ("x" * (LONG_CHARS + 1), False)])
def test_pictures_and_long_texts_are_not_judged_by_their_words(text: str, has_media: bool) -> None:
    """What the words do not tell is uncertain, without a score."""
    verdict = judge(SCORER, text, Policy(on_uncertain="reasoning", uncertain_tokens=9), has_media=has_media)
    assert (verdict.by, verdict.score, verdict.scorer, verdict.most_thinking) == ("uncertain", None, "", 9)


def test_a_key_that_weighs_money_gets_the_best_arm() -> None:
    """Utility goes before the band, and the quality floor before utility."""
    certain = score(1.0)
    assert judge_score(SCORER, certain, Policy(weighed=lambda level: [CHEAP, DEAR])).mode == "instant"
    floored = judge_score(SCORER, certain, Policy(weighed=lambda level: [CHEAP, DEAR], quality_floor=0.8))
    assert (floored.mode, floored.by, floored.arms) == ("reasoning", "utility", (CHEAP, DEAR))


@given(st.floats(0, 1))
def test_only_an_uncertain_text_is_explored(probability: float) -> None:
    """Nothing is drawn outside the band."""
    drawn: list[int] = []

    def draw(level: int) -> list[Arm]:
        drawn.append(level)
        return [CHEAP, DEAR]

    verdict = judge_score(SCORER, score(probability), Policy(drawn=draw, uncertain_tokens=9))
    is_in_band = SCORER.low <= probability < SCORER.high
    assert (drawn == [3]) == is_in_band == (verdict.by == "drawn")


def test_the_text_is_asked_last_and_only_then() -> None:
    """What structure decides never reads the text."""
    facts = ModeFacts("auto", None, None, "auto", "reasoning", 100, read=lambda: pytest.fail("read"))
    for changes in (
        {"asked": "instant", "asked_by": "model"},
        {"allowed": frozenset({"reasoning"})},
        {"default_mode": "instant"},
        {"thinking_room": 0},
        {"continues": True},
        {"is_native": False},
    ):
        assert decide_mode(facts._replace(**changes)).verdict is None


def test_the_verdict_becomes_the_decision() -> None:
    """Where nothing else decides, mode and reason are the text's, and the verdict rides along."""
    verdict = judge(SCORER, "hello there", Policy(), has_media=False)
    decision = decide_mode(ModeFacts("auto", None, None, "auto", "reasoning", 100, read=lambda: verdict))
    assert decision == ModeDecision(verdict.mode, verdict.reason, verdict)
    assert verdict.mode == "instant"
