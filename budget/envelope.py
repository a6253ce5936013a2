"""What one request may spend: tokens, nano-USD and seconds, whatever its keys still have.

Pure: time is passed in. The envelope is checked while tokens arrive; spending is O(1).
"""

from __future__ import annotations

from dataclasses import dataclass

from budget.chain import Purse
from budget.errors import EnvelopeSpent
from budget.price import FEMTO_PER_NANO, PriceTable


@dataclass(slots=True)
class Envelope:
    """Bounds of a whole request tree.

    Attributes:
        tokens: most tokens of all kinds; None for no bound.
        nano_usd: most money; None for no bound.
        deadline_s: on the clock whose readings are passed to `check`; None for no bound.
    """

    tokens: int | None = None
    nano_usd: int | None = None
    deadline_s: float | None = None

    def is_bounded(self) -> bool:
        """Whether there is anything to check."""
        return self.tokens is not None or self.nano_usd is not None or self.deadline_s is not None

    def less(self, *, tokens: int, nano_usd: int) -> Envelope:
        """What is left of it after so much was spent; its end stays where it is."""
        return Envelope(
            tokens=None if self.tokens is None else max(0, self.tokens - tokens),
            nano_usd=None if self.nano_usd is None else max(0, self.nano_usd - nano_usd),
            deadline_s=self.deadline_s,
        )

    def check(self, *, tokens: int, nano_usd: int, now_s: float) -> None:
        """Compare what was spent so far with the bounds.

        Raises: EnvelopeSpent, naming the part, once a bound is reached.
        """
        if self.tokens is not None and tokens >= self.tokens:
            raise EnvelopeSpent("tokens")
        if self.nano_usd is not None and nano_usd >= self.nano_usd:
            raise EnvelopeSpent("usd")
        if self.deadline_s is not None and now_s >= self.deadline_s:
            raise EnvelopeSpent("seconds")


def chain_bounds(
    envelope: Envelope, prices: PriceTable, *, prompt: int, choices: int, total: int, aside: int = 0
) -> tuple[int, Purse | None]:
    """Each choice's equal share of an envelope, once the prompt is known to take `prompt` tokens.

    Args:
        envelope: of the whole request.
        prices: of the model.
        prompt: tokens, as many as the backend counts.
        choices: how many share.
        total: most output tokens per choice that were allowed anyway.
        aside: tokens spent besides, at the answer's price.

    Returns: most output tokens per choice, and the money of one choice if that is bounded; either may leave nothing.
    """
    if envelope.tokens is not None:
        total = min(total, (envelope.tokens - prompt - aside) // choices)
    if envelope.nano_usd is None:
        return total, None
    left = envelope.nano_usd * FEMTO_PER_NANO - prompt * max(prices.prompt, prices.cached) - aside * prices.answer
    return total, Purse(femto_usd=left // choices, thinking=prices.thinking, answer=prices.answer)


def thinking_is_over(
    *, now_s: float, deadline_s: float, first_token_s: float, sampling_s: float, sampled: int, answer_tokens: int
) -> bool:
    """Whether thinking must end now for an answer to be ready at the deadline, going by what was measured so far.

    Args:
        now_s: on the clock of `deadline_s`.
        deadline_s: when the answer must be complete.
        first_token_s: from the call to its first token: the second call will take as long, at most.
        sampling_s: from then to now.
        sampled: tokens in it.
        answer_tokens: the answer's floor.
    """
    per_token_s = sampling_s / max(1, sampled - 1)
    return now_s + first_token_s + (answer_tokens + 1) * per_token_s >= deadline_s
