"""Split text with inline thinking markers, whatever the borders of its pieces.

Owns: finding `start` and `end` in a text stream, also markers of several tokens that arrive in parts.
Pure; O(text). Feeding a text in any pieces gives the same result as feeding it whole.
"""

from __future__ import annotations

from gateway.backends.port import Kind

Piece = tuple[Kind, str]


def held_back(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without completing it."""
    for length in range(min(len(marker) - 1, len(text)), 0, -1):
        if marker.startswith(text[-length:]):
            return length
    return 0


class MarkerSplitter:
    """One choice's text, cut into thinking and answer; the markers themselves become INJECTED pieces.

    Args:
        start: opening marker; it is looked for only at the very beginning of the answer, after white space, unless more
            openings are announced: an answer may well speak of markers.
        end: closing marker.
        is_open: the prompt already opened the thinking.
    """

    __slots__ = ("_end", "_held", "_may_open", "_openings", "_start", "is_open")

    def __init__(self, start: str, end: str, *, is_open: bool = False) -> None:
        self._start = start
        self._end = end
        self._held = ""
        self._may_open = True
        self._openings = 0
        self.is_open = is_open

    @property
    def is_holding(self) -> bool:
        """Whether some text is held back: it may be the beginning of a marker."""
        return bool(self._held)

    def feed(self, text: str, *, openings: int = 0) -> list[Piece]:
        """The pieces that are certain by now; `openings` more opening markers are known to be in the text."""
        self._openings += openings
        pieces: list[Piece] = []
        text = self._held + text
        self._held = ""
        while text:
            if self.is_open:
                text = self._inside(text, pieces)
            elif self._may_open:
                text = self._before(text, pieces)
            elif self._openings:
                text = self._again(text, pieces)
            else:
                pieces.append((Kind.ANSWER, text))
                text = ""
        return pieces

    def finish(self, *, cut: bool = False) -> list[Piece]:
        """What was held back, once no more text comes; where it was cut off not the half of a marker."""
        held, self._held = self._held, ""
        if cut and self.is_open and len(held) > 1:
            return []
        return [(Kind.THINKING if self.is_open else Kind.ANSWER, held)] if held else []

    def _inside(self, text: str, pieces: list[Piece]) -> str:
        before, marker, after = text.partition(self._end)
        if marker:
            if before:
                pieces.append((Kind.THINKING, before))
            pieces.append((Kind.INJECTED, marker))
            self.is_open = self._may_open = False
            return after
        keep = held_back(text, self._end)
        self._held = text[len(text) - keep :] if keep else ""
        if len(text) > keep:
            pieces.append((Kind.THINKING, text[: len(text) - keep]))
        return ""

    def _before(self, text: str, pieces: list[Piece]) -> str:
        bare = text.lstrip()
        if bare.startswith(self._start):
            pieces.append((Kind.INJECTED, self._start))
            self._open()
            return bare[len(self._start) :]
        if self._start.startswith(bare):  # white space only, or the beginning of the marker
            self._held = text
            return ""
        self._may_open = False
        return text

    def _again(self, text: str, pieces: list[Piece]) -> str:
        before, marker, after = text.partition(self._start)
        keep = 0 if marker else held_back(text, self._start)
        self._held = text[len(text) - keep :] if keep else ""
        if before[: len(before) - keep]:
            pieces.append((Kind.ANSWER, before[: len(before) - keep]))
        if marker:
            pieces.append((Kind.INJECTED, marker))
            self._open()
        return after

    def _open(self) -> None:
        self.is_open, self._may_open = True, False
        self._openings = max(0, self._openings - 1)


class AnswerFilter:
    """One choice's answer text without what stands between markers: thinking that was reopened in it.

    Args:
        start: opening marker.
        end: closing marker.
    """

    __slots__ = ("_end", "_held", "_is_inside", "start")

    def __init__(self, start: str, end: str) -> None:
        self.start, self._end = start, end
        self._held = ""
        self._is_inside = False

    @property
    def is_busy(self) -> bool:
        """Whether it stands between markers, or holds some text back."""
        return self._is_inside or bool(self._held)

    def feed(self, text: str, *, is_last: bool) -> str:
        """The text that is certain by now."""
        text, shown = self._held + text, []
        self._held = ""
        while text:
            marker = self._end if self._is_inside else self.start
            before, found, after = text.partition(marker)
            if found:
                shown.append("" if self._is_inside else before)
                self._is_inside = not self._is_inside
                text = after
                continue
            keep = 0 if is_last else held_back(text, marker)
            self._held = text[len(text) - keep :] if keep else ""
            shown.append("" if self._is_inside else text[: len(text) - keep])
            break
        return "".join(shown)
