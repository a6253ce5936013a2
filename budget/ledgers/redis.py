"""The store in Redis 7 or Valkey: books that many replicas share. Every call is one Lua script.

Owns: what is said to the server and how its answers read; the rules are in lua/, in step with budget/books.py. Does
not own: the connection (redis_line.py), leases and the outbox (leased.py). All keys carry one hash tag, so that a
cluster keeps them on one node. Time is the server's. Counts are exact below 2^53 (nine million dollars).

The server needs `maxmemory-policy noeviction`, and `appendonly yes` to keep budgets over a restart. A failover or a
restart may lose the server's last writes: every replica then tells what it settled in the last REPLAY_S again, before
anything else, and enters its open holds again with its next report. What remains lost is what a replica settled that
is gone itself, or settled earlier than that. What others were granted in the room of what came back is debt.
"""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any

import msgspec

from budget.books import RATES, rate_standing, refusal, window_end
from budget.errors import HoldEnded, StoreUnreachable
from budget.ledger import Amounts, LedgerHealth, Limit, Standing, Unit, UsageRow
from budget.ledgers.leased import Booking, Settlement
from budget.ledgers.redis_line import Line, Wire

REPLAY_S = 60.0
SLICE_LEASE_S = 300.0
SILENT_S = 86400.0  # as in books.lua: what a replica did that was silent for longer may have been forgotten
AT_ONCE = 100  # holds of one script: longer ones would keep everybody else waiting
KEPT_PLANS = 10_000
UNITS: dict[Unit, int] = {"tokens": 1, "thinking_tokens": 2, "usd": 3, "requests": 4, "concurrency": 5}
TAKEN, REFUSED, ENDED = 1, 0, -1
EPOCH = dt.date(1970, 1, 1)
SCRIPTS = {
    "take": ("books", "certain", "take"),
    "extend": ("books", "extend"),
    "settle": ("books", "settle"),
    "enter": ("books", "certain", "enter"),
    "report": ("books", "report"),
    "sweep": ("books", "sweep"),
    "held": ("books", "held"),
}

Words = tuple[bytes | str | float, ...]


