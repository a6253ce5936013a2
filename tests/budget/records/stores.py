"""The three kinds of records, each empty and with its own way to let time pass."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from redis.asyncio import Redis

from budget.records.port import Records


class Clock:
    """Time that passes when a test says so."""

    def __init__(self, now: float = 1_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        """Seconds since the epoch."""
        return self.now


@dataclass(frozen=True, slots=True)
class Store:
    """One kind of records.

    Attributes:
        kind: memory, sqlite or redis.
        records: what is tested.
        pass_time: lets so many seconds pass for it; returns when they have.
    """

    kind: str
    records: Records
    pass_time: Callable[[float], Awaitable[None]]


def by_clock(clock: Clock) -> Callable[[float], Awaitable[None]]:
    """Time that is passed in."""

    async def pass_time(seconds: float) -> None:
        clock.now += seconds

    return pass_time


def by_server(client: Redis) -> Callable[[float], Awaitable[None]]:
    """The server's own clock cannot be set; instead, all that has a time to live gets so much nearer to its end."""

    async def pass_time(seconds: float) -> None:
        async for name in client.scan_iter():
            left_ms = await client.pttl(name)
            if left_ms > 0:
                await client.pexpire(name, left_ms - round(seconds * 1000))

    return pass_time
