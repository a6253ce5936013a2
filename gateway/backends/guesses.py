"""How many tokens thought and how many answered, where no id tells: by the text they wrote.

Owns: counting by events, by words and by length. It never says fewer than there must be. O(text).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.backends.port import Delta, Kind

if TYPE_CHECKING:
    from gateway.backends.markers import MarkerSplitter, Piece


def part_of(count: int, thought: str, said: str) -> int:
    """How many of `count` tokens wrote the thinking, by the length of what they wrote."""
    size = len(thought) + len(said)
    return -(-count * len(thought) // size) if size else 0


def count_inline(delta: Delta, pieces: list[Piece], splitter: MarkerSplitter, pending: int) -> int:
    """Sort a delta's tokens, and `pending` ones before it, by the text that is certain by now.

    Returns: how many are pending now, since all their text is held back.
    """
    count = pending + delta.thinking + delta.answer + delta.injected
    pending = 0
    if not pieces and splitter.is_holding:
        pending, count = count, 0
    size = sum(len(text) for _, text in pieces)
    if size and not delta.token_ids:
        _count_words(delta, pieces, count)
        return pending
    if size:
        thought = sum(len(text) for kind, text in pieces if kind is Kind.THINKING)
        forced = sum(len(text) for kind, text in pieces if kind is Kind.INJECTED)
        delta.thinking = -(-count * thought // size)
        delta.injected = min(count - delta.thinking, (2 * count * forced + size) // (2 * size))
    else:
        delta.thinking, delta.injected = (count if splitter.is_open else 0), 0
    delta.answer = count - delta.thinking - delta.injected
    return pending


def _count_words(delta: Delta, pieces: list[Piece], events: int) -> None:
    """Sort what nothing but events and words tell: at least a token for each of either."""
    delta.thinking = sum(at_least(text) for kind, text in pieces if kind is Kind.THINKING)
    delta.answer = sum(at_least(text) for kind, text in pieces if kind is Kind.ANSWER)
    delta.injected = 0
    rest = max(0, events - delta.thinking - delta.answer)
    if any(kind is Kind.INJECTED for kind, _ in pieces):
        delta.injected = rest
    elif delta.thinking:
        delta.thinking += rest
    else:
        delta.answer += rest


def at_least(text: str) -> int:
    """How many tokens a text is made of, where nothing says so: no token writes two words."""
    return max(1, len(text.split())) if text else 0
