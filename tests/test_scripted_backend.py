"""The scripted upstream does what a script says: the other tests rely on it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Reply, Script, refusal
from tests.scripted_stream import END_THINK, EOS, Model, Say, Token, byte_tokens, tokens

ASK: dict[str, Any] = {
    "model": "scripted",
    "messages": [{"role": "user", "content": "what is 6 times 7"}],
    "stream": True,
    "stream_options": {"include_usage": True},
    "return_token_ids": True,
}
THINKS = Say(thinking=tokens("a b c d e f g h"), answer=tokens("it is 42"))


@pytest.fixture
async def client(scripted: ScriptedBackend) -> AsyncIterator[httpx.AsyncClient]:
    """A plain HTTP client of the scripted backend."""
    async with httpx.AsyncClient(base_url=scripted.url, timeout=10) as client:
        yield client


async def stream(client: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    """Every event of a streamed chat call, decoded; [DONE] is asserted."""
    answer = await client.post("/v1/chat/completions", json={**ASK, **fields})
    assert answer.status_code == 200, answer.text
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


def ids(events: list[dict[str, Any]], index: int = 0) -> list[int]:
    """The token ids of one choice."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return [token for choice in choices for token in choice.get("token_ids") or []]


def text(events: list[dict[str, Any]], field: str) -> str:
    """The text in one field of the first choice's deltas."""
    return "".join(
        choice["delta"].get(field) or "" for event in events for choice in event["choices"] if not choice["index"]
    )


