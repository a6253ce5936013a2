"""Time and limits as a test wants them."""

from __future__ import annotations

import datetime as dt

from budget.ledger import Amounts, Limit, Unit, Window

TEN = Amounts(tokens=10)
NOON = dt.datetime(2024, 5, 17, 12, tzinfo=dt.UTC)


class Clock:
    """Seconds since 1970, as a test wants them."""

    def __init__(self) -> None:
        self.now = NOON.timestamp()

    def __call__(self) -> float:
        """The time."""
        return self.now


def tokens(amount: int, window: Window | None = "hour", scope: str = "key:a", unit: Unit = "tokens") -> Limit:
    """A limit."""
    return Limit(scope=scope, unit=unit, amount=amount, window=window)


def utc(year: int, month: int, day: int, hour: int = 0, minute: int = 0, second: int = 0) -> float:
    """A moment in UTC, as epoch seconds."""
    return dt.datetime(year, month, day, hour, minute, second, tzinfo=dt.UTC).timestamp()
