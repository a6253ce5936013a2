"""Settlements on their way to the store: sent at once, kept until it has them, told again after a loss.

Owns: what the store may not have yet. Does not own: when it counts as lost (leased.py), and that a settlement that is
told twice counts once (the stores).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from itertools import islice

from budget.errors import StoreUnreachable
from budget.ledgers.store import Settlement, Store

log = logging.getLogger("thinkgate.ledger")
AT_ONCE = 1000  # settlements of one delivery: the store has a time for each
MOST_KEPT = 100_000  # about 100 MB


class Outbox:
    """The settlements of one process.

    Args:
        store: where they go.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._in_flight: dict[asyncio.Future[None], list[Settlement]] = {}
        self._kept: deque[Settlement] = deque()

    def send(self, settlement: Settlement) -> None:
        """Send it; kept, should that fail."""
        delivery = self._store.settle((settlement,))
        batch = self._in_flight.get(delivery)
        if batch is None:
            self._in_flight[delivery] = [settlement]
            delivery.add_done_callback(self._was_delivered)
        else:
            batch.append(settlement)

    def keep(self, settlement: Settlement) -> None:
        """Keep it for later, always: what is full only stops what is granted."""
        self._kept.append(settlement)
        if len(self._kept) == MOST_KEPT:
            log.error("too many settlements wait: nothing more is granted without the store")

    def is_full(self) -> bool:
        """So much is kept that nothing should be granted that will have to be kept as well."""
        return len(self._kept) >= MOST_KEPT

    def has_kept(self) -> bool:
        """Something is to be told again."""
        return bool(self._kept)

    def waiting(self) -> int:
        """How many the store may not have."""
        return len(self._kept) + sum(len(batch) for batch in list(self._in_flight.values()))

    async def deliver(self) -> int:
        """Send the oldest AT_ONCE that are kept; how many there were. Raises: StoreUnreachable; then they stay."""
        some = list(islice(self._kept, AT_ONCE))
        if not some:
            return 0
        try:
            await self._store.settle(some)
        except StoreUnreachable:
            raise
        except Exception:  # a bug, which would come again: a sweep settles what was last reported
            log.exception("settlements failed")
        for _ in some:
            self._kept.popleft()
        return len(some)

    async def arrived(self) -> None:
        """Wait until nothing is under way."""
        while self._in_flight:
            await asyncio.wait(self._in_flight)

    def _was_delivered(self, delivery: asyncio.Future[None]) -> None:
        settlements = self._in_flight.pop(delivery)
        exc = StoreUnreachable() if delivery.cancelled() else delivery.exception()
        if isinstance(exc, StoreUnreachable):
            self._kept.extend(settlements)
        elif exc is not None:  # a bug, as above
            log.error("a settlement failed", exc_info=exc)
