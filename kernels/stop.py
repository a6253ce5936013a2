"""Stop strings in text that arrives in pieces.

Invariant: what comes out does not depend on where the pieces were cut. The stop string that is complete
first wins; of several complete at the same character, the longest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def held_back(text: str, needles: Sequence[str]) -> int:
    """Length of the longest end of `text` that a needle could still grow out of."""
    longest = min(len(text), max(map(len, needles), default=1) - 1)
    for size in range(longest, 0, -1):
        tail = text[-size:]
        if any(needle.startswith(tail) for needle in needles if len(needle) > size):
            return size
    return 0


class StopScanner:
    """Release text up to the first stop string, holding back what may become one.

    Args:
        stops: non-empty strings.
        include: release the stop string too; then nothing has to be held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = tuple(stops)
        self._include = include
        self._held = ""
        # How much of what is held was released already: it is kept to be matched.
        self._released = 0
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """The text that is safe to show; nothing any more once `hit` is set."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            end, start, self.hit = min(found)
            released, self._held = self._held[self._released : end if self._include else start], ""
            return released
        cut = len(self._held) - held_back(self._held, self._stops)
        released = self._held[self._released : None if self._include else cut]
        self._held = self._held[cut:]
        self._released = len(self._held) if self._include else 0
        return released

    def flush(self) -> str:
        """What was held back: no stop string will complete it any more."""
        released, self._held, self._released = self._held[self._released :], "", 0
        return released
