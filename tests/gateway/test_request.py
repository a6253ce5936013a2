"""Bytes to a request: what is wrong is named, what is right is kept as it came."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.request import (
    GATEWAY_OWNED,
    MAX_DEPTH,
    MAX_STOP,
    ChatFields,
    CompletionFields,
    RawFields,
    check_json,
    parse_chat,
    parse_completion,
    parse_embedding,
)

Json = dict[str, Any]
FEW = settings(max_examples=100, deadline=None)
CHAT: Json = {"model": "qwen", "messages": [{"role": "user", "content": "hi"}]}
TEXT: Json = {"model": "qwen", "prompt": "hi"}
PARSERS = [parse_chat, parse_completion, parse_embedding]
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def chat(**more: Any) -> bytes:
    """A chat request with these fields added."""
    return json.dumps({**CHAT, **more}).encode()


def chat_raw(field: bytes) -> bytes:
    """A chat request with one more field, as bytes."""
    return chat()[:-1] + b"," + field + b"}"


def refused(body: bytes, parse: Any = parse_chat) -> InvalidRequest:
    """The error that a body is answered with."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    return caught.value


def error_of(body: bytes, parse: Any) -> InvalidRequest | None:
    """The error that a body is answered with, if it is."""
    try:
        parse(body)
    except InvalidRequest as error:
        return error
    return None


# --------------------------------------------------------------------------------------- not JSON at all


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"model"',
        b"{'model': 'x'}",
        b'{"model":"qwen",}',
        b'{"model":"qwen"} {}',
        b"{/* no */}",
        b'{"temperature":NaN}',
        b'{"temperature":Infinity}',
        b'{"temperature":-Infinity}',
        b'{"anything":NaN}',
        b'{"n":01}',
        b'{"n":+1}',
        b'{"n":0x1}',
        b'{"user":"\t"}',
        b'{"user":"\\x"}',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"user":"\xff"}',
        b'{"user":"\xed\xa0\x80"}',
        b'{"\xc3\x28":1}',
        b'{"user":"\\ud800"}',
        b'{"anything":"\\udc00 alone"}',
        b'{"\\ud800":1}',
        b"]" * 300,
        b'{"a":' + b"[" * 200,
    ],
)
@pytest.mark.parametrize("parse", PARSERS)
def test_what_is_not_json_is_refused_as_such(body: bytes, parse: Any) -> None:
    """Broken JSON, NaN, other encodings and lone surrogates are a 400 that speaks of the body, on every route."""
    error = refused(body, parse)
    assert (error.status, error.type, error.param) == (400, "invalid_request_error", None)
    assert error.code in {"invalid_json", "nested_too_deep"}
    assert "body" in error.message


@pytest.mark.parametrize("body", [b"[]", b"null", b'"text"', b"5", b"true", b'[{"model":"qwen"}]'])
def test_anything_but_an_object_is_refused(body: bytes) -> None:
    """A JSON value that is no object says that one is expected."""
    assert "must be a JSON object" in refused(body).message


def test_nesting_is_allowed_up_to_its_limit() -> None:
    """A hundred levels pass, one more does not, and brackets inside strings are no levels."""
    levels = MAX_DEPTH - 1
    parse_chat(chat_raw(b'"x":' + b"[" * levels + b"]" * levels))
    parse_chat(chat_raw(b'"x":' + b'{"y":' * levels + b"1" + b"}" * levels))
    parse_chat(chat(user="[{" * 500, x=['\\"[{' * 50] * 10))
    error = refused(chat_raw(b'"x":' + b"[" * (levels + 1) + b"]" * (levels + 1)))
    assert (error.code, str(MAX_DEPTH) in error.message) == ("nested_too_deep", True)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 101 + b'"' + b'\\"' * 1_000_000,
        b"[" * 101 + b'"' + b'\\"' * 1_000_000 + b"\\",
        b"[" * 101 + b'"' + b"\\" * 2_000_000,
        b"[" * 101 + b'"' * 2_000_000,
        b"[" * 2_000_000,
        b'{"x":' * 400_000,
    ],
)
def test_the_depth_check_takes_linear_time(body: bytes) -> None:
    """Two hostile megabytes are refused within a fraction of a second of work: nothing here backtracks."""
    began = time.process_time()
    refused(body)
    assert time.process_time() - began < 2.0


@FEW
@given(tree=st.dictionaries(st.text(max_size=8), TREES, max_size=4))
def test_the_depth_that_is_measured_is_the_depth(tree: Json) -> None:
    """Wrapping any JSON in levels crosses the limit exactly where its own depth says."""

    def depth(value: object) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return 1 + max(map(depth, inner), default=0) if isinstance(value, dict | list) else 0

    levels = MAX_DEPTH - depth(tree) - 1
    for extra, fits in ((0, True), (1, False)):
        opening, closing = "[" * (levels + extra), "]" * (levels + extra)
        body = f'{{"x":{opening}{json.dumps(tree)}{closing},"pad":"{"[" * 101}"}}'.encode()
        if fits:
            check_json(body)
        else:
            assert refused(body, check_json).code == "nested_too_deep"


def spoilt(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """`body` with pieces of it replaced."""
    for start, length, piece in edits:
        at = start % (len(body) + 1)
        body = body[:at] + piece + body[at + length :]
    return body


EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 4), st.binary(max_size=3)), max_size=4)


