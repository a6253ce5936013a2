"""Every kind of ledger as a test wants it: fresh books, time in the test's hand, and a look into the books.

A place is one set of books. `ledger()` opens it as one process does; where books are shared, a second call is a
second process. Another store joins the contract tests by another subclass in `PLACES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from budget.ledger import Ledger, Limit, Unit, Window
from budget.ledgers.memory import CalendarAccount, MemoryLedger
from tests.budget.clocks import Clock

Key = tuple[str, Unit, Window | None]
Counts = tuple[int, int, int]


class Place(ABC):
    """One set of books.

    Args:
        folder: empty, for whatever it keeps.

    Attributes:
        clock: the time by which everything there goes.
        is_shared: several processes keep these books, and they outlive each of them.
    """

    is_shared: ClassVar[bool] = True

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

    is_shared = False
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


PLACES: dict[str, Callable[[Path], Place]] = {"memory": MemoryPlace}