class RedisStore:
    """See budget.ledgers.leased.Store.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with all that redis-py reads from it.
        name: of the ledger; those of different names do not see each other.
        timeout_s: to connect, and for the server to say something.
        clock: epoch seconds, instead of the server's; for tests.

    Raises: ImportError without the extra `thinkgate[redis]`; ValueError for a URL that cannot be read.
    """

    kind = "redis"
    replay_s = REPLAY_S

    def __init__(
        self, url: str, *, name: str = "thinkgate", timeout_s: float = 1.0, clock: Callable[[], float] | None = None
    ) -> None:
        self._line = Line(url, timeout_s=timeout_s, greet=self._greet)
        self._clock = clock
        self._tag = f"{{{name}}}"
        self._sources = {script: _source(parts) for script, parts in SCRIPTS.items()}
        self._heads: dict[str, Words] = {
            script: (b"EVALSHA", sha1(source).hexdigest(), 1, self._tag)  # noqa: S324  # its name, not a secret
            for script, source in self._sources.items()
        }
        self._plans: dict[tuple[Limit, ...], Words] = {}
        self._owner = ""
        self.retell: Callable[[], Sequence[Settlement]] = tuple

    # ------------------------------------------------------------------------------------------- holds

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        """See Store."""
        self._owner = booking.owner
        wire = self._line.wire or await self._line.open()
        reply = await wire.send(
            *self._head("take"),
            booking.hold_id,
            booking.owner,
            lease_s,
            booking.taken_s if is_certain else "",
            _label(booking),
            *_amounts(booking.ceiling, booking.requests),
            *self._plan(booking),
        )
        return _standings(reply, booking.limits, booking.ceiling.by_unit(requests=booking.requests))

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        """See Store. A hold that is unknown here is in doubt until the next report has entered it again."""
        wire = self._line.wire or await self._line.open()
        amounts = _amounts(booking.ceiling, booking.requests)
        reply = await wire.send(
            *self._head("extend"), booking.hold_id, booking.owner, *amounts, *self._plan(booking)
        )
        return _standings(reply, booking.limits, more.by_unit(requests=0))

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """See Store."""
        delivered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        wire = self._line.wire
        if wire is None:
            delivered.set_exception(StoreUnreachable("not connected"))
            return delivered
        replies = self._send_settlements(wire, settlements)
        replied = replies[0] if len(replies) == 1 else asyncio.gather(*replies)

        def was_settled(reply: asyncio.Future[Any]) -> None:
            if _has_failed(reply, delivered):
                return
            unknown = set(reply.result() if len(replies) == 1 else [each for ids in reply.result() for each in ids])
            if not unknown:
                delivered.set_result(None)
                return
            entered = asyncio.gather(*self._send_unknown(wire, settlements, unknown))
            entered.add_done_callback(lambda done: _has_failed(done, delivered) or delivered.set_result(None))

        replied.add_done_callback(was_settled)
        return delivered

    def _send_settlements(self, wire: Wire, settlements: Sequence[Settlement]) -> list[asyncio.Future[Any]]:
        replies = []
        for some in _by(AT_ONCE, settlements):
            words: list[bytes | str | float] = [*self._head("settle"), some[0].booking.owner]
            for settlement in some:
                words += (settlement.booking.hold_id, "1" if settlement.was_taken else "0")
                words += _amounts(settlement.used, int(settlement.was_taken))
            replies.append(wire.send(*words))
        return replies

    def _send_unknown(
        self, wire: Wire, settlements: Sequence[Settlement], unknown: set[bytes]
    ) -> Iterator[asyncio.Future[Any]]:
        """Enter settlements of holds that the server has lost, or never had."""
        for settlement in settlements:
            booking = settlement.booking
            if booking.hold_id.encode() in unknown:
                yield wire.send(
                    *self._head("enter"),
                    booking.hold_id,
                    booking.owner,
                    booking.taken_s,
                    _label(booking),
                    *_amounts(booking.ceiling, booking.requests),
                    *_amounts(settlement.used, int(settlement.was_taken)),
                    *self._plan(booking),
                )

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        replies = []
        for some in _by(AT_ONCE, progress):
            words: list[bytes | str | float] = [*self._head("report"), lease_s]
            for hold_id, used in some:
                words += (hold_id, f"{used.tokens} {used.thinking_tokens} {used.nano_usd} 1")
            replies.append(wire.send(*words))
        return [hold_id.decode() for ids in await asyncio.gather(*replies) for hold_id in ids]

    async def sweep(self, lease_s: float) -> int:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        swept = 0
        while True:
            late: int = await wire.send(*self._head("sweep"), AT_ONCE, self._owner, lease_s, max(lease_s, SLICE_LEASE_S))
            swept += late
            if late < AT_ONCE:
                return swept

    # ------------------------------------------------------------------------------------- what there is

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        first, last = (first_day - EPOCH).days, (last_day - EPOCH).days
        kept = sorted(int(day) for day in await wire.send(b"SMEMBERS", f"{self._tag}:days"))
        days = [day for day in kept if first <= day <= last]
        found = await asyncio.gather(*(wire.send(b"HGETALL", f"{self._tag}:u:{day}") for day in days))
        return [row for day, fields in zip(days, found, strict=True) for row in _usage_rows(day, fields)]

    async def health(self) -> LedgerHealth:
        """See Store."""
        sums = [0, 0, 0, 0]
        try:
            wire = self._line.wire or await self._line.open()
            while True:
                more: list[int] = await wire.send(*self._head("held"), sums[0], AT_ONCE)
                sums = [a + b for a, b in zip(sums, more, strict=True)]
                if more[0] < AT_ONCE:
                    break
        except StoreUnreachable as exc:
            return LedgerHealth(kind=self.kind, is_reachable=False, holds=0, held=Amounts(), detail=str(exc))
        held = Amounts(tokens=sums[1], thinking_tokens=sums[2], nano_usd=sums[3])
        return LedgerHealth(kind=self.kind, is_reachable=True, holds=sums[0], held=held)

    # --------------------------------------------------------------------------------------- connection

    async def connect(self) -> None:
        """See Store."""
        await self._line.open()

    async def close(self) -> None:
        """See Store."""
        await self._line.close()

    async def _greet(self, wire: Wire) -> None:
        """Make a server that was just connected to ready: the scripts, and settlements that it may have lost."""
        await asyncio.gather(*(wire.send(b"SCRIPT", b"LOAD", source) for source in self._sources.values()))
        recent = self.retell()
        if recent:
            replies = await asyncio.gather(*self._send_settlements(wire, recent))
            await asyncio.gather(*self._send_unknown(wire, recent, {each for ids in replies for each in ids}))

    def _head(self, script: str) -> Words:
        return (*self._heads[script], "" if self._clock is None else repr(self._clock()))

    def _plan(self, booking: Booking) -> Words:
        """The words for a booking's limits, which are the same for many."""
        if booking.slices:
            return tuple(_limit_words(booking.limits, booking.slices))
        plan = self._plans.get(booking.limits)
        if plan is None:
            if len(self._plans) >= KEPT_PLANS:
                self._plans.clear()
            plan = self._plans[booking.limits] = tuple(_limit_words(booking.limits, [""] * len(booking.limits)))
        return plan