@FEW
@given(body=st.binary(max_size=40) | st.builds(spoilt, st.just(chat(n=1, tools=None, x={"y": [1]})), EDITS))
@example(b'{"model":"a","messages":[]}')
def test_arbitrary_bytes_are_never_more_than_an_invalid_request(body: bytes) -> None:
    """No body makes a parser raise anything but InvalidRequest."""
    for parse in PARSERS:
        error = error_of(body, parse)
        assert error is None or error.status == 400


@FEW
@given(
    fields=st.dictionaries(
        st.sampled_from([*ChatFields.__struct_fields__, *CompletionFields.__struct_fields__, "input", "foo"]),
        TREES,
        max_size=5,
    ),
    extension=st.dictionaries(st.text(max_size=5), TREES, max_size=3),
)
def test_arbitrary_json_in_known_fields_is_read_or_refused_by_name(fields: Json, extension: Json) -> None:
    """Any JSON in any known field is either accepted or refused with the field's own name in `param`."""
    body = json.dumps({**CHAT, **TEXT, "thinkgate": extension, **fields}).encode()
    for parse in PARSERS:
        error = error_of(body, parse)
        if error is not None and error.code != "invalid_json":
            assert error.status == 400
            assert error.param
            assert error.param.split(".")[0].split("[")[0] in {*fields, "thinkgate", "input"}


# -------------------------------------------------------------------------------------- fields by name


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


@pytest.mark.parametrize("value", [None, False, 0, "", "x", {}, []])
@pytest.mark.parametrize("name", sorted(GATEWAY_OWNED))
def test_fields_of_the_gateway_are_never_taken_from_a_client(name: str, value: object) -> None:
    """What the gateway sets itself is refused by name whatever its value, with the remedy."""
    for body, parse in ((CHAT, parse_chat), (TEXT, parse_completion), ({**TEXT, "input": "x"}, parse_embedding)):
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


# ------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize("name", [name for name in ChatFields.__struct_fields__ if name not in {"model", "messages"}])
def test_null_is_the_same_as_absent(name: str) -> None:
    """Clients send null for what they do not set: every optional field takes it."""
    fields, raw = parse_chat(chat(**{name: None}))
    assert getattr(fields, name) is None
    assert bytes(raw[name]) == b"null"


def test_an_assistant_message_may_have_no_content() -> None:
    """History with tool calls has content null or none at all."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": [call], "reasoning": "hm"},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "c"},
    ]
    fields, raw = parse_chat(chat(messages=messages))
    assert [message.content is None for message in fields.messages] == [False, True, True, False]
    assert json.loads(bytes(raw["messages"])) == messages


def test_numbers_at_their_bounds_are_accepted() -> None:
    """The bounds themselves are inside, and whole numbers pass where fractions do."""
    fields, _ = parse_chat(
        chat(temperature=2, top_p=1, n=2**31 - 1, thinking_token_budget=-1, top_k=-1, logit_bias={"2": -100})
    )
    assert (fields.temperature, fields.thinking_token_budget, fields.logit_bias) == (2.0, -1, {"2": -100.0})
    assert parse_chat(chat(stop=["x"] * MAX_STOP))[0].stop == ["x"] * MAX_STOP


def test_unknown_fields_ride_along_byte_for_byte() -> None:
    """A field we do not know keeps its bytes: number formats, escapes and white space included."""
    _, raw = parse_chat(chat_raw(b'"mystery": {"a" : 1.50e+1,\n"b":"\\u00e9\xc3\xa9", "b":[ ]}'))
    assert bytes(raw["mystery"]) == b'{"a" : 1.50e+1,\n"b":"\\u00e9\xc3\xa9", "b":[ ]}'


@pytest.mark.parametrize("last", [b'"n":3', b'"\\u006e":3'])
def test_a_key_that_stands_twice_means_its_last_value_everywhere(last: bytes) -> None:
    """The typed view and the raw fields agree on which of two equal keys counts, however they are written."""
    fields, raw = parse_chat(chat_raw(b'"n":2,' + last))
    assert (fields.n, bytes(raw["n"])) == (3, b"3")
    assert len(raw) == 3


def test_a_key_that_stands_twice_is_checked_both_times() -> None:
    """A valid last value does not excuse a wrong first one."""
    assert refused(chat_raw(b'"n":"two","n":2')).param == "n"


@pytest.mark.parametrize("prompt", ["hi", ["hi", "ho"], [1, 2, 3], [[1, 2], [3]], [[]]])
def test_every_form_of_prompt_is_read(prompt: object) -> None:
    """Text, several texts, token ids and lists of them are prompts."""
    assert parse_completion(json.dumps({**TEXT, "prompt": prompt}).encode())[0].prompt == prompt


@pytest.mark.parametrize(
    ("prompt", "param"),
    [
        (None, "prompt"),
        (5, "prompt"),
        ([], "prompt"),
        ([True], "prompt[0]"),
        ([1.5], "prompt[0]"),
        ([-1], "prompt[0]"),
        ([[1, "x"]], "prompt[0][1]"),
        ([2**31], "prompt[0]"),
    ],
)
def test_what_is_no_prompt_is_named(prompt: object, param: str) -> None:
    """Anything else in a prompt is refused with its place in the list."""
    assert refused(json.dumps({**TEXT, "prompt": prompt}).encode(), parse_completion).param == param


@FEW
@given(extra=st.dictionaries(st.text(max_size=6).map("x_".__add__), TREES, max_size=3))
def test_the_raw_fields_are_the_request(extra: Json) -> None:
    """Put together again, the raw fields are the request that came in, unknown fields included."""
    body = chat(**extra)
    raw: RawFields = parse_chat(body)[1]
    assert {name: json.loads(bytes(value)) for name, value in raw.items()} == json.loads(body)
