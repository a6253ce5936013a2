"""Deltas to server-sent events: what needs no change passes, the last finish waits for its extension."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from gateway.backends.port import Delta, Kind, Surface, Usage
from gateway.edge.sse import ChunkEncoder
from tests.gateway.folding import UPSTREAM, chunks_of, deltas_of, folded
from tests.scripted_stream import Say, tokens

Json = dict[str, Any]
EXTENSION = b'{"mode":"reasoning"}'
USAGE = b'{"prompt_tokens":3}'
TWO = [
    Say(thinking=tokens("hm so"), answer=tokens("it is 42")),
    Say(thinking=tokens("well"), answer=tokens("a much longer answer than the other")),
]


def encoder(model: str = "qwen", *, surface: Surface = "chat", **how: bool) -> ChunkEncoder:
    """An encoder for the public name `qwen`."""
    return ChunkEncoder(surface, model, UPSTREAM, stream_id="chatcmpl-own", created=7, **how)


def stream(deltas: list[Delta], by: ChunkEncoder | None = None, *, usage: bytes | None = None) -> bytes:
    """The whole stream, delta by delta."""
    by = by or encoder()
    return b"".join(by.encode([delta]) for delta in deltas) + by.finish(EXTENSION, usage)


def test_an_event_passes_as_it_came() -> None:
    """Where the public name is the backend's, events are forwarded byte for byte."""
    wire = b'{"id":"x","created":5,"model":"up/qwen","choices":[{"index":0,"delta":{"content":"a"}}]}'
    by = encoder(UPSTREAM)
    assert by.encode([Delta(text="a", wire=wire), Delta(text="b", wire=wire)]) == b"data: %b\n\n" % wire * 2


def test_the_backends_name_is_replaced_once() -> None:
    """The public name takes the place of the backend's, and text that looks like it is left alone."""
    text = '","model":"up/qwen","x":"'
    body = {"id": "x", "model": UPSTREAM, "choices": [{"index": 0, "delta": {"content": text}}]}
    out = encoder().encode([Delta(text=text, wire=msgspec.json.encode(body))])
    assert json.loads(out.removeprefix(b"data: ")) == {**body, "model": "qwen"}


def test_every_chunk_names_the_public_model_and_one_id() -> None:
    """Forwarded, moved and rebuilt chunks, usage included, agree on id, time and model."""
    chunks = chunks_of(stream(deltas_of(TWO, merged=3), usage=USAGE))
    assert {(c["id"], c["created"], c["model"]) for c in chunks} == {("chatcmpl-scripted", 1795410418, "qwen")}


def test_the_extension_rides_on_the_last_finish() -> None:
    """Exactly one chunk has `thinkgate`: the last with a finish_reason, and nothing but usage comes after it."""
    chunks = chunks_of(stream(deltas_of(TWO), usage=USAGE))
    *before, last, usage = chunks
    assert last["thinkgate"] == {"mode": "reasoning"}
    assert [choice["finish_reason"] for choice in last["choices"]] == ["stop"]
    assert not any("thinkgate" in chunk for chunk in before)
    assert (usage["choices"], usage["usage"]) == ([], {"prompt_tokens": 3})
    assert sum(choice["finish_reason"] is not None for c in before for choice in c["choices"]) == 1


def test_the_last_finish_is_held_until_the_end() -> None:
    """A finish goes out when another choice finishes, or with the extension; deltas in between are not delayed."""
    by = encoder()
    assert by.encode([Delta(text="a", finish_reason="stop")]) == b""
    assert b'"b"' in by.encode([Delta(index=1, text="b")])
    assert b'"a"' in by.encode([Delta(index=1, finish_reason="length")])
    assert b'"length"' in by.finish(EXTENSION, None)


def test_usage_goes_out_only_when_asked_for() -> None:
    """The backend's own usage chunk never passes; ours comes before [DONE] if the client wants one."""
    deltas = [*deltas_of(TWO[:1]), Delta(usage=Usage(prompt_tokens=1, completion_tokens=2))]
    assert all("usage" not in chunk for chunk in chunks_of(stream(deltas)))
    asked = chunks_of(stream(deltas, usage=USAGE))
    assert [chunk.get("usage") for chunk in asked] == [None] * (len(asked) - 1) + [{"prompt_tokens": 3}]


def test_a_backend_that_pads_its_events_breaks_nothing() -> None:
    """White space after the last brace does not spoil the chunk that gets the extension."""
    wire = b'{"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]} \t'
    (chunk,) = chunks_of(stream([Delta(finish_reason="stop", wire=wire)]))
    assert chunk["thinkgate"] == {"mode": "reasoning"}


