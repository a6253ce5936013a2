"""How sure a model was of what it said, from the log probabilities of its own tokens.

Owns: one measure of one answer, told token by token. Pure; O(1) per token, O(window) memory.

The measure is the lowest mean over any `window` tokens in a row, as a probability: exp(min mean logprob), which is the
geometric mean of the tokens' probabilities where the model was least sure. Windows are "lowest group confidence" of
Fu et al., "Deep Think with Confidence", 2025 (arXiv:2508.15260), section 3, taken over the sampled token alone, since
that is all that `logprobs: true` gives. A mean over the whole answer would hide one bad step in a long answer, and a
product would punish length: Gupta et al., "Language Model Cascades: Token-level uncertainty and beyond", ICLR 2024
(arXiv:2404.10136). The lowest window only falls while tokens come, so that a draft can be left at the first bad one.
"""

from __future__ import annotations

import math
from collections import deque

LEAST_LOGPROB = -20.0  # vLLM writes -9999 for "never"; one such token is bad enough at 2e-9


class Confidence:
    """Of one answer.

    Args:
        window: tokens that are looked at together, 1 at least.

    Attributes:
        tokens: how many were told.
    """

    __slots__ = ("_last", "_lowest", "_sum", "_window", "tokens")

    def __init__(self, window: int) -> None:
        self._window = window
        self._last: deque[float] = deque()
        self._sum = 0.0
        self._lowest = 0.0
        self.tokens = 0

    def add(self, logprob: float) -> None:
        """One more token, with the natural logarithm of its probability."""
        logprob = min(0.0, max(LEAST_LOGPROB, logprob)) if not math.isnan(logprob) else LEAST_LOGPROB
        self.tokens += 1
        self._last.append(logprob)
        self._sum += logprob
        if len(self._last) > self._window:
            self._sum -= self._last.popleft()
        if self.tokens >= self._window:
            self._lowest = min(self._lowest, self._sum / self._window)

    @property
    def lowest(self) -> float:
        """Of all full windows so far, 0 to 1; 1 before there is one. It never rises."""
        return math.exp(self._lowest)

    @property
    def value(self) -> float:
        """Of the answer as it is: its lowest window, or all of it where it is shorter than one; 0 of nothing."""
        if not self.tokens:
            return 0.0
        return math.exp(self._sum / self.tokens) if self.tokens < self._window else self.lowest
