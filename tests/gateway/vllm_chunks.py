"""Chunks as vLLM 0.32 writes them, recorded with `<think>` = 15 and `</think>` = 16, and what is read of them."""

from __future__ import annotations

import json
from typing import Any, Literal

from gateway.backends.port import Call, Delta, Kind, Thinking
from gateway.backends.reader import MarkerIds, StreamReader

Json = dict[str, Any]
A, T, I = Kind.ANSWER, Kind.THINKING, Kind.INJECTED  # noqa: E741  # the three kinds, in tables
IDS = MarkerIds(start=15, end=16)
HEAD = '{"id":"chatcmpl-b6e6","object":"chat.completion.chunk","created":1795410418,"model":"smollm2","choices":['
OPEN_PROMPT = "[1,9690,198,2683,359,253,5356,5646,11173,1,520,9531,198,15,198]"
CLOSED_PROMPT = "[1,9690,198,2683,359,15,1116,16,1116]"
USAGE = (
    '"usage":{"prompt_tokens":47,"total_tokens":91,"completion_tokens":44,"prompt_tokens_details":'
    '{"cached_tokens":32,"created_cache_tokens":32},"completion_tokens_details":{"reasoning_tokens":3}}'
)


def chunk(delta: str, ids: str | None = None, *, index: int = 0, finish: str = "null", logprobs: str = "null") -> bytes:
    """A chunk as vLLM writes it, with this delta and these token ids."""
    stop = ',"stop_reason":null' if finish != "null" else ""
    token_ids = "" if ids is None else f',"token_ids":{ids}'
    choice = f'{{"index":{index},"delta":{delta},"logprobs":{logprobs},"finish_reason":{finish}{stop}{token_ids}}}'
    return f"{HEAD}{choice}]}}".encode()


def role(prompt: str = OPEN_PROMPT, *, index: int = 0) -> bytes:
    """The first chunk of a choice: its role, the prompt's ids beside it, and no token."""
    bare = chunk('{"role":"assistant","content":""}', index=index).decode()
    return f'{bare[:-1]},"prompt_token_ids":{prompt},"prompt_text":null}}'.encode()


def call(*, surface: Literal["chat", "completions"] = "chat", cap: int | None = 40, ids: bool = False) -> Call:
    """A call that may think."""
    return Call(
        surface=surface,
        request_id="req-1",
        model="smollm2",
        fields={},
        thinking=Thinking(enabled=True, cap=cap),
        max_tokens=100,
        wants_token_ids=ids,
    )


def reader(of: Call | None = None, *, markers: MarkerIds | None = IDS, **how: bool) -> StreamReader:
    """A reader of a backend that gives token ids."""
    return StreamReader(of or call(), markers, **{"expects_ids": True, **how})


def read(*events: bytes, by: StreamReader | None = None) -> list[Delta]:
    """The deltas of these events."""
    by = by or reader()
    out: list[Delta] = []
    for event in events:
        by.read(event, out)
    return out


def counts(deltas: list[Delta]) -> tuple[int, int, int]:
    """Thinking, answer and injected tokens together."""
    return sum(d.thinking for d in deltas), sum(d.answer for d in deltas), sum(d.injected for d in deltas)


def said(deltas: list[Delta]) -> tuple[str, str]:
    """Thinking and answer text as the deltas have it."""
    thinking = "".join(d.text for d in deltas if d.kind is T)
    return thinking, "".join(d.text for d in deltas if d.kind is A)


def shown(deltas: list[Delta], index: int = 0) -> tuple[str, str]:
    """Thinking and answer text as a client reads them in the events that pass."""
    parts: list[Json] = [
        choice["delta"]
        for delta in deltas
        if delta.wire
        for choice in json.loads(delta.wire)["choices"]
        if choice["index"] == index
    ]
    thinking = "".join(part.get("reasoning") or part.get("reasoning_content") or "" for part in parts)
    return thinking, "".join(part.get("content") or "" for part in parts)
