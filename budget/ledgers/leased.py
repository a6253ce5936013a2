"""The ledger over a store that outlives the process: holds are leases, settlements are delivered.

Owns: what all stores have in common. A hold is taken in one atomic call; from then on it is a lease that this
process renews, with what was used so far, every REPORT_S. When the process dies, whoever sweeps next settles the
hold at what was last reported. Settlements go through an outbox in order, are retried until the store has them and
count once, by hold id. Does not own: how a store keeps books (sqlite.py, redis.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Self

import msgspec

from budget.books import tightest
from budget.errors import HoldEnded, HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Figures, LedgerHealth, Limit, Remaining, Standing, Unit, UsageRow, Used, told
from budget.ledgers.store import Booking, Settlement, Store

log = logging.getLogger("thinkgate.ledger")
NOTHING = Amounts()
LEASE_S = 10.0
REPORT_S = 0.5
SWEEP_S = 1.0
CLOSE_S = 5.0  # for the last settlements to reach the store
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
UNREACHABLE = "The budget store does not answer, so nothing can be held. Try again shortly."


class LeasedHold:
    """See budget.ledger.Hold."""

    __slots__ = ("_ledger", "_standings", "booking", "state", "used")

    def __init__(self, ledger: LeasedLedger, booking: Booking) -> None:
        self._ledger = ledger
        self._standings: Sequence[Standing] = ()
        self.booking = booking
        self.used: Used = NOTHING
        self.state = "new"

    @property
    def ceiling(self) -> Amounts:
        """What is held, extensions included."""
        return self.booking.ceiling

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused, StoreUnreachable; then nothing is held anywhere."""
        assert self.state == "new", "a hold is taken once"
        self.state = "taking"
        try:
            self._standings = await self._ledger.take(self.booking)
        except HoldRefused as exc:
            self._standings = exc.standings
            self.state = "ended"
            raise
        except BaseException:
            # Nobody knows whether the store took it: whatever arrives there late is released.
            self.state = "ended"
            self._ledger.settle(self.booking, NOTHING, was_taken=False)
            raise
        self.state = "open"
        self._ledger.open[self.booking.hold_id] = self
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle what was last reported, once; nothing is waited for."""
        if self.state == "open":
            self.state = "ended"
            del self._ledger.open[self.booking.hold_id]
            self._ledger.settle(self.booking, told(self.used))

    async def extend(self, more: Amounts) -> None:
        """Hold `more` besides. Raises: HoldRefused, StoreUnreachable; then the hold is as it was, or larger."""
        assert self.state == "open", "only a hold that was taken can be extended"
        booking = msgspec.structs.replace(self.booking, ceiling=self.booking.ceiling.plus(more))
        self._standings = await self._ledger.extend(booking, more)
        self.booking = booking

    def report(self, used: Used) -> None:
        """Say what was used so far, or how to find out; it goes to the store with the next report."""
        self.used = used

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit`, as of the last call to the store."""
        mine = [standing for standing in self._standings if standing.limit.unit == unit]
        return min(mine, key=lambda standing: standing.free).remaining() if mine else None


