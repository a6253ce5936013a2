"""A transport whose writes of one turn of the event loop go out together, after everything else of that turn.

Owns: holding writes back until the turn's other callbacks have run. A response's head and body become one
system call, and the requests that are ready at the same time run one after the other without system calls
in between, which costs far less than it sounds: each call into the kernel leaves branch predictors and
caches cold (docs/adr/0008). O(bytes).
"""

from __future__ import annotations

import asyncio
from typing import Any

MOST_HELD_BYTES = 64 * 1024


class CoalescedTransport:
    """Wraps one TCP transport; whatever is not about writing is the wrapped transport's own.

    Args:
        transport: the transport.
        loop: whose turns count.
    """

    __slots__ = ("_held", "_held_bytes", "_loop", "_transport", "is_closing")

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self.is_closing = transport.is_closing  # asked twice per request
        self._held: list[bytes] = []
        self._held_bytes = 0

    def write(self, data: bytes) -> None:
        """Send `data` at the end of this turn, or at once when much is held already."""
        held = self._held
        if not held:
            self._loop.call_soon(self.flush)
        held.append(data)
        self._held_bytes += len(data)
        if self._held_bytes > MOST_HELD_BYTES:
            self.flush()

    def write_now(self, data: bytes) -> None:
        """Send `data` at once, behind what is held."""
        if self._held:
            self._held.append(data)
            self.flush()
        elif not self.is_closing():
            self._transport.write(data)

    def flush(self) -> None:
        """Send what is held, unless the connection was lost in the meantime."""
        held = self._held
        if held:
            data = held[0] if len(held) == 1 else b"".join(held)
            held.clear()
            self._held_bytes = 0
            if not self.is_closing():  # uvloop raises where asyncio is silent
                self._transport.write(data)

    def close(self) -> None:
        """Send what is held, then close."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once; what is held is lost."""
        self._held.clear()
        self._held_bytes = 0
        self._transport.abort()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever a transport has
        return getattr(self._transport, name)
