"""What a scripted upstream says: tokens by choice, turned into the events and bodies that vLLM 0.32 sends.

Shapes and key order were recorded from vLLM 0.32.0 with `--reasoning-parser qwen3`;
tests/e2e/test_scripted_fidelity.py holds them against a real server.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any, Literal

BOS, EOS, THINK, END_THINK, NEWLINE = 1, 2, 15, 16, 198
Field = Literal["reasoning", "reasoning_content", "inline"]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token: `text` as a detokeniser hands it out (empty inside a character), `delta` as is."""

    id: int
    text: str
    delta: Mapping[str, Any] | None = None


START_MARKER = (Token(THINK, "<think>"),)
END_MARKER = (Token(END_THINK, "</think>"),)
MARKERS = {"<think>": THINK, "</think>": END_THINK}


def tokens(text: str) -> tuple[Token, ...]:
    """A token per word, each with the space before it; equal words get equal ids."""
    words = text.split(" ")
    parts = [words[0], *(f" {word}" for word in words[1:])] if text else []
    return tuple(Token(1000 + zlib.crc32(part.encode()) % 40000, part) for part in parts)


def byte_tokens(text: str) -> tuple[Token, ...]:
    """A token per UTF-8 byte; a character's text comes with its last byte, as from a detokeniser."""
    made: list[Token] = []
    for character in text:
        *head, last = character.encode()
        made += [Token(300 + byte, "") for byte in head]
        made.append(Token(300 + last, character))
    return tuple(made)


@dataclass(frozen=True, slots=True, kw_only=True)
class Say:
    """What the model would say for one choice if nothing stopped it.

    Attributes:
        thinking: tokens between the markers; the end marker follows when the model thinks.
        answer: tokens after it.
        ends: False: the answer repeats until a limit; without an answer, so does the thinking.
        finish_reason: how it ends when no limit ends it.
        stop_reason: the stop string or token id, as vLLM reports it.
    """

    thinking: Sequence[Token] = ()
    answer: Sequence[Token] = ()
    ends: bool = True
    finish_reason: str = "stop"
    stop_reason: int | str | None = None


@dataclass(slots=True)
class Choice:
    """One choice as it was in fact generated."""

    index: int
    parts: list[tuple[Literal["thinking", "marker", "answer", "eos"], Token]] = field(default_factory=list)
    finish_reason: str = "stop"
    stop_reason: int | str | None = None

    def ids(self) -> list[int]:
        """Every output token."""
        return [token.id for _, token in self.parts]

    def text(self, kind: str) -> str:
        """The text of one kind of token."""
        return "".join(token.text for what, token in self.parts if what == kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """How the scripted model behaves, whatever it says.

    Attributes:
        honours_cap: `thinking_token_budget` ends the thinking; False: it is silently ignored.
        honours_off: `enable_thinking: false` keeps it from thinking.
        slack: template tokens after the start marker, which vLLM counts as thinking.
        field: where thinking text arrives.
        start_marker: sampled by the model when the template does not open the thinking.
        end_marker: one token, or several.
        gives_ids: knows `return_token_ids`.
        gives_usage: knows `stream_options.include_usage`.
        gives_reasoning_tokens: puts them into the usage.
        cached_tokens: reported as cached; None: not reported.
    """

    honours_cap: bool = True
    honours_off: bool = True
    slack: int = 1
    field: Field = "reasoning"
    start_marker: Sequence[Token] = ()
    end_marker: Sequence[Token] = END_MARKER
    gives_ids: bool = True
    gives_usage: bool = True
    gives_reasoning_tokens: bool = True
    cached_tokens: int | None = 0

    def generate(self, request: Json, index: int, say: Say, *, thinks: bool) -> Choice:
        """Play one choice: cap, then the total limit, then the end of sequence."""
        limit = request.get("max_completion_tokens") or request.get("max_tokens") or 256
        choice = Choice(index, finish_reason=say.finish_reason, stop_reason=say.stop_reason)
        thinking, answer = iter(say.thinking), iter(say.answer)
        if not say.ends and not say.answer:
            thinking, answer = cycle(say.thinking), cycle(say.thinking)
        elif not say.ends:
            answer = cycle(say.answer)
        if thinks:
            choice.parts += [("marker", token) for token in self.start_marker]
            budget = request.get("thinking_token_budget")
            room = limit if budget is None or not self.honours_cap else max(0, budget - self.slack)
            choice.parts += [("thinking", token) for token in islice(thinking, room)]
            choice.parts += [("marker", token) for token in self.end_marker]
        choice.parts += [("answer", token) for token in islice(answer, limit)]
        if say.ends and say.finish_reason == "stop" and say.stop_reason is None:
            choice.parts.append(("eos", Token(EOS, "")))
        if len(choice.parts) > limit:
            del choice.parts[limit:]
            choice.finish_reason, choice.stop_reason = "length", None
        return choice

    def delta(self, kind: str, token: Token, surface: str) -> Json:
        """What a token adds to `choices[].delta` (or `.text`)."""
        if surface == "completions":
            return {"text": token.text}
        if token.delta is not None:
            return dict(token.delta)
        if self.field == "inline":
            return {"content": token.text} if token.text else {}
        if kind == "thinking" and token.text:
            return {self.field: token.text}
        return {"content": token.text} if kind == "answer" and token.text else {}

    def usage(self, prompt_tokens: int, choices: Iterable[Choice]) -> Json:
        """`usage`, with the details this model reports."""
        every = [part for choice in choices for part in choice.parts]
        usage: Json = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(every),
            "completion_tokens": len(every),
        }
        if self.cached_tokens is not None:
            usage["prompt_tokens_details"] = {
                "cached_tokens": self.cached_tokens,
                "created_cache_tokens": prompt_tokens - self.cached_tokens,
            }
        if self.gives_reasoning_tokens:
            reasoning = sum(kind == "thinking" for kind, _ in every)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage


