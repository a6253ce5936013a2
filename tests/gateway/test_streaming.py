"""Streams over real sockets: the order of chunks, what rides on the last one, and how failures end them."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from tests.gateway.live import ASK, COMPLETIONS, INSTANT, STREAM, Client, Json, Live, ask
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Reply, Script, json_reply, refusal
from tests.scripted_stream import Say, event, tokens

THINKS = Say(thinking=tokens("let me see"), answer=tokens("it is 42"))
WITH_USAGE: Json = {**STREAM, "stream_options": {"include_usage": True}}
TEXT: Json = {"model": "qwen", "prompt": "six times seven is", "stream": True}
WHOLE = "data: [DONE]\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def finishes(chunks: list[Json]) -> list[Json]:
    """The chunks that have a finish_reason."""
    return [chunk for chunk in chunks if any(choice["finish_reason"] for choice in chunk["choices"])]


def text_of(chunks: list[Json], field: str = "content", index: int = 0) -> str:
    """The text of one choice."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in choices)


@pytest.mark.parametrize("body", [STREAM, {**STREAM, "stream_options": {"include_usage": False}}])
async def test_usage_comes_only_when_asked_for(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """Without include_usage no chunk has usage, though the backend is always asked for it."""
    chunks = (await ask(gateway, body)).chunks()
    assert [chunk for chunk in chunks if chunk.get("usage") is not None] == []
    assert [chunk for chunk in chunks if not chunk["choices"]] == []
    assert scripted.calls[0].json["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize("body", [WITH_USAGE, {**TEXT, "stream_options": {"include_usage": True}}])
async def test_usage_is_one_last_chunk_without_choices(gateway: Live, body: Json) -> None:
    """With include_usage the chunk before [DONE] has the usage and empty choices, and no other chunk has usage."""
    answer = await ask(gateway, body, COMPLETIONS if "prompt" in body else "/v1/chat/completions")
    *others, last = answer.chunks()
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == last["usage"]["prompt_tokens"] + last["usage"]["completion_tokens"]
    assert {key: last[key] for key in ("id", "object", "created", "model")} == {
        key: others[0][key] for key in ("id", "object", "created", "model")
    }
    assert [chunk for chunk in others if chunk.get("usage") is not None] == []
    assert answer.body.endswith(WHOLE.encode())


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("body", [STREAM, TEXT, {**STREAM, "thinkgate": {"mode": "instant"}}])
async def test_last_finish_carries_the_extension(gateway: Live, body: Json, n: int) -> None:
    """The last chunk with a finish_reason, and only that, has `thinkgate`; every choice is finished once."""
    answer = await ask(gateway, {**body, "n": n}, COMPLETIONS if "prompt" in body else "/v1/chat/completions")
    chunks = answer.chunks()
    assert [chunk for chunk in chunks if "thinkgate" in chunk] == chunks[-1:] == finishes(chunks)[-1:]
    assert sorted(choice["index"] for chunk in finishes(chunks) for choice in chunk["choices"]) == list(range(n))
    extension = chunks[-1]["thinkgate"]
    assert extension["backend"] == "a"
    assert extension["request_id"] == answer.headers["x-request-id"]
    assert extension["settled"]["tokens"] == sum(extension["tokens"].values())
    assert answer.payloads()[-1] == "[DONE]"


async def test_finish_waits_for_the_usage(gateway: Live, scripted: ScriptedBackend) -> None:
    """The chunk with the finish_reason is held back until the backend's usage has come; the text is not."""
    scripted.queue(Script(say=[THINKS]))
    number = len((await ask(gateway, WITH_USAGE)).payloads())
    gate = Gate()
    # role, three thoughts, marker, three words, end of sequence: and then the usage
    scripted.queue(Script(say=[THINKS], gates={9: gate}))
    async with Client(gateway.port) as client:
        client.send(WITH_USAGE)
        await client.head()
        seen = [await client.chunk() for _ in range(number - 3)]
        await gate.wait()
        assert text_of(seen) == "it is 42"
        # Another request through the same loop: whatever the first one had to send is sent by now.
        await ask(gateway, INSTANT)
        assert client.received() == b""
        gate.open()
        assert finishes([await client.chunk()])[0]["thinkgate"]["tokens"]["answer"] == 4
        assert (await client.chunk())["usage"]["completion_tokens"] == 8
        assert [await client.event(), await client.event()] == ["[DONE]", None]


async def test_public_name_replaces_the_backends(gateway: Live) -> None:
    """No chunk, no whole answer and no error says what the model is called upstream."""
    for body in (STREAM, ASK, INSTANT, {**STREAM, "n": 2, "logprobs": True}):
        answer = await ask(gateway, body)
        assert b'"model":"qwen"' in answer.body
        assert b'"model":"scripted"' not in answer.body


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
@pytest.mark.parametrize(("events", "pieces"), [(1, 1), (1, 7), (3, None), (100, None), (100, 1000)])
async def test_framing_of_the_backend_does_not_matter(
    gateway: Live, scripted: ScriptedBackend, events: int, pieces: int | None, newline: bytes
) -> None:
    """Half events, several at once and CRLF give the client the chunks that it always gets."""
    scripted.queue(Script(say=[THINKS]))
    plain = (await ask(gateway, WITH_USAGE)).chunks()
    scripted.queue(Script(say=[THINKS], events_per_write=events, bytes_per_write=pieces, newline=newline))
    chunks = (await ask(gateway, WITH_USAGE)).chunks()
    assert [chunk["choices"] for chunk in chunks] == [chunk["choices"] for chunk in plain]
    assert chunks[-1]["usage"] == plain[-1]["usage"]


BAD: list[tuple[Reply, int, str]] = [
    (Reply(body=b"<html>", content_type="text/html"), 502, "upstream_error"),
    (Reply(body=b"{}"), 502, "upstream_error"),
    (json_reply({"choices": [{"index": "x"}]}), 502, "upstream_error"),
    (Reply(raw=b"no HTTP at all\r\n\r\n"), 502, "upstream_error"),
    (Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-ty"), 502, "upstream_error"),
    (Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\n{"), 502, "upstream_error"),
    (refusal(500, "boom", "InternalServerError"), 502, "upstream_error"),
    (refusal(503, "starting"), 502, "upstream_error"),
    (refusal(401, "who are you"), 502, "upstream_error"),
    (refusal(403, "not you"), 502, "upstream_error"),
    (refusal(429, "slow down"), 502, "upstream_error"),
    (refusal(408, "too slow"), 502, "upstream_error"),
    (Reply(status=302, headers=[("location", "/elsewhere")]), 502, "upstream_error"),
]


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
@pytest.mark.parametrize(("reply", "status", "code"), BAD)
async def test_bad_answer_is_a_bad_gateway(
    gateway: Live, scripted: ScriptedBackend, reply: Reply, status: int, code: str, body: Json
) -> None:
    """Whatever a backend answers but a completion or a refusal of the request itself is a 502 that tells no secret."""
    scripted.queue(reply)
    answer = await ask(gateway, body)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert "who are you" not in answer.error["message"]
    if reply.status in {429, 500, 503}:
        assert answer.headers["retry-after"] == "1"
    await gateway.assert_settled()


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
@pytest.mark.parametrize("status", [400, 404, 413, 422])
async def test_refusal_of_the_request_passes_through(
    gateway: Live, scripted: ScriptedBackend, status: int, body: Json
) -> None:
    """A backend's 4xx about the request comes back with its status and its error."""
    scripted.queue(refusal(status, "prompt is too long", param="messages"))
    answer = await ask(gateway, body)
    assert (answer.status, answer.error["message"], answer.error["param"]) == (status, "prompt is too long", "messages")


async def test_refusal_without_an_error_object_becomes_one(gateway: Live, scripted: ScriptedBackend) -> None:
    """A 4xx whose body is no error object is wrapped into one that repeats what it says."""
    scripted.queue(json_reply({"detail": "no such field"}, 422), Reply(status=404, body=b"<html>"))
    first, second = await ask(gateway), await ask(gateway)
    assert (first.status, second.status) == (422, 404)
    assert "no such field" in first.error["message"]
    assert second.error["type"] == "invalid_request_error"


GARBAGE: list[tuple[str, Script]] = [
    ("close", Script(say=[THINKS], dies_after=4, dies_by="close")),
    ("reset", Script(say=[THINKS], dies_after=4, dies_by="reset")),
    ("no JSON", Script(say=[THINKS], replace={5: event(b"{nonsense")})),
    ("an error", Script(say=[THINKS], replace={5: event({"error": {"message": "out of memory"}})})),
    ("no end", Script(say=[THINKS], replace={8: None, 9: None, 10: None})),
    ("no finish", Script(say=[THINKS], replace={8: None})),
    ("no end, batched", Script(say=[THINKS], replace={8: None, 9: None, 10: None}, events_per_write=99)),
    ("no JSON, batched", Script(say=[THINKS], replace={5: event(b"{nonsense")}, events_per_write=99)),
]


@pytest.mark.parametrize("script", [script for _, script in GARBAGE], ids=[name for name, _ in GARBAGE])
async def test_failure_after_the_first_byte_ends_the_stream_with_an_error(
    gateway: Live, scripted: ScriptedBackend, script: Script
) -> None:
    """A backend that breaks off is a last event with `error`, never [DONE]; what was received is settled."""
    scripted.queue(script)
    answer = await ask(gateway, STREAM)
    *chunks, error = answer.chunks()
    assert answer.status == 200
    assert error["error"]["type"] == "upstream_error"
    assert "[DONE]" not in answer.payloads()
    assert text_of(chunks, "reasoning") == "let me see"
    await gateway.assert_settled()
    line = gateway.request_lines()[0]
    assert line["error"] == "upstream_error"
    assert line["tokens"]["thinking"] == 3
    assert line["tokens"]["prompt"] > 0


@pytest.mark.parametrize("script", [script for _, script in GARBAGE], ids=[name for name, _ in GARBAGE])
async def test_failure_of_a_folded_call_is_a_status(gateway: Live, scripted: ScriptedBackend, script: Script) -> None:
    """The same failures, where the client did not ask for a stream, are a 502 and settle what was received."""
    scripted.queue(script)
    answer = await ask(gateway)
    assert (answer.status, answer.error["type"]) == (502, "upstream_error")
    await gateway.assert_settled()
    assert gateway.request_lines()[0]["tokens"]["thinking"] == 3


def raw_stream(*events: bytes, end: bytes) -> Reply:
    """A stream written in one go, and the connection closed after `end`."""
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in events)
    return Reply(raw=STREAM_HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks + end)


def chunk_of(delta: Json, finish: str | None = None, **more: Any) -> bytes:
    """One event of a backend that gives no ids."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return event({"id": "c", "created": 1, "model": "scripted", "choices": [choice], **more})


@pytest.mark.parametrize("end", [b"", b"0\r\n\r\n", b"zz"])
async def test_done_is_done(gateway: Live, scripted: ScriptedBackend, end: bytes) -> None:
    """After the backend's [DONE] the answer is complete, however its HTTP message ends, and is not waited for."""
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    events = (chunk_of({"content": "hi"}), chunk_of({}, "stop", usage=usage), event(b"[DONE]"))
    scripted.queue(raw_stream(*events, end=end))
    answer = await ask(gateway, STREAM)
    assert answer.body.endswith(WHOLE.encode())
    assert answer.chunks()[-1]["thinkgate"]["settled"]["tokens"] == 5


@pytest.mark.parametrize("kind", ["content", "reasoning"])
async def test_answer_without_ids_and_usage_is_estimated(
    gateway: Live, scripted: ScriptedBackend, kind: Literal["content", "reasoning"]
) -> None:
    """A backend that gives neither ids nor usage is counted by its events, and the response says so."""
    events = (chunk_of({kind: "a"}), chunk_of({kind: "b"}), chunk_of({}, "stop"), event(b"[DONE]"))
    scripted.queue(raw_stream(*events, end=b"0\r\n\r\n"))
    extension = (await ask(gateway, STREAM)).chunks()[-1]["thinkgate"]
    assert extension["counted"] == "estimated"
    assert extension["tokens"]["answer" if kind == "content" else "thinking"] == 2
