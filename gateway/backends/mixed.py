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
    """The two deltas of an event; the finish, if it has one, stays with what came last.

    Args:
        delta: of the whole event.
        thinking: its text in the thinking.
        answer: its text in the answer; may be empty where tool calls are the answer.
        markers: ids of the markers, if tokens can be sorted by them.
        was_open: the event began inside the thinking.
    """
    ids = delta.token_ids
    thought = _thought(ids, markers, was_open=was_open)
    ends_thinking = bool(thought) and thought[-1]
    other = Delta(index=delta.index)
    of_thinking, of_answer = (delta, other) if ends_thinking else (other, delta)
    of_thinking.kind, of_thinking.text = Kind.THINKING, thinking
    of_answer.kind, of_answer.text = Kind.ANSWER, answer
    of_answer.tool_calls, of_thinking.tool_calls = delta.tool_calls, None
    if thought or not ids:
        of_thinking.thinking, of_answer.thinking = delta.thinking, 0
        of_thinking.injected, of_answer.injected = delta.injected, 0
        of_thinking.capped, of_answer.capped = delta.capped, False
        of_answer.answer, of_thinking.answer = delta.answer, 0
    if thought:
        entries = delta.logprobs.get("content") if isinstance(delta.logprobs, dict) else None
        for part, wanted in ((of_thinking, True), (of_answer, False)):
            part.token_ids = [id for id, is_thought in zip(ids, thought, strict=True) if is_thought is wanted]
            if isinstance(entries, list):
                part.logprobs = {
                    "content": [e for e, is_thought in zip(entries, thought, strict=False) if is_thought is wanted]
                }
    return [other, delta]


def _thought(ids: list[int], markers: MarkerIds | None, *, was_open: bool) -> list[bool]:
    """Of each token whether it is thinking or a marker; nothing where ids do not tell the two apart."""
    if markers is None:
        return []
    found, is_open = [], was_open
    for token_id in ids:
        is_open = is_open or token_id == markers.start
        found.append(is_open or token_id == markers.end)
        is_open = is_open and token_id != markers.end
    return found if len(set(found)) == 2 else []
