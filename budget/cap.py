"""The thinking cap: how much one call may think, and where its tokens fall.

Owns: turning what was asked, configured and allowed into one cap (`allow`), and the state machine that
sorts a choice's tokens into thinking, answer and markers (`ThinkingMeter`). Pure; O(1) per token.
Definitions: docs/api.md, "Counting". Thinking excludes the markers; markers are `injected`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

EFFORT_SHARE: Mapping[str, float] = {
    "minimal": 0.1,
    "low": 0.2,
    "medium": 0.5,
    "high": 0.8,
    "xhigh": 0.95,
    "max": 0.95,
}
EFFORT_FLOOR_TOKENS = 16
COMMON_EFFORTS = ("low", "medium", "high")  # the words that every server with efforts knows
MARKER_ALLOWANCE_TOKENS = 16
Source = Literal["request", "effort", "default"]


class CapTooHigh(Exception):
    """An explicit cap does not fit; says what it collides with.

    Attributes:
        limit: what it collides with, in words a client understands.
        allowed: the largest cap that would fit.
    """

    def __init__(self, limit: str, allowed: int) -> None:
        super().__init__(f"the most that fits is {allowed} ({limit})")
        self.limit = limit
        self.allowed = allowed


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What limits a cap.

    Attributes:
        model_max: the model's ceiling.
        key_max: the key's ceiling, or None.
        total_max: tokens of thinking and answer together that the request allows, or None.
        window: the model's context window, or None.
        answer_floor: tokens kept back for the answer.
        forced: tokens kept back for ending the thinking by force: markers and wrap-up.
        default: cap when the request says nothing.
        effort_tokens: the model's own table, which overrides the shares.
    """

    model_max: int
    key_max: int | None = None
    total_max: int | None = None
    window: int | None = None
    answer_floor: int = 0
    forced: int = 0
    default: int = 0
    effort_tokens: Mapping[str, int] = {}

    def ceiling(self) -> tuple[int, str]:
        """The largest cap that fits, and which bound makes it so."""
        best, why = self.model_max, "the model's thinking.max_tokens"
        if self.key_max is not None and self.key_max < best:
            best, why = self.key_max, "this key's max_thinking_tokens"
        reserve = self.answer_floor + self.forced
        kept = f"{self.answer_floor} kept for the answer"
        if self.forced:
            kept += f" and {self.forced} for ending the thinking"
        if self.total_max is not None and self.total_max - reserve < best:
            best, why = max(0, self.total_max - reserve), f"the total limit {self.total_max} less {kept}"
        if self.window is not None and self.window - reserve < best:
            best, why = max(0, self.window - reserve), f"the context window {self.window} less {kept}"
        return best, why


class Cap(msgspec.Struct, frozen=True, kw_only=True):
    """The decided cap.

    Attributes:
        tokens: most thinking tokens per choice.
        source: what asked for it.
        clamped_from: what was asked, if it did not fit.
        clamped_by: which bound it met.
    """

    tokens: int
    source: Source
    clamped_from: int | None = None
    clamped_by: str | None = None


def allow(explicit: int | None, effort: str | None, bounds: Bounds) -> Cap:
    """Decide the cap of a call that may think.

    Args:
        explicit: tokens the request names, or None.
        effort: an effort word other than `none`, or None.
        bounds: what limits it.

    Raises: CapTooHigh for an explicit cap above what fits; caps from efforts and defaults are clamped.
    """
    ceiling, why = bounds.ceiling()
    if explicit is not None:
        if explicit > ceiling:
            raise CapTooHigh(why, ceiling)
        return Cap(tokens=explicit, source="request")
    wanted = bounds.default if effort is None else effort_tokens(effort, bounds)
    source: Source = "default" if effort is None else "effort"
    if wanted > ceiling:
        return Cap(tokens=ceiling, source=source, clamped_from=wanted, clamped_by=why)
    return Cap(tokens=wanted, source=source)


def effort_tokens(effort: str, bounds: Bounds) -> int:
    """An effort word as tokens: the model's table, else its share of the total (docs/api.md)."""
    own = bounds.effort_tokens.get(effort)
    if own is not None:
        return own
    total = bounds.total_max if bounds.total_max is not None else bounds.model_max
    return max(EFFORT_FLOOR_TOKENS, int(total * EFFORT_SHARE[effort]))


def effort_within(cap: int, bounds: Bounds) -> str:
    """The highest effort word whose tokens are within `cap`; the lowest word if none is."""
    words = [word for word in EFFORT_SHARE if effort_tokens(word, bounds) <= cap and word in COMMON_EFFORTS]
    return max(words, key=lambda word: EFFORT_SHARE[word], default=COMMON_EFFORTS[0])


@dataclass(slots=True)
class Split:
    """How the tokens of one delta fall."""

    thinking: int = 0
    answer: int = 0
    injected: int = 0
    closed: bool = False


class ThinkingMeter:
    """Sorts the tokens of one choice by the marker ids of its model.

    Needs markers that are single vocabulary tokens; other markers are split by text (`markers.py`).

    Args:
        start_id: opening marker.
        end_id: closing marker.
        cap: most thinking tokens, or None.
        is_open: the prompt already opened the thinking.
        slack: tokens after the opening marker in the prompt, which a native cap counts as thinking.
        has_closed: the prompt already closed a chain.

    Attributes:
        has_closed: a closing marker was seen: from then on the ids say for certain what is answer.
    """

    __slots__ = (
        "_slack",
        "answer",
        "cap",
        "capped",
        "end_id",
        "has_closed",
        "injected",
        "is_open",
        "start_id",
        "thinking",
    )

    def __init__(
        self,
        start_id: int,
        end_id: int,
        *,
        cap: int | None,
        is_open: bool = False,
        slack: int = 0,
        has_closed: bool = False,
    ) -> None:
        self.start_id = start_id
        self.end_id = end_id
        self.cap = cap
        self.is_open = is_open
        self.has_closed = has_closed
        self.thinking = self.answer = self.injected = 0
        self.capped = False
        self._slack = slack

    def feed_plain(self, token_id: int) -> bool:
        """Count one token if it is no marker; False, and nothing counted, if it is."""
        if token_id in (self.end_id, self.start_id):
            return False
        if self.is_open:
            self.thinking += 1
        else:
            self.answer += 1
        return True

    def feed(self, token_ids: Sequence[int]) -> Split:
        """Sort the next tokens; `closed` says that thinking ended in them."""
        split = Split()
        for token_id in token_ids:
            if self.is_open:
                if token_id == self.end_id:
                    self.is_open = False
                    self.has_closed = True
                    split.injected += 1
                    split.closed = True
                    reached = self.thinking + split.thinking + self._slack
                    self.capped = self.capped or (self.cap is not None and reached >= self.cap)
                else:
                    split.thinking += 1
            elif token_id == self.start_id:
                self.is_open = True
                split.injected += 1
            elif token_id == self.end_id:
                self.has_closed = True
                split.injected += 1
            else:
                split.answer += 1
        self.thinking += split.thinking
        self.answer += split.answer
        self.injected += split.injected
        return split

    def believe(self, split: Split) -> None:
        """Take the answer tokens of `split` for thinking after all: the backend says so, and no marker denies it."""
        self.thinking += split.answer
        self.answer -= split.answer
        split.thinking, split.answer = split.thinking + split.answer, 0
