"""Events that carry both thinking and answer: cut in two, each with the tokens that are its own.

Owns: the order of the two, and which tokens, logprobs and marker go with which. A delta is kept or dropped as a whole:
thinking beyond a cap must not take an answer with it. O(tokens of the event).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.backends.port import Delta, Kind

if TYPE_CHECKING:
    from gateway.backends.reader import MarkerIds


def cut(delta: Delta, thinking: str, answer: str, markers: MarkerIds | None, *, was_open: bool) -> list[Delta]:
    """The two deltas of an event, in the order in which they were sampled.

    Args:
        delta: of the whole event; what is not moved stays with the last.
        thinking: its text in the thinking.
        answer: its text in the answer; may be empty where tool calls are the answer.
        markers: ids of the markers, if tokens can be sorted by them.
        was_open: the event began inside the thinking.
    """
    at, is_thinking_first = _border(delta.token_ids, markers, was_open=was_open)
    first = Delta(index=delta.index, kind=Kind.THINKING if is_thinking_first else Kind.ANSWER)
    first.text, delta.text = (thinking, answer) if is_thinking_first else (answer, thinking)
    delta.kind = Kind.ANSWER if is_thinking_first else Kind.THINKING
    if not at and delta.token_ids:
        return [first, delta]  # tokens without a border between them: none can be told from the others
    if is_thinking_first:
        first.thinking, first.capped, delta.thinking, delta.capped = delta.thinking, delta.capped, 0, False
        first.injected, delta.injected = delta.injected, 0
    else:
        first.answer, delta.answer = delta.answer, 0
        first.tool_calls, delta.tool_calls = delta.tool_calls, None
    first.token_ids, delta.token_ids = delta.token_ids[:at], delta.token_ids[at:]
    if isinstance(delta.logprobs, dict) and isinstance(entries := delta.logprobs.get("content"), list):
        first.logprobs, delta.logprobs = {"content": entries[:at]}, {"content": entries[at:]}
    return [first, delta]


def _border(ids: list[int], markers: MarkerIds | None, *, was_open: bool) -> tuple[int, bool]:
    """Where the second begins, and whether the first is thinking; 0 where ids do not tell."""
    if markers is None:
        return 0, True
    if not was_open and markers.start in ids[1:] and ids[0] not in (markers.start, markers.end):
        return ids.index(markers.start), False
    return (ids.index(markers.end) + 1 if markers.end in ids else 0), True
