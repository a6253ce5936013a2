"""A TCP proxy before a Redis server that breaks the connection at a chosen call.

It runs in the loop of the test. Calls are EVALSHA commands, counted over all connections from 1.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Literal
from urllib.parse import urlsplit

import hiredis

from budget.ledgers.redis_line import RESET_ON_CLOSE

Where = Literal["before", "after", "within", "swallow"]


class CuttingProxy:
    """Forwards until the call that is to be cut.

    Attributes:
        url: where to connect instead.
        where: `before` the call has reached the server; `after` it, before any of the answer; `within` the answer;
            `swallow` it and all that follows, with the connection left open.
        cut_at: which call; None for none, until it is set anew.
        calls: how many there were.
        connections: how many there were.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname, parts.port
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self.url = ""
        self.where: Where = "before"
        self.cut_at: int | None = None
        self.calls = self.connections = 0
        self.is_closed = False

    async def start(self) -> None:
        """Listen on a port of its own."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self) -> None:
        """Break everything."""
        assert self._server is not None
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        for writer in self._writers:
            with suppress(OSError):
                sock = writer.get_extra_info("socket")
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            writer.transport.abort()
        self._writers.clear()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self.is_closed:
            writer.transport.abort()
            return
        upstream_reader, upstream_writer = await asyncio.open_connection(self._host, self._port)
        self._writers |= {writer, upstream_writer}
        exchange = Exchange(self)
        with suppress(OSError):
            await asyncio.gather(
                exchange.forward_calls(reader, upstream_writer), exchange.forward_answers(upstream_reader, writer)
            )
        for each in (writer, upstream_writer):
            each.transport.abort()
            self._writers.discard(each)


class Exchange:
    """One connection through the proxy: what was asked, in order, until it was answered."""

    def __init__(self, proxy: CuttingProxy) -> None:
        self._proxy = proxy
        self._asked: list[int] = []  # which call; 0 for other commands

    async def forward_calls(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Client to server, command by command."""
        proxy, parser, rest = self._proxy, hiredis.Reader(notEnoughData=self), b""
        while data := await reader.read(65536):
            rest += data
            while (command := _first_command(rest)) is not None:
                rest = rest[len(command) :]
                parser.feed(command)
                is_call = parser.gets()[0] == b"EVALSHA"
                proxy.calls += is_call
                is_cut = is_call and proxy.cut_at is not None and proxy.calls >= proxy.cut_at
                if is_cut and proxy.where == "before":
                    proxy.cut_at = None
                    proxy.cut()
                    return
                if is_cut and proxy.where == "swallow":
                    continue
                self._asked.append(proxy.calls if is_call else 0)
                writer.write(command)

    async def forward_answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Server to client, as it comes."""
        proxy, parser = self._proxy, hiredis.Reader(notEnoughData=self)
        while data := await reader.read(65536):
            parser.feed(data)
            answered = []
            while parser.gets() is not self:
                answered.append(self._asked.pop(0))
            if proxy.cut_at is not None and proxy.cut_at in answered and proxy.where in {"after", "within"}:
                proxy.cut_at = None
                if proxy.where == "within":
                    writer.write(data[: len(data) // 2])
                    await writer.drain()
                proxy.cut()
                return
            writer.write(data)


def _first_command(data: bytes) -> bytes | None:
    """The first whole command: `*N`, then N times `$LENGTH` and so many bytes."""
    end = data.find(b"\r\n")
    if end < 0:
        return None
    at = end + 2
    for _ in range(int(data[1:end])):
        end = data.find(b"\r\n", at)
        if end < 0:
            return None
        at = end + 2 + int(data[at + 1 : end]) + 2
    return data[:at] if len(data) >= at else None


@asynccontextmanager
async def cutting(url: str) -> AsyncIterator[CuttingProxy]:
    """A proxy that ends with the block."""
    proxy = CuttingProxy(url)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
