"""Reasoning mode on the native path: the backend caps, the gateway counts and holds it to the cap.

Owns: stop strings, which only ever end the answer. The cap itself is held by `flow`, for every mode.
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.port import Delta, Kind
from gateway.modes.flow import flow
from gateway.stop import StopFilter

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from gateway.modes.flow import Run


def reasoning(run: Run, stops: Sequence[str], *, keep_stop: bool) -> AsyncGenerator[list[Delta], None]:
    """Thinking and answer deltas; the answer ends before the first of `stops`."""
    return stopped_flow(run, stops, keep_stop=keep_stop) if stops else flow(run)


async def stopped_flow(run: Run, stops: Sequence[str], *, keep_stop: bool) -> AsyncGenerator[list[Delta], None]:
    """As `flow`, with the answer of each choice ended at a stop string."""
    filters = [StopFilter(stops, keep=keep_stop) for _ in range(run.choices)]
    async with aclosing(flow(run)) as batches:
        async for deltas in batches:
            kept = [delta for delta in deltas if _filter(run, filters, delta)]
            if kept:
                yield kept
            if all(stop.has_hit() for stop in filters):
                return


def _filter(run: Run, filters: list[StopFilter], delta: Delta) -> bool:
    """Apply the choice's filter to one delta; False when it comes after the stop string."""
    if delta.usage is not None or delta.index >= len(filters):
        return True
    stop = filters[delta.index]
    if stop.has_hit():
        run.tally.answer -= delta.answer
        run.tally.wasted += delta.answer
        return False
    is_last = delta.finish_reason is not None
    if delta.kind is Kind.ANSWER and (delta.text or is_last):
        text = stop.feed(delta.text, is_last=is_last)
        if stop.has_hit():
            delta.finish_reason, delta.stop_reason = "stop", stop.hit
            run.finished.add(delta.index)
        if text != delta.text or stop.has_hit():
            delta.text = text
            delta.wire = _with_text(delta) if delta.wire else b""
    return True


def _with_text(delta: Delta) -> bytes:
    chunk: dict[str, Any] = msgspec.json.decode(delta.wire)
    choice = chunk["choices"][0]
    choice["delta"]["content"] = delta.text
    choice["finish_reason"] = delta.finish_reason
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    return msgspec.json.encode(chunk)
