"""The ledger over a store that outlives the process: holds are leases, settlements are delivered.

Owns: what all stores have in common. A hold is taken in one atomic call; from then on it is a lease that this process
renews every REPORT_S, with what was used so far. When it dies, whoever sweeps next settles the hold at what was last
reported. Settlements go through an outbox and count once, by hold id. Does not own: a store (store.py), how it keeps
books (sqlite.py, redis.py), what may be spent while it is not there (offline.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

import msgspec

from budget.books import tightest
from budget.errors import HoldEnded, HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Figures, LedgerHealth, Limit, Remaining, Standing, Unit, UsageRow, Used, told
from budget.ledgers.offline import Offline, OfflineHold
from budget.ledgers.outbox import Outbox
from budget.ledgers.store import Booking, Settlement, Store

Call = Callable[[], Awaitable[list[Standing]]]
log = logging.getLogger("thinkgate.ledger")
NOTHING = Amounts()
LEASE_S = 10.0
REPORT_S = 0.5
SWEEP_S = 1.0
CLOSE_S = 5.0  # for the last settlements to reach the store
MOST_REMEMBERED = 10_000  # combinations of scopes
AT_ONCE = 100  # holds that are entered again
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
UNREACHABLE = "The budget store does not answer, so nothing can be held. Try again shortly."


class LeasedHold:
    """See budget.ledger.Hold.

    Attributes:
        booking: as the store knows it, or will.
        local: as long as only this process knows of it.
        is_offline: it was granted while the store was lost.
    """

    __slots__ = ("_ledger", "_standings", "booking", "is_offline", "local", "state", "used")

    def __init__(self, ledger: LeasedLedger, booking: Booking) -> None:
        self._ledger = ledger
        self._standings: Sequence[Standing] = ()
        self.booking = booking
        self.local: OfflineHold | None = None
        self.is_offline = False
        self.used: Used = NOTHING
        self.state = "new"

    @property
    def ceiling(self) -> Amounts:
        """What is held, extensions included."""
        return self.booking.ceiling

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused, StoreUnreachable; then nothing is held anywhere."""
        assert self.state == "new", "a hold is taken once"
        self.state = "ended"
        was_lost = self._ledger.is_lost
        try:
            self._standings = await self._ledger.take(self.booking)
        except HoldRefused as exc:
            self._standings = exc.standings
            raise
        except BaseException as exc:
            if not was_lost:  # nobody knows whether the store took it: whatever arrives there late is released
                self._ledger.settle(self.booking, NOTHING, was_taken=False)
            if not isinstance(exc, StoreUnreachable):
                raise
            self.booking, self.local = self._ledger.grant(self.booking, exc)
            self._standings, self.is_offline = self.local.standings, True
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
            used = told(self.used)
            if self.local is not None:
                self.local.settle(used)
            self._ledger.settle(self.booking, used)

    async def extend(self, more: Amounts) -> None:
        """Hold `more` besides. Raises: HoldRefused, StoreUnreachable; then the hold is as it was, or larger."""
        assert self.state == "open", "only a hold that was taken can be extended"
        booking = msgspec.structs.replace(self.booking, ceiling=self.booking.ceiling.plus(more))
        if self.local is not None:
            self.local.extend(more)
            self._standings = self.local.standings
        else:
            self._standings = await self._ledger.extend(booking, more)
        # Its limits may have been replaced meanwhile.
        self.booking = msgspec.structs.replace(self.booking, ceiling=booking.ceiling)

    def report(self, used: Used) -> None:
        """Say what was used so far, or how to find out; it goes to the store with the next report."""
        self.used = used

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit`, as of the last call to the store."""
        least: Standing | None = None
        for standing in self._standings:
            if standing.limit.unit == unit and (least is None or standing.free < least.free):
                least = standing
        return None if least is None else least.remaining()

    def standings(self) -> Sequence[Standing]:
        """All limits, as of the last call to the store."""
        return self._standings


class LeasedLedger:
    """See budget.ledger.Ledger.

    Args:
        store: where the books are.
        limits: what is limited.
        clock: epoch seconds; only for what the store may have to be told later.
        lease_s: how long a hold outlives its process.
        timeout_s: how long a request waits for the store.
        offline_share: of each limit, may be spent without the store; 0: nothing.
        monotonic: seconds; only for what is spent without the store.
    """

    def __init__(
        self,
        store: Store,
        limits: Sequence[Limit] = (),
        *,
        clock: Callable[[], float],
        lease_s: float = LEASE_S,
        timeout_s: float = 1.0,
        offline_share: float = 0.0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._clock = clock
        self._lease_s = lease_s
        self._timeout_s = timeout_s
        self._owner = secrets.token_hex(8)
        self._numbers = itertools.count()
        self._limits: dict[str, list[Limit]] = {}
        self._limits_of: dict[tuple[str, ...], tuple[Limit, ...]] = {}
        self._outbox = Outbox(store)
        self._offline: Offline | None = None
        if offline_share:
            self._offline = Offline(
                store, self._owner, offline_share, release=self._release, clock=clock, monotonic=monotonic
            )
        self.is_lost = False
        self._swept = 0
        self._debt = NOTHING
        self.open: dict[str, LeasedHold] = {}
        self.set_limits(limits)

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held stays, in the store."""
        in_force = self._in_force = tightest(limits)
        self._limits = {}
        self._limits_of.clear()
        for limit in in_force.values():
            self._limits.setdefault(limit.scope, []).append(limit)
        for hold in self.open.values():  # extensions meet the new amounts
            known = hold.booking.limits
            new = tuple(in_force.get((each.scope, each.unit, each.window), each) for each in known)
            hold.booking = msgspec.structs.replace(hold.booking, limits=new)

    def hold(self, scopes: Sequence[str], ceiling: Amounts, *, mode: str = "") -> LeasedHold:
        """A hold to be entered with `async with`."""
        scopes = tuple(scopes)
        booking = Booking(
            hold_id=f"{self._owner}-{next(self._numbers):x}",  # in order: cheaper to keep for a store than at random
            owner=self._owner,
            scopes=scopes,
            mode=mode,
            limits=self._limits_for(scopes),
            ceiling=ceiling,
            taken_s=self._clock(),
        )
        return LeasedHold(self, booking)

    def _limits_for(self, scopes: tuple[str, ...]) -> tuple[Limit, ...]:
        limits = self._limits_of.get(scopes)
        if limits is None:
            limits = tuple(limit for scope in scopes for limit in self._limits.get(scope, ()))
            if len(self._limits_of) >= MOST_REMEMBERED:
                self._limits_of.clear()
            self._limits_of[scopes] = limits
        return limits

    def held(self) -> Amounts:
        """Everything this process holds now."""
        total = NOTHING
        for hold in list(self.open.values()):  # metrics ask from another thread
            total = total.plus(hold.ceiling)
        return total

    def figures(self) -> Figures:
        """What is known without asking the store."""
        return Figures(
            is_reachable=not self.is_lost,
            waiting=self._outbox.waiting(),
            swept=self._swept,
            debt=self._debt,
            offline=0 if self._offline is None else self._offline.granted,
        )

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
        began_s = asyncio.get_running_loop().time()
        if self._offline is not None:
            self._offline.see(booking.limits)
        elif self._store.is_prompt and not self.is_lost:  # nearly always, and so in few steps
            with contextlib.suppress(StoreUnreachable):
                return await self._store.take(booking, self._lease_s)
        need = booking.ceiling.by_unit()
        return await self._with_room(lambda: self._store.take(booking, self._lease_s), need, began_s)

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        """Extend a hold in the store. Raises: as `take`."""
        began_s = asyncio.get_running_loop().time()
        return await self._with_room(lambda: self._store.extend(booking, more), more.by_unit(requests=0), began_s)

    async def _with_room(self, call: Call, need: Mapping[Unit, int], began_s: float) -> list[Standing]:
        """As `_in_time`; where the room that is short is set aside for being offline, that is given back."""
        offline = self._offline
        returned = 0 if offline is None else offline.returned
        try:
            return await self._in_time(call, began_s)
        except HoldRefused as refused:  # somebody refused beside this one may have given back what both lack
            if offline is None or not (offline.give_back(refused.standings, need) or offline.returned > returned):
                raise
        return await self._in_time(call, began_s)

    async def _in_time(self, call: Call, began_s: float) -> list[Standing]:
        if self.is_lost:
            raise StoreUnreachable(UNREACHABLE)
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout_at(began_s + self._timeout_s):
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

    def grant(self, booking: Booking, unreachable: StoreUnreachable) -> tuple[Booking, OfflineHold]:
        """Hold in what this process may spend while the store is lost. Raises: StoreUnreachable."""
        if self._offline is None or not self.is_lost or self._outbox.is_full():
            raise unreachable
        return self._offline.grant(booking)

    def settle(self, booking: Booking, used: Amounts, *, was_taken: bool = True) -> None:
        """Send the end of a hold to the store; kept and sent again until the store has it."""
        settlement = Settlement(booking=booking, used=used, ended_s=self._clock(), was_taken=was_taken)
        if used.exceeds(booking.ceiling):
            self._debt = self._debt.plus(used.beyond(booking.ceiling))
        if self.is_lost:
            self._outbox.keep(settlement)
        else:
            self._outbox.send(settlement)

    def _release(self, booking: Booking) -> None:
        self.settle(booking, NOTHING, was_taken=False)

    def _lose(self) -> None:
        if not self.is_lost:
            self.is_lost = True
            if self._offline is not None:
                self._offline.begin()
            instead = "requests are refused" if self._offline is None else "this replica spends its slices"
            log.error("the budget store does not answer: %s until it does", instead)

    async def run(self) -> None:
        """Report every REPORT_S, sweep every SWEEP_S, and try a lost store again, until cancelled."""
        beats = 0
        while True:
            await asyncio.sleep(REPORT_S)
            beats += 1
            await self.beat(sweeps=beats * REPORT_S % SWEEP_S == 0)

    async def beat(self, *, sweeps: bool = True) -> None:
        """Find out whether a lost store is back, report what the open holds have used, and sweep.

        Again while that fails: one broken connection does not make a store lost.
        """
        pause_s = FIRST_PAUSE_S
        try:
            async with asyncio.timeout(self._lease_s / 4):
                while True:
                    try:
                        return await self._round(sweeps=sweeps)
                    except StoreUnreachable:
                        if self.is_lost:
                            return None
                        await asyncio.sleep(pause_s)
                        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        except TimeoutError:
            self._lose()
        except Exception:  # a bug must not end the requests that run
            log.exception("the ledger's round failed")

    async def _round(self, *, sweeps: bool) -> None:
        if self.is_lost or self._outbox.has_kept():
            await self._recover()
        await self._report()
        if sweeps:
            self._swept += await self._store.sweep(self._lease_s)
            if self._offline is not None:
                await self._offline.beat(set(self._in_force.values()))

    async def _report(self) -> None:
        progress = [(hold.booking.hold_id, told(hold.used)) for hold in self.open.values()]
        lost = await self._store.report(progress, self._lease_s) if progress else ()
        # They were granted, so they are entered again whatever is free now.
        await self._enter_all([self.open[hold_id] for hold_id in lost if hold_id in self.open])

    async def _enter_all(self, holds: Sequence[LeasedHold]) -> None:
        for first in range(0, len(holds), AT_ONCE):
            some = (self._enter(hold) for hold in holds[first : first + AT_ONCE])
            for outcome in await asyncio.gather(*some, return_exceptions=True):
                if outcome is not None:
                    raise outcome

    async def _enter(self, hold: LeasedHold) -> None:
        if hold.state != "open":
            return
        local, hold.local = hold.local, None  # from now on it is the store's
        if local is not None:
            local.is_told = True
        try:
            await self._store.take(hold.booking, self._lease_s, is_certain=True)
        except HoldEnded:
            log.info("a hold was swept before it was entered")  # its settlement will correct that
        except BaseException:
            hold.local = local
            raise

    async def _recover(self) -> None:
        """Tell a store that is back what it missed; then slices are given back."""
        delivered = 0
        await self._store.report([], self._lease_s)  # is anybody there?
        while self._outbox.has_kept() or any(hold.local for hold in self.open.values()):  # more may come meanwhile
            delivered += await self._outbox.deliver()
            await self._enter_all([hold for hold in self.open.values() if hold.local])
        if self.is_lost:
            self.is_lost = False
            log.warning("the budget store is back", extra={"settlements": delivered})
            if self._offline is not None:
                self._offline.end()

    async def close(self) -> None:
        """Deliver what is pending, as far as the store answers in time, and let go of it."""
        with contextlib.suppress(StoreUnreachable, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._outbox.arrived()
                if self.is_lost or self._outbox.has_kept():
                    await self._recover()
                if self._offline is not None:
                    self._offline.end()
                await self._outbox.arrived()
        if self._outbox.waiting():
            log.error("settlements were not delivered", extra={"settlements": self._outbox.waiting()})
        await self._store.close()
