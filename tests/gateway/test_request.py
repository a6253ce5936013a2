"""Bytes to a request: JSON or not, kept as it came."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.ask.request import (
    MAX_DEPTH,
    MAX_STOP,
    ChatFields,
    CompletionFields,
    RawFields,
    check_json,
    parse_chat,
    parse_completion,
)
from tests.gateway.bodies import CHAT, PARSERS, TEXT, TREES, Json, chat, chat_raw, error_of, refused

FEW = settings(max_examples=100, deadline=None)


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
def test_what_is_not_json_is_refused_as_such(body: bytes) -> None:
    """Broken JSON, NaN, other encodings and lone surrogates are a 400 that speaks of the body, on every route."""
    for parse in PARSERS:
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
