"""Bounds on what comes before a request."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.edge.exchange import Exchange
from gateway.edge.http_server import MAX_HEAD_BYTES, GuardedProtocol, sweep_heads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.edge.exchange import Receive, Scope, Send

pytestmark = pytest.mark.anyio


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer everything with 200."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


async def whole(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with the request's own query as a header; the short way, unless the path is /usual."""
    if scope["path"] == "/usual":
        scope["extensions"] = {}
    await Exchange(scope, receive, send).respond(200, [(b"x-query", scope["query_string"])], b"ok")


async def strange(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer with a header that would end its line."""
    await Exchange(scope, receive, send).respond(200, [(b"x", b"1\r\ny: 2")], b"ok")


@asynccontextmanager
async def serving(app: Any = app) -> AsyncIterator[tuple[uvicorn.Server, int]]:
    """A server with the guarded protocol, and its port."""
    config = uvicorn.Config(app, port=0, http=GuardedProtocol, lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup()
    try:
        yield server, server.servers[0].sockets[0].getsockname()[1]
    finally:
        await server.shutdown()


async def talk(port: int, *pieces: bytes) -> bytes:
    """What comes back for some bytes, until the server has nothing more to say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        return await reader.read()
    finally:
        writer.close()


async def is_cut(reader: asyncio.StreamReader) -> bool:
    """Whether the server ended the connection without a word."""
    try:
        return await reader.read() == b""
    except ConnectionResetError:
        return True


async def test_ordinary_request_is_served() -> None:
    """A head within the limits reaches the app."""
    async with serving() as (_, port):
        answer = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("line", [b"x: " + b"a" * MAX_HEAD_BYTES, b"x: y\r\n" * (MAX_HEAD_BYTES // 6 + 1)])
async def test_endless_head_is_refused_with_431(line: bytes) -> None:
    """One huge header or very many small ones: refused in the error format, and the connection is closed."""
    async with serving() as (server, port):
        answer = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n", line)
        assert not server.server_state.tasks
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 431")
    assert json.loads(body)["error"]["code"] == "headers_too_large"


async def test_broken_http_is_refused_in_the_usual_format() -> None:
    """What is no HTTP gets a 400 with an error object."""
    async with serving() as (_, port):
        answer = await talk(port, b"\x00\x01\x02 nonsense\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert json.loads(body)["error"]["code"] == "invalid_http"


async def test_an_answered_request_leaves_nothing_to_the_garbage_collector() -> None:
    """Its memory is free for the next one at once: no cycle keeps it until a collection."""

    def cycles() -> list[object]:
        # By type: what looks like another class may warn when it is asked for it.
        return [each for each in gc.get_objects() if type(each) is RequestResponseCycle]

    gc.collect()
    gc.disable()
    others = cycles()
    try:
        async with serving(whole) as (_, port):
            once = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
            await talk(port, *[once] * 9, b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        left = len(cycles()) - len(others)
    finally:
        gc.enable()
    assert left <= 1


async def test_head_that_never_ends_is_cut_by_the_sweep() -> None:
    """A connection that sends half a head, or nothing, does not stay for ever; one that is served does."""
    async with serving() as (server, port):
        slow, slow_writer = await asyncio.open_connection("127.0.0.1", port)
        slow_writer.write(b"POST /v1/chat")
        sweeping = asyncio.ensure_future(sweep_heads(server.server_state.connections, 0.0))
        try:
            assert await is_cut(slow)
        finally:
            sweeping.cancel()
            slow_writer.close()


async def test_idle_connection_is_closed_by_the_sweep() -> None:
    """A connection is kept for uvicorn's `timeout_keep_alive` after a response, then closed; a busy one is not."""
    async with serving() as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(2):
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readuntil(b"ok")).startswith(b"HTTP/1.1 200")
            connection: Any = next(iter(server.server_state.connections))
            idle_since_s = connection.idle_since_s
            connection.look(idle_since_s + server.config.timeout_keep_alive, 0.0)
        connection.on_message_begin()
        connection.look(idle_since_s + server.config.timeout_keep_alive + 1, 1e9)
        assert not connection.transport.is_closing()
        connection.on_response_complete()
        connection.look(idle_since_s + 1e9, 1e10)
        assert await is_cut(reader)
        writer.close()


@pytest.mark.parametrize(
    "request_head",
    [
        b"GET %b?q HTTP/1.1\r\nhost: x\r\n",
        b"GET %b?q HTTP/1.1\r\nhost: x\r\nconnection: close\r\n",
        b"GET %b?q HTTP/1.0\r\nhost: x\r\n",
        b"HEAD %b?q HTTP/1.1\r\nhost: x\r\n",
        b"POST %b?q HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 0\r\n",
    ],
)
async def test_whole_response_is_what_uvicorn_would_write(request_head: bytes) -> None:
    """The short way writes the same head and body, and keeps or closes the connection alike."""
    async with serving(whole) as (_, port):
        heads_and_bodies = []
        for path in (b"/usual", b"/short"):
            last = b"GET /usual HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
            answer = await talk(port, request_head % path + b"x-request-id: 1\r\n\r\n", last)
            head, _, body = answer.partition(b"\r\n\r\n")
            heads_and_bodies.append((sorted(line for line in head.split(b"\r\n") if b"date" not in line), body[:2]))
    assert heads_and_bodies[0] == heads_and_bodies[1]
    assert b"x-query: q" in heads_and_bodies[1][0]


async def test_pipelined_requests_are_answered_in_order() -> None:
    """Each response goes to the request that it is for."""
    asks = b"".join(b"GET /short?%d HTTP/1.1\r\nhost: x\r\n\r\n" % number for number in range(3))
    async with serving(whole) as (_, port):
        answer = await talk(port, asks + b"GET /short?3 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    assert re.findall(rb"x-query: (\d)", answer) == [b"0", b"1", b"2", b"3"]


async def test_header_that_would_end_its_line_is_not_written(caplog: pytest.LogCaptureFixture) -> None:
    """A value with a line break makes no second header: the request fails instead."""
    async with serving(strange) as (_, port):
        answer = await talk(port, b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    assert b"y: 2" not in answer
