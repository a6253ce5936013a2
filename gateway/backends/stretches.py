"""Events of several tokens: where thinking and answer meet, and which tokens, texts and logprobs are whose.

Owns: stretches of one kind, in the order they came. A delta is kept or dropped as a whole, and what follows a cut goes
on from the tokens in their order: thinking beyond a cap must neither take an answer with it nor change places with it.
O(tokens + text of the event).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gateway.backends.port import Delta, Kind

if TYPE_CHECKING:
    from gateway.backends.markers import Piece
    from gateway.backends.reader import MarkerIds


@dataclass(slots=True)
class Stretch:
    """Neighbouring tokens of one kind.

    Attributes:
        is_thought: thinking or markers; else answer.
        tokens: how many, markers included.
        injected: how many of them are markers.
        text: what they write, without markers.
    """

    is_thought: bool
    tokens: int = 0
    injected: int = 0
    text: str = ""

    def kind(self) -> Kind:
        """Of its text."""
        if not self.is_thought:
            return Kind.ANSWER
        return Kind.THINKING if self.text or self.tokens > self.injected else Kind.INJECTED


def by_ids(ids: Sequence[int], markers: MarkerIds, *, is_open: bool) -> list[Stretch]:
    """The stretches of an event as its ids say; `is_open`: it begins inside the thinking."""
    found: list[Stretch] = []
    for token_id in ids:
        is_marker = token_id == markers.end or (token_id == markers.start and not is_open)
        is_thought = is_open or is_marker
        if not found or found[-1].is_thought is not is_thought:
            found.append(Stretch(is_thought))
        found[-1].tokens += 1
        found[-1].injected += is_marker
        is_open = token_id != markers.end if is_marker else is_open
    return found


def by_counts(delta: Delta) -> list[Stretch]:
    """The stretches of an event whose ids do not tell: first what was thought, then the answer."""
    thought = Stretch(is_thought=True, tokens=delta.thinking + delta.injected, injected=delta.injected)
    return [one for one in (thought, Stretch(is_thought=False, tokens=delta.answer)) if one.tokens]


def with_texts(found: list[Stretch], pieces: Sequence[Piece], *, calls: bool) -> list[Stretch]:
    """The same with their texts: piece by piece where these are of the same kinds, else shared out by tokens.

    Args:
        found: stretches.
        pieces: what the event says, in its order.
        calls: there are tool calls, which are answer, too.
    """
    if calls and all(one.is_thought for one in found):
        found.append(Stretch(is_thought=False))
    runs: list[tuple[bool, str]] = []
    for kind, written in pieces:
        is_thought, text = kind is not Kind.ANSWER, "" if kind is Kind.INJECTED else written
        if runs and runs[-1][0] is is_thought:
            runs[-1] = (is_thought, runs[-1][1] + text)
        else:
            runs.append((is_thought, text))
    if [is_thought for is_thought, _ in runs] == [one.is_thought for one in found]:
        for one, (_, text) in zip(found, runs, strict=True):
            one.text = text
        return found
    thought, said = ("".join(text for is_thought, text in runs if is_thought is wanted) for wanted in (True, False))
    if thought and not any(one.is_thought for one in found):
        found.insert(0, Stretch(is_thought=True))
    if said and all(one.is_thought for one in found):
        found.append(Stretch(is_thought=False))
    _share(thought, [one for one in found if one.is_thought])
    _share(said, [one for one in found if not one.is_thought])
    return found


def _share(text: str, among: list[Stretch]) -> None:
    """Cut a text at about where its tokens do; markers write none of it."""
    total, before, start = sum(one.tokens - one.injected for one in among) or 1, 0, 0
    for one in among:
        before += one.tokens - one.injected
        end = len(text) if one is among[-1] else len(text) * before // total
        one.text, start = text[start:end], end


def cut(delta: Delta, found: Sequence[Stretch]) -> list[Delta]:
    """One delta for each stretch, wires aside; the finish stays with the last, tool calls with the first answer."""
    entries = delta.logprobs.get("content") if isinstance(delta.logprobs, dict) else None
    of_ids = _shares(delta.token_ids, found)
    of_entries = _shares(entries if isinstance(entries, list) else [], found)
    parts, calls, capped = [], delta.tool_calls, delta.capped
    for one, ids, some in zip(found, of_ids, of_entries, strict=True):
        part = Delta(delta.index, one.kind(), one.text, token_ids=ids)
        part.logprobs = {"content": some} if some else None
        if one.is_thought:
            part.thinking, part.injected = one.tokens - one.injected, one.injected
            part.capped, capped = capped, False
        else:
            part.answer = one.tokens
            part.tool_calls, calls = calls, None
        parts.append(part)
    last = parts[-1]
    last.finish_reason, last.stop_reason = delta.finish_reason, delta.stop_reason
    return parts


def _shares(items: list[Any], among: Sequence[Stretch]) -> list[list[Any]]:
    """Each stretch's part of what there is one of for each token; where tokens are guessed, the last fit best."""
    end, shares = len(items), []
    for one in reversed(among[1:]):
        start = max(0, end - one.tokens)
        shares.append(items[start:end])
        end = start
    return [items[:end], *reversed(shares)]
