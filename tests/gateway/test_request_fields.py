"""What is wrong with a field is told by its path, with what would be right."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest

from gateway.ask.request import GATEWAY_OWNED, MAX_STOP, parse_chat, parse_completion, parse_embedding
from tests.gateway.bodies import CHAT, TEXT, Json, chat, chat_raw, refused


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("model", 5, "model"),
        ("model", None, "model"),
        ("messages", "hi", "messages"),
        ("messages", [5], "messages[0]"),
        ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
        ("messages", [{"role": "user", "content": [{"type": 5}]}], "messages[0].content[0].type"),
        ("messages", [{"role": 5}], "messages[0].role"),
        (
            "messages",
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}],
            "messages[0].content[0].image_url.url",
        ),
        ("stream", "true", "stream"),
        ("stream", 1, "stream"),
        ("stream_options", [], "stream_options"),
        ("stream_options", {"include_usage": 1}, "stream_options.include_usage"),
        ("n", "2", "n"),
        ("n", 2.5, "n"),
        ("n", True, "n"),
        ("max_tokens", "10", "max_tokens"),
        ("max_completion_tokens", 1.5, "max_completion_tokens"),
        ("temperature", "hot", "temperature"),
        ("temperature", True, "temperature"),
        ("logit_bias", {"2": "no"}, "logit_bias"),
        ("logit_bias", [1], "logit_bias"),
        ("seed", 1.5, "seed"),
        ("stop", 5, "stop"),
        ("stop", [5], "stop[0]"),
        ("stop_token_ids", "2", "stop_token_ids"),
        ("logprobs", 5, "logprobs"),
        ("tools", {}, "tools"),
        ("tools", [{"type": "function", "function": 5}], "tools[0].function"),
        ("tool_choice", 5, "tool_choice"),
        ("response_format", "json", "response_format"),
        ("chat_template_kwargs", True, "chat_template_kwargs"),
        ("enable_thinking", "false", "enable_thinking"),
        ("thinking_token_budget", True, "thinking_token_budget"),
        ("thinking_token_budget", 1.0, "thinking_token_budget"),
        ("thinking_token_budget", "5", "thinking_token_budget"),
        ("thinking_budget", 1.5, "thinking_budget"),
        ("reasoning_effort", 5, "reasoning_effort"),
        ("reasoning", "high", "reasoning"),
        ("reasoning", {"max_tokens": "9"}, "reasoning.max_tokens"),
        ("thinking", True, "thinking"),
        ("thinking", {"type": "enabled", "budget_tokens": "9"}, "thinking.budget_tokens"),
        ("thinking_config", {"thinking_budget": None, "include_thoughts": 1}, "thinking_config.include_thoughts"),
        ("thinkgate", "instant", "thinkgate"),
        ("thinkgate", {"thinking_tokens": "5"}, "thinkgate.thinking_tokens"),
        ("thinkgate", {"min_thinking_tokens": 1.5}, "thinkgate.min_thinking_tokens"),
        ("reasoning", {"summary": True}, "reasoning.summary"),
        ("thinkgate", {"envelope": 5}, "thinkgate.envelope"),
        ("thinkgate", {"envelope": {"seconds": "5"}}, "thinkgate.envelope.seconds"),
        ("thinkgate", {"degrade": "cap"}, "thinkgate.degrade"),
        ("user", 5, "user"),
    ],
)
def test_a_wrong_type_names_the_field_and_the_right_type(field: str, value: object, param: str) -> None:
    """A field of the wrong type is `invalid_type`, its path is in `param`, and the message says what is expected."""
    error = refused(chat(**{field: value}))
    assert (error.code, error.param) == ("invalid_type", param)
    assert error.message.startswith(f"`{param}`: expected `")
    assert "got `" in error.message


@pytest.mark.parametrize(
    ("field", "value", "param", "right"),
    [
        ("model", "", "model", ">= 1"),
        ("model", "m" * 257, "model", "<= 256"),
        ("messages", [], "messages", ">= 1"),
        ("n", 0, "n", ">= 1"),
        ("n", -1, "n", ">= 1"),
        ("n", 2**31, "n", "<= 2147483647"),
        ("max_tokens", 0, "max_tokens", ">= 1"),
        ("max_tokens", -5, "max_tokens", ">= 1"),
        ("max_tokens", 10**30, "max_tokens", "<= 2147483647"),
        ("max_completion_tokens", 0, "max_completion_tokens", ">= 1"),
        ("temperature", 2.0000001, "temperature", "<= 2.0"),
        ("temperature", -0.1, "temperature", ">= 0.0"),
        ("top_p", 0, "top_p", "> 0.0"),
        ("top_p", 1.1, "top_p", "<= 1.0"),
        ("top_k", -2, "top_k", ">= -1"),
        ("min_p", 1.5, "min_p", "<= 1.0"),
        ("presence_penalty", -2.5, "presence_penalty", ">= -2.0"),
        ("frequency_penalty", 2.5, "frequency_penalty", "<= 2.0"),
        ("repetition_penalty", 0, "repetition_penalty", "> 0.0"),
        ("logit_bias", {"2": 101}, "logit_bias", "<= 100.0"),
        ("seed", 2**63, "seed", "<= 9223372036854775807"),
        ("stop", ["x"] * (MAX_STOP + 1), "stop", "<= 16"),
        ("stop_token_ids", [-1], "stop_token_ids[0]", ">= 0"),
        ("top_logprobs", 21, "top_logprobs", "<= 20"),
        ("thinking_token_budget", -2, "thinking_token_budget", ">= -1"),
        ("thinking_budget", -2, "thinking_budget", ">= -1"),
        ("reasoning", {"max_tokens": -1}, "reasoning.max_tokens", ">= 0"),
        ("thinking", {"type": "enabled", "budget_tokens": -1}, "thinking.budget_tokens", ">= 0"),
        ("thinking_config", {"thinking_budget": -2}, "thinking_config.thinking_budget", ">= -1"),
        ("thinkgate", {"thinking_tokens": -1}, "thinkgate.thinking_tokens", ">= 0"),
        ("thinkgate", {"min_thinking_tokens": -1}, "thinkgate.min_thinking_tokens", ">= 0"),
        ("thinkgate", {"answer_tokens_min": -1}, "thinkgate.answer_tokens_min", ">= 0"),
        ("thinkgate", {"envelope": {"tokens": 0}}, "thinkgate.envelope.tokens", ">= 1"),
        ("thinkgate", {"envelope": {"usd": 0}}, "thinkgate.envelope.usd", "> 0.0"),
        ("thinkgate", {"envelope": {"seconds": -1}}, "thinkgate.envelope.seconds", "> 0.0"),
        ("tools", [{"type": "function", "function": {"name": ""}}], "tools[0].function.name", ">= 1"),
    ],
)
def test_a_value_out_of_range_names_the_field_and_the_bound(field: str, value: object, param: str, right: str) -> None:
    """A value out of range is `invalid_value`, and the message says which bound it crosses."""
    error = refused(chat(**{field: value}))
    assert (error.code, error.param) == ("invalid_value", param)
    assert error.message.startswith(f"`{param}`: expected `")
    assert right in error.message


@pytest.mark.parametrize(
    ("field", "value", "param", "allowed"),
    [
        ("reasoning_effort", "huge", "reasoning_effort", "high, low, max, medium, minimal, none, xhigh"),
        ("service_tier", "gold", "service_tier", "auto, default, flex, priority, scale"),
        ("messages", [{"role": "alien"}], "messages[0].role", "assistant, developer, function, system, tool, user"),
        ("tools", [{"type": "custom", "function": {"name": "f"}}], "tools[0].type", "function"),
        ("reasoning", {"effort": "huge"}, "reasoning.effort", "high, low, max, medium, minimal, none, xhigh"),
        ("reasoning", {"summary": "long"}, "reasoning.summary", "auto, concise, detailed"),
        ("thinking", {"type": "adaptive"}, "thinking.type", "disabled, enabled"),
        ("thinkgate", {"mode": "fast"}, "thinkgate.mode", "agentic, auto, instant, reasoning, search"),
        ("thinkgate", {"plan": "yes"}, "thinkgate.plan", "auto, off, on"),
        ("thinkgate", {"degrade": ["cap", "speed"]}, "thinkgate.degrade[1]", "cap, effort, instant, model"),
        ("thinkgate", {"reasoning_field": "all"}, "thinkgate.reasoning_field", "both, upstream"),
    ],
)
def test_an_unknown_word_names_the_words_that_are_known(field: str, value: object, param: str, allowed: str) -> None:
    """A word that a field does not know is `invalid_value`; the message quotes it and lists all that are allowed."""
    error = refused(chat(**{field: value}))
    assert (error.code, error.param) == ("invalid_value", param)
    assert error.message.endswith(f"is not one of {allowed}.")


@pytest.mark.parametrize(
    ("body", "param", "parse"),
    [
        ({}, "model", parse_chat),
        ({"model": "qwen"}, "messages", parse_chat),
        ({"model": "qwen"}, "prompt", parse_completion),
        ({"model": "qwen"}, "input", parse_embedding),
        ({**CHAT, "messages": [{"content": "hi"}]}, "messages[0].role", parse_chat),
        ({**CHAT, "tools": [{"type": "function"}]}, "tools[0].function", parse_chat),
        ({**CHAT, "tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", parse_chat),
        ({**CHAT, "thinking": {"budget_tokens": 5}}, "thinking.type", parse_chat),
    ],
)
def test_a_missing_field_is_named(body: Json, param: str, parse: Any) -> None:
    """A required field that is absent is `missing_required_parameter`, with the path where it should stand."""
    error = refused(json.dumps(body).encode(), parse)
    assert (error.code, error.param, error.message) == (
        "missing_required_parameter",
        param,
        f"`{param}` is required.",
    )


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("thinkgate", {"thinking_budget": 5}, "thinkgate.thinking_budget"),
        ("thinkgate", {"envelope": {"euros": 5}}, "thinkgate.envelope.euros"),
        ("reasoning", {"budget": 5}, "reasoning.budget"),
        ("thinking", {"type": "enabled", "tokens": 5}, "thinking.tokens"),
        ("thinking_config", {"budget": 5}, "thinking_config.budget"),
        ("thinkgate", {"x - at `$": 1}, "thinkgate.x - at `$"),
        ("thinkgate", {"a`\nb": 1}, "thinkgate.a`\nb"),
    ],
)
def test_an_unknown_field_inside_an_object_of_ours_is_named(field: str, value: object, param: str) -> None:
    """A misspelt budget is refused by its path rather than ignored, whatever characters it is made of."""
    error = refused(chat(**{field: value}))
    assert (error.code, error.param) == ("unknown_parameter", param)


@pytest.mark.parametrize("name", sorted(GATEWAY_OWNED))
def test_fields_of_the_gateway_are_never_taken_from_a_client(name: str) -> None:
    """What the gateway sets itself is refused by name whatever its value, with the remedy."""
    routes = [(CHAT, parse_chat), (TEXT, parse_completion), ({**TEXT, "input": "x"}, parse_embedding)]
    values: list[object] = [None, False, 0, "", "x", {}, []]
    for (body, parse), value in product(routes, values):
        error = refused(json.dumps({**body, name: value}).encode(), parse)
        assert (error.code, error.param) == ("unknown_parameter", name)
        assert "leave it out" in error.message


def test_the_gateways_fields_are_the_documented_ones() -> None:
    """The list is the one of the specification, so that a new engine's switch is a decision and no accident."""
    assert sorted(GATEWAY_OWNED) == [
        "cache_salt",
        "chat_template",
        "ec_transfer_params",
        "kv_transfer_params",
        "priority",
        "prompt_embeds",
        "request_id",
        "session_id",
        "stream_interval",
        "use_beam_search",
        "vllm_xargs",
    ]


def test_a_hidden_name_is_still_that_name() -> None:
    """Escapes in a key do not smuggle a field past the check, and of several the first by name is told."""
    assert refused(chat_raw(b'"cache\\u005fsalt":1')).param == "cache_salt"
    assert refused(chat_raw(b'"vllm_xargs":1,"cache_salt":1,"priority":1')).param == "cache_salt"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("user", "x" * 100_000),
        ("reasoning_effort", "x" * 100_000),
        ("thinkgate", {"x" * 100_000: 1}),
        ("thinkgate", {"mode": "- at `$" * 20_000}),
    ],
)
def test_an_error_never_echoes_a_megabyte(field: str, value: object) -> None:
    """What is quoted back from the client is cut to a length that fits a log."""
    body = chat(**{field: value, "n": "wrong" if field == "user" else 1})
    error = refused(body)
    assert len(error.message) < 500
    assert len(error.param or "") < 200
