"""What a mode is worth: expected quality less what it costs, from what was seen so far.

Owns: running statistics per model, mode and difficulty, and the choice between modes that follows from them. Does not
own: prices (budget/price.py) and load, which are told by who asks. No I/O and no clock; O(1) per request.

    utility = quality - lambda x cost in USD        (GTAlign's lesson: when prices change, the action changes)

Quality is the mean of a Beta distribution: the prior of the configuration plus the scores of feedback. Tokens are a
mean that begins at the prior, weighs it as PRIOR_WEIGHT requests, and forgets: at most MOST_WEIGHT requests count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

Mode = Literal["instant", "reasoning"]
PRIOR_WEIGHT = 10.0
MOST_WEIGHT = 1000.0
LEVELS = 5


class Prior(NamedTuple):
    """What is believed of a mode before anything was seen, by difficulty 1 to 5.

    Attributes:
        success: expected quality, 0 to 1.
        tokens: expected thinking and answer tokens.
    """

    success: tuple[float, ...]
    tokens: tuple[float, ...]


class Arm(NamedTuple):
    """One mode as it was weighed.

    Attributes:
        mode: which.
        quality: expected or drawn, 0 to 1.
        cost_usd: expected, at current prices and load.
        utility: the two together.
    """

    mode: Mode
    quality: float
    cost_usd: float
    utility: float


class TargetArm(NamedTuple):
    """One mode of one model, where a public name stands for several."""

    model: str
    arm: Arm


class Estimate:
    """What was seen of one model, mode and difficulty.

    Attributes:
        good: of the Beta distribution: scores.
        bad: of the same: what they lack to 1.
        tokens: mean of a request.
        weight: requests that the mean stands for.
    """

    __slots__ = ("bad", "good", "tokens", "weight")

    def __init__(self, success: float, tokens: float) -> None:
        self.good, self.bad = success * PRIOR_WEIGHT, (1 - success) * PRIOR_WEIGHT
        self.tokens, self.weight = tokens, PRIOR_WEIGHT

    def saw_tokens(self, tokens: int) -> None:
        """A request took so many."""
        self.weight = min(self.weight + 1, MOST_WEIGHT)
        self.tokens += (tokens - self.tokens) / self.weight

    def saw_score(self, score: float) -> None:
        """A request was worth so much, 0 to 1."""
        total = self.good + self.bad
        if total >= MOST_WEIGHT:
            self.good *= (MOST_WEIGHT - 1) / total
            self.bad *= (MOST_WEIGHT - 1) / total
        self.good += score
        self.bad += 1 - score

    @property
    def quality(self) -> float:
        """Expected."""
        return self.good / (self.good + self.bad)


class Statistics:
    """All that was seen, in this process.

    Args:
        priors: by mode.
    """

    def __init__(self, priors: dict[Mode, Prior]) -> None:
        self._priors = priors
        self._seen: dict[tuple[str, Mode, int], Estimate] = {}

    def believe(self, priors: dict[Mode, Prior]) -> None:
        """Take other priors, for whatever was not seen yet."""
        self._priors = priors

    def of(self, model: str, mode: Mode, level: int) -> Estimate:
        """What is known of a model, mode and difficulty."""
        key = model, mode, level
        found = self._seen.get(key)
        if found is None:
            prior = self._priors[mode]
            found = self._seen[key] = Estimate(prior.success[level - 1], prior.tokens[level - 1])
        return found

    def arms(
        self,
        model: str,
        level: int,
        cost_usd: Callable[[Mode, float], float],
        lambda_per_usd: float,
        draw: Callable[[float, float], float] | None = None,
    ) -> list[Arm]:
        """Both modes, weighed.

        Args:
            model: by public name.
            level: difficulty, 1 to 5.
            cost_usd: of so many tokens in a mode, at current prices and load.
            lambda_per_usd: quality that one US dollar is worth.
            draw: takes the two parameters of a Beta distribution; None for its mean.
        """
        arms = []
        for mode in self._priors:
            known = self.of(model, mode, level)
            quality = known.quality if draw is None else draw(max(known.good, 1e-6), max(known.bad, 1e-6))
            cost = cost_usd(mode, known.tokens)
            utility = quality - lambda_per_usd * cost
            arms.append(Arm(mode, round(quality, 4), round(cost, 9), round(utility, 4)))
        return arms


def best_target(arms: Sequence[TargetArm], quality_floor: float) -> TargetArm:
    """As `best`, over models as well as modes; the first of equal ones."""
    chosen = best([one.arm for one in arms], quality_floor)
    return next(one for one in arms if one.arm is chosen)


def best(arms: Sequence[Arm], quality_floor: float) -> Arm:
    """The arm of the greatest utility among those good enough; the one of the highest quality if none is.

    Ties go to the cheaper one.
    """
    good = [arm for arm in arms if arm.quality >= quality_floor]
    if not good:
        return max(arms, key=lambda arm: (arm.quality, -arm.cost_usd))
    return max(good, key=lambda arm: (arm.utility, -arm.cost_usd))
