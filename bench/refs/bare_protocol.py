"""The ceiling for Python: a pass-through with no ASGI at all.

asyncio protocols on both sides over uvloop, httptools for the requests, upstream bytes relayed verbatim
(status line, headers, chunk framing and all).

    python bench/refs/bare_protocol.py 9309 127.0.0.1:9100
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import httptools
import msgspec
import uvloop

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"


class Head(msgspec.Struct):
    """What a router has to know of a body."""

    model: str
    stream: bool = False


decode_head = msgspec.json.Decoder(Head).decode


class Relay:
    """The pool of upstream connections, and whose turn each of them is."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self.loop = asyncio.get_running_loop()
        self.idle: list[Upstream] = []
        self.dialling: set[asyncio.Task[None]] = set()

    def send(self, client: Client, request: bytes) -> None:
        """Put `request` on an idle connection, or on a new one."""
        while self.idle:
            upstream = self.idle.pop()
            if upstream.is_alive:
                upstream.begin(client, request)
                return
        task = self.loop.create_task(self._dial(client, request))
        self.dialling.add(task)
        task.add_done_callback(self.dialling.discard)

    async def _dial(self, client: Client, request: bytes) -> None:
        _, upstream = await self.loop.create_connection(lambda: Upstream(self), self.host, self.port)
        upstream.begin(client, request)


class Upstream(asyncio.Protocol):
    """One connection to the model server."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.client: Client | None = None
        self.is_alive = True
        self.is_finished = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.WriteTransport", transport)

    def begin(self, client: Client, request: bytes) -> None:
        """Send a request on behalf of `client`."""
        self.client = client
        self.is_finished = False
        self.parser = httptools.HttpResponseParser(self)  # only to see the end
        self.transport.write(request)

    def on_message_complete(self) -> None:
        """httptools: the answer is complete."""
        self.is_finished = True

    def data_received(self, data: bytes) -> None:
        """Relay, and go idle at the end."""
        self.parser.feed_data(data)
        if self.client is not None and self.client.transport is not None:
            self.client.transport.write(data)
        if self.is_finished:
            self.client = None
            self.relay.idle.append(self)

    def connection_lost(self, _exc: Exception | None) -> None:
        """An answer that breaks off breaks off for the client."""
        self.is_alive = False
        if self.client is not None and self.client.transport is not None:
            self.client.transport.close()


class Client(asyncio.Protocol):
    """One connection of a client."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.transport: asyncio.WriteTransport | None = None
        self.parser = httptools.HttpRequestParser(self)
        self.url = b""
        self.body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.WriteTransport", transport)

    def connection_lost(self, _exc: Exception | None) -> None:
        """Whatever still arrives for it goes nowhere."""
        self.transport = None

    def data_received(self, data: bytes) -> None:
        """Bytes to the parser."""
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        """httptools: a request begins."""
        self.body = []

    def on_url(self, url: bytes) -> None:
        """httptools: its path."""
        self.url = url

    def on_body(self, part: bytes) -> None:
        """httptools: part of its body."""
        self.body.append(part)

    def on_message_complete(self) -> None:
        """httptools: the request is complete."""
        assert self.transport is not None
        if self.parser.get_method() == b"GET":
            self.transport.write(OK)
            return
        body = b"".join(self.body)
        decode_head(body)
        head = b"POST %b HTTP/1.1\r\nhost: %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.relay.send(self, head % (self.url, self.relay.host.encode(), len(body)) + body)


async def main() -> None:
    """Serve until killed."""
    host, _, port = sys.argv[2].partition(":")
    relay = Relay(host, int(port))
    server = await relay.loop.create_server(lambda: Client(relay), "127.0.0.1", int(sys.argv[1]), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
