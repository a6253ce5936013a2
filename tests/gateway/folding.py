"""A stream folded as a client folds it, and streams of the scripted model without a server."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

from gateway.backends.port import Call, Delta, Surface, Thinking
from gateway.backends.reader import MarkerIds, StreamReader
from tests.scripted_stream import END_THINK, THINK, Model, Say, Stream

Json = dict[str, Any]
UPSTREAM = "up/qwen"


def chunks_of(stream: bytes) -> list[Json]:
    """The events of a stream that ends in [DONE], decoded."""
    *events, rest = stream.split(b"\n\n")
    assert rest == b""
    assert events.pop() == b"data: [DONE]"
    return [json.loads(event.removeprefix(b"data: ")) for event in events]


def folded(stream: bytes) -> Json:
    """What a client has after reading a whole stream, in the shape of an answer that was not streamed."""
    whole: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks_of(stream):
        assert chunk["object"] in {"chat.completion.chunk", "text_completion"}
        whole |= {name: chunk[name] for name in ("id", "created", "model")}
        whole |= {name: chunk[name] for name in ("usage", "thinkgate") if chunk.get(name)}
        if chunk.get("prompt_token_ids") is not None:
            whole["prompt_token_ids"] = chunk["prompt_token_ids"]
        for part in chunk["choices"]:
            _fold(choices.setdefault(part["index"], {"message": {}, "text": "", "logprobs": {}, "ids": []}), part)
    return {**whole, "choices": choices}


def _fold(choice: Json, part: Json) -> None:
    assert "finish_reason" not in choice, "a choice went on after its finish"
    message = choice["message"]
    for name, value in part.get("delta", {}).items():
        if name == "tool_calls":
            _join(message.setdefault("tool_calls", {}), value)
        elif value is not None:
            message[name] = message.get(name, "") + value
    choice["text"] += part.get("text") or ""
    choice["ids"] += part.get("token_ids") or []
    for name, entries in (part.get("logprobs") or {}).items():
        choice["logprobs"].setdefault(name, []).extend(entries)
    if part.get("prompt_token_ids") is not None:
        choice["prompt_token_ids"] = part["prompt_token_ids"]
    if part["finish_reason"] is not None:
        choice["finish_reason"] = part["finish_reason"]
        if part.get("stop_reason") is not None:
            choice["stop_reason"] = part["stop_reason"]


def _join(known: dict[int, Json], calls: list[Json]) -> None:
    for part in calls:
        call = known.setdefault(part["index"], {"arguments": ""})
        call |= {key: part[key] for key in ("id", "type") if part.get(key)}
        call |= {"name": part["function"]["name"]} if part["function"].get("name") else {}
        call["arguments"] += part["function"].get("arguments") or ""


def deltas_of(
    says: Sequence[Say],
    *,
    surface: Surface = "chat",
    merged: int = 1,
    ids: bool = False,
    gives_ids: bool = True,
    field: Literal["reasoning", "reasoning_content", "inline"] = "reasoning",
    **request: object,
) -> list[Delta]:
    """What the gateway's reader makes of a scripted model that says this, a choice each."""
    asked: Json = {
        "model": UPSTREAM,
        **({"messages": [{"role": "user", "content": "hi"}]} if surface == "chat" else {"prompt": "hi"}),
        "return_token_ids": gives_ids,
        "stream_options": {"include_usage": True},
        **request,
    }
    model = Model(field=field, gives_ids=gives_ids)
    thinks = surface == "chat"
    choices = [model.generate(asked, i, say, thinks=thinks) for i, say in enumerate(says)]
    stream = Stream(model=model, request=asked, surface=surface, choices=choices, tokens_per_event=merged)
    call = Call(
        surface=surface,
        request_id="req-1",
        model=UPSTREAM,
        fields={},
        thinking=Thinking(enabled=thinks, cap=None),
        max_tokens=100,
        n=len(says),
        wants_token_ids=ids,
    )
    reader = StreamReader(
        call,
        MarkerIds(THINK, END_THINK) if gives_ids and thinks else None,
        expects_ids=gives_ids,
        inline=field == "inline",
        opened=True,
    )
    out: list[Delta] = []
    for event in stream.events():
        reader.read(event.removeprefix(b"data: ").removesuffix(b"\n\n"), out)
    return out
