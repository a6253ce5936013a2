"""Time as a test wants it, and ledgers that live by it."""

from __future__ import annotations

import datetime as dt

from budget.ledger import Amounts, Limit, Unit, Window
from budget.ledgers.memory import MemoryLedger

TEN = Amounts(tokens=10)


class Clock:
    """Seconds since 1970, as a test wants them."""

    def __init__(self, year: int = 2024, month: int = 5, day: int = 17, hour: int = 12) -> None:
        self.now = dt.datetime(year, month, day, hour, tzinfo=dt.UTC).timestamp()

    def __call__(self) -> float:
        """The time."""
        return self.now


def tokens(amount: int, window: Window | None = "hour", scope: str = "key:a", unit: Unit = "tokens") -> Limit:
    """A limit."""
    return Limit(scope=scope, unit=unit, amount=amount, window=window)


def ledger_of(*limits: Limit) -> tuple[MemoryLedger, Clock]:
    """A ledger at noon."""
    clock = Clock()
    return MemoryLedger(limits, clock=clock), clock


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> float:
    """A moment in UTC, as epoch seconds."""
    return dt.datetime(year, month, day, hour, minute, second, tzinfo=dt.UTC).timestamp()
