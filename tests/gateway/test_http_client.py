"""The lean client: connections are reused, replaced when they went stale, paused when nobody reads, and swept."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from gateway.backends import http
from gateway.backends.http import HIGH_WATER_BYTES, Pool, UpstreamUnreachable
from gateway.config.schema import Timeouts
from gateway.errors import DeadlinePassed, UpstreamError
from tests.gateway.live import ASK, INSTANT, STREAM, Json, Live, ask, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import END, Gate, Reply, Script

NOW: Timeouts = Timeouts(first_byte_s=0.001, idle_s=0.001, connect_s=5)
PATH = "/x"


@pytest.fixture
async def pool(scripted: ScriptedBackend) -> AsyncIterator[Pool]:
    """A pool of connections to the scripted backend, which answers PATH with `ok`."""
    scripted.routes[PATH] = Reply(body=b"ok")
    pool = Pool(scripted.url, timeouts=Timeouts())
    yield pool
    pool.close()


async def fetch(pool: Pool, path: str = PATH, body: bytes = b"{}") -> bytes:
    """One exchange to its end."""
    connection = await pool.send(path, body)
    try:
        return await connection.read_all(2**20)
    finally:
        connection.release()


async def later(loop: asyncio.AbstractEventLoop, turns: int = 20) -> None:
    """Let everything happen that is ready to happen."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_connection_is_reused(pool: Pool, scripted: ScriptedBackend) -> None:
    """One exchange after the other goes over one connection; two at once need two."""
    for _ in range(3):
        assert await fetch(pool) == b"ok"
    assert {exchange.connection for exchange in scripted.exchanges} == {0}
    await asyncio.gather(fetch(pool), fetch(pool))
    assert {exchange.connection for exchange in scripted.exchanges} == {0, 1}
    assert pool.busy() == 0


async def test_stale_connection_is_replaced_once(pool: Pool, scripted: ScriptedBackend) -> None:
    """A connection that the server closes just as we send is replaced by a fresh one, and the call succeeds."""
    await fetch(pool)
    scripted.drops_reused = True
    assert await fetch(pool) == b"ok"
    assert [exchange.connection for exchange in scripted.exchanges] == [0, 1]


async def test_fresh_connection_that_is_dropped_is_not_retried(pool: Pool, scripted: ScriptedBackend) -> None:
    """A server that closes a fresh connection without a byte has perhaps done the work: no second try."""
    scripted.routes[PATH] = Reply(raw=b"")
    with pytest.raises(UpstreamError, match="closed the connection"):
        await fetch(pool)
    assert len(scripted.exchanges) == 1


