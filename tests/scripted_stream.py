"""The events and bodies of a scripted upstream: choices in the shapes that vLLM 0.32 sends.

Shapes and key order were recorded from vLLM 0.32.0 with `--reasoning-parser qwen3`;
tests/e2e/test_scripted_fidelity.py holds them against a real server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from tests.scripted_model import Choice, Field, Kind, Model, Say, Surface, stop_strings
from tests.scripted_tokens import (
    BOS,
    END_MARKER,
    END_OF_SEQUENCE,
    END_THINK,
    EOS,
    NAMES,
    NEWLINE,
    START_MARKER,
    THINK,
    Json,
    Token,
    byte_tokens,
    tokens,
    tool_call_tokens,
)

__all__ = [
    "BOS",
    "END_MARKER",
    "END_OF_SEQUENCE",
    "END_THINK",
    "EOS",
    "NEWLINE",
    "START_MARKER",
    "THINK",
    "Choice",
    "Field",
    "Json",
    "Model",
    "Say",
    "Stream",
    "Token",
    "byte_tokens",
    "dump",
    "event",
    "tokens",
    "tool_call_tokens",
]
BLOCK = 32


def dump(value: object) -> bytes:
    """JSON as pydantic writes it: compact, UTF-8 as it is."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def event(value: object) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, bytes) else dump(value)) + b"\n\n"


def _name(token: Token) -> str:
    """Its text where special tokens are shown."""
    return NAMES.get(token.id, token.text)


def _ranking(token: Token, count: int) -> list[tuple[str, float]]:
    """The sampled token and made-up alternatives, the best first."""
    names = [_name(token), *(f" alternative{rank}" for rank in range(1, count))]
    return [(name, token.logprob - rank) for rank, name in enumerate(names)]


def chat_logprobs(request: Json, batch: Sequence[tuple[Kind, Token]]) -> Json | None:
    """`logprobs` for the tokens of one event, markers and the end of sequence included."""
    if not request.get("logprobs"):
        return None

    def entry(name: str, logprob: float) -> Json:
        return {"token": name, "logprob": logprob, "bytes": list(name.encode())}

    count = request.get("top_logprobs") or 0
    return {
        "content": [
            {
                **entry(_name(token), token.logprob),
                "top_logprobs": [entry(*one) for one in _ranking(token, count)] if count else [],
            }
            for _, token in batch
        ]
    }


def text_logprobs(request: Json, batch: Sequence[tuple[Kind, Token]], offset: int) -> Json | None:
    """The same as the completions endpoint has it: `offset` is the length of the text before."""
    count = request.get("logprobs")
    if count is None:
        return None
    names = [_name(token) for _, token in batch]
    return {
        "text_offset": [offset + sum(map(len, names[:number])) for number in range(len(names))],
        "token_logprobs": [token.logprob for _, token in batch],
        "tokens": names,
        "top_logprobs": [dict(_ranking(token, count)) for _, token in batch],
    }


