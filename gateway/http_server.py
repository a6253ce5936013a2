"""uvicorn's HTTP protocol with bounds on what comes before a request: the size and the time of its head.

Owns: the limits that uvicorn's httptools implementation lacks, and refusals in our error format where no
request reached the app. One sweep a second, O(connections), replaces a timer per request.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.coalesce import CoalescedTransport
from gateway.errors import GatewayError, HeadTooLarge, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

MAX_HEAD_BYTES = 64 * 1024
SWEEP_S = 1.0


class GuardedProtocol(HttpToolsProtocol):
    """One client connection.

    Attributes:
        head_since_s: loop time at which the head that is still coming began; None outside a head.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  # uvicorn's own
        super().__init__(*args, **kwargs)
        self.head_since_s: float | None = None
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
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self.head_since_s = None
        super().on_headers_complete()

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


async def sweep_heads(connections: Iterable[object], patience_s: float) -> None:
    """Cut connections whose head is not whole after `patience_s`, until cancelled."""
    while True:
        await asyncio.sleep(SWEEP_S)
        now_s = asyncio.get_running_loop().time()
        for connection in list(connections):
            since_s = connection.head_since_s if isinstance(connection, GuardedProtocol) else None
            if since_s is not None and now_s - since_s > patience_s:
                connection.transport.abort()  # type: ignore[attr-defined]  # it is a GuardedProtocol
