"""Deltas to one body: streamed or not, a client gets the same answer."""

from __future__ import annotations

import json
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.port import Delta, Kind, Surface, Usage
from gateway.edge.aggregate import Aggregator
from gateway.edge.sse import ChunkEncoder
from tests.gateway.folding import UPSTREAM, deltas_of, folded
from tests.scripted_stream import Say, Token, tokens

Json = dict[str, Any]
FLAGS = ("exclude_thinking", "both_fields", "wants_token_ids")


def body(deltas: list[Delta], *, surface: Surface = "chat", **how: bool) -> Json:
    """The whole answer."""
    by = Aggregator(surface, **how)
    for delta in deltas:
        by.add([delta])
    answer: Json = json.loads(by.body("id-1", 7, "qwen", usage=b'{"x":1}', extension=b'{"mode":"instant"}'))
    return answer


def call_tokens(*parts: Json) -> list[Token]:
    """Tokens that are pieces of tool calls."""
    return [Token(500 + i, "", {"tool_calls": [part]}) for i, part in enumerate(parts)]


WEATHER = call_tokens(
    {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}},
    {"index": 0, "function": {"arguments": '{"city": '}},
    {"index": 1, "id": "c2", "type": "function", "function": {"name": "time"}},
    {"index": 0, "function": {"arguments": '"Paris"}'}},
    {"index": 1, "function": {"arguments": "{}"}},
)


def test_an_answer_is_put_together() -> None:
    """Thinking, answer, finish, usage and extension stand where OpenAI's clients look for them."""
    answer = body(deltas_of([Say(thinking=tokens("hm so"), answer=tokens("it is 42"))]))
    assert answer == {
        "id": "id-1",
        "object": "chat.completion",
        "created": 7,
        "model": "qwen",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "it is 42", "reasoning": "hm so"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"x": 1},
        "thinkgate": {"mode": "instant"},
    }


def test_choices_come_in_order_and_usage_is_no_choice() -> None:
    """However deltas interleave, choices are sorted, and the call's last delta adds none."""
    deltas = [
        Delta(index=2, text="c"),
        Delta(index=0, text="a"),
        Delta(index=1, text="b"),
        Delta(index=0, text="a"),
        Delta(usage=Usage(prompt_tokens=1, completion_tokens=4)),
    ]
    choices = body(deltas)["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "aa"), (1, "b"), (2, "c")]


def test_tool_calls_are_joined() -> None:
    """Pieces of several calls are joined by index; without text the content is null."""
    say = Say(thinking=tokens("hm"), answer=WEATHER, finish_reason="tool_calls")
    (choice,) = body(deltas_of([say]))["choices"]
    assert choice["message"]["content"] is None
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}},
        {"id": "c2", "type": "function", "function": {"name": "time", "arguments": "{}"}},
    ]
    assert choice["finish_reason"] == "tool_calls"


def test_tool_calls_beside_text_keep_the_text() -> None:
    """Some models say something before they call."""
    say = Say(answer=[*tokens("let me look"), *WEATHER], finish_reason="tool_calls")
    message = body(deltas_of([say]))["choices"][0]["message"]
    assert (message["content"], len(message["tool_calls"])) == ("let me look", 2)


def test_raw_parts_are_read_as_objects_are() -> None:
    """The embedded engine hands tool calls and logprobs over as JSON."""
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]
    logprobs = {"content": [{"token": "a"}]}
    as_json = Delta(tool_calls=msgspec.Raw(json.dumps(call)), logprobs=msgspec.Raw(json.dumps(logprobs)))
    assert body([as_json]) == body([Delta(tool_calls=call, logprobs=logprobs)])


def test_logprobs_are_joined_list_by_list() -> None:
    """Chat has one list, text completions have four, and a null stays out."""
    chat = [Delta(logprobs={"content": [{"token": t}], "refusal": None}) for t in "ab"]
    assert body(chat)["choices"][0]["logprobs"] == {"content": [{"token": "a"}, {"token": "b"}]}
    text = [
        Delta(text=t, logprobs={"tokens": [t], "token_logprobs": [-1], "text_offset": [i]}) for i, t in enumerate("ab")
    ]
    assert body(text, surface="completions")["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1, -1],
        "text_offset": [0, 1],
    }