@dataclass(slots=True, kw_only=True)
class Stream:
    """The events of one streamed call, one at a time.

    Attributes:
        cached: prompt tokens that the prefix cache held.
        on_token: told of every token when it leaves: the place of its choice in `choices`, and its id.
    """

    model: Model
    request: Json
    surface: Surface
    choices: Sequence[Choice]
    call_id: str = "chatcmpl-scripted"
    tokens_per_event: int = 1
    cached: int = 0
    on_token: Callable[[int, int], None] | None = None
    _shown: dict[int, str] = field(default_factory=dict, init=False)
    _offset: dict[int, int] = field(default_factory=dict, init=False)

    def events(self) -> Iterator[bytes]:
        """Role chunks, then every choice's tokens in turn, then usage and [DONE]."""
        prompts = self.model.prompts_of(self.request)
        if self.surface == "chat":
            yield from (self._role(choice, prompts[0]) for choice in self.choices)
        queues = [list(self._batches(choice)) for choice in self.choices]
        for turn in range(max((len(queue) for queue in queues), default=0)):
            for choice, queue in zip(self.choices, queues, strict=True):
                if turn < len(queue):
                    is_last = turn + 1 == len(queue)
                    ids = [] if turn else self._prompt_of(choice, prompts)
                    yield self._tokens(choice, queue[turn], ids, is_last=is_last)
        if self._wants_usage() and self.model.gives_usage:
            usage = self._usage(sum(map(len, prompts)), streamed=True)
            yield event({**self._head(), "choices": [], "usage": usage, "system_fingerprint": "scripted"})
        yield event(b"[DONE]")

    def body(self) -> Json:
        """The same call without streaming."""
        prompts = self.model.prompts_of(self.request)
        head = {**self._head(), "object": self._object(streamed=False)}
        wants_ids = self.request.get("return_token_ids") and self.model.gives_ids
        for choice in self.choices:
            self._leave(choice, choice.parts)
        return {
            **head,
            "choices": [self._whole(choice, self._prompt_of(choice, prompts)) for choice in self.choices],
            "service_tier": None,
            "system_fingerprint": "scripted",
            "usage": self._usage(sum(map(len, prompts)), streamed=False),
            **({"prompt_logprobs": None} if self.surface == "chat" else {}),
            **({"prompt_token_ids": prompts[0] if wants_ids else None} if self.surface == "chat" else {}),
        }

    def _wants_usage(self) -> bool:
        return bool((self.request.get("stream_options") or {}).get("include_usage"))

    def _usage(self, prompt_tokens: int, *, streamed: bool) -> Json:
        every = [part for choice in self.choices for part in choice.parts]
        usage: Json = {
            "prompt_tokens": prompt_tokens,
            "total_tokens": prompt_tokens + len(every),
            "completion_tokens": len(every),
        }
        is_text = self.surface == "completions"
        cached = self.cached if self.model.cached_tokens == "measured" else self.model.cached_tokens
        if cached is not None:
            created = None if is_text else prompt_tokens // BLOCK * BLOCK - cached
            more = {} if is_text and streamed else {"created_cache_tokens": created}
            usage["prompt_tokens_details"] = {"cached_tokens": cached, **more}
        if is_text:
            return usage if streamed else {**usage, "completion_tokens_details": None}
        if self.model.gives_reasoning_tokens:
            reasoning = sum(kind == "thinking" for kind, _ in every)
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

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

    def _delta(self, kind: Kind, token: Token) -> Json:
        """What a token adds to `choices[].delta`."""
        if token.delta is not None:
            return dict(token.delta)
        if self.model.field == "inline":
            return {"content": token.text} if token.text else {}
        if kind == "thinking" and token.text:
            return {self.model.field: token.text}
        return {"content": token.text} if kind == "answer" and token.text else {}

    def _batches(self, choice: Choice) -> Iterator[list[tuple[Kind, Token]]]:
        """Tokens that travel together; a chat event has text, ids or logprobs, or is not sent."""
        parts: list[tuple[Kind, Token]] = list(choice.parts)
        wants_ids = self.request.get("return_token_ids") and self.model.gives_ids
        if self.surface == "chat" and parts and not wants_ids and not self.request.get("logprobs"):
            *rest, last = parts
            parts = [p for p in rest if self._delta(*p)] + [last]
        for start in range(0, len(parts), self.tokens_per_event):
            yield parts[start : start + self.tokens_per_event]

    def _leave(self, choice: Choice, batch: Sequence[tuple[Kind, Token]]) -> None:
        for _, token in batch if self.on_token else ():
            self.on_token(self.choices.index(choice), token.id)  # type: ignore[misc]  # it is there

    def _tokens(self, choice: Choice, batch: Sequence[tuple[Kind, Token]], ids: list[int], *, is_last: bool) -> bytes:
        self._leave(choice, batch)
        body: Json = {"index": choice.index}
        if self.surface == "completions":
            body |= self._text(choice, batch, is_last=is_last)
        else:
            body |= {"delta": self._joined(batch), "logprobs": self._logprobs(batch)}
        body["finish_reason"] = choice.finish_reason if is_last else None
        if is_last or self.surface == "completions":
            body["stop_reason"] = choice.stop_reason if is_last else None
        if self.model.gives_ids:
            wants = self.request.get("return_token_ids")
            if self.surface == "completions":
                body["prompt_token_ids"] = ids or None if wants else None
            body["token_ids"] = [token.id for _, token in batch] if wants else None
        rides = is_last and not self._wants_usage()  # else it comes with the usage
        return event({**self._head(), "choices": [body], **({"system_fingerprint": "scripted"} if rides else {})})

    def _logprobs(self, batch: Sequence[tuple[Kind, Token]]) -> Json | None:
        return chat_logprobs(self.request, batch) if self.model.gives_logprobs else None

    def _joined(self, batch: Sequence[tuple[Kind, Token]]) -> Json:
        delta: Json = {}
        for kind, token in batch:
            for name, value in self._delta(kind, token).items():
                joins = isinstance(value, str | list) and isinstance(delta.get(name), type(value))
                delta[name] = delta[name] + value if joins else value
        return delta

    def _text(self, choice: Choice, batch: Sequence[tuple[Kind, Token]], *, is_last: bool) -> Json:
        """Text and logprobs; text that may yet become a stop string is held back, unless that is shown too."""
        offset = self._offset.get(choice.index, 0)
        self._offset[choice.index] = end = offset + sum(len(token.text) for _, token in batch)
        shows_stop = not self.model.honours_stop or self.request.get("include_stop_str_in_output")
        held = 0 if is_last or shows_stop else max((len(s) - 1 for s in stop_strings(self.request)), default=0)
        before = self._shown.get(choice.index, "")
        shown = choice.raw()[: max(len(before), end - held)]
        self._shown[choice.index] = shown
        return {"text": shown[len(before) :], "logprobs": text_logprobs(self.request, batch, offset)}

    def _whole(self, choice: Choice, ids: list[int]) -> Json:
        body: Json = {"index": choice.index}
        if self.surface == "completions":
            body |= {"text": choice.raw(), "logprobs": text_logprobs(self.request, choice.parts, 0)}
        else:
            body |= {"message": self._message(choice), "logprobs": self._logprobs(choice.parts)}
        body |= {"finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if self.model.gives_ids:
            wants = self.request.get("return_token_ids")
            body["token_ids"] = choice.ids() if wants else None
            if self.surface == "completions":
                body["prompt_token_ids"] = ids if wants else None
        return body

    def _message(self, choice: Choice) -> Json:
        deltas = [self._delta(kind, token) for kind, token in choice.parts]
        content = "".join(delta.get("content") or "" for delta in deltas)
        calls: dict[int, Json] = {}
        for call in (call for delta in deltas for call in delta.get("tool_calls") or ()):
            whole = calls.setdefault(call.get("index", 0), {"function": {"arguments": ""}})
            function = call.get("function") or {}
            arguments = whole["function"]["arguments"] + function.get("arguments", "")
            merged = {**whole["function"], **function, "arguments": arguments}
            whole |= {**{name: value for name, value in call.items() if name != "index"}, "function": merged}
        message: Json = {"role": "assistant", "content": content or None}
        if calls:
            message["tool_calls"] = list(calls.values())
        if self.model.field == "inline":
            return message
        return {**message, self.model.field: choice.text("thinking") or None}