def test_a_stream_without_any_finish_still_ends() -> None:
    """Where a call yielded nothing to finish, the stream is just its end."""
    assert stream([]) == b"data: [DONE]\n\n"


@pytest.mark.parametrize("merged", [1, 4])
def test_hidden_thinking_leaves_no_trace(merged: int) -> None:
    """With the thinking excluded its text is in no chunk, and neither are its logprobs or ids; the answer is whole."""
    deltas = deltas_of(TWO, merged=merged, ids=True, logprobs=True)
    out = stream(deltas, encoder(exclude_thinking=True, wants_token_ids=True))
    assert b"hm" not in out
    assert b"well" not in out
    client = folded(out)
    assert client["choices"][0]["message"] == {"role": "assistant", "content": "it is 42"}


def test_thinking_that_ends_by_length_is_hidden_but_finishes() -> None:
    """The finish of a choice is told even when its last text is not."""
    deltas = deltas_of([Say(thinking=tokens("a b c"), ends=False)], max_tokens=3)
    out = stream(deltas, encoder(exclude_thinking=True))
    client = folded(out)
    assert client["choices"][0]["finish_reason"] == "length"
    assert "reasoning" not in client["choices"][0]["message"]


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_the_thinking_keeps_the_backends_name_for_it(field: Any) -> None:
    """Events pass with the field they came in."""
    client = folded(stream(deltas_of(TWO[:1], field=field, gives_ids=False)))
    assert client["choices"][0]["message"] == {"role": "assistant", field: "hm so", "content": "it is 42"}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "inline"])
def test_the_thinking_can_have_both_names(field: Any) -> None:
    """For clients of either kind the text stands under both names, whatever the backend calls it."""
    client = folded(stream(deltas_of(TWO, field=field), encoder(both_fields=True)))
    for index, thinking in enumerate(["hm so", "well"]):
        message = client["choices"][index]["message"]
        assert (message["reasoning"], message["reasoning_content"]) == (thinking, thinking)


def test_token_ids_go_to_who_asked() -> None:
    """With ids asked for, every token's id arrives, those of silent markers too, and the prompt's; else none does."""
    deltas = deltas_of(TWO, merged=2, ids=True)
    client = folded(stream(deltas, encoder(wants_token_ids=True)))
    for index in range(2):
        assert client["choices"][index]["ids"] == [token for d in deltas if d.index == index for token in d.token_ids]
    assert client["prompt_token_ids"]
    assert b"token_ids" not in stream(deltas_of(TWO, merged=2))


# ------------------------------------------------------------------- deltas without a wire (embedded engine)


def test_deltas_without_a_wire_are_written_here() -> None:
    """The embedded engine's deltas get their chunks: role first, once per choice, and nothing for a bare marker."""
    deltas = [
        Delta(text="hm", kind=Kind.THINKING, thinking=1),
        Delta(kind=Kind.INJECTED, injected=1),
        Delta(text="42", answer=1),
        Delta(index=1, text="43", answer=1, logprobs={"content": [{"token": "43"}]}),
        Delta(finish_reason="stop", stop_reason="x"),
        Delta(index=1, finish_reason="length"),
    ]
    chunks = chunks_of(stream(deltas, usage=USAGE))
    assert [choice["delta"] for chunk in chunks for choice in chunk["choices"]] == [
        {"role": "assistant", "reasoning": "hm"},
        {"content": "42"},
        {"role": "assistant", "content": "43"},
        {},
        {},
    ]
    assert {(c["id"], c["object"], c["created"], c["model"]) for c in chunks} == {
        ("chatcmpl-own", "chat.completion.chunk", 7, "qwen")
    }
    assert chunks[2]["choices"][0]["logprobs"] == {"content": [{"token": "43"}]}
    assert (chunks[3]["choices"][0]["stop_reason"], chunks[4]["choices"][0]["finish_reason"]) == ("x", "length")


def test_text_completions_have_their_own_shape() -> None:
    """Without a wire a completion chunk has `text`, and ids where they were asked for."""
    by = encoder(surface="completions", wants_token_ids=True)
    deltas = [
        Delta(text="a", token_ids=[7], prompt_token_ids=[1, 2]),
        Delta(text="b", token_ids=[8], finish_reason="stop"),
    ]
    first, last, usage = chunks_of(stream(deltas, by, usage=USAGE))
    assert first["object"] == usage["object"] == "text_completion"
    assert first["choices"] == [
        {
            "index": 0,
            "text": "a",
            "logprobs": None,
            "finish_reason": None,
            "prompt_token_ids": [1, 2],
            "token_ids": [7],
        }
    ]
    assert (last["choices"][0]["text"], last["thinkgate"]) == ("b", {"mode": "reasoning"})
