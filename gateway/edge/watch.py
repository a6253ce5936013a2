"""Watch running requests: clients that leave or dawdle, envelopes and timeouts that end.

Owns: cancelling a request's task with a reason, and what that reason becomes for the client. A tick, 20
times a second and O(requests in flight), replaces a watcher and a timer for each request: short requests
never pay for one.
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from gateway.edge.exchange import ClientGone, Exchange
from gateway.errors import DeadlinePassed, GatewayError, Overloaded

if TYPE_CHECKING:
    from gateway.config.schema import Timeouts

TICK_S = 0.05
Reason = Literal["disconnect", "slow_client", "body", "envelope", "timeout", "drain"]


class Watched:
    """One request being served; as a context manager, watched for as long as the block runs.

    Attributes:
        reason: why its task was cancelled, or None.
    """

    __slots__ = (
        "_deadline_reason",
        "_deadline_s",
        "_is_over",
        "_running",
        "_task",
        "_watcher",
        "exchange",
        "reason",
    )

    def __init__(
        self, exchange: Exchange, task: asyncio.Task[object], running: dict[int, Watched], deadline_s: float
    ) -> None:
        self._running = running
        self.exchange = exchange
        self.reason: Reason | None = None
        self._deadline_s = deadline_s
        self._deadline_reason: Reason = "timeout"
        self._is_over = False
        self._watcher: asyncio.Task[None] | None = None
        self._task = task

    def __enter__(self) -> Self:
        """Begin to watch."""
        self._running[id(self)] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """The request is over.

        Raises: GatewayError or ClientGone in place of a CancelledError that is this watch's own.
        """
        self._is_over = True
        del self._running[id(self)]
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None  # or it and this would refer to each other, and be garbage for the collector
        if self.reason is not None and kind is asyncio.CancelledError:
            self._task.uncancel()
            raise _outcome(self.reason) from None

    @property
    def deadline_s(self) -> float:
        """When the request's time is over, on its clock."""
        return self._deadline_s

    def bound(self, deadline_s: float) -> None:
        """The request's envelope ends at this monotonic time."""
        if deadline_s < self._deadline_s:
            self._deadline_s = deadline_s
            self._deadline_reason = "envelope"

    def is_at_deadline(self) -> bool:
        """Whether a CancelledError in the request's task says that its time is over."""
        return self.reason in {"envelope", "timeout"}

    def go_on(self) -> None:
        """After `is_at_deadline`: the request may still say how it ended, without a deadline."""
        self._task.uncancel()
        self.reason = None
        self._deadline_s = float("inf")

    def cancel(self, reason: Reason) -> None:
        """End the request's work, once."""
        if self.reason is None and not self._is_over:
            self.reason = reason
            self._task.cancel()

    def look(self, now_s: float, limits: Timeouts, tasks: asyncio.TaskGroup) -> None:
        """Cancel what has no time left; from the second look on, listen for the client's departure."""
        exchange = self.exchange
        if not exchange.has_body:
            if now_s - exchange.began_s > limits.body_s:
                self.cancel("body")
            return
        if self._watcher is None and now_s - exchange.began_s > TICK_S:
            self._watcher = tasks.create_task(self._until_gone())
        sending_since_s = exchange.sending_since_s
        if sending_since_s is not None and now_s - sending_since_s > limits.slow_client_s:
            self.cancel("slow_client")
        elif now_s >= self._deadline_s and not exchange.is_complete:
            self.cancel(self._deadline_reason)

    async def _until_gone(self) -> None:
        message = await self.exchange.receive()
        # A complete response ends the exchange too, before the hold is settled: that is no departure.
        if message["type"] == "http.disconnect" and not self.exchange.is_complete:
            self.cancel("disconnect")


def _outcome(reason: Reason) -> GatewayError | ClientGone:
    if reason == "body":
        return DeadlinePassed("The body did not arrive in time (server.timeouts.body_s).", code="body_timeout")
    if reason in {"envelope", "timeout"}:
        return DeadlinePassed("The request's time was over before it was answered.")
    if reason == "drain":
        return Overloaded("The server is shutting down.")
    return ClientGone()


class Watch:
    """All requests in flight.

    Args:
        limits: how long what may take.
    """

    def __init__(self, limits: Timeouts) -> None:
        self._limits = limits
        self._running: dict[int, Watched] = {}

    def __len__(self) -> int:
        """Requests in flight."""
        return len(self._running)

    def over(self, exchange: Exchange) -> Watched:
        """A context manager: the request is watched for as long as the block runs."""
        task = asyncio.current_task()
        assert task is not None
        return Watched(exchange, task, self._running, exchange.began_s + self._limits.total_s)

    def cancel_all(self) -> None:
        """End every request: the drain's patience is over."""
        for watched in list(self._running.values()):
            watched.cancel("drain")

    async def run(self) -> None:
        """Tick, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(TICK_S)
                now_s = time.perf_counter()
                for watched in list(self._running.values()):
                    watched.look(now_s, self._limits, tasks)
