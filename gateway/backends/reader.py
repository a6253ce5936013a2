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
from gateway.backends.markers import MarkerSplitter, Piece
from gateway.backends.mixed import cut
from gateway.backends.port import Call, Delta, Kind, Usage
from gateway.backends.shape import Shape, learn

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
        meter = state.meter
        if thinking_text and not answer_text and meter is not None and not meter.is_open and not meter.has_closed:
            meter.believe(split)  # no marker was ever seen: then the field it came in says what it is
        if choice.token_ids and not self._call.wants_token_ids:
            wire = cut_token_ids(wire)
        delta = Delta(
            index=choice.index,
            kind=Kind.THINKING if thinking_text else Kind.ANSWER,
            text=thinking_text or answer_text,
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
        if state.splitter is not None and choice.delta is not None:
            self._split_inline(chunk, state, state.splitter, delta, body.role, out)
        elif thinking_text and (answer_text or body.tool_calls is not None):
            for part in cut(delta, thinking_text, answer_text, self._markers, was_open=was_open):
                part.wire = self._rebuild(chunk, part, _fields(None, self._field(part.kind), part.text))
                out.append(part)
        else:
            self._settle_kind(chunk, delta, split, was_open, role=body.role)
            out.append(delta)

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

    def _settle_kind(self, chunk: ChunkBody, delta: Delta, split: Split, was_open: bool, role: str | None) -> None:
        """Silence empty events; move text that a parser put into the wrong field, going by its tokens."""
        is_empty = not delta.text and delta.finish_reason is None and delta.tool_calls is None
        if is_empty and delta.logprobs is None and role is None:
            delta.wire = b""
            return
        if not delta.wire and self._call.surface == "chat":
            delta.wire = self._rebuild(chunk, delta, _fields(role, self._field(delta.kind), delta.text))
        if not delta.text or split.injected or not delta.token_ids:
            return
        if delta.kind is Kind.THINKING and split.answer and not split.thinking and not was_open:
            delta.kind = Kind.ANSWER
            delta.wire = self._rebuild(chunk, delta, _fields(role, "content", delta.text))
        elif delta.kind is Kind.ANSWER and split.thinking and not split.answer and self._call.surface == "chat":
            delta.kind = Kind.THINKING
            delta.wire = self._rebuild(chunk, delta, _fields(role, self._field(delta.kind), delta.text))

    def _split_inline(
        self,
        chunk: ChunkBody,
        state: _Choice,
        splitter: MarkerSplitter,
        delta: Delta,
        role: str | None,
        out: list[Delta],
    ) -> None:
        """Cut one delta's content at markers; counts, logprobs and the finish stay with the last piece."""
        had_text = bool(delta.text)
        pieces = splitter.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += splitter.finish()
        if state.meter is None:
            _count_inline(state, splitter, delta, pieces)
        thought, said = (
            "".join(text for kind, text in pieces if kind is wanted) for wanted in (Kind.THINKING, Kind.ANSWER)
        )
        if thought and (said or delta.tool_calls is not None):  # what a splitter finds is thinking, and then the answer
            first, delta = cut(delta, thought, said, self._markers, was_open=True)
            first.wire = self._rebuild(chunk, first, _fields(role, self._field(first.kind), first.text))
            role = None
            out.append(first)
        else:
            kind = Kind.THINKING if thought else Kind.ANSWER if said else Kind.INJECTED
            delta.kind, delta.text = kind, thought or said
        if delta.text or delta.finish_reason is not None or delta.tool_calls is not None:
            delta.wire = self._rebuild(chunk, delta, _fields(role, self._field(delta.kind), delta.text))
        elif had_text or (delta.logprobs is None and role is None):
            delta.wire = b""
        out.append(delta)

    def _count(self, state: _Choice, choice: ChoiceBody, thinking_text: str, answer_text: str) -> Split:
        if choice.token_ids:
            if state.meter is not None:
                return state.meter.feed(choice.token_ids)
            count = len(choice.token_ids)
            return Split(thinking=count) if thinking_text else Split(answer=count)
        is_bare = choice.token_ids is not None or not (thinking_text or answer_text)
        if is_bare and self._expects_ids and self._prompt_tokens:
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


def _count_inline(state: _Choice, splitter: MarkerSplitter, delta: Delta, pieces: list[Piece]) -> None:
    """Sort a delta's tokens by the text that is certain by now; without marker ids there is nothing better."""
    count = state.pending + delta.thinking + delta.answer + delta.injected
    state.pending = 0
    if not pieces and splitter.is_holding:
        state.pending, count = count, 0
    size = sum(len(text) for _, text in pieces)
    if size and not delta.token_ids:
        _count_words(delta, pieces, count)
        return
    if size:
        thought = sum(len(text) for kind, text in pieces if kind is Kind.THINKING)
        forced = sum(len(text) for kind, text in pieces if kind is Kind.INJECTED)
        delta.thinking = -(-count * thought // size)
        delta.injected = min(count - delta.thinking, (2 * count * forced + size) // (2 * size))
    else:
        delta.thinking, delta.injected = (count if splitter.is_open else 0), 0
    delta.answer = count - delta.thinking - delta.injected


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


def read_usage(body: UsageBody) -> Usage:
    """`usage` as the gateway keeps it."""
    prompt, completion = body.prompt_tokens_details, body.completion_tokens_details
    return Usage(
        prompt_tokens=body.prompt_tokens,
        completion_tokens=body.completion_tokens or 0,
        cached_tokens=prompt.cached_tokens if prompt is not None else None,
        reasoning_tokens=completion.reasoning_tokens if completion is not None else None,
    )