def _source(parts: Sequence[str]) -> bytes:
    folder = files("budget.ledgers") / "lua"
    return b"\n".join((folder / f"{part}.lua").read_bytes() for part in parts)


def _limit_words(limits: Sequence[Limit], slices: Sequence[str]) -> Iterator[bytes | str | float]:
    for limit, of_slice in zip(limits, slices, strict=True):
        window = limit.window or ""
        yield from (f"{limit.scope}|{limit.unit}|{window}", UNITS[limit.unit], window, limit.amount, of_slice)


def _amounts(amounts: Amounts, requests: int) -> tuple[int, int, int, int]:
    return amounts.tokens, amounts.thinking_tokens, amounts.nano_usd, requests


def _label(booking: Booking) -> bytes:
    """What usage is entered under; empty for a slice, which has none."""
    return msgspec.json.encode((booking.mode, *booking.scopes)) if booking.scopes else b""


def _by(size: int, many: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(many), size):
        yield many[first : first + size]


def _has_failed(done: asyncio.Future[Any], delivered: asyncio.Future[None]) -> bool:
    """Whether there is nothing left to do: it failed, which `delivered` then says, or nobody waits any more."""
    exc = asyncio.CancelledError() if done.cancelled() else done.exception()
    if delivered.done():
        return True
    if exc is not None:
        delivered.set_exception(exc)
    return exc is not None


def _standings(reply: list[Any], limits: Sequence[Limit], needs: Mapping[Unit, int]) -> list[Standing]:
    """How the limits stand. Raises: HoldRefused, HoldEnded, StoreUnreachable, as the server answered."""
    if reply[0] < REFUSED:
        if reply[0] == ENDED:
            raise HoldEnded("the hold has ended in the budget store: its lease was over")
        raise StoreUnreachable("the budget store has lost the hold")
    now_s = int(reply[1]) / 1e6
    standings = [
        rate_standing(limit, float(a), needs[limit.unit])
        if limit.window in RATES
        else Standing(limit, limit.amount - a - b, a, max(0.0, window_end(limit.window, start_s) - now_s))
        for limit, a, b, start_s in zip(limits, reply[2::3], reply[3::3], reply[4::3], strict=True)
    ]
    if reply[0] == TAKEN:
        return standings
    short = [standing for standing in standings if needs[standing.limit.unit] > max(0, standing.free)]
    tightest = min(short, key=Standing.tightness)
    refused = refusal(tightest, needs[tightest.limit.unit])
    refused.standings = standings
    raise refused


def _usage_rows(day: int, fields: Sequence[bytes]) -> Iterator[UsageRow]:
    """The rows of one day, from `LABEL|WHAT` and counts in turn."""
    sums: dict[bytes, dict[str, int]] = {}
    for field, number in zip(fields[::2], fields[1::2], strict=True):
        label, _, what = field.rpartition(b"|")
        sums.setdefault(label, {"r": 0, "t": 0, "k": 0, "n": 0})[what.decode()] = int(number)
    for label, row in sums.items():
        if not row["r"]:
            continue  # all of it was taken back
        mode, *scopes = msgspec.json.decode(label, type=list[str])
        yield UsageRow(
            day=EPOCH + dt.timedelta(days=day),
            scopes=tuple(scopes),
            mode=mode,
            requests=row["r"],
            tokens=row["t"],
            thinking_tokens=row["k"],
            nano_usd=row["n"],
        )
