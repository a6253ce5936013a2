"""One HTTP connection of the scripted upstream: requests parsed, answers written as their script says.

Owns: framing, gates, deaths and the events of an `Exchange`. What is answered is the server's business.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, TypeAlias

import httptools

from tests.scripted_script import END, Exchange, Reply, Script
from tests.scripted_stream import Stream, dump

Playing: TypeAlias = tuple[Script, Stream]  # how a call is played, and what


class Server(Protocol):
    """What a connection needs of its server."""

    drops_reused: bool
    connections: list[Connection]

    def answer(self, exchange: Exchange, connection: Connection) -> None:
        """Start answering one request."""


class Connection(asyncio.Protocol):
    """One connection of the gateway's."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._running: Exchange | None = None
        self._served = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._headers: dict[str, str] = {}
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # TCP gives a Transport
        self.number = len(self._server.connections)
        self._server.connections.append(self)

    def data_received(self, data: bytes) -> None:
        if self._served and self._server.drops_reused:
            self._transport.close()
            return
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        if self._running is not None:
            self._running.closed.set()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._served += 1
        method = self._parser.get_method().decode()
        path = self._path.decode().partition("?")[0]
        self._running = Exchange(method, path, self._headers, self._body, self.number)
        self._reset()
        self._server.answer(self._running, self)

    def cut(self, how: Literal["close", "reset"]) -> None:
        """Break the connection off, with FIN or with RST."""
        if self._transport.is_closing():
            return
        sock = self._transport.get_extra_info("socket")
        if how == "reset" and sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()

    async def play(self, exchange: Exchange, answer: Reply | Playing) -> None:
        """Write one answer to its end."""
        if isinstance(answer, Reply):
            finished = await self._reply(answer)
        else:
            finished = await self._script(exchange, *answer)
        if finished and not exchange.closed.is_set():
            self._running = None
            exchange.done.set()

    async def _reply(self, reply: Reply) -> bool:
        if reply.gate is not None:
            await reply.gate.hold()
        if reply.raw is not None:
            self._transport.write(reply.raw)
            self._transport.close()
            return True
        length = ("content-length", str(len(reply.body)))
        self._head(reply.status, reply.content_type, [*reply.headers, length])
        self._transport.write(reply.body)
        return True

    def _head(self, status: int, content_type: str, headers: Sequence[tuple[str, str]]) -> None:
        lines = [f"HTTP/1.1 {status} Scripted", "server: uvicorn", f"content-type: {content_type}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._transport.write("\r\n".join([*lines, "", ""]).encode())

    async def _script(self, exchange: Exchange, script: Script, stream: Stream) -> bool:
        await _stand(script, -1)
        if exchange.closed.is_set():
            return False
        if not exchange.json.get("stream"):
            return await self._reply(Reply(body=dump(stream.body())))
        self._head(200, "text/event-stream; charset=utf-8", [("transfer-encoding", "chunked")])
        pending: list[bytes] = []
        for number, one in enumerate(_replaced(stream.events(), script)):
            if number == script.dies_after:
                await self._write(b"".join(pending), script)
                self.cut(script.dies_by)
                return False
            if number in script.gates:
                await self._write(b"".join(pending), script)
                pending.clear()
                await script.gates[number].hold()
            pending.append(one)
            exchange.events_sent = number + 1
            if len(pending) >= script.events_per_write:
                await self._write(b"".join(pending), script)
                pending.clear()
        await self._write(b"".join(pending), script)
        await _stand(script, END)
        if self._transport.is_closing():
            return False
        self._transport.write(b"0\r\n\r\n")
        return True

    async def _write(self, data: bytes, script: Script) -> None:
        size = script.bytes_per_write or len(data)
        for start in range(0, len(data), size or 1):
            piece = data[start : start + size]
            if not self._transport.is_closing():
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0)  # let the other side see the pieces apart
            await self._writable.wait()


async def _stand(script: Script, where: int) -> None:
    if where in script.gates:
        await script.gates[where].hold()


def _replaced(events: Iterator[bytes], script: Script) -> Iterator[bytes]:
    for number, one in enumerate(events):
        chosen = script.replace.get(number, one)
        if chosen is not None:
            yield chosen.replace(b"\n", script.newline)
