"""A pipelined connection to Redis: calls of one turn of the loop leave in one write, replies come back in order.

Owns: connecting, the order of calls, and that all of them fail together when the connection does. redis-py reads the
URL and shakes hands (TLS, AUTH, SELECT); from then on the socket belongs to a protocol of our own, because redis-py's
client takes about 100 us of CPU for each command. Does not own: what is said (redis.py).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, cast

from budget.errors import StoreUnreachable
from budget.redis_calls import cancellable

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

log = logging.getLogger("thinkgate.ledger")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
# This server does not keep these books, or cannot now: after connecting anew, another may.
ELSEWHERE = ("MOVED", "ASK", "READONLY", "NOSCRIPT", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN")


class Wire(asyncio.Protocol):
    """One connection, from when the handshake is over until it breaks.

    Args:
        transport: connected.
        timeout_s: for the server to answer a call.
    """

    def __init__(self, transport: asyncio.Transport, timeout_s: float) -> None:
        import hiredis

        self._reader = hiredis.Reader(notEnoughData=self)
        self._transport = transport
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[asyncio.Future[Any], float]] = deque()  # each with when it is too late
        self._outgoing: list[bytes] = []
        self._watch: asyncio.TimerHandle | None = None
        self.broke: str | None = None
        transport.set_protocol(self)

    def send(self, command: bytes) -> asyncio.Future[Any]:
        """Send a packed command behind all others of this turn; the future has its reply, or StoreUnreachable."""
        reply: asyncio.Future[Any] = self._loop.create_future()
        if self.broke is not None:
            reply.set_exception(StoreUnreachable(self.broke))
            return reply
        if not self._outgoing:
            self._loop.call_soon(self._flush)
        self._outgoing.append(command)
        self._waiting.append((reply, self._loop.time() + self._timeout_s))
        if self._watch is None:
            self._watch = self._loop.call_later(self._timeout_s, self._look_after)
        return reply

    def _flush(self) -> None:
        if self._outgoing:
            self._transport.write(b"".join(self._outgoing))
            self._outgoing.clear()

    def _look_after(self) -> None:
        """Give up when the oldest call was not answered in time."""
        self._watch = None
        if self._waiting:
            late_s = self._waiting[0][1]
            if late_s <= self._loop.time():
                self.give_up("the server does not answer")
            else:
                self._watch = self._loop.call_at(late_s, self._look_after)

    def data_received(self, data: bytes) -> None:
        """Give replies to those who wait for them, in order."""
        self._reader.feed(data)
        while (answer := self._reader.gets()) is not self and self._waiting:
            reply, _ = self._waiting.popleft()
            if isinstance(answer, Exception):
                self._refuse(reply, str(answer))
            elif not reply.done():
                reply.set_result(answer)

    def _refuse(self, reply: asyncio.Future[Any], why: str) -> None:
        if not reply.done():
            reply.set_exception(StoreUnreachable(why))
        if why.startswith(ELSEWHERE):
            self.give_up(why)
        else:
            log.error("the budget store refused a call", extra={"reason": why})

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail what waits for a reply."""
        self.give_up("the connection broke" if exc is None else f"the connection broke: {exc}")

    def give_up(self, why: str) -> None:
        """Hang up; every call that waits fails."""
        if self.broke is not None:
            return
        self.broke = why
        if self._watch is not None:
            self._watch.cancel()
        # What the kernel has not sent yet is thrown away: it must not arrive after the same was sent elsewhere.
        sock = self._transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self._transport.abort()
        self._outgoing.clear()
        waiting, self._waiting = self._waiting, deque()
        for reply, _ in waiting:
            if not reply.done():
                reply.set_exception(StoreUnreachable(why))


class Line:
    """The way to the server at `url`: a wire, connected when it is first needed and again after it broke.

    Args:
        url: `redis://`, `rediss://` or `unix://`, as redis-py reads them. A cluster's nodes lead to the right one.
        timeout_s: to connect, and for the server to answer a call.
        greet: carried out on each new wire before anything else is sent; may raise StoreUnreachable.

    Raises: ImportError without the extra `thinkgate[redis]`; ValueError for a URL that cannot be read.
    """

    def __init__(self, url: str, *, timeout_s: float, greet: Callable[[Wire], Awaitable[None]]) -> None:
        try:
            import hiredis  # noqa: F401  # the wires need it; better said now than with the first request
            from redis.asyncio import ConnectionPool
        except ImportError as exc:
            raise ImportError("the redis store needs more packages: pip install 'thinkgate[redis]'") from exc
        self._pool = ConnectionPool.from_url(
            url, protocol=2, socket_connect_timeout=timeout_s, socket_timeout=timeout_s, client_name="thinkgate"
        )
        self._timeout_s = timeout_s
        self._greet = greet
        self._opening = asyncio.Lock()
        self._pause_s = self._not_before_s = 0.0
        self._moved_to: tuple[str, int] | None = None
        self._is_closed = False
        self._connection: AbstractConnection | None = None
        self._wire: Wire | None = None

    @property
    def wire(self) -> Wire | None:
        """The open wire, if there is one."""
        return self._wire if self._wire is not None and self._wire.broke is None else None

    async def open(self) -> Wire:
        """The open wire, after connecting if need be.

        Raises: StoreUnreachable, also while it is too early for a new attempt.
        """
        async with self._opening:
            if self._wire is not None and self._wire.broke is None:
                return self._wire
            if self._is_closed:
                raise StoreUnreachable("the connection was closed")
            loop = asyncio.get_running_loop()
            if loop.time() < self._not_before_s:
                raise StoreUnreachable("the last attempt to connect failed a moment ago")
            try:
                self._wire = await self._greeted()
            except BaseException:  # whoever waits in line fails too, instead of trying for as long as this one did
                self._pause_s = min(max(FIRST_PAUSE_S, 2 * self._pause_s), LONGEST_PAUSE_S)
                self._not_before_s = loop.time() + self._pause_s
                raise
            self._pause_s = 0.0
            return self._wire

    async def _greeted(self) -> Wire:
        """A new wire instead of the old one."""
        await self._let_go()
        wire = await self._connect()
        try:
            await self._greet(wire)
        except BaseException:
            wire.give_up("the greeting failed")
            raise
        return wire

    async def _connect(self) -> Wire:
        from redis.asyncio.connection import Connection
        from redis.exceptions import RedisError

        connection = self._connection = self._pool.connection_class(**self._pool.connection_kwargs)
        moved_to, self._moved_to = self._moved_to, None
        if isinstance(connection, Connection) and moved_to is not None:
            connection.host, connection.port = moved_to
        try:
            with cancellable():
                await connection.connect()  # type: ignore[no-untyped-call]
        except (RedisError, OSError) as exc:
            raise StoreUnreachable(str(exc)) from exc
        assert connection._writer is not None, "it is connected"
        return Wire(cast("asyncio.Transport", connection._writer.transport), self._timeout_s)

    async def _let_go(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            self._moved_to = _moved_to(wire.broke or "")
            wire.give_up("the connection was closed")
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)

    async def close(self) -> None:
        """Hang up for good; calls that wait fail."""
        async with self._opening:
            self._is_closed = True
            await self._let_go()


def _moved_to(why: str) -> tuple[str, int] | None:
    """Where a node of a cluster sends us: `MOVED 866 10.0.0.7:6379`."""
    words = why.split()
    if len(words) != 3 or words[0] != "MOVED":
        return None
    host, _, port = words[2].rpartition(":")
    return host, int(port)
