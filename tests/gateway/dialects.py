"""Every way to say how much a model shall think, and requests that say it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.ask.request import parse_chat, parse_completion
from gateway.ask.resolve import Ask, resolve_chat, resolve_completion
from gateway.errors import InvalidRequest

Json = dict[str, Any]
SUMMARIES = ("auto", "concise", "detailed")
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")


def merged(*trees: Json) -> Json:
    """Objects laid over each other, also inside."""
    result: Json = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def chat(*parts: Json) -> Ask:
    """The Ask of a chat request with these fields; `suffix` is what stood behind the model's name."""
    body = merged({"model": "qwen", "messages": [{"role": "user", "content": "hi"}]}, *parts)
    suffix = body.pop("suffix", None)
    return resolve_chat(parse_chat(json.dumps(body).encode())[0], "qwen", suffix)


def text(*parts: Json) -> Ask:
    """The Ask of a text completion with these fields."""
    body = merged({"model": "qwen", "prompt": "hi"}, *parts)
    suffix = body.pop("suffix", None)
    return resolve_completion(parse_completion(json.dumps(body).encode())[0], "qwen", suffix)


def refused(*parts: Json, ask: Any = chat) -> InvalidRequest:
    """The error that such a request is answered with."""
    with pytest.raises(InvalidRequest) as caught:
        ask(*parts)
    return caught.value


@dataclass(frozen=True)
class Says:
    """One field of one dialect, and what it means.

    Attributes:
        field: the name an error uses.
        fields: as the client sends it.
        on: it switches thinking on or off.
        tokens: cap it names.
        effort: effort it names.
    """

    field: str
    fields: Json
    on: bool
    tokens: int | None = None
    effort: str | None = None

    def __str__(self) -> str:
        """For the test's name."""
        return json.dumps(self.fields).replace('"', "").replace(" ", "")[1:-1]


def off_statements() -> list[Says]:
    """Every way to say that the model shall not think."""
    return [
        Says("model", {"suffix": "instant"}, False),
        Says("thinkgate.mode", {"thinkgate": {"mode": "instant"}}, False),
        Says("thinkgate.thinking_tokens", {"thinkgate": {"thinking_tokens": 0}}, False),
        Says("reasoning_effort", {"reasoning_effort": "none"}, False),
        Says("reasoning.effort", {"reasoning": {"effort": "none"}}, False),
        Says("reasoning.max_tokens", {"reasoning": {"max_tokens": 0}}, False),
        Says("reasoning.enabled", {"reasoning": {"enabled": False}}, False),
        Says("thinking.type", {"thinking": {"type": "disabled"}}, False),
        Says("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 0}}, False),
        Says("thinking_config.thinking_budget", {"thinking_config": {"thinking_budget": 0}}, False),
        Says("enable_thinking", {"enable_thinking": False}, False),
        Says("thinking_budget", {"thinking_budget": 0}, False),
        Says("thinking_token_budget", {"thinking_token_budget": 0}, False),
        Says("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": False}}, False),
        Says("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": False}}, False),
    ]


def cap_statements(tokens: int) -> list[Says]:
    """Every way to name a cap."""
    return [
        Says("thinkgate.thinking_tokens", {"thinkgate": {"thinking_tokens": tokens}}, True, tokens),
        Says("reasoning.max_tokens", {"reasoning": {"max_tokens": tokens}}, True, tokens),
        Says("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": tokens}}, True, tokens),
        Says("thinking_config.thinking_budget", {"thinking_config": {"thinking_budget": tokens}}, True, tokens),
        Says("thinking_budget", {"thinking_budget": tokens}, True, tokens),
        Says("thinking_token_budget", {"thinking_token_budget": tokens}, True, tokens),
    ]


def effort_statements(effort: str) -> list[Says]:
    """Every way to name an effort."""
    return [
        Says("reasoning_effort", {"reasoning_effort": effort}, True, effort=effort),
        Says("reasoning.effort", {"reasoning": {"effort": effort}}, True, effort=effort),
    ]


def on_statements() -> list[Says]:
    """Every way to say that the model shall think, without saying how much."""
    return [
        Says("model", {"suffix": "reasoning"}, True),
        Says("thinkgate.mode", {"thinkgate": {"mode": "reasoning"}}, True),
        Says("thinkgate.min_thinking_tokens", {"thinkgate": {"min_thinking_tokens": 50}}, True),
        Says("reasoning.enabled", {"reasoning": {"enabled": True}}, True),
        Says("thinking.type", {"thinking": {"type": "enabled"}}, True),
        Says("enable_thinking", {"enable_thinking": True}, True),
        Says("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": True}}, True),
        Says("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": True}}, True),
    ]


def visibility_statements(hidden: bool) -> list[tuple[str, Json]]:
    """Every way to say that the thinking text is hidden, or shown in full: the field, and what the client sends."""
    return [
        ("reasoning.exclude", {"reasoning": {"exclude": hidden}}),
        ("include_reasoning", {"include_reasoning": not hidden}),
        ("thinking_config.include_thoughts", {"thinking_config": {"include_thoughts": not hidden}}),
    ]


ALL_ON = [*on_statements(), *cap_statements(300), *effort_statements("low")]
EVERYTHING = [*off_statements(), *ALL_ON, *cap_statements(77), *effort_statements("max")]


def same_place(one: Says, other: Says) -> bool:
    """Whether no request can hold both statements, or one of them is a part of the other."""
    both = merged(one.fields, other.fields)
    return merged(both, one.fields) != both or both in (one.fields, other.fields)
