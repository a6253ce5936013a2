"""One upstream stream to deltas: whose tokens they are, and what the client may see of each event.

Owns: per choice, sorting tokens into thinking, answer and markers. Token ids are the truth where the
backend gives them (docs/adr/0003); else the fields the text came in; else inline markers. O(1) per event
beyond decoding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from budget.cap import Split, ThinkingMeter
from gateway.backends.events import (
    DONE,
    FINISH_REASONS,
    ChoiceBody,
    ChunkBody,
    DeltaBody,
    UsageBody,
    compact,
    cut_prompt_ids,
    cut_token_ids,
    decode_chunk,
    prompt_ids,
    with_legal_finish,
)
from gateway.backends.guesses import at_least, count_inline, part_of
from gateway.backends.markers import MarkerSplitter, Piece
from gateway.backends.port import Call, Delta, Kind, Usage
from gateway.backends.shape import Shape, learn
from gateway.backends.stretches import Stretch, by_counts, by_ids, cut, with_texts

_decode_text = msgspec.json.Decoder(str).decode


@dataclass(frozen=True, slots=True)
class MarkerIds:
    """Vocabulary ids of the model's markers; only markers that are one token have them."""

    start: int
    end: int


# An ordinary event: its shape, its choice's meter, the text, the token's id and where the text ends.
Ordinary = tuple[Shape, ThinkingMeter, str, int, int]


@dataclass(slots=True)
class _Choice:
    meter: ThinkingMeter | None
    splitter: MarkerSplitter | None
    pending: int = 0  # tokens whose text the splitter still holds back


