"""Every kind of ledger as a test wants it: fresh books, time in the test's hand, and a look into the books.

A place is one set of books. `ledger()` opens it as one process does; where books are shared, a second call is a
second process. Another store joins the contract tests by another subclass in `PLACES`.
"""

from __future__ import annotations

import sqlite3
from abc import ABC, abstractmethod
from contextlib import closing
from pathlib import Path
from typing import ClassVar

from budget.accounts import CalendarAccount
from budget.books import RATES
from budget.ledger import Ledger, Limit, Unit, Window
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.memory import MemoryLedger
from budget.ledgers.redis import RedisStore
from budget.ledgers.sqlite import SqliteStore
from budget.ledgers.store import Store
from tests.budget.clocks import Clock
from tests.budget.valkey import valkey

Key = tuple[str, Unit, Window | None]
Counts = tuple[int, int, int]


class Place(ABC):
    """One set of books.

    Args:
        folder: empty, for whatever it keeps.

    Attributes:
        clock: the time by which everything there goes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.clock = Clock()

    @abstractmethod
    def ledger(self, *limits: Limit) -> Ledger:
        """The books as one process has them open."""

    @abstractmethod
    async def books(self) -> dict[Key, dict[int, Counts]]:
        """Settled, held and debt of each limit in each calendar window, by the window's start; not of rates."""

    @abstractmethod
    async def close(self) -> None:
        """End all processes, and the books with them."""


class MemoryPlace(Place):
    """In memory."""

    ledger_class: ClassVar[type[MemoryLedger]] = MemoryLedger

    def ledger(self, *limits: Limit) -> MemoryLedger:
        self._ledger = self.ledger_class(limits, clock=self.clock)
        return self._ledger

    async def books(self) -> dict[Key, dict[int, Counts]]:
        return {
            key: {start: (page.settled, page.held, page.debt) for start, page in account.books.items()}
            for key, account in self._ledger._known.items()
            if isinstance(account, CalendarAccount)
        }

    async def close(self) -> None:
        await self._ledger.close()


class LeasedPlace(Place):
    """In a store that processes share.

    Attributes:
        kind: as in the configuration.
        lease_s: of every hold. No sum of the steps that tests make is as long.
        address: what another process needs to know to open the books.
    """

    kind: ClassVar[str]
    address: str

    lease_s: ClassVar[float] = 10.0625
    timeout_s: ClassVar[float] = 10.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.stores: list[Store] = []
        self.ledgers: list[LeasedLedger] = []

    @abstractmethod
    def store(self) -> Store:
        """A process's way to the books."""

    @abstractmethod
    async def read(self) -> dict[Key, dict[int, Counts]]:
        """As `books`, of what has arrived in the store."""

    def ledger(self, *limits: Limit, store: Store | None = None) -> LeasedLedger:
        self.stores.append(store or self.store())
        ledger = LeasedLedger(self.stores[-1], limits, clock=self.clock, lease_s=self.lease_s, timeout_s=self.timeout_s)
        self.ledgers.append(ledger)
        return ledger

    async def kill(self, ledger: LeasedLedger) -> None:
        """End a process without a word to its store; what it had sent has arrived."""
        await ledger.health()
        at = self.ledgers.index(ledger)
        del self.ledgers[at]
        await self.stores.pop(at).close()

    async def books(self) -> dict[Key, dict[int, Counts]]:
        for ledger in self.ledgers:
            await ledger.health()  # carried out after everything that was sent before
        return await self.read()

    async def close(self) -> None:
        for ledger in self.ledgers:
            await ledger.close()


class SqlitePlace(LeasedPlace):
    """In a file."""

    kind = "sqlite"
    store_class: ClassVar[type[SqliteStore]] = SqliteStore

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.address = str(folder / "thinkgate.db")

    def store(self) -> SqliteStore:
        return self.store_class(Path(self.address), clock=self.clock)

    async def read(self) -> dict[Key, dict[int, Counts]]:
        found: dict[Key, dict[int, Counts]] = {}
        with closing(sqlite3.connect(self.address)) as connection:
            for scope, unit, window, start_s, *counts in connection.execute(
                "SELECT scope, unit, window, start_s, settled, held, debt FROM books"
            ):
                if window not in RATES:
                    found.setdefault((scope, unit, window or None), {})[start_s] = (counts[0], counts[1], counts[2])
        return found


class RedisPlace(LeasedPlace):
    """In a Valkey server, which is emptied first."""

    kind = "redis"
    store_class: ClassVar[type[RedisStore]] = RedisStore

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.address = valkey().connection_url
        self._client = valkey().client()
        self._client.flushall()

    def forget(self) -> None:
        """Lose everything, as a restart without persistence does."""
        self._client.flushall()

    def store(self) -> RedisStore:
        return self.store_class(self.address, linger_s=0.0, clock=self.clock)

    async def read(self) -> dict[Key, dict[int, Counts]]:
        found: dict[Key, dict[int, Counts]] = {}
        for key in self._client.scan_iter("{thinkgate}:a:*", _type="hash"):
            scope, unit, window = key.decode().removeprefix("{thinkgate}:a:").rsplit("|", 2)
            fields = {name.decode(): int(number) for name, number in self._client.hgetall(key).items()}
            found[scope, unit, window or None] = {
                int(start): (fields.get(f"{start}s", 0), fields.get(f"{start}h", 0), fields.get(f"{start}d", 0))
                for start in {name[:-1] for name in fields if name != "n"}
            }
        return found

    async def close(self) -> None:
        await super().close()
        self._client.close()


PLACES: dict[str, type[Place]] = {"memory": MemoryPlace, "redis": RedisPlace, "sqlite": SqlitePlace}
SHARED = sorted(name for name, place in PLACES.items() if issubclass(place, LeasedPlace))
