"""What a request's text says of its mode, once nothing else decides it. Pure; O(characters read).

Owns: the verdict and its reasons, with everything they follow from. Does not own: the score (scorer.py), what comes
before the text (mode.py), what modes cost and achieve (utility.py).

    score -> utility, where the key weighs money       -> the best arm
          -> certain: below or above the band           -> instant or reasoning
          -> in the band                                -> drawn arms, where exploring; else on_uncertain, small cap
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from router.utility import Arm, Mode, best

if TYPE_CHECKING:
    from router.scorer import Score, Scorer

By = Literal["text", "utility", "drawn", "uncertain"]
LONG_CHARS = 16_000
PICTURES = "pictures, sound or films: the text alone does not tell"
LONG = "a long text: its beginning does not tell"


class Policy(NamedTuple):
    """How a verdict is reached for one key and model.

    Attributes:
        on_uncertain: `routing.on_uncertain`.
        uncertain_tokens: most thinking tokens where it was uncertain.
        quality_floor: least expected quality of a mode that may be taken for its price.
        weighed: the arms of a difficulty; None where the key does not weigh money.
        drawn: the arms of a difficulty with qualities drawn at random; None where nothing is explored.
    """

    on_uncertain: Mode = "reasoning"
    uncertain_tokens: int | None = None
    quality_floor: float = 0.0
    weighed: Callable[[int], Sequence[Arm]] | None = None
    drawn: Callable[[int], Sequence[Arm]] | None = None


class Verdict(NamedTuple):
    """A mode by the text, and what it follows from.

    Attributes:
        mode: instant or reasoning.
        reason: why, in words.
        most_thinking: a cap below the default, in tokens; None for none.
        score: what the text says; None where it was not asked.
        scorer: which scorer said it.
        arms: what was weighed or drawn, if anything was.
        by: `text`, `utility`, `drawn` or `uncertain`.
        policy: what else it follows from: `on_uncertain` and the quality floor.
    """

    mode: Mode
    reason: str
    most_thinking: int | None = None
    score: Score | None = None
    scorer: str = ""
    arms: tuple[Arm, ...] = ()
    by: By = "text"
    policy: tuple[Mode, float] = ("reasoning", 0.0)


def judge(scorer: Scorer, text: str, policy: Policy, *, has_media: bool) -> Verdict:
    """The verdict on a text."""
    if has_media or len(text) > LONG_CHARS:
        return _uncertain(PICTURES if has_media else LONG, policy)
    return judge_score(scorer, scorer.read(text), policy)


def judge_score(scorer: Scorer, score: Score, policy: Policy) -> Verdict:
    """The verdict that follows from a score, also from one that a log holds."""
    verdict = _of_score(scorer, score, policy)
    return verdict._replace(score=score, scorer=scorer.digest, policy=(policy.on_uncertain, policy.quality_floor))


def _of_score(scorer: Scorer, score: Score, policy: Policy) -> Verdict:
    probability, level = score.probability, score.level
    if policy.weighed is not None:
        arms = tuple(policy.weighed(level))
        reason = f"the best of quality less cost at difficulty {level}"
        return Verdict(best(arms, policy.quality_floor).mode, reason, arms=arms, by="utility")
    if probability < scorer.low:
        return Verdict("instant", f"the text: thinking pays with {probability}")
    if probability >= scorer.high:
        return Verdict("reasoning", f"the text: thinking pays with {probability}")
    why = f"the text does not tell ({probability})"
    if policy.drawn is None:
        return _uncertain(why, policy)
    arms = tuple(policy.drawn(level))
    mode = best(arms, policy.quality_floor).mode
    cap = policy.uncertain_tokens if mode == "reasoning" else None
    return Verdict(mode, f"{why}: drawn", cap, arms=arms, by="drawn")


def _uncertain(why: str, policy: Policy) -> Verdict:
    mode = policy.on_uncertain
    cap = policy.uncertain_tokens if mode == "reasoning" else None
    said = (mode, policy.quality_floor)
    return Verdict(mode, f"{why}: routing.on_uncertain", cap, by="uncertain", policy=said)
