"""Reasoning mode on the native path: the backend caps, the gateway counts and holds it to the cap.

Owns: stop strings, which end the answer, and the thinking only if that was asked for. The cap itself is held by
`flow`, for every mode.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gateway.backends.port import Delta, Kind
from gateway.modes.flow import flow
from gateway.stop import StopFilter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from gateway.modes.flow import Run


THINKING_FIELDS = ("reasoning", "reasoning_content")


class Stops(NamedTuple):
    """The client's stop strings.

    Attributes:
        texts: the strings.
        keep: leave the one that was found in the text.
        in_thinking: look for them in the thinking, too.
    """

    texts: tuple[str, ...] = ()
    keep: bool = False
    in_thinking: bool = False


def reasoning(run: Run, stops: Stops) -> AsyncGenerator[list[Delta], None]:
    """Thinking and answer deltas; a choice ends before the first of the stop strings."""
    return stopped_flow(run, stops) if stops.texts else flow(run)


async def stopped_flow(run: Run, stops: Stops) -> AsyncGenerator[list[Delta], None]:
    """As `flow`, with each choice ended at a stop string."""
    filters = [_Filters(stops) for _ in range(run.choices)]
    async with aclosing(flow(run)) as batches:
        async for deltas in batches:
            kept: list[Delta] = []
            for delta in deltas:
                _filter(run, filters, delta, kept)
            if kept:
                yield kept
            if all(choice.has_hit for choice in filters):
                return


class _Filters:
    """One choice's filters, by the kind of text."""

    __slots__ = ("_by_kind", "_thought", "has_hit")

    def __init__(self, stops: Stops) -> None:
        kinds = (Kind.ANSWER, Kind.THINKING) if stops.in_thinking else (Kind.ANSWER,)
        self._by_kind = {kind: StopFilter(stops.texts, keep=stops.keep) for kind in kinds}
        self._thought = b""  # an event of the thinking, to be like
        self.has_hit = False

    def end_of_thinking(self, index: int) -> Delta | None:
        """What of the thinking is held back, since a stop string might have begun with it; once."""
        thinking = self._by_kind.get(Kind.THINKING)
        held = "" if thinking is None else thinking.feed("", is_last=True)
        if not held:
            return None
        delta = Delta(index, Kind.THINKING, held, wire=self._thought)
        delta.wire = _with_text(delta) if delta.wire else b""
        return delta

    def of(self, delta: Delta) -> StopFilter | None:
        """The filter of a delta's text, if it is looked at; a choice's end flushes the answer's."""
        if delta.kind is Kind.THINKING and delta.text and delta.wire:
            self._thought = delta.wire
        return self._by_kind.get(delta.kind) if delta.text or delta.finish_reason is not None else None


def _filter(run: Run, filters: list[_Filters], delta: Delta, kept: list[Delta]) -> None:
    """Append what one delta's choice may show of it; nothing, when it comes after the stop string."""
    if delta.usage is not None or delta.index >= len(filters):
        kept.append(delta)
        return
    choice = filters[delta.index]
    if choice.has_hit:
        run.tally.waste(delta)
        return
    if delta.finish_reason is not None or (delta.kind is Kind.ANSWER and delta.text):
        held = choice.end_of_thinking(delta.index)
        if held is not None:
            kept.append(held)
    stop = choice.of(delta)
    if stop is not None:
        text = stop.feed(delta.text, is_last=delta.finish_reason is not None)
        choice.has_hit = stop.has_hit()
        if choice.has_hit:
            delta.finish_reason, delta.stop_reason = "stop", stop.hit
            run.finished.add(delta.index)
        if text != delta.text or choice.has_hit:
            delta.text = text
            delta.wire = _with_text(delta) if delta.wire else b""
    kept.append(delta)


def _with_text(delta: Delta) -> bytes:
    """The event of a delta with the delta's text, under the name that the backend uses."""
    chunk: dict[str, Any] = msgspec.json.decode(delta.wire)
    choice = chunk["choices"][0]
    fields = choice["delta"]
    name = "content" if delta.kind is Kind.ANSWER else next((name for name in THINKING_FIELDS if name in fields), None)
    fields[name or THINKING_FIELDS[0]] = delta.text
    choice["finish_reason"], choice["logprobs"] = delta.finish_reason, delta.logprobs
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if not delta.token_ids:
        choice.pop("token_ids", None)
    return msgspec.json.encode(chunk)
