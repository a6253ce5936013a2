"""How a budget of thinking tokens is shared among the steps of a plan, and how large it is.

Owns: the published schedules and the exact Bayesian allocation, whole tokens out of shares, and a budget from a
predicted level. Pure; O(steps), but for the bisection. Does not own: plans (plan.py), what happens while
steps run (steps.py).

Source: Plan-and-Budget (arXiv 2505.16122): schedules and tokens per level as in its code, section "BBAM" of its first
version. Its shares are exact only where all exponents are equal; elsewhere the multiplier is found by bisection.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Literal, get_args

Schedule = Literal["uniform", "weighted", "linear", "polynomial", "exponential", "cosine"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
POWER, GAMMA, COSINE_FLOOR = 2, 0.9, 0.1
LEVEL_TOKENS: Mapping[int, int] = MappingProxyType({1: 200, 2: 250, 3: 350, 4: 450, 5: 600})
# Mean credits that a planner gives to the first up to the last of five sub-questions: they rise, whatever is asked.
CREDIT_TREND: tuple[float, ...] = (13, 18, 22, 22, 24)
BISECTIONS = 200


def decay(schedule: Schedule, steps: int) -> list[float]:
    """How much a schedule favours each step, from the first on; `uniform` and `weighted` favour none."""
    last = max(1, steps - 1)
    match schedule:
        case "linear":
            return [float(steps - i) for i in range(steps)]
        case "polynomial":
            return [float((steps - i) ** POWER) for i in range(steps)]
        case "exponential":
            return [GAMMA**i for i in range(steps)]
        case "cosine":
            return [(1 + math.cos(math.pi * i / last)) / 2 + COSINE_FLOOR for i in range(steps)]
        case _:
            return [1.0] * steps


def without_trend(credits: Sequence[float], trend: Sequence[float] = CREDIT_TREND) -> list[float]:
    """Credits as multiples of what a planner gives to that place anyhow.

    Credits rise with the place, which undoes most of a schedule that favours the first steps. Taken without their trend
    they say again which step is harder than usual.

    Args:
        credits: of each step.
        trend: a planner's mean credits from the first to the last place; plans of other lengths are interpolated.
    """
    at = [i * (len(trend) - 1) / max(1, len(credits) - 1) for i in range(len(credits))]
    usual = [_between(trend, where) for where in at]
    return [credit / most for credit, most in zip(credits, usual, strict=True)]


def shares(credits: Sequence[float], schedule: Schedule, *, keeps_trend: bool = False) -> list[float]:
    """The part of the budget of each step; they add up to 1.

    Args:
        credits: what the planner gave to each step, at least one of them above 0; `uniform` does not look at them.
        schedule: how much the first steps are favoured.
        keeps_trend: multiply credits as they are, as published; else without the planner's own trend.
    """
    if schedule == "uniform":
        return [1 / len(credits)] * len(credits)
    # `weighted` favours no step, so that there is nothing which a trend could undo.
    own = credits if keeps_trend or schedule == "weighted" else without_trend(credits)
    weights = [credit * favour for credit, favour in zip(own, decay(schedule, len(credits)), strict=True)]
    total = sum(weights)
    return [weight / total for weight in weights]


def whole(total: int, weights: Sequence[float]) -> list[int]:
    """`total` tokens in proportion to `weights`, to the token; without any weight, evenly.

    Largest remainders, by Sainte-Laguë's divisors: plain ones take a token from a step when the budget grows by one
    (the Alabama paradox), here no step gets less of more. For two steps both are the same.
    """
    own = weights if sum(weights) > 0 else [1.0] * len(weights)
    scale = sum(own)
    tokens = [math.floor(weight / scale * total + 0.5) for weight in own]
    heirs = [i for i, weight in enumerate(own) if weight > 0]

    def nearest() -> tuple[float, int]:
        return min(((tokens[i] + 0.5) / own[i], i) for i in heirs)

    def furthest() -> tuple[float, int]:
        return max(((tokens[i] - 0.5) / own[i], i) for i in heirs)

    while (missing := total - sum(tokens)) or furthest() > nearest():
        if missing >= 0:
            tokens[nearest()[1]] += 1
        if missing <= 0:
            tokens[furthest()[1]] -= 1
    return tokens


def bayesian(total: float, complexity: Sequence[float], exponents: Sequence[float]) -> list[float]:
    """Tokens of each step that leave the least uncertainty, where b of them leave c / b**a.

    In the optimum one more token is worth the same everywhere: c a / b**(a + 1) is one multiplier for all steps.

    Args:
        total: tokens to share, above 0.
        complexity: c of each step, at least 0; a step with 0 gets nothing.
        exponents: a of each step, above 0.
    """
    worth = [c * a for c, a in zip(complexity, exponents, strict=True)]
    if not any(worth):
        return [total / len(worth)] * len(worth)

    def logs_at(log_multiplier: float) -> list[float]:
        pairs = zip(worth, exponents, strict=True)
        return [(math.log(w) - log_multiplier) / (a + 1) if w else -math.inf for w, a in pairs]

    def is_too_much(log_multiplier: float) -> bool:
        return _log_sum(logs_at(log_multiplier)) > math.log(total)

    # Between the multipliers at which the largest step alone takes everything, and at which each takes an equal part.
    pairs = [(w, a) for w, a in zip(worth, exponents, strict=True) if w]
    low = min(math.log(w) - (a + 1) * math.log(total) for w, a in pairs) - 1
    high = max(math.log(w) - (a + 1) * math.log(total / len(pairs)) for w, a in pairs) + 1
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if is_too_much(middle) else (low, middle)
    return [math.exp(log) for log in logs_at(high)]


def level_budget(level: float, table: Mapping[int, int] = LEVEL_TOKENS) -> int:
    """Thinking tokens for a whole request of a predicted level; between two levels of the table in proportion."""
    levels = sorted(table)
    if level <= levels[0]:
        return table[levels[0]]
    for below, above in pairwise(levels):
        if level <= above:
            part = (level - below) / (above - below)
            return round(table[below] + part * (table[above] - table[below]))
    return table[levels[-1]]


def _between(values: Sequence[float], where: float) -> float:
    """`values` at a place that may lie between two of them."""
    below = min(int(where), len(values) - 1)
    above = min(below + 1, len(values) - 1)
    return values[below] + (where - below) * (values[above] - values[below])


def _log_sum(logs: Sequence[float]) -> float:
    """The logarithm of a sum whose terms are given as logarithms: they may be too large for a float."""
    most = max(logs)
    return most + math.log(sum(math.exp(log - most) for log in logs))
