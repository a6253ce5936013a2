"""An event loop whose time passes only when nobody has anything to do, and a store that loses calls on demand."""

from __future__ import annotations

import asyncio
import datetime as dt
import selectors
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Literal, TypeVar

from budget.errors import StoreUnreachable
from budget.ledger import Amounts, LedgerHealth, Standing, UsageRow
from budget.ledgers.store import Booking, Settlement, Store

T = TypeVar("T")
Fault = Literal["before", "after"]


class VirtualLoop(asyncio.SelectorEventLoop):
    """Timers that are due later are due at once when nothing else happens; nothing sleeps.

    Attributes:
        busy: calls that other threads or servers work on: while there are any, time stands still.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self.busy = 0
        super().__init__(_Selector(self))

    def time(self) -> float:
        """Seconds, as far as they have passed."""
        return self.now_s


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0 or self._loop.busy:
            return super().select(timeout if timeout is not None and timeout <= 0 else None)
        found = super().select(0)
        if not found:
            self._loop.now_s += timeout
        return found


def play(story: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, in a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(story)


class FaultyStore:
    """A store behind a bad connection.

    Attributes:
        faults: what befalls the next calls, one each: it does not arrive, or its answer does not, or (None) nothing.
        always: what befalls all others.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self.faults: deque[Fault | None] = deque()
        self.always: Fault | None = None
        self.is_prompt = store.is_prompt

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        return await self._call(lambda: self._store.take(booking, lease_s, is_certain=is_certain))

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        return await self._call(lambda: self._store.extend(booking, more))

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        told: asyncio.Future[None] = loop.create_future()
        fault = self._fault()
        if fault == "before":
            told.set_exception(StoreUnreachable("lost on the way"))
            return told
        inner = self._store.settle(settlements)
        self._busy(1)

        def tell(done: asyncio.Future[None]) -> None:
            self._busy(-1)
            exc = done.exception() or (StoreUnreachable("lost on the way back") if fault else None)
            if told.done():
                return
            if exc is None:
                told.set_result(None)
            else:
                told.set_exception(exc)

        inner.add_done_callback(tell)
        return told

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        return await self._call(lambda: self._store.report(progress, lease_s))

    async def sweep(self, lease_s: float) -> int:
        return await self._call(lambda: self._store.sweep(lease_s))

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        return await self._quietly(lambda: self._store.usage(first_day, last_day))

    async def health(self) -> LedgerHealth:
        return await self._quietly(self._store.health)

    async def close(self) -> None:
        await self._quietly(self._store.close)

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        fault = self._fault()
        if fault == "before":
            raise StoreUnreachable("lost on the way")
        try:
            return await self._quietly(call)
        finally:
            if fault == "after":
                raise StoreUnreachable("lost on the way back")

    async def _quietly(self, call: Callable[[], Awaitable[T]]) -> T:
        self._busy(1)
        try:
            return await call()
        finally:
            self._busy(-1)

    def _fault(self) -> Fault | None:
        return self.faults.popleft() if self.faults else self.always

    @staticmethod
    def _busy(by: int) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualLoop):
            loop.busy += by
