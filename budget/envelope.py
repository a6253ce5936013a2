"""What one request may spend: tokens, nano-USD and seconds, whatever its keys still have.

Pure: time is passed in. The envelope is checked while tokens arrive; spending is O(1).
"""

from __future__ import annotations

from dataclasses import dataclass

from budget.errors import EnvelopeSpent


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