class LeasedLedger:
    """See budget.ledger.Ledger.

    Args:
        store: where the books are.
        limits: what is limited.
        clock: epoch seconds; only for `taken_s` and how long a settlement is kept for replay.
        lease_s: how long a hold outlives its process.
        timeout_s: how long a request waits for the store.
    """

    def __init__(
        self,
        store: Store,
        limits: Sequence[Limit] = (),
        *,
        clock: Callable[[], float],
        lease_s: float = LEASE_S,
        timeout_s: float = 1.0,
    ) -> None:
        self._store = store
        self._clock = clock
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._owner = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._limits: dict[str, list[Limit]] = {}
        self._undelivered: deque[Settlement] = deque()
        self._in_flight: set[asyncio.Future[None]] = set()
        self._recent: deque[tuple[float, Settlement]] = deque()
        self._is_lost = False
        self._swept = 0
        self._debt = NOTHING
        self.open: dict[str, LeasedHold] = {}
        self.set_limits(limits)

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held stays, in the store."""
        in_force = tightest(limits)
        self._limits = {}
        for limit in in_force.values():
            self._limits.setdefault(limit.scope, []).append(limit)
        for hold in self.open.values():  # extensions meet the new amounts
            known = hold.booking.limits
            new = tuple(in_force.get((each.scope, each.unit, each.window), each) for each in known)
            hold.booking = msgspec.structs.replace(hold.booking, limits=new)

    def hold(self, scopes: Sequence[str], ceiling: Amounts, *, mode: str = "") -> LeasedHold:
        """A hold to be entered with `async with`."""
        booking = Booking(
            hold_id=f"{self._owner}-{next(self._numbers):x}",  # in order: cheaper to keep for a store than at random
            owner=self._owner,
            scopes=tuple(scopes),
            mode=mode,
            limits=tuple(limit for scope in scopes for limit in self._limits.get(scope, ())),
            ceiling=ceiling,
            taken_s=self._clock(),
        )
        return LeasedHold(self, booking)

    def held(self) -> Amounts:
        """Everything this process holds now."""
        total = NOTHING
        for hold in list(self.open.values()):  # metrics ask from another thread
            total = total.plus(hold.ceiling)
        return total

    def figures(self) -> Figures:
        """What is known without asking the store."""
        waiting = len(self._undelivered) + len(self._in_flight)
        return Figures(is_reachable=not self._is_lost, waiting=waiting, swept=self._swept, debt=self._debt)

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """What was settled on these days, both included. Raises: StoreUnreachable."""
        return await self._store.usage(first_day, last_day)

    async def health(self) -> LedgerHealth:
        """How the store is."""
        return await self._store.health()

    async def take(self, booking: Booking) -> list[Standing]:
        """Take a hold in the store; a lost reply is asked for again with the same id.

        Raises: HoldRefused; StoreUnreachable when the store does not answer in time, at once while it is lost.
        """
        return await self._in_time(lambda: self._store.take(booking, self._lease_s))

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        """Extend a hold in the store. Raises: as `take`."""
        return await self._in_time(lambda: self._store.extend(booking, more))

    async def _in_time(self, call: Callable[[], Awaitable[list[Standing]]]) -> list[Standing]:
        if self._is_lost:
            raise StoreUnreachable(UNREACHABLE)
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._timeout_s):
                while True:
                    try:
                        return await call()
                    except HoldEnded:
                        raise
                    except StoreUnreachable:
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            self._lose()
            raise StoreUnreachable(UNREACHABLE) from None

    def settle(self, booking: Booking, used: Amounts, *, was_taken: bool = True) -> None:
        """Send the end of a hold to the store; kept and sent again until the store has it."""
        settlement = Settlement(booking=booking, used=used, ended_s=self._clock(), was_taken=was_taken)
        self._debt = self._debt.plus(settlement.used.beyond(settlement.booking.ceiling))
        if self._is_lost:
            self._undelivered.append(settlement)
        else:
            self._deliver([settlement])

    def _deliver(self, settlements: list[Settlement]) -> None:
        delivery = self._store.settle(settlements)
        self._in_flight.add(delivery)
        delivery.add_done_callback(lambda done: self._was_delivered(done, settlements))

    def _was_delivered(self, delivery: asyncio.Future[None], settlements: list[Settlement]) -> None:
        self._in_flight.discard(delivery)
        exc = StoreUnreachable() if delivery.cancelled() else delivery.exception()
        if isinstance(exc, StoreUnreachable):
            self._undelivered.extend(settlements)
            self._lose()
        elif exc is not None:  # a bug, which would come again: a sweep settles what was last reported
            log.error("a settlement failed", exc_info=exc)
        else:
            self._remember(settlements)

    def _remember(self, settlements: Sequence[Settlement]) -> None:
        """Keep what a store that comes back may have lost."""
        if not self._store.replay_s:
            return
        now_s = self._clock()
        self._recent.extend((now_s, settlement) for settlement in settlements if settlement.was_taken)
        while self._recent and self._recent[0][0] < now_s - self._store.replay_s:
            self._recent.popleft()

    def _lose(self) -> None:
        if not self._is_lost:
            self._is_lost = True
            log.error("the budget store does not answer: requests are refused until it does")

    async def run(self) -> None:
        """Report every REPORT_S, sweep every SWEEP_S, and try a lost store again, until cancelled."""
        beats = 0
        while True:
            await asyncio.sleep(REPORT_S)
            beats += 1
            await self.beat(sweeps=beats * REPORT_S % SWEEP_S == 0)

    async def beat(self, *, sweeps: bool = True) -> None:
        """Find out whether a lost store is back, report what the open holds have used, and sweep."""
        try:
            async with asyncio.timeout(self._lease_s / 4):
                if self._is_lost:
                    await self._recover()
                await self._report()
                if sweeps:
                    self._swept += await self._store.sweep(self._lease_s)
        except (StoreUnreachable, TimeoutError):
            self._lose()
        except Exception:  # a bug must not end the requests that run
            log.exception("the ledger's round failed")

    async def _report(self) -> None:
        if not self.open:
            return
        progress = [(hold.booking.hold_id, told(hold.used)) for hold in self.open.values()]
        for hold_id in await self._store.report(progress, self._lease_s):
            hold = self.open.get(hold_id)
            if hold is not None:  # the store lost it; it was granted, so it is entered again whatever is free now
                await self._store.take(hold.booking, self._lease_s, is_certain=True)

    async def _recover(self) -> None:
        """Tell a store that is back what it missed, and what it may have lost with its last writes."""
        await self._store.settle([settlement for _, settlement in self._recent])
        delivered = 0
        while self._undelivered:  # more may come while these are on their way
            waiting = list(self._undelivered)
            try:
                await self._store.settle(waiting)
            except StoreUnreachable:
                raise
            except Exception:  # a bug, as above
                log.exception("settlements failed")
            for _ in waiting:
                self._undelivered.popleft()
            self._remember(waiting)
            delivered += len(waiting)
        self._is_lost = False
        log.warning("the budget store is back", extra={"settlements": delivered})

    async def close(self) -> None:
        """Deliver what is pending, as far as the store answers in time, and let go of it."""
        with contextlib.suppress(StoreUnreachable, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                while self._in_flight:
                    await asyncio.wait(self._in_flight)
                if self._undelivered:
                    await self._recover()
        if self._undelivered:
            log.error("settlements were not delivered", extra={"settlements": len(self._undelivered)})
        await self._store.close()
