"""What each step of a plan may think, decided anew whenever one ends.

Owns: the cap of the step that runs, what an early end leaves to the others, and what a step that was cut may borrow
from them. The steps of one chain together never have more than the budget. Pure; O(steps) per step, O(1) per token.
"""

from __future__ import annotations

from collections.abc import Sequence

from budget.allocate import whole

LEAST_STEP_TOKENS = 16  # a shorter thought is none: nobody borrows from it
BORROWS = 0.5


class Steps:
    """The steps of one chain.

    What is left is shared anew among the steps to come each time one ends, by their weights: an unused part is carried
    forward, and what was borrowed is missing from all of them alike. A step that was cut before it came to an end is
    uncertain: once, it may go on with tokens of the later ones, as many as half of its own cap, and at most half of
    what they have above the least that is of use.

    Args:
        budget: thinking tokens of all steps together.
        weights: of each step, at least one of them above 0.
        borrows: the part of its own cap that a step may borrow, and of what the later ones can spare; 0: none may.

    Attributes:
        at: the step that runs, from 0.
        caps: of the steps that have begun, borrowed tokens included.
        used: thinking tokens of those steps.
    """

    __slots__ = ("_borrows", "_budget", "_has_borrowed", "_weights", "at", "caps", "used")

    def __init__(self, budget: int, weights: Sequence[float], *, borrows: float = BORROWS) -> None:
        assert weights, "a plan has a step"
        self._budget = max(0, budget)
        self._weights = tuple(weights)
        self._borrows = borrows
        self._has_borrowed = False
        self.at = 0
        self.caps = [whole(self._budget, self._weights)[0]]
        self.used = [0]

    def room(self) -> int:
        """Most tokens that the step which runs may still think."""
        return max(0, self.caps[-1] - self.used[-1])

    def left(self) -> int:
        """Tokens that no step has thought yet."""
        return self._budget - sum(self.used)

    def is_last(self) -> bool:
        """Whether no step comes after the one that runs."""
        return self.at == len(self._weights) - 1

    def think(self, tokens: int) -> None:
        """The step that runs has thought so many more (fewer, if some turn out to be no thought)."""
        self.used[-1] += tokens

    def next(self) -> bool:
        """Begin the next step; False, and nothing done, when there is none, or nothing left for it."""
        if self.is_last() or self.left() <= 0:
            return False
        self.at += 1
        self._has_borrowed = False
        self.caps.append(whole(self.left(), self._weights[self.at :])[0])
        self.used.append(0)
        return True

    def borrow(self) -> int:
        """Tokens by which the step that runs, cut at its cap, may go on; 0 where there are none to spare."""
        if self._has_borrowed or self.is_last():
            return 0
        self._has_borrowed = True
        later = whole(max(0, self.left() - self.room()), self._weights[self.at + 1 :])
        spare = sum(max(0, tokens - LEAST_STEP_TOKENS) for tokens in later)
        tokens = int(self._borrows * min(self.caps[-1], spare))
        self.caps[-1] += tokens
        return tokens
