"""Thinking markers: where they stand in ids and text, and which tokens wrote them.

Owns: finding one marker in text that arrives token by token, so that thinking tokens and marker tokens
can be told apart, and whether a prompt leaves the chain open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.stop import held_back

if TYPE_CHECKING:
    from kernels.params import Token


@dataclass(frozen=True, slots=True)
class Marker:
    """A forced or recognised piece of text.

    Attributes:
        text: as configured.
        ids: its tokens.
    """

    text: str
    ids: tuple[int, ...]

    @property
    def single(self) -> int | None:
        """The token id, if it is one token of the vocabulary: then it is matched by id."""
        return self.ids[0] if len(self.ids) == 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingPlan:
    """ThinkingRules in the model's tokens.

    Attributes:
        cap: most thinking tokens; None for no cap, 0 when thinking is off.
        start: opening marker, if the model may write it itself; None otherwise.
        end: closing marker.
        wrap_up: forced before `end` when the cap ends the thinking.
        after: forced after an `end` that was forced.
        reports_cap: a cap that is reached is news; off in instant mode, where nothing was promised.
    """

    cap: int | None
    start: Marker | None
    end: Marker
    wrap_up: Marker
    after: Marker
    reports_cap: bool


def chain_is_open(prompt: str, start: str, end: str, *, anywhere: bool) -> bool:
    """Whether a rendered prompt ends inside the thinking.

    Args:
        prompt: the text the model reads.
        start: opening marker.
        end: closing marker.
        anywhere: the last `start` may stand anywhere after the last `end`, as in a continued
            completion; else it must end the prompt, as a chat template writes it, so that a user's
            message that merely mentions the marker opens nothing.
    """
    if anywhere:
        return prompt.rfind(start) > prompt.rfind(end)
    return prompt.rstrip().endswith(start.rstrip())


@dataclass(slots=True)
class Found:
    """What one token settled.

    Attributes:
        before: text before the marker.
        tokens: tokens that wrote `before`; one that wrote the end of the text and the beginning of
            the marker counts here.
        marker_tokens: tokens that wrote the marker; the last one may have written `after` too.
        after: text after the marker; None while the marker was not found.
    """

    before: str
    tokens: list[Token]
    marker_tokens: list[Token]
    after: str | None


class MarkerFinder:
    """Find one marker in text that arrives token by token, holding back what may belong to it."""

    def __init__(self, marker: str) -> None:
        self._marker = marker
        self._text = ""
        # Where the text of each begins and ends in `_text`; one that begins before it, below zero.
        self._tokens: list[tuple[Token, int, int]] = []

    @property
    def pending(self) -> list[Token]:
        """Tokens held back."""
        return [token for token, _, _ in self._tokens]

    def push(self, token: Token | None, text: str) -> Found:
        """Take one token and the text it completed; None for text whose token is settled already."""
        if token is not None:
            self._tokens.append((token, len(self._text), len(self._text) + len(text)))
        self._text += text
        at = self._text.find(self._marker)
        if at < 0:
            return self._release(len(self._text) - held_back(self._text, [self._marker]))
        before = [each for each, start, _ in self._tokens if start < at]
        marker = [each for each, start, _ in self._tokens if start >= at]
        after = self._text[at + len(self._marker) :]
        found = Found(self._text[:at], before, marker, after)
        self._text, self._tokens = "", []
        return found

    def flush(self) -> Found:
        """Everything held back: the marker will not come."""
        return self._release(len(self._text))

    def drop(self) -> list[Token]:
        """The tokens held back, which are marker tokens; their text is forgotten."""
        tokens, self._text, self._tokens = self.pending, "", []
        return tokens

    def _release(self, size: int) -> Found:
        """Settle the first `size` characters and the tokens that wrote only them."""
        done = [token for token, _, end in self._tokens if end <= size]
        self._tokens = [(each, start - size, end - size) for each, start, end in self._tokens[len(done) :]]
        before, self._text = self._text[:size], self._text[size:]
        return Found(before, done, [], None)