def prompts_of(request: Json) -> list[list[int]]:
    """Every rendered prompt; only text completions can have several."""
    prompt = request.get("prompt")
    if isinstance(prompt, list) and not all(isinstance(item, int) for item in prompt):
        return [prompt_ids({"prompt": item}) for item in prompt]
    return [prompt_ids(request)]


def prompt_ids(request: Json) -> list[int]:
    """The rendered prompt: an id per word, then the opened (or closed) thinking of the template."""
    prompt = request.get("prompt")
    if isinstance(prompt, list):
        return [int(token) for token in prompt]
    if prompt is not None:
        return [MARKERS.get(token.text.strip(), token.id) for token in tokens(str(prompt))]
    ids = [BOS]
    for message in request.get("messages", []):
        content = message.get("content") or ""
        words = content if isinstance(content, str) else json.dumps(content)
        ids += [*(token.id for token in tokens(words)), EOS, NEWLINE]
    return ids + ([THINK, NEWLINE] if wants_thinking(request) else [THINK, NEWLINE, END_THINK, NEWLINE])


def wants_thinking(request: Json) -> bool:
    """Whether the template opens the thinking."""
    kwargs = request.get("chat_template_kwargs") or {}
    return kwargs.get("enable_thinking", request.get("reasoning_effort") != "none") is not False


