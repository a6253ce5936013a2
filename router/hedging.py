"""When a call without a first byte is worth a second try on another backend (Dean and Barroso, 2013). Pure.

Owns: what is usual at one backend, a running quantile of the time to the first byte, and how many calls may be hedged.
Time is passed in, in seconds. Memory is bounded by the calls that are remembered; an addition is O(log) and a move of
at most as many numbers. Does not own: the tries themselves (gateway/modes/hedge.py).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque

from router.health import RetryBudget

SAVED_UP = 10.0


class FirstBytes:
    """How long the last calls waited for their first byte at one backend, or for as long as anybody waited.

    Args:
        quantile: of them that is still usual.
        most: calls that are remembered.
        enough: calls that say something; with fewer nothing is known, and nothing is guessed.
    """

    def __init__(self, quantile: float = 0.95, *, most: int = 256, enough: int = 32) -> None:
        self._quantile, self._most, self._enough = quantile, most, enough
        self._by_age: deque[float] = deque()
        self._by_size: list[float] = []

    def add(self, waited_s: float) -> None:
        """One more came, after so long."""
        if len(self._by_age) == self._most:
            oldest = self._by_age.popleft()
            del self._by_size[bisect_left(self._by_size, oldest)]
        self._by_age.append(waited_s)
        insort(self._by_size, waited_s)

    def gave_up(self, waited_s: float) -> None:
        """One more would have come later than this.

        It counts where it is known to be among the slow ones. Were those that lose their race left out, what is usual
        would shrink with every hedge; were the others counted, they would look as if they had answered.
        """
        usual_s = self.usual_s()
        if usual_s is not None and waited_s >= usual_s:
            self.add(waited_s)

    def usual_s(self) -> float | None:
        """The quantile; None while too few came."""
        count = len(self._by_size)
        if count < self._enough:
            return None
        return self._by_size[math.ceil(self._quantile * count) - 1]


class Hedging:
    """How many calls of a model may be hedged.

    Args:
        share: of its calls, on average.

    Attributes:
        begun: second tries.
        won: those of them that answered first.
    """

    def __init__(self, share: float) -> None:
        self._budget = RetryBudget(share, per_s=0.0, most=SAVED_UP)
        self.begun = self.won = 0

    def called(self) -> None:
        """One more call, which earns its share."""
        self._budget.tried()

    def take(self, now_s: float) -> bool:
        """Whether one more may be hedged; it is taken then."""
        return self._budget.take(now_s)
