"""One envelope for a whole request tree: what its children may spend is split off before they start.

Owns: splitting, spending and giving back, so that plan steps, branches, agent turns, hedges and retries together
never spend more than the request's envelope. Pure: no clock, no I/O. Does not own: the hold in the ledger, which is one
for the tree (ledger.py), nor the bounds of one call's choices (envelope.py).
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from budget.errors import EnvelopeSpent


class Share:
    """A part of an envelope that one child of a request may spend: a plan's step, a branch, a turn, a retry.

    A context manager: whatever is left when the block ends goes back to where it came from. What is split off is
    not there any more until then, so that however many children run at once, and however they end, together they
    cannot spend more than the envelope. All operations are O(1) and synchronous.

    Attributes:
        tokens: left to spend or to split; None for no bound.
        nano_usd: likewise.
        deadline_s: when all of it must be over; a child's is never later than its parent's.
        spent_tokens, spent_nano_usd: by it and by its children that have ended.
    """

    __slots__ = ("_is_open", "_parent", "deadline_s", "nano_usd", "spent_nano_usd", "spent_tokens", "tokens")

    def __init__(
        self,
        tokens: int | None = None,
        nano_usd: int | None = None,
        deadline_s: float | None = None,
        *,
        parent: Share | None = None,
    ) -> None:
        self.tokens = tokens
        self.nano_usd = nano_usd
        self.deadline_s = deadline_s
        self.spent_tokens = self.spent_nano_usd = 0
        self._parent = parent
        self._is_open = True

    def __enter__(self) -> Self:
        """Spend within the block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give back what is left."""
        self.refund()

    def split(
        self, *, tokens: int | None = None, nano_usd: int | None = None, deadline_s: float | None = None
    ) -> Share:
        """A child's share, taken out of this one.

        Args:
            tokens: how many; None for all that is left, which is no bound where there is none.
            nano_usd: likewise.
            deadline_s: of the child, if it is earlier than this one's.

        Raises: EnvelopeSpent, naming the part, when there is not so much left; then nothing is taken.
        """
        self._check_open()
        taken_tokens = _taken(self.tokens, tokens, "tokens")
        taken_nano_usd = _taken(self.nano_usd, nano_usd, "usd")
        if self.tokens is not None and taken_tokens is not None:
            self.tokens -= taken_tokens
        if self.nano_usd is not None and taken_nano_usd is not None:
            self.nano_usd -= taken_nano_usd
        ends = [at for at in (self.deadline_s, deadline_s) if at is not None]
        return Share(taken_tokens, taken_nano_usd, min(ends, default=None), parent=self)

    def spend(self, *, tokens: int = 0, nano_usd: int = 0) -> None:
        """Spend some of it; what a call may still receive is what is left here, so ask for no more.

        Raises: EnvelopeSpent, naming the part, when there is not so much left; then nothing is spent.
        """
        self._check_open()
        _taken(self.tokens, tokens, "tokens")
        _taken(self.nano_usd, nano_usd, "usd")
        if self.tokens is not None:
            self.tokens -= tokens
        if self.nano_usd is not None:
            self.nano_usd -= nano_usd
        self.spent_tokens += tokens
        self.spent_nano_usd += nano_usd

    def grow(self, *, tokens: int = 0, nano_usd: int = 0) -> None:
        """Make it larger, after the hold of the tree was extended by as much."""
        self._check_open()
        assert tokens >= 0, "a share shrinks by spending and splitting only"
        assert nano_usd >= 0, "a share shrinks by spending and splitting only"
        if self.tokens is not None:
            self.tokens += tokens
        if self.nano_usd is not None:
            self.nano_usd += nano_usd

    def refund(self) -> None:
        """End it: what is left goes back, once. A parent that has ended meanwhile hands it on."""
        if not self._is_open:
            return
        self._is_open = False
        parent = self._parent
        while parent is not None:
            parent.spent_tokens += self.spent_tokens
            parent.spent_nano_usd += self.spent_nano_usd
            if parent._is_open:
                break
            parent = parent._parent
        if parent is not None:
            if parent.tokens is not None:
                parent.tokens += self.tokens or 0
            if parent.nano_usd is not None:
                parent.nano_usd += self.nano_usd or 0
        self.tokens = self.nano_usd = 0

    def is_over(self, now_s: float) -> bool:
        """Whether its deadline has passed."""
        return self.deadline_s is not None and now_s >= self.deadline_s

    def _check_open(self) -> None:
        assert self._is_open, "a share that was given back cannot be spent"


def _taken(left: int | None, wanted: int | None, part: str) -> int | None:
    """How much of what is left is taken. Raises: EnvelopeSpent."""
    if wanted is None:
        return left
    assert wanted >= 0, "what was taken comes back by a refund only"
    if left is not None and wanted > left:
        raise EnvelopeSpent(part)
    return wanted
