"""Clients that leave or do not read: the upstream is closed at once, and what was received is settled."""

from __future__ import annotations

from typing import Literal

import pytest

from tests.gateway.live import (
    ASK,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    INSTANT,
    STREAM,
    Client,
    Json,
    Live,
    ask,
    live,
    tree_of,
)
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Reply, Script
from tests.scripted_stream import Say, Token, tokens

How = Literal["close", "reset"]
TALKS = Say(thinking=tokens("let me see"), answer=tokens("word " * 50))
TEXT: Json = {"model": "qwen", "prompt": "six times seven is"}
KINDS = [STREAM, ASK, INSTANT, {**INSTANT, "stream": True}, {**STREAM, "n": 3}, TEXT, {**TEXT, "stream": True}]
NAMES = ["streamed", "folded", "plain", "instant stream", "three choices", "text", "text stream"]


def path_of(body: Json) -> str:
    """The route of a request."""
    return COMPLETIONS if "prompt" in body else CHAT


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("body", KINDS, ids=NAMES)
async def test_leaving_before_the_first_byte_closes_the_upstream(
    gateway: Live, scripted: ScriptedBackend, body: Json, how: How
) -> None:
    """A client that leaves while the backend has not answered yet: the call is aborted, nothing stays held."""
    gate = Gate()
    scripted.queue(Script(say=[TALKS], gates={-1: gate}))
    async with Client(gateway.port) as client:
        client.send(body, path_of(body))
        await gate.wait()
        assert gateway.gateway.ledger.held().tokens > 0
        client.leave(how)
        await scripted.calls[0].wait_closed()
    await gateway.assert_settled()
    line = gateway.request_lines()[0]
    assert (line["ended_by"], line["status"], sum(line["tokens"].values())) == ("disconnect", 0, 0)
    assert gateway.metric("thinkgate_disconnects_total", route=path_of(body)) == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("body", [kind for kind in KINDS if kind not in (INSTANT, TEXT)])
async def test_leaving_in_the_middle_settles_what_came(
    gateway: Live, scripted: ScriptedBackend, body: Json, how: How
) -> None:
    """A client that leaves in mid-stream: the upstream is closed and exactly the received tokens are charged."""
    gate = Gate()
    scripted.queue(Script(say=[TALKS], gates={12: gate}))
    async with Client(gateway.port) as client:
        client.send(body, path_of(body))
        await gate.wait()
        await ask(gateway, INSTANT)  # a turn of the loop for everything that was sent before the gate
        client.leave(how)
        await scripted.calls[0].wait_closed()
    await gateway.assert_settled()
    lines = gateway.request_lines()
    line = next(line for line in lines if line.get("ended_by") == "disconnect")
    used = line["tokens"]
    call = scripted.calls[0]
    roles = 0 if "prompt" in body else body.get("n", 1)
    assert used["thinking"] + used["answer"] + used["injected"] == call.events_sent - roles
    assert used["prompt"] > 0
    assert line["cost_nano_usd"] > 0
    assert not call.done.is_set()


async def test_leaving_while_embeddings_are_made_closes_the_upstream(gateway: Live, scripted: ScriptedBackend) -> None:
    """An embedding request is watched like the others."""
    gate = Gate()
    scripted.routes[EMBEDDINGS] = Reply(body=b"{}", gate=gate)
    async with Client(gateway.port) as client:
        client.send({"model": "qwen", "input": "x"}, EMBEDDINGS)
        await gate.wait()
        client.leave()
        await scripted.exchanges[0].wait_closed()
    await gateway.assert_settled()
    assert gateway.request_lines()[0]["ended_by"] == "disconnect"


async def test_leaving_after_the_answer_is_no_disconnect(gateway: Live) -> None:
    """A client that closes once it has its answer counts as served."""
    for body in (STREAM, ASK, INSTANT):
        async with Client(gateway.port) as client:
            client.send(body)
            assert (await client.answer()).status == 200
            client.leave("reset")
    await gateway.assert_settled()
    assert [line.get("ended_by") for line in gateway.request_lines()] == [None, None, None]
    assert gateway.metric("thinkgate_disconnects_total", route=CHAT) == 0


TOKEN_BYTES = 2000
ENDLESS = Say(answer=[Token(5000, " " + "x" * TOKEN_BYTES)] * 20000)
NEVER_READS: Json = {**INSTANT, "stream": True, "max_tokens": 20000}


async def test_client_that_does_not_read_is_given_up(scripted: ScriptedBackend) -> None:
    """A client that never reads stops its upstream, costs bounded memory and is cut after slow_client_s."""
    async with live(tree_of(scripted, server={"timeouts": {"slow_client_s": 0.3}})) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[ENDLESS], events_per_write=20))
        async with Client(gateway.port, receive_buffer_bytes=4096) as client:
            client.send(NEVER_READS)
            await client.head()
            await scripted.calls[0].wait_closed()
            await gateway.assert_settled()
            assert not (await client.closed()).endswith(b"0\r\n\r\n")
        line = gateway.request_lines()[0]
    assert line["ended_by"] == "slow_client"
    assert line["tokens"]["answer"] * TOKEN_BYTES < 10_000_000  # of 40 MB: the rest was never taken from upstream


async def test_client_that_reads_late_gets_everything(gateway: Live, scripted: ScriptedBackend) -> None:
    """A client that pauses and then reads gets the whole stream, though the upstream had to wait for it."""
    scripted.queue(Script(say=[Say(answer=ENDLESS.answer[:4000])], events_per_write=20))
    async with Client(gateway.port, receive_buffer_bytes=4096) as client:
        client.send(NEVER_READS)
        answer = await client.head()
        await ask(gateway, INSTANT)
        while piece := await client.piece():
            answer.body += piece
    assert answer.chunks()[-1]["thinkgate"]["tokens"]["answer"] == 4001


async def test_slow_client_at_its_deadline_is_given_up(scripted: ScriptedBackend) -> None:
    """An envelope's end does not save a client that never reads: its hold is settled and its connection cut."""
    async with live(tree_of(scripted, server={"timeouts": {"slow_client_s": 0.3}})) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[ENDLESS], events_per_write=20))
        async with Client(gateway.port, receive_buffer_bytes=4096) as client:
            client.send(NEVER_READS)
            await client.head()
            await gateway.blocked.wait()
            gateway.watched().bound(0)
            await scripted.calls[0].wait_closed()
            await gateway.assert_settled()
            assert not (await client.closed()).endswith(b"0\r\n\r\n")
        line = gateway.request_lines()[0]
    assert line["ended_by"] == "slow_client"
    assert line["tokens"]["answer"] * TOKEN_BYTES < 10_000_000


async def test_goodbye_that_is_not_read_is_not_waited_for(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that never reads cannot hold up the end of its request: its error event is given up, it is cut."""
    monkeypatch.setattr("gateway.edge.exchange.FAIL_S", 0.05)
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[ENDLESS], events_per_write=20))
        async with Client(gateway.port, receive_buffer_bytes=4096) as client:
            client.send(NEVER_READS)
            await client.head()
            await gateway.blocked.wait()
            gateway.gateway.watch.cancel_all()
            await scripted.calls[0].wait_closed()
            await gateway.assert_settled()
            assert b'data: {"error"' not in await client.closed()
    assert gateway.request_lines()[0]["ended_by"] == "drain"
