"""What a replica may spend while it cannot reach the store: slices of limits, leased beforehand.

Owns: a slice of every limit that was in use lately, held in the store as any hold but for longer, and what is granted
out of slices meanwhile. Does not own: when a store counts as lost, and what it is told afterwards (leased.py).

A slice is `share` of a limit, rounded down, in the calendar window in which it was leased. It is spent from until that
window or its lease is over, by this process's monotonic clock. It is given back when a request is refused for want of
exactly its room. Of a rate nothing can be set aside: offline, a replica has `share` of the rate, beginning with nothing
at hand, so that replicas whose shares add up to at most 1 keep to the whole rate.

Invariant: what is granted out of a slice is held in the store all the time, so settled + held <= limit + debt; when
the store is back, it moves from the slice to where it belongs in one step. The invariant needs the slice to be there:
a store that lost it with its last writes, or that swept it since the replica was away for longer than SLICE_LEASE_S,
may have granted its room to others. What was spent is entered all the same, and what of it is too much is debt.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence

from msgspec.structs import replace

from budget.accounts import Account, Books, CalendarAccount, RateAccount, hold_in
from budget.books import RATES
from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Limit, Standing, Unit
from budget.ledgers.store import Booking, Store

SLICE_LEASE_S = 300.0
RENEW_S = 60.0
SEEN_S = 300.0  # a limit that nobody used for so long needs no slice
REST_S = 60.0  # until a slice is leased again that was refused or given back
MOST_NEW = 100  # slices of one beat
NOTHING = Amounts()
SPENT = "The budget store does not answer, and what this replica may spend without it is used up. Try again shortly."


class Slice:
    """What of one limit this process may spend offline.

    Args:
        limit: whose part it is.
        account: the books of this part.
        booking: its hold in the store; None for a rate.
        leased_s: on the monotonic clock.
        end_s: of its window, on the monotonic clock.
    """

    __slots__ = ("account", "booking", "end_s", "leased_s", "limit")

    def __init__(self, limit: Limit, account: Account, booking: Booking | None, leased_s: float, end_s: float) -> None:
        self.limit = limit
        self.account = account
        self.booking = booking
        self.leased_s = leased_s
        self.end_s = end_s

    def until_s(self) -> float:
        """How long it may be spent from, on the monotonic clock."""
        return self.end_s if self.booking is None else min(self.end_s, self.leased_s + SLICE_LEASE_S)


class OfflineHold:
    """A hold that was granted out of slices.

    Args:
        slices: of its limits.
        without: units of those of its limits that have no slice.
        ceiling: what to hold; nothing in those units.

    Attributes:
        standings: of the slices, as it left them.
        is_told: the store may know of it, as it was then; so it grows no more.
    """

    __slots__ = ("_ceiling", "_monotonic", "_pages", "_slices", "_without", "is_told", "standings")

    def __init__(
        self,
        slices: Sequence[Slice],
        without: Collection[Unit],
        ceiling: Amounts,
        monotonic: Callable[[], float],
    ) -> None:
        """Raises: StoreUnreachable when there is not enough left."""
        self._slices = slices
        self._without = without
        self._monotonic = monotonic
        self._pages: list[Books] = []
        self._ceiling = ceiling
        self.is_told = False
        self.standings: list[Standing] = []
        now_s = monotonic()
        self._pages = [part.account.turn(now_s) for part in slices]
        self._hold(ceiling.by_unit(), now_s)

    def extend(self, more: Amounts) -> None:
        """Hold more. Raises: StoreUnreachable; then it is as it was."""
        need, now_s = more.by_unit(requests=0), self._monotonic()
        over = {part.limit.unit for part in self._slices if part.until_s() <= now_s}
        if self.is_told or any(need[unit] for unit in over.union(self._without)):
            raise StoreUnreachable(SPENT)
        self._hold(need, now_s)
        self._ceiling = self._ceiling.plus(more)

    def settle(self, used: Amounts) -> None:
        """Replace it by its use."""
        now_s, held, spent = self._monotonic(), self._ceiling.by_unit(), used.by_unit()
        for part, page in zip(self._slices, self._pages, strict=True):
            part.account.settle(page, now_s, held[part.limit.unit], spent[part.limit.unit])

    def _hold(self, need: Mapping[Unit, int], now_s: float) -> None:
        try:
            hold_in([part.account for part in self._slices], self._pages, need, now_s)
        except HoldRefused as exc:
            raise StoreUnreachable(SPENT) from exc
        self.standings = []
        for part, page in zip(self._slices, self._pages, strict=True):
            own = part.account.standing(page, now_s)
            reset_s = min(own.reset_s, part.until_s() - now_s)
            self.standings.append(Standing(part.limit, own.free, own.settled, reset_s))


class Offline:
    """The slices of one process.

    Args:
        store: where they are held.
        owner: of the process.
        share: of each limit, above 0, at most 1.
        release: ends a hold in the store, in the end.
        clock: epoch seconds.
        monotonic: seconds; what leases and windows are measured by here.

    Attributes:
        granted: holds that were granted out of slices.
        returned: slices that were given back.
    """

    def __init__(
        self,
        store: Store,
        owner: str,
        share: float,
        *,
        release: Callable[[Booking], None],
        clock: Callable[[], float],
        monotonic: Callable[[], float],
    ) -> None:
        self._store = store
        self._owner = owner
        self._share = share
        self._release = release
        self._clock = clock
        self._monotonic = monotonic
        self._slices: dict[Limit, Slice] = {}
        self._rates: dict[Limit, Slice] = {}
        self._lost_s = 0.0
        self._seen: dict[Limit, float] = {}
        self._resting: dict[Limit, float] = {}
        self.granted = self.returned = 0

    def see(self, limits: Sequence[Limit]) -> None:
        """Note that limits are in use."""
        now_s = self._monotonic()
        for limit in limits:
            self._seen[limit] = now_s

    # ------------------------------------------------------------------------------- while the store is there

    async def beat(self, in_force: Collection[Limit]) -> None:
        """Let go of slices that are of no use any more, renew the others, lease new ones. Raises: StoreUnreachable."""
        now_s = self._monotonic()
        self._seen = {limit: at_s for limit, at_s in self._seen.items() if limit in in_force and at_s > now_s - SEEN_S}
        self._resting = {limit: until_s for limit, until_s in self._resting.items() if until_s > now_s}
        for limit, part in list(self._slices.items()):
            if limit not in self._seen or part.until_s() <= now_s:
                self._give_back(limit)
        await self._renew(now_s)
        wanted = self._seen.keys() - self._slices.keys() - self._resting.keys()
        leases = [self._lease(limit) for limit in list(wanted)[:MOST_NEW] if limit.window not in RATES]
        for outcome in await asyncio.gather(*leases, return_exceptions=True):
            if isinstance(outcome, BaseException):
                raise outcome

    async def _renew(self, now_s: float) -> None:
        due = {p.booking.hold_id: p for p in self._slices.values() if p.booking and p.leased_s <= now_s - RENEW_S}
        if not due:
            return
        lost = await self._store.report([(hold_id, NOTHING) for hold_id in due], SLICE_LEASE_S)
        for hold_id, part in due.items():
            if hold_id in lost:
                self._slices.pop(part.limit, None)
            else:
                part.leased_s = now_s

    async def _lease(self, limit: Limit) -> None:
        amount, now_s = self._part_of(limit), self._monotonic()
        is_count = limit.unit in {"requests", "concurrency"}
        booking = Booking(
            hold_id=secrets.token_hex(12),
            owner=self._owner,
            scopes=(),
            mode="",
            limits=(limit,),
            ceiling=NOTHING if is_count else amounts_in(limit.unit, amount),
            taken_s=self._clock(),
            requests=amount if is_count else 0,
        )
        self._resting[limit] = now_s + REST_S
        if amount < 1:
            return
        try:
            standings = await self._store.take(booking, SLICE_LEASE_S)
        except HoldRefused:
            return
        except BaseException:
            self._release(booking)  # nobody knows whether the store has it
            raise
        del self._resting[limit]
        account = CalendarAccount(replace(limit, amount=amount, window="total"))
        self._slices[limit] = Slice(limit, account, booking, now_s, now_s + standings[0].reset_s)

    def give_back(self, standings: Sequence[Standing], need: Mapping[Unit, int]) -> bool:
        """Give back the slices whose room a refused hold lacks; whether it will fit then."""
        short = [standing for standing in standings if need[standing.limit.unit] > max(0, standing.free)]
        for standing in short:
            part = self._slices.get(standing.limit)
            if part is None or need[standing.limit.unit] > standing.free + part.account.limit.amount:
                return False
        for standing in short:
            self._give_back(standing.limit)
        return bool(short)

    def _give_back(self, limit: Limit) -> None:
        part = self._slices.pop(limit)
        self.returned += 1
        assert part.booking is not None, "a rate is not leased"
        self._resting[limit] = self._monotonic() + REST_S
        self._release(part.booking)

    # ---------------------------------------------------------------------------------- while it is not there

    def begin(self) -> None:
        """The store was lost: what of a rate runs out from now on is what there is to spend."""
        self._lost_s = self._monotonic()
        self._rates.clear()

    def grant(self, booking: Booking) -> tuple[Booking, OfflineHold]:
        """Hold out of slices. Returns: the booking under which the store is to know of it later.

        Raises: StoreUnreachable when they do not have it.
        """
        now_s, need = self._monotonic(), booking.ceiling.by_unit()
        slices, hold_ids, without = [], [], set()
        for limit in booking.limits:
            part = self._of(limit)
            if part is not None and part.until_s() > now_s:
                slices.append(part)
                hold_ids.append("" if part.booking is None else part.booking.hold_id)
            elif need[limit.unit]:
                raise StoreUnreachable(SPENT)
            else:
                hold_ids.append("")
                without.add(limit.unit)
        hold = OfflineHold(slices, without, booking.ceiling, self._monotonic)
        self.granted += 1
        return replace(booking, hold_id=f"{booking.hold_id}o", slices=tuple(hold_ids)), hold

    def _of(self, limit: Limit) -> Slice | None:
        if limit.window not in RATES:
            return self._slices.get(limit)
        part, amount = self._rates.get(limit), self._part_of(limit)
        if part is None and amount:
            account = RateAccount(replace(limit, amount=amount), level=amount, seen_s=self._lost_s)
            part = self._rates[limit] = Slice(limit, account, None, self._lost_s, math.inf)
        return part

    def end(self) -> None:
        """The store is back and knows everything: slices go back, and later beats lease new ones."""
        for limit in list(self._slices):
            self._give_back(limit)
        self._resting.clear()

    def _part_of(self, limit: Limit) -> int:
        return math.floor(limit.amount * self._share + 1e-9)


def amounts_in(unit: Unit, amount: int) -> Amounts:
    """So much of one unit."""
    if unit == "tokens":
        return Amounts(tokens=amount)
    return Amounts(thinking_tokens=amount) if unit == "thinking_tokens" else Amounts(nano_usd=amount)