class StreamReader:
    """Reads the events of one call.

    Args:
        call: what was asked.
        markers: ids of the thinking markers, if token ids can be read by them.
        expects_ids: the backend was asked for token ids: an event without them carries no token.
        inline: thinking arrives as marked text inside the content.
        opened: for `inline`: the prompt opens the thinking itself.
    """

    def __init__(
        self,
        call: Call,
        markers: MarkerIds | None,
        *,
        expects_ids: bool = False,
        inline: bool = False,
        opened: bool = False,
    ) -> None:
        self._call = call
        self._markers = markers
        self._expects_ids = expects_ids
        self._inline = inline
        self._opened = opened
        self._choices: dict[int, _Choice] = {}
        self._prompt_tail: list[int] = []
        self._prompt_tokens = 0
        self._shapes: dict[int, Shape] = {}
        self._thinking_field = "reasoning"
        self.is_done = False
        self.usage: Usage | None = None

    def read(self, event: bytes, out: list[Delta]) -> None:
        """Append the deltas of one event. Raises: UpstreamError."""
        found = self.ordinary(event)
        if found is not None:
            shape, meter, text, token_id, end = found
            meter.feed_plain(token_id)
            kind, wire = shape.kind, event[:end] + shape.rest
            thinking, answer = (1, 0) if kind is Kind.THINKING else (0, 1)
            out.append(Delta(shape.choice, kind, text, thinking, answer, 0, [token_id], wire=wire))
            return
        if event == DONE:
            self.is_done = True
        else:
            self._decode(event, out)

    def _decode(self, event: bytes, out: list[Delta]) -> None:
        event = compact(event)
        full_event = event
        if b'"prompt_token_ids":[' in event:
            event, prompt_tokens, tail = cut_prompt_ids(event)
        chunk = decode_chunk(event)
        is_first = event is not full_event and not self._prompt_tokens
        if is_first:
            self._prompt_tokens, self._prompt_tail = prompt_tokens, tail
        if chunk.usage is not None:
            self.usage = read_usage(chunk.usage)
        wire = full_event if self._call.wants_token_ids else event
        if len(chunk.choices) == 1:
            self._one_choice(chunk, chunk.choices[0], wire, out)
        else:
            for choice in chunk.choices:
                self._one_choice(chunk, choice, b"", out)
        if event is not full_event and chunk.choices:
            self._add_prompt(out[-1], full_event, prompt_tokens if is_first else 0)

    def _add_prompt(self, delta: Delta, event: bytes, prompt_tokens: int) -> None:
        """Every choice repeats the prompt: it counts once, its ids go to each."""
        delta.prompt_tokens = prompt_tokens
        delta.prompt_token_ids = prompt_ids(event) if self._call.wants_token_ids else None

    def ordinary(self, event: bytes) -> Ordinary | None:
        """An event like the last of its choice, but for text and token id; nothing is counted yet."""
        for shape in self._shapes.values():
            found = shape.match(event)
            if found is not None:
                break
        else:
            return None
        text, token_id, end = found
        meter = self._choices[shape.choice].meter
        if meter is None or meter.is_open is not (shape.kind is Kind.THINKING):
            return None
        if token_id in (meter.end_id, meter.start_id):
            return None
        try:
            return shape, meter, _decode_text(text), token_id, end
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None  # no JSON string after all: the careful path says so

    def _one_choice(self, chunk: ChunkBody, choice: ChoiceBody, wire: bytes, out: list[Delta]) -> None:
        state = self._choices.get(choice.index) or self._new_choice(choice.index)
        if state.splitter is None and choice.finish_reason is None and self._ordinary(state, choice, wire, out):
            return
        body = choice.delta or DeltaBody(content=choice.text)
        thinking_text, answer_text = self._texts(body)
        was_open = state.meter is not None and state.meter.is_open
        capped_before = state.meter is not None and state.meter.capped
        split = self._count(state, choice, thinking_text, answer_text)
        if choice.token_ids and not self._call.wants_token_ids:
            wire = cut_token_ids(wire)
        delta = Delta(
            index=choice.index,
            thinking=split.thinking,
            answer=split.answer,
            injected=split.injected,
            token_ids=choice.token_ids or [],
            logprobs=choice.logprobs,
            tool_calls=body.tool_calls,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            capped=state.meter is not None and state.meter.capped and not capped_before,
            wire=wire,
        )
        if choice.finish_reason is not None and choice.finish_reason not in FINISH_REASONS:
            delta.finish_reason, delta.stop_reason = "stop", choice.finish_reason
            delta.wire = with_legal_finish(wire)
        pieces = [piece for piece in ((Kind.THINKING, thinking_text), (Kind.ANSWER, answer_text)) if piece[1]]
        is_inline = state.splitter is not None and choice.delta is not None
        if is_inline:
            pieces = self._inline_pieces(state, delta, thinking_text or answer_text)
        found = self._stretches(state, delta, pieces, was_open=was_open)
        if len(found) > 1:
            self._cut(chunk, delta, found, body.role, out)
            return
        _say(delta, pieces, is_held=state.pending > 0 and state.splitter is not None and state.splitter.is_open)
        self._show(chunk, delta, body.role)
        if not is_inline:
            self._settle_kind(chunk, delta, split, was_open=was_open, role=body.role)
        out.append(delta)

    def _stretches(self, state: _Choice, delta: Delta, pieces: list[Piece], *, was_open: bool) -> list[Stretch]:
        """Where thinking and answer meet in an event; one stretch, or none, where they do not."""
        ids, calls = delta.token_ids, delta.tool_calls is not None
        if len(ids) < 2 and len(pieces) + calls < 2:  # one more token, as almost always
            return []
        if state.meter is not None and self._markers is not None and ids:
            found = by_ids(ids, self._markers, is_open=was_open)
        else:
            found = by_counts(delta)
        return with_texts(found, pieces, calls=calls)

    def _cut(self, chunk: ChunkBody, delta: Delta, found: list[Stretch], role: str | None, out: list[Delta]) -> None:
        """Append one delta for each stretch of an event; the first that shows says the role."""
        for part in cut(delta, found):
            self._show(chunk, part, role)
            role = None if part.wire else role
            out.append(part)

    def _show(self, chunk: ChunkBody, delta: Delta, role: str | None) -> None:
        """The wire of what has none of its own, if there is anything in it to see."""
        is_empty = not delta.text and delta.finish_reason is None and delta.tool_calls is None
        if is_empty and delta.logprobs is None and role is None:
            delta.wire = b""
        elif not delta.wire and self._call.surface == "chat":
            delta.wire = self._rebuild(chunk, delta, _fields(role, self._field(delta.kind), delta.text))

    def _texts(self, body: DeltaBody) -> tuple[str, str]:
        """Thinking and answer as the backend's fields have them."""
        if body.reasoning_content and not body.reasoning:
            self._thinking_field = "reasoning_content"
        return body.reasoning or body.reasoning_content or "", body.content or ""

    def _ordinary(self, state: _Choice, choice: ChoiceBody, wire: bytes, out: list[Delta]) -> bool:
        """One token that is no marker, its text in the field it belongs to: further ones need no decoding."""
        ids, body, meter = choice.token_ids, choice.delta, state.meter
        if ids is None or len(ids) != 1 or body is None or meter is None or not wire:
            return False
        text = body.reasoning if meter.is_open else body.content
        other = body.content if meter.is_open else body.reasoning
        if not text or other or body.tool_calls is not None or not meter.feed_plain(ids[0]):
            return False
        kind = Kind.THINKING if meter.is_open else Kind.ANSWER
        if not self._call.wants_token_ids:
            shape = learn(wire, choice.index, kind)
            if shape is not None:
                self._shapes[choice.index] = shape
            wire = cut_token_ids(wire)
        thinking, answer = (1, 0) if meter.is_open else (0, 1)
        out.append(Delta(choice.index, kind, text, thinking, answer, 0, ids, choice.logprobs, wire=wire))
        return True

    def _settle_kind(self, chunk: ChunkBody, delta: Delta, split: Split, *, was_open: bool, role: str | None) -> None:
        """Move text that a parser put into the wrong field, going by its tokens."""
        if not delta.text or split.injected or not delta.token_ids:
            return
        if delta.kind is Kind.THINKING and split.answer and not split.thinking and not was_open:
            delta.kind = Kind.ANSWER
        elif delta.kind is Kind.ANSWER and split.thinking and not split.answer and self._call.surface == "chat":
            delta.kind = Kind.THINKING
        else:
            return
        delta.wire = self._rebuild(chunk, delta, _fields(role, self._field(delta.kind), delta.text))

    def _inline_pieces(self, state: _Choice, delta: Delta, text: str) -> list[Piece]:
        """An event's content cut at markers; where ids tell of no marker, its tokens are sorted by that."""
        splitter, markers = state.splitter, self._markers
        assert splitter is not None
        pieces = splitter.feed(text, openings=0 if markers is None else delta.token_ids.count(markers.start))
        if delta.finish_reason is not None:
            pieces += splitter.finish()
        if state.meter is None:
            state.pending = count_inline(delta, pieces, splitter, state.pending)
        if text or delta.finish_reason is not None or delta.tool_calls is not None:
            delta.wire = b""  # the markers are not shown
        return pieces

    def _count(self, state: _Choice, choice: ChoiceBody, thinking_text: str, answer_text: str) -> Split:
        if choice.token_ids:
            if state.meter is not None:
                return _by_ids(state.meter, choice.token_ids, is_thought=bool(thinking_text) and not answer_text)
            count = len(choice.token_ids)
            thought = part_of(count, thinking_text, answer_text)
            return Split(thinking=thought, answer=count - thought)
        if not (thinking_text or answer_text) and self._expects_ids and self._prompt_tokens:
            return Split()
        has_answer = bool(answer_text) or (choice.delta is not None and choice.delta.tool_calls is not None)
        if state.splitter is not None:  # it may hold some of the text back: one event, until it is sorted
            return Split(answer=int(has_answer))
        return Split(thinking=at_least(thinking_text), answer=max(int(has_answer), at_least(answer_text)))

    def _new_choice(self, index: int) -> _Choice:
        thinking, markers = self._call.thinking, self._markers
        meter = None
        if markers is not None:
            is_open, slack, has_closed = self._tail_state(markers)
            meter = ThinkingMeter(
                markers.start, markers.end, cap=thinking.cap, is_open=is_open, slack=slack, has_closed=has_closed
            )
        splitter = None
        if self._inline:
            splitter = MarkerSplitter(
                thinking.start, thinking.end, is_open=meter.is_open if meter is not None else self._opened
            )
        choice = self._choices[index] = _Choice(meter, splitter)
        return choice

    def _tail_state(self, markers: MarkerIds) -> tuple[bool, int, bool]:
        """Whether the prompt's end left the thinking open, how many tokens follow its marker, or that it is closed."""
        for back, token_id in enumerate(reversed(self._prompt_tail)):
            if token_id == markers.end:
                return False, 0, True
            if token_id == markers.start:
                return True, back, False
        return False, 0, False

    def _field(self, kind: Kind) -> str:
        """Where a text goes: thinking under the name that the backend uses."""
        return self._thinking_field if kind is Kind.THINKING else "content"

    def _rebuild(self, chunk: ChunkBody, delta: Delta, fields: dict[str, Any]) -> bytes:
        return build_chunk(chunk.id, chunk.created, self._call.model, delta, fields, ids=self._call.wants_token_ids)