def dump(value: object) -> bytes:
    """JSON as pydantic writes it: compact, UTF-8 as it is."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else dump(value)) + b"\n\n"


def logprobs_of(request: Json, batch: Sequence[tuple[str, Token]]) -> Json | None:
    """`logprobs` for the tokens of one event, markers and the end of sequence included."""
    if not request.get("logprobs"):
        return None
    entries = [
        {"token": token.text, "logprob": -0.5, "bytes": list(token.text.encode()), "top_logprobs": []}
        for _, token in batch
    ]
    return {"content": entries}


@dataclass(slots=True, kw_only=True)
class Stream:
    """The events of one streamed call, one at a time."""

    model: Model
    request: Json
    surface: Literal["chat", "completions"]
    choices: Sequence[Choice]
    call_id: str = "chatcmpl-scripted"
    tokens_per_event: int = 1

    def events(self) -> Iterator[bytes]:
        """Role chunks, then every choice's tokens in turn, then usage and [DONE]."""
        prompts = prompts_of(self.request)
        if self.surface == "chat":
            yield from (self._role(choice, prompts[0]) for choice in self.choices)
        queues = [list(self._batches(choice)) for choice in self.choices]
        for turn in range(max((len(queue) for queue in queues), default=0)):
            for choice, queue in zip(self.choices, queues, strict=True):
                if turn < len(queue):
                    is_last = turn + 1 == len(queue)
                    ids = [] if turn else self._prompt_of(choice, prompts)
                    yield self._tokens(choice, queue[turn], ids, is_last=is_last)
        wants_usage = (self.request.get("stream_options") or {}).get("include_usage")
        if wants_usage and self.model.gives_usage:
            usage = self.model.usage(sum(map(len, prompts)), self.choices)
            yield event({**self._head(), "choices": [], "usage": usage, "system_fingerprint": "scripted"})
        yield event(b"[DONE]")

    def body(self) -> Json:
        """The same call without streaming."""
        prompts = prompts_of(self.request)
        head = {**self._head(), "object": self._object(streamed=False)}
        wants_ids = self.request.get("return_token_ids") and self.model.gives_ids
        return {
            **head,
            "choices": [self._whole(choice, self._prompt_of(choice, prompts)) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": "scripted",
            "usage": self.model.usage(sum(map(len, prompts)), self.choices),
            **({"prompt_logprobs": None} if self.surface == "chat" else {}),
            **({"prompt_token_ids": prompts[0] if wants_ids else None} if self.surface == "chat" else {}),
        }

    def _prompt_of(self, choice: Choice, prompts: Sequence[list[int]]) -> list[int]:
        """The prompt a choice continues: the choices of one prompt stand together."""
        return prompts[choice.index // (len(self.choices) // len(prompts) or 1)]

    def _object(self, *, streamed: bool) -> str:
        if self.surface == "completions":
            return "text_completion"
        return "chat.completion.chunk" if streamed else "chat.completion"

    def _head(self) -> Json:
        kind, model = self._object(streamed=True), self.request.get("model")
        return {"id": self.call_id, "object": kind, "created": 1795410418, "model": model}

    def _role(self, choice: Choice, ids: list[int]) -> bytes:
        delta = {"role": "assistant", "content": ""}
        body = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
        extra: Json = {}
        if self.model.gives_ids:
            wants = self.request.get("return_token_ids")
            extra = {"prompt_token_ids": ids if wants else None, "prompt_text": None}
        return event({**self._head(), "choices": [body], **extra})

    def _batches(self, choice: Choice) -> Iterator[list[tuple[str, Token]]]:
        """Tokens that travel together; vLLM sends no event that has neither text nor ids nor logprobs."""
        parts: list[tuple[str, Token]] = list(choice.parts)
        wants_ids = self.request.get("return_token_ids") and self.model.gives_ids
        if parts and not wants_ids and not self.request.get("logprobs"):
            *rest, last = parts
            parts = [p for p in rest if self.model.delta(p[0], p[1], self.surface)] + [last]
        for start in range(0, len(parts), self.tokens_per_event):
            yield parts[start : start + self.tokens_per_event]

    def _tokens(self, choice: Choice, batch: Sequence[tuple[str, Token]], ids: list[int], *, is_last: bool) -> bytes:
        delta: Json = {}
        for kind, token in batch:
            for name, value in self.model.delta(kind, token, self.surface).items():
                joins = isinstance(value, str | list) and isinstance(delta.get(name), type(value))
                delta[name] = delta[name] + value if joins else value
        body: Json = {"index": choice.index}
        body |= delta if self.surface == "completions" else {"delta": delta}
        body |= {"logprobs": logprobs_of(self.request, batch), "finish_reason": None}
        if is_last or self.surface == "completions":
            body["stop_reason"] = choice.stop_reason if is_last else None
        if is_last:
            body["finish_reason"] = choice.finish_reason
        if self.model.gives_ids:
            wants = self.request.get("return_token_ids")
            if self.surface == "completions":
                body["prompt_token_ids"] = ids or None if wants else None
            body["token_ids"] = [token.id for _, token in batch] if wants else None
        return event({**self._head(), "choices": [body]})

    def _whole(self, choice: Choice, ids: list[int]) -> Json:
        body: Json = {"index": choice.index}
        if self.surface == "completions":
            body["text"] = "".join(token.text for _, token in choice.parts)
        else:
            body["message"] = self._message(choice)
        body |= {
            "logprobs": logprobs_of(self.request, choice.parts),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self.model.gives_ids:
            wants = self.request.get("return_token_ids")
            body["token_ids"] = choice.ids() if wants else None
            if self.surface == "completions":
                body["prompt_token_ids"] = ids if wants else None
        return body

    def _message(self, choice: Choice) -> Json:
        if self.model.field == "inline":
            text = "".join(token.text for _, token in choice.parts)
            return {"role": "assistant", "content": text or None}
        calls = [call for _, token in choice.parts for call in (token.delta or {}).get("tool_calls", [])]
        message: Json = {"role": "assistant", "content": choice.text("answer") or None}
        if calls:
            message["tool_calls"] = calls
        return {**message, self.model.field: choice.text("thinking") or None}
