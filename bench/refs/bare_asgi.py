"""Raw ASGI under uvicorn with a lean httptools client: the base that a feature's price is added to.

UPSTREAM=127.0.0.1:9100 uvicorn bench.refs.bare_asgi:app --loop uvloop --http httptools --no-access-log
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any, cast

import httptools
import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

UPSTREAM = os.environ.get("UPSTREAM", "127.0.0.1:9100")
HOST, _, PORT = UPSTREAM.partition(":")
PATH = "/v1/chat/completions"
HEAD = f"POST {PATH} HTTP/1.1\r\nhost: {UPSTREAM}\r\ncontent-type: application/json\r\ncontent-length: ".encode()


class Head(msgspec.Struct):
    """What a router has to know of a body."""

    model: str
    stream: bool = False


decode_head = msgspec.json.Decoder(Head).decode


class Wire(asyncio.Protocol):
    """One keep-alive upstream connection; httptools does the parsing."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.parts: list[bytes] = []
        self.waiter: asyncio.Future[None] | None = None
        self.has_head = self.is_done = self.is_lost = False
        self.content_type = b"application/json"
        self.status = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.WriteTransport", transport)

    def begin(self, request: bytes) -> None:
        """Send a request."""
        self.parser = httptools.HttpResponseParser(self)
        self.has_head = self.is_done = False
        self.transport.write(request)

    def on_header(self, name: bytes, value: bytes) -> None:
        """httptools: one header."""
        if name == b"content-type":
            self.content_type = value

    def on_headers_complete(self) -> None:
        """httptools: status and headers are there."""
        self.has_head = True
        self.status = self.parser.get_status_code()

    def on_body(self, part: bytes) -> None:
        """httptools: part of the body."""
        self.parts.append(part)

    def on_message_complete(self) -> None:
        """httptools: the answer is complete."""
        self.is_done = True

    def data_received(self, data: bytes) -> None:
        """Parse, then wake who waits."""
        self.parser.feed_data(data)
        self._wake()

    def connection_lost(self, _exc: Exception | None) -> None:
        """The answer ends here."""
        self.is_lost = self.is_done = True
        self._wake()

    def _wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def _wait(self) -> None:
        self.waiter = self.loop.create_future()
        await self.waiter
        self.waiter = None

    async def head(self) -> None:
        """Wait for status and headers."""
        while not self.has_head and not self.is_lost:
            await self._wait()

    async def whole(self) -> bytes:
        """The body, once it is complete."""
        return b"".join([part async for part in self.chunks()])

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, as it arrives."""
        while True:
            if self.parts:
                joined = b"".join(self.parts)
                self.parts.clear()
                yield joined
            elif self.is_done:
                return
            else:
                await self._wait()


idle: list[Wire] = []


async def call(body: bytes) -> Wire:
    """Send `body` upstream; the head of the answer has arrived when this returns."""
    wire = next((w for w in iter(lambda: idle.pop() if idle else None, None) if not w.is_lost), None)
    if wire is None:
        loop = asyncio.get_running_loop()
        _, wire = await loop.create_connection(Wire, HOST, int(PORT))
    wire.begin(b"%b%d\r\n\r\n%b" % (HEAD, len(body), body))
    await wire.head()
    return wire


async def app(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """The whole gateway."""
    if scope["type"] == "lifespan":
        for phase in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{phase}.complete"})
        return
    message = await receive()
    body = message.get("body", b"")
    while message.get("more_body"):
        message = await receive()
        body += message["body"]
    is_stream = decode_head(body).stream
    wire = await call(body)
    headers = [(b"content-type", wire.content_type)]
    if is_stream:
        await send({"type": "http.response.start", "status": wire.status, "headers": headers})
        async for chunk in wire.chunks():
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
    else:
        whole = await wire.whole()
        headers.append((b"content-length", b"%d" % len(whole)))
        await send({"type": "http.response.start", "status": wire.status, "headers": headers})
        await send({"type": "http.response.body", "body": whole})
    if wire.is_lost:
        wire.transport.close()
    else:
        idle.append(wire)