def _by_ids(meter: ThinkingMeter, ids: list[int], *, is_thought: bool) -> Split:
    """Tokens sorted by marker ids; where none was ever seen, the field they came in says what they are."""
    split = meter.feed(ids)
    if is_thought and not meter.is_open and not meter.has_closed:
        meter.believe(split)
    return split


def _say(delta: Delta, pieces: list[Piece], *, is_held: bool) -> None:
    """Kind and text of a delta of one kind; half a character has no text, and is to be hidden like all thoughts.

    `is_held`: what the event says is a thought, and held back.
    """
    said = [piece for piece in pieces if piece[0] is not Kind.INJECTED]
    if said:
        delta.kind, delta.text = said[0][0], "".join(text for _, text in said)
    elif delta.thinking or (is_held and delta.tool_calls is None):
        delta.kind = Kind.THINKING
    elif pieces:
        delta.kind = Kind.INJECTED


def _fields(role: str | None, field: str, text: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": role} if role else {}
    if text:
        fields[field] = text
    return fields


def build_chunk(
    chunk_id: str, created: int, model: str, delta: Delta, fields: dict[str, Any], *, ids: bool = False
) -> bytes:
    """A chat chunk with one choice, as JSON: `fields` is its `delta`, the rest comes from `delta`."""
    if delta.tool_calls is not None:
        fields = {**fields, "tool_calls": delta.tool_calls}
    choice: dict[str, Any] = {
        "index": delta.index,
        "delta": fields,
        "logprobs": delta.logprobs,
        "finish_reason": delta.finish_reason,
    }
    if delta.stop_reason is not None:
        choice["stop_reason"] = delta.stop_reason
    if ids and delta.token_ids:
        choice["token_ids"] = delta.token_ids
    chunk: dict[str, Any] = {
        "id": chunk_id,
        "object": "chat.completion.chunk",
        "created": created,
        "model": model,
        "choices": [choice],
    }
    if delta.prompt_token_ids is not None:
        chunk["prompt_token_ids"] = delta.prompt_token_ids
    return msgspec.json.encode(chunk)


def read_usage(body: UsageBody) -> Usage | None:
    """`usage` as the gateway keeps it; None: all zeros, which says nothing, for every prompt has tokens."""
    if not (body.prompt_tokens or body.completion_tokens):
        return None
    prompt, completion = body.prompt_tokens_details, body.completion_tokens_details
    return Usage(
        prompt_tokens=body.prompt_tokens,
        completion_tokens=body.completion_tokens or 0,
        cached_tokens=prompt.cached_tokens if prompt is not None else None,
        reasoning_tokens=completion.reasoning_tokens if completion is not None else None,
    )
