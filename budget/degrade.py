"""The degrade ladder: what a request that its limits refuse may do with less thinking.

Owns: which step comes next, and how much thinking it leaves. Pure; O(units + effort words). Does not own: what a
request needs (gateway/prepare.py), which steps it may take and carrying one out (gateway/degrade.py).

A step is taken as far as it is of use: a cap may be lowered to half of what it was, below that a lower effort says
better what is wanted than a thought cut short, and below the lowest effort instant mode does. Where the better step is
not possible, the cap is lowered to whatever fits. Another model, the last step, takes no arithmetic: it is held anew.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from budget.ledger import Amounts, Unit

Step = Literal["cap", "effort", "instant", "model"]
STEPS: tuple[Step, ...] = ("cap", "effort", "instant", "model")
LEAST_CAP_TOKENS = 16  # a shorter thought is none
ROUNDING: Mapping[Unit, int] = {"usd": 2}  # prices may be fractions of a nano-USD, and amounts are rounded


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What the holds of one request take.

    Attributes:
        cap: thinking tokens per choice as it was refused; None: no cap can be held, so none can be lowered.
        full: the hold that was refused.
        bare: what is left of it with a cap of 0; between the two it grows evenly with the cap.
        instant: the hold in instant mode; None: the request may not be instant.
        least: fewest thinking tokens per choice that the request insists on.
        efforts: the model's effort words, in tokens per choice.
    """

    cap: int | None
    full: Amounts
    bare: Amounts
    instant: Amounts | None = None
    least: int = 0
    efforts: Mapping[str, int] = {}


class Attempt(NamedTuple):
    """What to hold next.

    Attributes:
        step: of the ladder.
        cap: most thinking tokens per choice; 0 in instant mode.
        effort: the word that the cap follows from; None unless the step is `effort`.
    """

    step: Step
    cap: int = 0
    effort: str | None = None


def step_under_load(saturation: float, begins_at: float, steps: Sequence[Step]) -> Step | None:
    """The step that so much load asks for: the range from `begins_at` to 1 in equal parts, one for each step.

    Args:
        saturation: of a model's backends, 0 to 1.
        begins_at: below, nothing is asked for; at most 1.
        steps: those that may be taken, in order.
    """
    if saturation < begins_at or not steps:
        return None
    part = (saturation - begins_at) / (1 - begins_at) if begins_at < 1 else 1.0
    return steps[min(len(steps) - 1, int(part * len(steps)))]


def next_attempt(left: Mapping[Unit, int], needs: Needs, steps: Collection[Step]) -> Attempt | None:
    """The first step of the ladder that is of use and fits; None for a request that fits, or that nothing makes fit.

    Args:
        left: what the tightest limit of each unit has left; a unit that is absent is not limited.
        needs: of the request.
        steps: those that may still be taken.
    """
    if fits(left, needs.full):
        return None
    possible = []
    if needs.cap is not None:
        room = tokens_that_fit(left, needs.cap, needs.full, needs.bare)
        least = max(needs.least, LEAST_CAP_TOKENS)
        if "cap" in steps and room >= least:
            possible.append(Attempt("cap", room))
            if 2 * room >= needs.cap:
                return possible[0]
        words = {tokens: word for word, tokens in needs.efforts.items() if least <= tokens <= room}
        if "effort" in steps and words:
            return Attempt("effort", max(words), words[max(words)])
    if "instant" in steps and needs.instant is not None and not needs.least and fits(left, needs.instant):
        return Attempt("instant")
    return possible[0] if possible else None


def fits(left: Mapping[Unit, int], hold: Amounts) -> bool:
    """Whether every limit has room for a hold."""
    return all(amount <= left.get(unit, amount) for unit, amount in hold.by_unit().items())


def tokens_that_fit(left: Mapping[Unit, int], most: int, full: Amounts, bare: Amounts) -> int:
    """How many of `most` tokens every limit has room for; below 0 if there is no room even without them.

    Args:
        left: as for `next_attempt`.
        most: tokens that `full` has and `bare` has not, per choice.
        full: the hold with all of them.
        bare: the hold with none of them.
    """
    fitting, least_need = most, bare.by_unit()
    for unit, need in full.by_unit().items():
        if need <= left.get(unit, need):
            continue
        room = left[unit] - ROUNDING.get(unit, 0) - least_need[unit]
        fitting = min(fitting, most * room // (need - least_need[unit]) if room >= 0 else -1)
    return fitting
