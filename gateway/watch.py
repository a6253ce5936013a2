"""Watch running requests: clients that leave, envelopes whose seconds end, clients too slow to read.

Owns: cancelling a request's task with a reason. A tick, 20 times a second and O(requests in flight),
replaces a watcher and a timer for each request: short requests never pay for one.
"""

from __future__ import annotations

import asyncio
import time
from typing import Literal, Self

from gateway.edge import Exchange

TICK_S = 0.05
Reason = Literal["disconnect", "deadline", "slow_client", "drain"]


class Watched:
    """One request being served.

    Attributes:
        deadline_s: monotonic time at which its envelope ends, or None.
        reason: why its task was cancelled, or None.
    """

    __slots__ = ("_running", "_task", "deadline_s", "exchange", "is_over", "reason", "watcher")

    def __init__(self, exchange: Exchange, task: asyncio.Task[object], running: dict[int, Watched]) -> None:
        self._running = running
        self.exchange = exchange
        self.deadline_s: float | None = None
        self.reason: Reason | None = None
        self.is_over = False
        self.watcher: asyncio.Task[None] | None = None
        self._task = task

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._running[id(self)] = self
        return self

    def __exit__(self, *_: object) -> None:
        """The request is over."""
        self.is_over = True
        del self._running[id(self)]
        if self.watcher is not None:
            self.watcher.cancel()

    def cancel(self, reason: Reason) -> None:
        """End the request's work, once."""
        if self.reason is None and not self.is_over:
            self.reason = reason
            self._task.cancel()

    def was_cancelled(self) -> bool:
        """Whether a CancelledError in the request's task is this watch's; then the task may go on."""
        if self.reason is None:
            return False
        self._task.uncancel()
        return True


class Watch:
    """All requests in flight.

    Args:
        slow_client_s: how long one write may wait for the client.
        total_s: how long a request may last at all.
    """

    def __init__(self, *, slow_client_s: float, total_s: float) -> None:
        self._slow_client_s = slow_client_s
        self._total_s = total_s
        self._running: dict[int, Watched] = {}

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._running)

    def over(self, exchange: Exchange) -> Watched:
        """A context manager: the request is watched for as long as the block runs."""
        task = asyncio.current_task()
        assert task is not None
        return Watched(exchange, task, self._running)

    def cancel_all(self) -> None:
        """End every request: the drain's patience is over."""
        for watched in list(self._running.values()):
            watched.cancel("drain")

    async def run(self) -> None:
        """Tick, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(TICK_S)
                now = time.perf_counter()
                for watched in list(self._running.values()):
                    self._look_at(watched, now, tasks)

    def _look_at(self, watched: Watched, now: float, tasks: asyncio.TaskGroup) -> None:
        exchange = watched.exchange
        if watched.watcher is None and now - exchange.began_s > TICK_S:
            watched.watcher = tasks.create_task(self._until_gone(watched))
        sending_since_s = exchange.sending_since_s
        if sending_since_s is not None and now - sending_since_s > self._slow_client_s:
            watched.cancel("slow_client")
        elif (watched.deadline_s is not None and now >= watched.deadline_s) or now - exchange.began_s > self._total_s:
            watched.cancel("deadline")

    @staticmethod
    async def _until_gone(watched: Watched) -> None:
        message = await watched.exchange.receive()
        if message["type"] == "http.disconnect":
            watched.cancel("disconnect")
