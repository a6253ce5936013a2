"""A lean HTTP/1.1 client for the hot path: pooled keep-alive connections, parsed by httptools.

Owns: connections to one upstream server, their timeouts and flow control. Does not own: what the bytes
mean (chat.py). Why not httpx or aiohttp: docs/adr/0001. Cost per call is O(bytes); a sweep, once a
second, is O(open connections) and replaces a timer per read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httptools

from gateway.edge.coalesce import CoalescedTransport
from gateway.errors import DeadlinePassed, UpstreamError

if TYPE_CHECKING:
    from gateway.config.schema import Timeouts

HIGH_WATER_BYTES = 256 * 1024
IDLE_KEEP_S = 3.0  # after the last byte; uvicorn, and so vLLM, closes idle connections after 5 s: be the first
ENDING_S = 1.0  # how long an answer that was read to its end may take to end its HTTP message
MAX_IDLE = 512


class UpstreamUnreachable(UpstreamError):
    """No connection could be made: nothing was sent, so another backend may be tried."""


class Connection(asyncio.Protocol):
    """One upstream connection, carrying one exchange at a time."""

    __slots__ = (
        "_body",
        "_buffered",
        "_error",
        "_head_done",
        "_is_ending",
        "_is_silent",
        "_keep_alive",
        "_loop",
        "_lost",
        "_parser",
        "_paused",
        "_pool",
        "_sink",
        "_transport",
        "_waiter",
        "content_type",
        "deadline",
        "done",
        "last_read",
        "reused",
        "status",
    )

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._loop = pool.loop
        self._waiter: asyncio.Future[None] | None = None
        self._sink: Callable[[bytes], bool] | None = None
        self._body: list[bytes] = []
        self._buffered = 0
        self._paused = self._lost = self._head_done = self._keep_alive = self._is_ending = False
        self._is_silent = True
        self._error: Exception | None = None
        self.done = True
        self.reused = False
        self.status = 0
        self.content_type = b""
        self.deadline = self.last_read = 0.0

    # -- what asyncio calls
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport; one parser serves all exchanges, for after a message it awaits the next."""
        self._transport = CoalescedTransport(transport, self._loop)  # type: ignore[arg-type]  # TCP gives a Transport
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived and wake the reader."""
        if self.done:  # bytes nobody asked for: the connection cannot be trusted with another exchange
            self._transport.abort()
            return
        self._is_silent = False
        self.last_read = self._loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as exc:
            self.abort(UpstreamError(f"The backend answered with broken HTTP: {exc}"))
            return
        if self._buffered > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            self._transport.pause_reading()
        if self._sink is None or self._body or self.done:
            self._wake()

    def connection_lost(self, _exc: Exception | None) -> None:
        """Fail the exchange, unless it was complete."""
        self._lost = True
        if not self.done and self._error is None:
            self._error = UpstreamError("The backend closed the connection before its answer was complete.")
        self._pool.forget(self)
        self._wake()

    # -- what httptools calls
    def on_message_begin(self) -> None:
        """Raises: UpstreamError, which the parser passes on as its own, for a message after the last one."""
        if self.done:
            raise UpstreamError("The backend sent more than its answer.")

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep the one header that matters."""
        if len(name) == 12 and name.lower() == b"content-type":
            self.content_type = value

    def on_headers_complete(self) -> None:
        """The status is known."""
        self.status = self._parser.get_status_code()
        self._head_done = self.status >= 200

    def on_body(self, body: bytes) -> None:
        """Buffer a piece of the body, unless it is dealt with at once."""
        sink, waiter = self._sink, self._waiter
        if sink is not None and not self._body and waiter is not None and not waiter.done() and sink(body):
            return
        if not self._is_ending:
            self._body.append(body)
            self._buffered += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole; the parser knows only now whether the connection may be kept."""
        if self.status >= 200:
            self.done = True
            self._keep_alive = self._parser.should_keep_alive()
            if self._is_ending:
                self.release()

    # -- what the pool and the backend call
    def start(self, data: bytes, *, first_byte_s: float) -> None:
        """Send one request; the previous exchange must be complete."""
        self._head_done = self.done = self._keep_alive = self._is_ending = False
        self._is_silent = True
        self.last_read = self._loop.time()
        self.deadline = self.last_read + first_byte_s
        self._transport.write(data)

    async def head(self) -> None:
        """Wait for the status line and headers. Raises: UpstreamError, DeadlinePassed."""
        while not self._head_done:
            if self._error is not None:
                raise self._error
            await self._more()

    def divert(self, sink: Callable[[bytes], bool] | None) -> None:
        """Offer each further piece of this body to `sink` first, while somebody waits in `read` for just that.

        What it takes (True) is dealt with in the same turn of the event loop, and wakes nobody.
        """
        self._sink = sink

    async def read(self) -> bytes:
        """The next piece of the body, all that arrived; empty at its end.

        Raises: UpstreamError when the backend breaks off, DeadlinePassed when it falls silent.
        """
        while not self._body:
            if self.done:
                return b""
            if self._error is not None:
                raise self._error
            await self._more()
        return self._take()

    async def read_all(self, limit_bytes: int) -> bytes:
        """The whole body. Raises: UpstreamError when it is longer than `limit_bytes`."""
        if self.done and self._buffered <= limit_bytes and self._error is None:
            return self._take()  # all of it came with the head
        pieces, size = [], 0
        while piece := await self.read():
            pieces.append(piece)
            size += len(piece)
            if size > limit_bytes:
                self.abort(UpstreamError("The backend's answer is too large."))
        if self._error is not None:
            raise self._error
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _take(self) -> bytes:
        """What is buffered; reading goes on if it was paused."""
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._body.clear()
        self._buffered = 0
        if self._paused:
            self._paused = False
            self.last_read = self._loop.time()
            self._transport.resume_reading()
        return body

    def end(self) -> None:
        """Let the rest of the message, of which nothing is needed, arrive by itself; then back to the pool."""
        self._is_ending = True
        self._body.clear()
        if self._paused:
            self._paused = False
            self._transport.resume_reading()

    def release(self) -> None:
        """End the exchange: back to the pool when complete, else close the connection at once."""
        self._sink = None
        if self._is_ending and not self.done and not self._lost:
            return
        if self.done and not self._lost and not self._body and self._keep_alive:
            self._pool.park(self)
        else:
            self._transport.abort()

    def abort(self, error: Exception) -> None:
        """Close the connection; what has arrived may still be read, then the exchange fails with `error`."""
        if self._error is None:
            self._error = error
        self._transport.abort()
        self._wake()

    def is_stale(self) -> bool:
        """The peer closed this reused connection before it answered a single byte."""
        return self._lost and self.reused and self._is_silent

    def check_time(self, now: float, idle_s: float) -> None:
        """Fail the exchange if the backend has been silent too long; the sweep calls this."""
        if self.done or self._paused:
            return
        if not self._head_done and now > self.deadline:
            self.abort(DeadlinePassed("The backend did not begin its answer in time.", retry_after_s=1.0))
        elif self._is_ending and now - self.last_read > ENDING_S:
            self.abort(UpstreamError("The backend did not end its answer."))
        elif self._head_done and now - self.last_read > idle_s:
            self.abort(DeadlinePassed("The backend fell silent in the middle of its answer.", retry_after_s=1.0))

    def is_open(self) -> bool:
        """Whether another exchange may be started."""
        return not self._lost and not self._transport.is_closing()

    def _more(self) -> asyncio.Future[None]:
        """To be awaited: done when something has happened."""
        self._waiter = self._loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class Pool:
    """Connections to one server: newest idle one first, so that the rest can age and close.

    Args:
        url: `http://host:port` or `https://host/prefix`.
        headers: sent with every request, e.g. the backend's own credential.
        timeouts: how long to wait for what.

    Attributes:
        tls: what certificates are checked with; None for plain HTTP.
    """

    def __init__(self, url: str, *, headers: Sequence[tuple[str, str]] = (), timeouts: Timeouts) -> None:
        parts = urlsplit(url)
        self.base_url = url
        self.headers = dict(headers)
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._prefix = parts.path.rstrip("/")
        self._fixed = f"HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in headers
        )
        self._timeouts = timeouts
        self._heads: dict[str, bytes] = {}
        self._idle: list[Connection] = []
        self._open: set[Connection] = set()
        self.loop: asyncio.AbstractEventLoop

    async def send(
        self, path: str, body: bytes, *, extra_headers: Sequence[tuple[bytes, bytes]] = (), method: str = "POST"
    ) -> Connection:
        """Send one request and wait for the head of its answer.

        The caller must `release` the connection. A reused connection that the server had closed
        meanwhile is replaced once: no byte of an answer came, so nothing was processed twice.

        Raises: UpstreamUnreachable, UpstreamError, DeadlinePassed.
        """
        data = self._request(method, path, body, extra_headers)
        connection = self._take_idle() or await self._connect()
        try:
            connection.start(data, first_byte_s=self._timeouts.first_byte_s)
            try:
                await connection.head()
            except UpstreamError:
                if not connection.is_stale():
                    raise
                connection = await self._connect()
                connection.start(data, first_byte_s=self._timeouts.first_byte_s)
                await connection.head()
        except BaseException:
            connection.release()
            raise
        return connection

    def _request(self, method: str, path: str, body: bytes, extra: Sequence[tuple[bytes, bytes]]) -> bytes:
        key = method + path
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = f"{method} {self._prefix}{path} {self._fixed}".encode()
        if extra:
            head += b"".join([b"%b: %b\r\n" % pair for pair in extra])
        return b"%bcontent-length: %d\r\n\r\n%b" % (head, len(body), body)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open():
                connection.reused = True
                return connection
        return None

    async def _connect(self) -> Connection:
        self.loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(self._timeouts.connect_s):
                _, connection = await self.loop.create_connection(
                    lambda: Connection(self), self.host, self.port, ssl=self.tls
                )
        except (OSError, TimeoutError) as exc:
            raise UpstreamUnreachable("The backend cannot be reached.", retry_after_s=1.0) from exc
        self._open.add(connection)
        return connection

    def busy(self) -> int:
        """Connections that carry an exchange."""
        return sum(not connection.done for connection in self._open)

    def park(self, connection: Connection) -> None:
        """Keep an idle connection for the next request."""
        if len(self._idle) >= MAX_IDLE:
            connection.abort(UpstreamError("too many idle connections"))
            return
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """Drop a connection that is gone."""
        self._open.discard(connection)

    def sweep(self) -> None:
        """Once a second: fail silent exchanges, close old idle connections. O(open connections)."""
        if not self._open:
            return
        now = self.loop.time()
        for connection in list(self._open):
            connection.check_time(now, self._timeouts.idle_s)
        keep = [c for c in self._idle if now - c.last_read < IDLE_KEEP_S and c.is_open()]
        for connection in set(self._idle).difference(keep):
            connection.abort(UpstreamError("idle"))
        self._idle = keep

    def close(self) -> None:
        """Close every connection; running exchanges fail."""
        for connection in list(self._open):
            connection.abort(UpstreamError("The gateway closed this backend."))
        self._idle.clear()
