"""Stop strings, matched by the gateway in the answer only.

In reasoning mode a backend would also stop inside the thinking, and vLLM's stream mixes fields up
(docs/adr/0006), so `stop` is kept here. Pure; O(text x stop strings).
"""

from __future__ import annotations

from collections.abc import Sequence

from gateway.backends.markers import held_back


class StopFilter:
    """One choice's answer text, up to the first stop string.

    Args:
        stops: the strings; empty ones are ignored.
        keep: leave the stop string in the text.
    """

    __slots__ = ("_held", "_keep", "_stops", "hit")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self._stops = [stop for stop in stops if stop]
        self._keep = keep
        self._held = ""
        self.hit: str | None = None

    def has_hit(self) -> bool:
        """Whether a stop string was found."""
        return self.hit is not None

    def feed(self, text: str, *, is_last: bool) -> str:
        """The text that is certain by now; nothing after `hit`."""
        if self.hit is not None:
            return ""
        text = self._held + text
        self._held = ""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            # What is complete first, whatever the borders of the pieces; of those the longest.
            _, at, self.hit = min(found)
            return text[: at + (len(self.hit) if self._keep else 0)]
        keep = 0 if is_last else max((held_back(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :] if keep else ""
        return text[: len(text) - keep]
