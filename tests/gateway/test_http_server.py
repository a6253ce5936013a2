"""Bounds on what comes before a request."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import uvicorn

from gateway.http_server import MAX_HEAD_BYTES, GuardedProtocol, sweep_heads

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.edge import Receive, Scope, Send

pytestmark = pytest.mark.anyio


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer everything with 200."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"ok"})


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[uvicorn.Server, int]]:
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
        return await reader.read(4096)
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
