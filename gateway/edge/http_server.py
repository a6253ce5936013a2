"""uvicorn's HTTP protocol with bounds on what comes before a request: the size and the time of its head.

Owns: the limits that uvicorn's httptools implementation lacks, refusals in our error format where no
request reached the app, and a short way for responses that are there as a whole. One sweep a second,
O(connections), replaces two timers per request.
"""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from gateway.edge.coalesce import CoalescedTransport
from gateway.edge.exchange import BODY_PART, WHOLE_RESPONSE
from gateway.errors import GatewayError, HeadTooLarge, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from gateway.edge.exchange import Send
    from gateway.errors import Headers

MAX_HEAD_BYTES = 64 * 1024
SWEEP_S = 1.0


class GuardedProtocol(HttpToolsProtocol):
    """One client connection.

    Attributes:
        head_since_s: loop time at which the head that is still coming began; None outside a head.
        idle_since_s: loop time at which the last response ended; None once another request began.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # uvicorn's own
        super().__init__(*args, **kwargs)
        self.head_since_s: float | None = None
        self.idle_since_s: float | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """The first head is awaited from now on."""
        super().connection_made(CoalescedTransport(transport, self.loop))  # type: ignore[arg-type]  # it has all of it
        self.head_since_s = self.loop.time()

    def data_received(self, data: bytes) -> None:
        """Parse, and count what did not complete a head."""
        super().data_received(data)
        if self.head_since_s is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HeadTooLarge(f"The request's headers are larger than {MAX_HEAD_BYTES} bytes."))

    def on_message_begin(self) -> None:
        """A head begins."""
        super().on_message_begin()
        self.head_since_s = self.loop.time()
        self.idle_since_s = None
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """The head is whole; the app runs in a later turn of the loop."""
        self.head_since_s = None
        super().on_headers_complete()
        self.scope["extensions"] = EXTENSIONS  # type: ignore[typeddict-item]  # ours are functions

    def on_response_complete(self) -> None:
        """The next request may come, unless it is here already: then uvicorn begins it."""
        if self.pipeline or self.transport.is_closing():
            super().on_response_complete()
            return
        self.server_state.total_requests += 1
        self.flow.resume_reading()
        self.idle_since_s = self.loop.time()

    def look(self, now_s: float, patience_s: float) -> None:
        """End what takes too long: a head, or an idle connection; the sweep calls this."""
        if self.head_since_s is not None and now_s - self.head_since_s > patience_s:
            self.transport.abort()
        elif self.idle_since_s is not None and now_s - self.idle_since_s > self.timeout_keep_alive:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """Broken HTTP, in the error format of everything else."""
        self._refuse(InvalidRequest(f"This is not valid HTTP: {msg}", code="invalid_http"))

    def _refuse(self, error: GatewayError) -> None:
        if self.transport.is_closing():
            return
        body = error.body()
        self.head_since_s = None
        self.transport.write(
            b"HTTP/1.1 %d Refused\r\ncontent-type: application/json\r\n"
            b"connection: close\r\ncontent-length: %d\r\n\r\n%b" % (error.http_status, len(body), body)
        )
        self.transport.close()


def respond(send: Send, status: int, headers: Headers, body: bytes) -> bool:
    """Write a whole response; `headers` name its length. False, with nothing written, where uvicorn must do it.

    uvicorn takes a response in two messages and looks at each header for what it might mean. Here that is
    known; whatever else is out of the ordinary is left to uvicorn, also a header that would end its line.
    """
    cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined]  # uvicorn's `send` is its method
    if (
        cycle.response_started
        or cycle.disconnected
        or cycle.flow.write_paused
        or cycle.access_log
        or not cycle.keep_alive
        or cycle.scope["method"] == "HEAD"
    ):
        return False
    headers = [*headers, *cycle.default_headers]
    head = b"\r\n".join(map(b": ".join, headers))
    line_ends = len(headers) - 1
    if head.count(b"\n") != line_ends or head.count(b"\r") != line_ends:
        return False
    cycle.transport.write(b"%b%b\r\n\r\n%b" % (STATUS_LINE[status], head, body))
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.message_event.set()
    cycle.on_response()
    return True


def write_part(send: Send, body: bytes) -> bool:
    """Write a part of a chunked body that goes on. False, with nothing written, where uvicorn must do it.

    A streamed token is one such part: a coroutine and two dictionaries for each are most of what uvicorn costs.
    """
    cycle: RequestResponseCycle = send.__self__  # type: ignore[attr-defined]
    if (
        cycle.flow.write_paused
        or cycle.disconnected
        or cycle.response_complete
        or not cycle.chunked_encoding  # nor None: the response has not begun, or has no body
        or not body  # which would end it
    ):
        return False
    cycle.transport.write_now(b"%x\r\n%b\r\n" % (len(body), body))  # type: ignore[attr-defined]  # ours
    return True


# Functions, and no state: a scope that refers to its own cycle is garbage that only the collector finds, and until it
# does, every request runs in memory that no cache has.
EXTENSIONS = MappingProxyType({WHOLE_RESPONSE: respond, BODY_PART: write_part})


async def sweep_heads(connections: Iterable[object], patience_s: float) -> None:
    """Cut connections whose head is not whole after `patience_s`, and close idle ones, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_S)
        now_s = asyncio.get_running_loop().time()
        for connection in list(connections):
            if isinstance(connection, GuardedProtocol):
                connection.look(now_s, patience_s)
