"""What a store of budgets does: the port between the ledger of leases (leased.py) and whoever keeps the books.

Owns: the words of that port. Does not own: how a store keeps books (sqlite.py, redis.py).
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Sequence
from typing import Protocol

import msgspec

from budget.ledger import Amounts, LedgerHealth, Limit, Standing, UsageRow


class Booking(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A hold as its store keeps it.

    Attributes:
        hold_id: unique for ever; what makes every call idempotent.
        owner: the process whose lease it is.
        scopes, mode: for the usage it is entered under.
        limits: all that apply, of all scopes.
        ceiling: what is held.
        taken_s: epoch seconds by the owner's clock; tells the windows of a hold that its store has lost.
        requests: that it stands for; other than 1 only for a slice (offline.py).
        slices: of a hold that was granted offline, the hold of each limit out of which it was; else empty.
    """

    hold_id: str
    owner: str
    scopes: tuple[str, ...]
    mode: str
    limits: tuple[Limit, ...]
    ceiling: Amounts
    taken_s: float
    requests: int = 1
    slices: tuple[str, ...] = ()


class Settlement(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The end of a hold.

    Attributes:
        booking: as extended.
        used: what replaces the hold.
        ended_s: epoch seconds by the owner's clock.
        was_taken: False when nobody knows whether the store took it: then it is only released, for good.
    """

    booking: Booking
    used: Amounts
    ended_s: float
    was_taken: bool = True


class Store(Protocol):
    """What a store does, each call atomically and by the store's own clock. All raise StoreUnreachable.

    Calls are carried out in the order in which they were made.

    Attributes:
        is_prompt: a call that is not carried out soon fails by itself; others may wait for as long as they like.
    """

    is_prompt: bool

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        """Hold in every limit or in none; the standings afterwards. Again with the same id: no change.

        `is_certain` holds without looking at what is free: for a hold that was granted and then lost by the store.

        Raises: HoldRefused for the tightest limit that is short; HoldEnded for an id that has ended.
        """

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        """Raise a hold to `booking.ceiling`, by `more`, in its own windows. Again with the same ceiling: no change.

        Raises: HoldRefused, then the hold is as it was; HoldEnded when it was swept or has ended.
        """

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """Replace holds by their use, each exactly once. One that a sweep settled is corrected, once.

        What was used without being held at that time is debt: beyond the ceiling, or beyond what was swept.

        A hold that is unknown here, though it was taken: a store that may lose writes, or that was away while it was
        granted, enters it all the same, in the windows of `taken_s`; for another one it was settled already. In line
        from the call on, before any later call; the future tells when the store has it.
        """

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        """Renew the leases of holds, by id, and note what they used so far; the ids that it has lost."""

    async def sweep(self, lease_s: float) -> int:
        """Settle holds whose lease is over at what was last reported; how many there were.

        No lease is longer than `lease_s` from now on: one that is was given by a clock that was ahead.
        """

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """What was settled on these days, both included."""

    async def health(self) -> LedgerHealth:
        """How it is; never raises."""

    async def close(self) -> None:
        """Let go of files and connections."""