@pytest.mark.parametrize(("cap", "thinking"), [(0, 0), (1, 0), (5, 4), (40, 8), (None, 8)])
async def test_cap_ends_thinking_where_vllm_ends_it(
    scripted: ScriptedBackend, client: httpx.AsyncClient, cap: int | None, thinking: int
) -> None:
    """The end marker falls one token before the budget, because the template's newline counts."""
    scripted.queue(Script(say=[THINKS]))
    events = await stream(client, thinking_token_budget=cap)
    assert ids(events).index(END_THINK) == thinking
    assert len(text(events, "reasoning").split()) == thinking
    assert text(events, "content") == "it is 42"
    assert ids(events)[-1] == EOS
    assert events[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": thinking}
    assert events[-1]["usage"]["completion_tokens"] == len(ids(events))


async def test_lying_model_ignores_the_cap(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """A model that does not honour the budget thinks to its end."""
    scripted.queue(Script(say=[THINKS], model=Model(honours_cap=False)))
    assert len(text(await stream(client, thinking_token_budget=2), "reasoning").split()) == 8


async def test_inline_markers_arrive_as_content_in_pieces(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """Without a reasoning parser the markers are content, split as their tokens are."""
    end = (Token(31, "</"), Token(32, "think"), Token(33, ">"))
    model = Model(field="inline", end_marker=end, start_marker=(Token(30, "<think>"),))
    scripted.queue(Script(say=[THINKS], model=model))
    events = await stream(client, max_tokens=40)
    assert text(events, "content") == "<think>a b c d e f g h</think>it is 42"
    assert [c["delta"] for e in events for c in e["choices"] if c.get("token_ids") == [32]] == [{"content": "think"}]


async def test_instant_mode_has_no_thinking(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """With thinking switched off in the template the answer begins at once."""
    scripted.queue(Script(say=[THINKS]))
    events = await stream(client, chat_template_kwargs={"enable_thinking": False})
    assert text(events, "reasoning") == ""
    assert text(events, "content") == "it is 42"
    assert events[0]["prompt_token_ids"][-2] == END_THINK


async def test_choices_interleave_and_share_one_usage(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """Each choice has its own role and finish; usage counts the prompt once."""
    scripted.queue(Script(say=[THINKS, Say(answer=tokens("no"))]))
    events = await stream(client, n=3)
    finishes = [c["index"] for e in events for c in e["choices"] if c["finish_reason"]]
    assert sorted(finishes) == [0, 1, 2]
    assert [c["index"] for e in events[:3] for c in e["choices"]] == [0, 1, 2]
    total = sum(len(ids(events, index)) for index in range(3))
    assert events[-1]["usage"]["completion_tokens"] == total


@pytest.mark.parametrize("bytes_per_write", [1, 7, None])
@pytest.mark.parametrize("events_per_write", [1, 5])
async def test_splitting_and_merging_change_no_event(
    scripted: ScriptedBackend, client: httpx.AsyncClient, bytes_per_write: int | None, events_per_write: int
) -> None:
    """However the bytes are cut, characters included, the events are the same."""
    say = Say(thinking=byte_tokens("é漢"), answer=byte_tokens("😀 ok"))
    scripted.queue(Script(say=[say], bytes_per_write=bytes_per_write, events_per_write=events_per_write))
    events = await stream(client)
    assert (text(events, "reasoning"), text(events, "content")) == ("é漢", "😀 ok")
    assert len(ids(events)) == 5 + 1 + 7 + 1


async def test_gate_holds_the_stream_until_opened(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """The events before a gate are sent, those behind it are not, until the test opens it."""
    gate = Gate()
    scripted.queue(Script(say=[THINKS], gates={3: gate}))
    async with client.stream("POST", "/v1/chat/completions", json=ASK) as answer:
        await gate.wait()
        assert scripted.calls[0].events_sent == 3
        gate.open()
        assert (await answer.aread()).endswith(b"data: [DONE]\n\n")
    assert scripted.calls[0].done.is_set()


async def test_peer_that_closes_is_noticed(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """A client that leaves in the middle of a stream sets `closed`, not `done`."""
    scripted.queue(Script(say=[THINKS], gates={3: Gate()}))
    async with client.stream("POST", "/v1/chat/completions", json=ASK) as answer:
        assert answer.status_code == 200
    await scripted.calls[0].wait_closed()
    assert not scripted.calls[0].done.is_set()


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_stream_can_die(scripted: ScriptedBackend, client: httpx.AsyncClient, how: Any) -> None:
    """A stream that dies breaks off without its last chunk."""
    scripted.queue(Script(say=[THINKS], dies_after=4, dies_by=how))
    with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
        await client.post("/v1/chat/completions", json=ASK)
    assert scripted.calls[0].events_sent == 4


async def test_plain_answers_are_as_told(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """Refusals, garbage and unknown routes are answered as the test says, or as vLLM would."""
    scripted.queue(refusal(400, "no", param="temperature"), Reply(status=200, body=b"<html>"), Reply(raw=b"x\r\n"))
    refused = await client.post("/v1/chat/completions", json=ASK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, 400)
    assert (await client.post("/v1/chat/completions", json=ASK)).text == "<html>"
    with pytest.raises(httpx.RemoteProtocolError):
        await client.post("/v1/chat/completions", json=ASK)
    unknown = await client.post("/v1/chat/completions", json={**ASK, "model": "other"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")
    assert (await client.post("/v1/embeddings", json={})).json() == {"detail": "Not Found"}
    assert (await client.get("/version")).json() == {"version": "0.32.0"}


async def test_reused_connection_can_be_dropped(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """The keep-alive race: the second request on a connection finds it closed."""
    scripted.drops_reused = True
    assert (await client.get("/version")).status_code == 200
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/version")
    assert len(scripted.exchanges) == 1


async def test_whole_answer_says_what_the_stream_says(scripted: ScriptedBackend, client: httpx.AsyncClient) -> None:
    """Without streaming the same call gives the same tokens, texts and usage."""
    scripted.queue(Script(say=[THINKS]), Script(say=[THINKS]))
    events = await stream(client, thinking_token_budget=5)
    plain = {**ASK, "stream": False, "stream_options": None, "thinking_token_budget": 5}
    whole = (await client.post("/v1/chat/completions", json=plain)).json()
    assert whole["choices"][0]["token_ids"] == ids(events)
    assert whole["choices"][0]["message"]["reasoning"] == text(events, "reasoning")
    assert whole["usage"] == events[-1]["usage"]
