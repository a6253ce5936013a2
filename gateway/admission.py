"""Calls wait here, not at the backends, while all backends of a model are full by their own account.

Owns: waiting: whose turn it is (router/queue.py), for how long, and refusing at once what could not be served in time.
A backend is full when it says that calls wait there (gateway/load.py); nothing is guessed. While any has room a call
pays one look at each slot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gateway.errors import DeadlinePassed, Overloaded
from router.queue import FairQueue, QueueFull

if TYPE_CHECKING:
    from gateway.config.placing import QueueConfig
    from gateway.slots import Slot
    from router.queue import Ticket

Turn = asyncio.Future[None]
FORGET = 0.1
KV_FULL = 0.85  # as placement has it: from there on calls are preempted


class Admission:
    """To the backends of one model.

    Args:
        name: of the model, for refusals.
        slots: its backends.
        config: how many may wait, and how long.
        clock: monotonic seconds.

    Attributes:
        waited_s: of calls that waited, seconds in all.
        waited: how many those were.
        shed: calls refused because too many waited.
    """

    def __init__(self, name: str, slots: Sequence[Slot], config: QueueConfig, clock: Callable[[], float]) -> None:
        self.name, self._clock = name, clock
        self._queue: FairQueue[Turn] = FairQueue(config.max_waiting)
        self._called = 0  # whose turn it is, and who have not been placed yet
        self._turn_s = 0.0  # between two turns, as of late
        self.waited_s = 0.0
        self.waited = self.shed = 0
        self.use(slots, config)

    def use(self, slots: Sequence[Slot], config: QueueConfig) -> None:
        """These are the backends from now on, and these the bounds; who waits goes on waiting."""
        self._slots, self.config = slots, config
        self._queue.most = config.max_waiting
        for slot in slots:
            slot.became_free = self._pump

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._queue)

    def saturation(self) -> float:
        """How full all backends are by their own account, 0 (some has room) to 1 (a call would be refused).

        The greatest of: calls that wait here, of as many as may; the time that one more would wait, of as long as it
        may; and KV memory above KV_FULL of the backend that has most left.
        """
        up = [slot.standing.kv_use for slot in self._slots if slot.is_up]
        if self.is_open() or not up:
            return 0.0
        waits = len(self._queue)
        shares = (
            waits / self.config.max_waiting,
            self._turn_s * (waits + 1) / self.config.max_wait_s,
            (min(up) - KV_FULL) / (1 - KV_FULL),
        )
        return min(1.0, max(0.0, *shares))

    def is_open(self) -> bool:
        """Whether a call may go on at once."""
        return not len(self._queue) and self._room() > 0

    async def enter(self, tenant: str, *, priority: int, tokens: int, deadline_s: float | None) -> None:
        """Wait until it is this call's turn; it is to be placed before anything else is awaited.

        Args:
            tenant: who pays.
            priority: its class; lower goes first.
            tokens: what the tenant is charged for, about.
            deadline_s: when waiting is of no use any more, on the clock.

        Raises: Overloaded when too many wait, or it would wait too long, or did; DeadlinePassed when it would not be
            its turn in time, or was not.
        """
        now_s = self._clock()
        ahead = self._queue.ahead(tenant, priority)
        expected_s = self._turn_s * ahead
        if deadline_s is not None and now_s + expected_s > deadline_s:
            raise DeadlinePassed("The request's time would pass before a backend has room.")
        if expected_s > self.config.max_wait_s:
            raise self._too_long(f"it would be about {expected_s:.0f} s until")
        turn: Turn = asyncio.get_running_loop().create_future()
        try:
            ticket, dropped = self._queue.push(turn, tenant, priority=priority, tokens=tokens, now_s=now_s)
        except QueueFull:
            raise self._full() from None
        if dropped is not None and not dropped.done():
            dropped.set_exception(self._full())
        self._pump()
        await self._wait(ticket, deadline_s, ahead)

    async def _wait(self, ticket: Ticket[Turn], deadline_s: float | None, ahead: int) -> None:
        most_s = self.config.max_wait_s
        if deadline_s is not None:
            most_s = min(most_s, deadline_s - ticket.since_s)
        try:
            async with asyncio.timeout(most_s):
                await ticket.item
        except TimeoutError as exc:
            if deadline_s is not None and most_s < self.config.max_wait_s:
                raise DeadlinePassed("The request's time passed before a backend had room.") from exc
            raise self._too_long("that has passed before") from exc
        finally:
            self._queue.cancel(ticket)
            self.waited += 1
            waited_s = self._clock() - ticket.since_s
            self.waited_s += waited_s
            turn = ticket.item
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self._turn_s += FORGET * (waited_s / (ahead + 1) - self._turn_s)
                self._called -= 1  # whoever was called goes on to be placed, or has left
                asyncio.get_running_loop().call_soon(self._pump)

    def charge(self, tenant: str, tokens: int) -> None:
        """A call that waited used more tokens than it was charged for, or, below 0, fewer."""
        self._queue.charge(tenant, tokens)

    def _full(self) -> Overloaded:
        return self._shed("too many calls wait")

    def _too_long(self, why: str) -> Overloaded:
        return self._shed(
            f"a call waits {self.config.max_wait_s:g} s at most (routing.queue.max_wait_s), and {why} it was its turn"
        )

    def _shed(self, why: str) -> Overloaded:
        self.shed += 1
        return Overloaded(
            f"All backends of {self.name!r} are full, and {why}: try again later.",
            retry_after_s=min(60.0, max(1.0, self._turn_s * len(self._queue))),
        )

    def _room(self) -> int:
        """Calls that may go on now; more than any number where a usable backend has no limit, or none is usable."""
        room, is_any_usable, now_s = -self._called, False, self._clock()
        for slot in self._slots:
            if not slot.is_up or not slot.breaker.allows(now_s):
                continue  # what it cannot take, the others would get
            is_any_usable = True
            limit = slot.standing.limit
            if limit is None:
                return 1 << 30
            room += max(0, limit - slot.in_flight)
        return room if is_any_usable else 1 << 30

    def _pump(self) -> None:
        """Call those whose turn it is."""
        while len(self._queue) and self._room() > 0:
            ticket = self._queue.pop()
            if ticket is None:
                return
            if ticket.item.done():
                continue
            self._called += 1
            ticket.item.set_result(None)