@pytest.mark.parametrize(
    "begun", [b"H", b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nab"]
)
async def test_reused_connection_is_not_retried_after_a_byte(
    pool: Pool, scripted: ScriptedBackend, begun: bytes
) -> None:
    """Once one byte of an answer came, the call was processed: breaking off is an error, not a reason to repeat."""
    await fetch(pool)
    scripted.routes[PATH] = Reply(raw=begun)
    with pytest.raises(UpstreamError, match="closed the connection"):
        await fetch(pool)
    assert len(scripted.exchanges) == 2
    assert pool.busy() == 0


async def test_replacement_that_cannot_connect_was_not_reached(pool: Pool, scripted: ScriptedBackend) -> None:
    """When the server is gone altogether, the call was not processed and may go to another backend."""
    await fetch(pool)
    scripted.stop()
    with pytest.raises(UpstreamUnreachable):
        await fetch(pool)


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_keep_alive_race_is_not_seen_by_clients(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """Through the whole gateway: the server closed the idle connection a moment before, the client gets its answer."""
    assert (await ask(gateway, body)).status == 200
    scripted.drops_reused = True
    assert (await ask(gateway, body)).status == 200
    assert len(scripted.calls) == 2


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_unreachable_backend_is_replaced_by_another(scripted: ScriptedBackend, body: Json) -> None:
    """A backend that refuses connections is taken out, and the request is served by the next one."""
    async with ScriptedBackend() as gone, live(tree_of(gone, scripted)) as gateway:
        gone.stop()
        gateway.slot(1).in_flight += 1  # so that the first is chosen first
        answer = await ask(gateway, body)
        gateway.slot(1).in_flight -= 1
        assert (answer.status, answer.headers["x-thinkgate-backend"]) == (200, "b")
        assert not gateway.slot(0).is_up
        await gateway.logs.wait("backend lost")
        assert gateway.metric("thinkgate_backend_up", model="qwen", backend="a") == 0
        assert (await ask(gateway, b"", "/health/ready", method="GET")).status == 200


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_no_backend_is_unavailable(scripted: ScriptedBackend, body: Json) -> None:
    """When no backend can be reached, the answer is 503 with retry-after, and so is readiness."""
    async with live(tree_of(scripted)) as gateway:
        scripted.stop()
        answer = await ask(gateway, body)
        assert (answer.status, answer.error["code"]) == (503, "server_is_overloaded")
        assert int(answer.headers["retry-after"]) >= 1
        ready = await ask(gateway, b"", "/health/ready", method="GET")
        assert (ready.status, ready.error["code"]) == (503, "server_is_overloaded")
        assert (await ask(gateway, b"", "/health/live", method="GET")).status == 200


async def test_lost_backend_comes_back(scripted: ScriptedBackend) -> None:
    """A backend that was lost is probed until it answers again, and then serves."""
    async with live(tree_of(scripted)) as gateway:
        gateway.slot().mark_down("a test says so")
        assert (await ask(gateway)).status == 503
        await gateway.logs.wait("backend up", 2)
        assert (await ask(gateway)).status == 200


async def test_unread_answer_stops_its_server(pool: Pool, scripted: ScriptedBackend) -> None:
    """What nobody reads is buffered up to the high-water mark; then the server has to wait."""
    size = 64 * HIGH_WATER_BYTES
    scripted.routes[PATH] = Reply(body=b"x" * size)
    connection = await pool.send(PATH, b"{}")
    while not connection._paused:
        await asyncio.sleep(0)
    assert connection._buffered <= 2 * HIGH_WATER_BYTES
    received = 0
    while piece := await connection.read():
        received += len(piece)
    connection.release()
    assert received == size
    assert pool.busy() == 0


async def test_answer_that_is_too_large_is_cut(pool: Pool, scripted: ScriptedBackend) -> None:
    """A whole answer above the limit is an error, and the connection is closed rather than drained."""
    scripted.routes[PATH] = Reply(body=b"x" * 2**22)
    with pytest.raises(UpstreamError, match="too large"):
        await fetch(pool)
    await later(pool.loop)
    assert pool.busy() == 0


@pytest.mark.parametrize("silent", ["before its answer", "in the middle"])
async def test_silent_backend_is_given_up(scripted: ScriptedBackend, silent: str) -> None:
    """A backend that sends nothing for too long fails the exchange when the sweep comes, and is closed."""
    pool = Pool(scripted.url, timeouts=NOW)
    gate = Gate()
    scripted.routes[PATH] = Reply(body=b"ok", gate=gate)
    scripted.queue(Script(gates={2: gate}))
    path, body = (PATH, b"{}") if silent == "before its answer" else ("/v1/chat/completions", b'{"stream":true}')
    waiting = asyncio.get_running_loop().create_task(fetch(pool, path, body))
    await gate.wait()
    await later(pool.loop)
    while not waiting.done():
        await asyncio.sleep(0)
        pool.sweep()
    with pytest.raises(DeadlinePassed, match="did not begin" if path == PATH else "fell silent"):
        await waiting
    await scripted.exchanges[0].wait_closed()
    assert pool.busy() == 0


async def test_idle_connections_are_closed_before_the_server_does(
    pool: Pool, scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep closes a connection that was idle too long; a younger one is kept."""
    await fetch(pool)
    pool.sweep()
    await fetch(pool)
    assert len(scripted.connections) == 1
    monkeypatch.setattr(http, "IDLE_KEEP_S", 0)
    pool.sweep()
    await fetch(pool)
    assert len(scripted.connections) == 2


async def test_bytes_nobody_asked_for_end_a_connection(pool: Pool, scripted: ScriptedBackend) -> None:
    """A server that talks between exchanges is not trusted with another one on that connection."""
    await fetch(pool)
    scripted.connections[0]._transport.write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    await later(pool.loop)
    assert await fetch(pool) == b"ok"
    assert [exchange.connection for exchange in scripted.exchanges] == [0, 1]


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno", b"HTTP/1.1 2", b"nonsense"])
async def test_message_after_the_answer_is_an_error(pool: Pool, scripted: ScriptedBackend, more: bytes) -> None:
    """What comes in one packet with an answer, beyond its end, is never taken for an answer to the next exchange."""
    scripted.routes["/twice"] = Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok" + more)
    with pytest.raises(UpstreamError, match="broken HTTP"):
        await fetch(pool, "/twice")
    assert await fetch(pool) == b"ok"
    assert [exchange.connection for exchange in scripted.exchanges] == [0, 1]


async def test_end_of_a_message_is_not_waited_for(gateway: Live, scripted: ScriptedBackend) -> None:
    """After [DONE] the client has its answer though the message goes on; once it ends, the connection is used again."""
    gate = Gate()
    scripted.queue(Script(gates={END: gate}))
    assert (await ask(gateway, STREAM)).payloads()[-1] == "[DONE]"
    assert gateway.pool().busy() == 1
    gate.open()
    await scripted.calls[0].wait_done()
    await later(gateway.pool().loop)
    assert (await ask(gateway, STREAM)).status == 200
    assert len({call.connection for call in scripted.calls}) == 1


async def test_message_that_never_ends_is_closed(
    gateway: Live, scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that does not end its message after [DONE] loses the connection when the sweep comes."""
    monkeypatch.setattr(http, "ENDING_S", -1)
    scripted.queue(Script(gates={END: Gate()}))
    assert (await ask(gateway, STREAM)).payloads()[-1] == "[DONE]"
    gateway.pool().sweep()
    await scripted.calls[0].wait_closed()
    assert (await ask(gateway, STREAM)).status == 200


async def test_informational_answers_are_skipped(pool: Pool, scripted: ScriptedBackend) -> None:
    """A 1xx before the answer is not the answer."""
    scripted.routes[PATH] = Reply(raw=b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi")
    assert await fetch(pool) == b"hi"


async def test_connection_close_is_honoured(pool: Pool, scripted: ScriptedBackend) -> None:
    """A server that says `connection: close` gets the next request on another connection."""
    scripted.routes[PATH] = Reply(body=b"ok", headers=[("connection", "close")])
    assert [await fetch(pool), await fetch(pool)] == [b"ok", b"ok"]
    assert [exchange.connection for exchange in scripted.exchanges] == [0, 1]


async def test_port_that_nobody_listens_on_is_unreachable() -> None:
    """A refused connection says that nothing was sent."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UpstreamUnreachable):
        await fetch(Pool(f"http://127.0.0.1:{port}", timeouts=Timeouts()))


async def test_address_that_does_not_answer_is_unreachable() -> None:
    """A connection that is not made within connect_s says the same."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        with pytest.raises(UpstreamUnreachable):
            await fetch(Pool(f"http://127.0.0.1:{port}", timeouts=Timeouts(connect_s=0.05)))
        for filler in fillers:
            filler.close()


async def test_own_credential_goes_upstream_and_the_clients_does_not(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend gets the gateway's key and the trace context, and no other header of the client's."""
    monkeypatch.setenv("UPSTREAM_KEY", "ours")
    tree = tree_of(scripted)
    tree["models"]["qwen"]["backends"][0]["api_key_env"] = "UPSTREAM_KEY"
    async with live(tree) as gateway:
        assert {exchange.headers["authorization"] for exchange in scripted.exchanges} == {"Bearer ours"}
        scripted.forget()
        theirs = {"authorization": "Bearer theirs", "x-secret": "1", "cookie": "a=b", "traceparent": "00-ab-cd-01"}
        for body in (STREAM, ASK, INSTANT):
            await ask(gateway, body, headers=theirs)
    for call in scripted.calls:
        assert call.headers["authorization"] == "Bearer ours"
        assert call.headers["traceparent"] == "00-ab-cd-01"
        assert set(call.headers) == {"host", "content-type", "content-length", "authorization", "traceparent"}