def test_hidden_thinking_leaves_no_trace() -> None:
    """Excluded thinking is not in the message, nor spelt out by its logprobs or ids."""
    deltas = deltas_of([Say(thinking=tokens("secret plan"), answer=tokens("42"))], ids=True, logprobs=True)
    answer = body(deltas, exclude_thinking=True, both_fields=True, wants_token_ids=True)
    assert "secret" not in json.dumps(answer)
    message = answer["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "42"}
    hidden = {token for delta in deltas if delta.kind is Kind.THINKING for token in delta.token_ids}
    assert hidden
    assert not hidden & set(answer["choices"][0]["token_ids"])


def test_a_choice_cut_inside_hidden_thinking_still_has_its_finish() -> None:
    """The last delta of a choice may be thinking; its text is hidden, its finish is not."""
    deltas = deltas_of([Say(thinking=tokens("a b c"), ends=False)], max_tokens=3)
    (choice,) = body(deltas, exclude_thinking=True)["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("length", "")


def test_token_ids_of_chat_stand_where_vllm_puts_them() -> None:
    """Output ids are in the choice; the prompt's are beside the choices in chat, in the choice in completions."""
    say = Say(thinking=tokens("hm"), answer=tokens("42"))
    deltas = deltas_of([say, say], ids=True)
    answer = body(deltas, wants_token_ids=True)
    assert answer["prompt_token_ids"]
    for index, choice in enumerate(answer["choices"]):
        assert choice["token_ids"] == [token for d in deltas if d.index == index for token in d.token_ids]
        assert "prompt_token_ids" not in choice
    text = body(deltas_of([say], surface="completions", ids=True), surface="completions", wants_token_ids=True)
    assert "prompt_token_ids" not in text
    assert text["choices"][0]["prompt_token_ids"]
    assert "token_ids" not in json.dumps(body(deltas))


SAYS = st.builds(
    Say,
    thinking=st.text(alphabet="ab ä", max_size=10).map(tokens),
    answer=st.one_of(st.text(alphabet="cd ö", min_size=1, max_size=10).map(tokens), st.just(WEATHER)),
    finish_reason=st.sampled_from(["stop", "tool_calls"]),
    stop_reason=st.sampled_from([None, "x", 7]),
)


@settings(max_examples=150, deadline=None)
@given(
    says=st.lists(SAYS, min_size=1, max_size=3),
    surface=st.sampled_from(["chat", "completions"]),
    field=st.sampled_from(["reasoning", "inline"]),
    merged=st.integers(1, 4),
    flags=st.tuples(*[st.booleans()] * 3),
    logprobs=st.booleans(),
    max_tokens=st.sampled_from([3, 256]),
    has_wire=st.booleans(),
)
def test_streamed_and_folded_say_the_same(
    says: list[Say],
    surface: Surface,
    field: Any,
    merged: int,
    flags: tuple[bool, bool, bool],
    logprobs: bool,
    max_tokens: int,
    has_wire: bool,
) -> None:
    """Whatever the model says and the client wants, reading the stream gives what the whole answer holds."""
    how = dict(zip(FLAGS, flags, strict=True))
    asked: Json = {"logprobs": logprobs, "max_tokens": max_tokens}
    deltas = deltas_of(says, surface=surface, field=field, merged=merged, ids=how["wants_token_ids"], **asked)
    if not has_wire:
        for delta in deltas:
            delta.wire = b""
    encoder = ChunkEncoder(surface, "qwen", UPSTREAM, stream_id="id-1", created=7, **how)
    out = b"".join(encoder.encode([delta]) for delta in deltas) + encoder.finish(b'{"mode":"instant"}', b'{"x":1}')
    client, whole = folded(out), body(deltas, surface=surface, **how)
    assert (client["usage"], client["thinkgate"]) == (whole["usage"], whole["thinkgate"])
    assert client.get("prompt_token_ids") == whole.get("prompt_token_ids")
    assert sorted(client["choices"]) == [choice["index"] for choice in whole["choices"]]
    for choice in whole["choices"]:
        streamed = client["choices"][choice["index"]]
        message = {name: value for name, value in choice.get("message", {}).items() if value}
        message.pop("role", None)
        calls = {
            i: {"id": c["id"], "type": c["type"], **c["function"]} for i, c in enumerate(message.pop("tool_calls", []))
        }
        seen = {name: value for name, value in streamed["message"].items() if value}
        seen.pop("role", None)
        assert seen.pop("tool_calls", {}) == calls
        assert seen == message
        assert streamed["text"] == choice.get("text", "")
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert streamed.get("stop_reason") == choice.get("stop_reason")
        assert streamed["ids"] == choice.get("token_ids", [])
        assert streamed.get("prompt_token_ids") == choice.get("prompt_token_ids")
        assert streamed["logprobs"] == (choice["logprobs"] or {})
