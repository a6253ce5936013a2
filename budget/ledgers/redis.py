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
import contextlib
import datetime as dt
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from hashlib import sha1
from importlib.resources import files
from typing import Any

import msgspec

from budget.books import RATES, rate_standing, refusal
from budget.errors import HoldEnded, StoreUnreachable
from budget.ledger import Amounts, LedgerHealth, Limit, Standing, Unit, UsageRow
from budget.ledgers.offline import SLICE_LEASE_S
from budget.ledgers.redis_line import Line, Wire
from budget.ledgers.store import Booking, Settlement

log = logging.getLogger("thinkgate.ledger")
REPLAY_S = 60.0
AT_ONCE = 100  # holds of one script: longer ones would keep everybody else waiting
KEPT_LIMITS = 10_000
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


class RedisStore:
    """See budget.ledgers.store.Store.

    Args:
        url: `redis://`, `rediss://` or `unix://`, with all that redis-py reads from it.
        name: of the ledger; those of different names do not see each other.
        timeout_s: to connect, and for the server to answer a call.
        linger_s: how long a settlement may wait for another call to leave with. That saves system calls.
        clock: epoch seconds, instead of the server's; for tests.

    Raises: ImportError without the extra `thinkgate[redis]`; ValueError for a URL that cannot be read.
    """

    is_prompt = True

    def __init__(
        self,
        url: str,
        *,
        name: str = "thinkgate",
        timeout_s: float = 1.0,
        linger_s: float = 0.005,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._line = Line(url, timeout_s=timeout_s, greet=self._greet)
        self._linger_s = linger_s
        self._clock = clock
        self._tag = f"{{{name}}}"
        self._sources = {script: _source(parts) for script, parts in SCRIPTS.items()}
        self._heads = {script: self._head(source) for script, source in self._sources.items()}
        self._limits: dict[tuple[Limit, ...], msgspec.Raw] = {}
        self._outbox: list[Settlement] = []
        self._delivery: asyncio.Future[None] | None = None
        self._owner = ""
        self._recent: deque[tuple[float, tuple[Settlement, ...]]] = deque()

    # ------------------------------------------------------------------------------------------- holds

    async def take(self, booking: Booking, lease_s: float, *, is_certain: bool = False) -> list[Standing]:
        """See Store."""
        self._owner = booking.owner
        wire = self._line.wire or await self._line.open()
        given = (
            booking.hold_id,
            booking.owner,
            lease_s,
            booking.taken_s if is_certain else False,
            _label(booking),
            _amounts(booking.ceiling, booking.requests),
            self._limits_of(booking),
        )
        reply = await self._call(wire, "take", given)
        return _standings(reply, booking.limits, booking.ceiling.by_unit(requests=booking.requests))

    async def extend(self, booking: Booking, more: Amounts) -> list[Standing]:
        """See Store. A hold that is unknown here is in doubt until the next report has entered it again."""
        wire = self._line.wire or await self._line.open()
        amounts = _amounts(booking.ceiling, booking.requests)
        given = (booking.hold_id, booking.owner, amounts, self._limits_of(booking))
        reply = await self._call(wire, "extend", given)
        return _standings(reply, booking.limits, more.by_unit(requests=0))

    def settle(self, settlements: Sequence[Settlement]) -> asyncio.Future[None]:
        """See Store. They leave with the next call, or by themselves after `linger_s`."""
        loop = asyncio.get_running_loop()
        if self._delivery is None:
            self._delivery = loop.create_future()
            loop.call_later(self._linger_s, self._flush)
        self._outbox += settlements
        return self._delivery

    def _flush(self) -> None:
        """Send the settlements that wait; the future that they share is told when the server has them."""
        settlements, delivery = self._outbox, self._delivery
        if delivery is None:
            return
        self._outbox, self._delivery = [], None
        wire = self._line.wire
        if wire is None:
            if not delivery.done():
                delivery.set_exception(StoreUnreachable("not connected"))
            return
        if len(settlements) <= AT_ONCE:
            reply = self._send_settlements(wire, settlements)
        else:
            reply = asyncio.gather(*(self._send_settlements(wire, some) for some in _by(AT_ONCE, settlements)))
        reply.add_done_callback(lambda done: self._were_settled(wire, settlements, done, delivery))

    def _were_settled(
        self, wire: Wire, settlements: list[Settlement], done: asyncio.Future[Any], delivery: asyncio.Future[None]
    ) -> None:
        if _has_failed(done, delivery):
            return
        unknown = _ids(done.result())
        if not unknown:
            self._remember(settlements, delivery)
            return
        entered = asyncio.gather(*self._send_unknown(wire, settlements, unknown))
        entered.add_done_callback(lambda done: self._were_settled(wire, settlements, done, delivery))

    def _remember(self, settlements: list[Settlement], delivery: asyncio.Future[None]) -> None:
        """The server has them; should it lose them, they can be told again."""
        delivery.set_result(None)
        now_s = asyncio.get_running_loop().time()
        self._recent.append((now_s, tuple(settlements)))
        while self._recent[0][0] < now_s - REPLAY_S:
            self._recent.popleft()

    def _send_settlements(self, wire: Wire, settlements: Sequence[Settlement]) -> asyncio.Future[Any]:
        given: list[Any] = [settlements[0].booking.owner]
        for settlement in settlements:
            was_taken = settlement.was_taken
            given += (settlement.booking.hold_id, was_taken, _amounts(settlement.used, int(was_taken)))
        return wire.send(self._command("settle", given))

    def _send_unknown(
        self, wire: Wire, settlements: Sequence[Settlement], unknown: set[bytes]
    ) -> Iterator[asyncio.Future[Any]]:
        """Enter settlements of holds that the server has lost, or never had."""
        for settlement in settlements if unknown else ():
            booking = settlement.booking
            if booking.hold_id.encode() in unknown:
                given = (
                    booking.hold_id,
                    booking.owner,
                    booking.taken_s,
                    False if booking.slices else settlement.ended_s,
                    _label(booking),
                    _amounts(booking.ceiling, booking.requests),
                    _amounts(settlement.used, int(settlement.was_taken)),
                    self._limits_of(booking),
                )
                yield wire.send(self._command("enter", given))

    async def report(self, progress: Sequence[tuple[str, Amounts]], lease_s: float) -> list[str]:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        replies = []
        for some in _by(AT_ONCE, progress) if progress else ((),):
            given: list[Any] = [lease_s]
            for hold_id, used in some:
                given += (hold_id, _amounts(used, 1))
            replies.append(self._call(wire, "report", given))
        return [hold_id.decode() for ids in await asyncio.gather(*replies) for hold_id in ids]

    async def sweep(self, lease_s: float) -> int:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        swept = 0
        while True:
            given = (AT_ONCE, self._owner, lease_s, max(lease_s, SLICE_LEASE_S))
            late: int = await self._call(wire, "sweep", given)
            swept += late
            if late < AT_ONCE:
                return swept

    # ------------------------------------------------------------------------------------- what there is

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """See Store."""
        wire = self._line.wire or await self._line.open()
        self._flush()
        first, last = (first_day - EPOCH).days, (last_day - EPOCH).days
        days = [int(day) for day in await wire.send(pack(b"ZRANGEBYSCORE", f"{self._tag}:days", first, last))]
        found = await asyncio.gather(*(wire.send(pack(b"HGETALL", f"{self._tag}:u:{day}")) for day in days))
        return await asyncio.to_thread(_usage, days, found)

    async def health(self) -> LedgerHealth:
        """See Store."""
        sums = [0, 0, 0, 0]
        try:
            wire = self._line.wire or await self._line.open()
            while True:
                more: list[int] = await self._call(wire, "held", (sums[0], AT_ONCE))
                sums = [a + b for a, b in zip(sums, more, strict=True)]
                if more[0] < AT_ONCE:
                    break
        except StoreUnreachable as exc:
            return LedgerHealth(kind="redis", is_reachable=False, holds=0, held=Amounts(), detail=str(exc))
        held = Amounts(tokens=sums[1], thinking_tokens=sums[2], nano_usd=sums[3])
        return LedgerHealth(kind="redis", is_reachable=True, holds=sums[0], held=held)

    # --------------------------------------------------------------------------------------- connection

    async def close(self) -> None:
        """See Store."""
        self._flush()
        await self._line.close()

    async def _greet(self, wire: Wire) -> None:
        """Make a server that was just connected to ready: the scripts, and settlements that it may have lost."""
        await asyncio.gather(*(wire.send(pack(b"SCRIPT", b"LOAD", source)) for source in self._sources.values()))
        recent = [each for _, settlements in self._recent for each in settlements if each.was_taken]
        replies = await asyncio.gather(*(self._send_settlements(wire, some) for some in _by(AT_ONCE, recent)))
        await asyncio.gather(*self._send_unknown(wire, recent, _ids(replies)))
        await _check_memory(wire)

    def _call(self, wire: Wire, script: str, given: Sequence[Any]) -> asyncio.Future[Any]:
        """Send a call behind the settlements that wait."""
        if self._delivery is not None:
            self._flush()
        return wire.send(self._command(script, given))

    def _command(self, script: str, given: Sequence[Any]) -> bytes:
        packed = msgspec.msgpack.encode(given)
        if self._clock is None:
            return b"%b$%d\r\n%b\r\n" % (self._heads[script], len(packed), packed)
        now = repr(self._clock()).encode()
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n" % (self._heads[script], len(packed), packed, len(now), now)

    def _head(self, source: bytes) -> bytes:
        """All but the last words of a call to a script, packed."""
        words = 5 if self._clock is None else 6
        name = sha1(source).hexdigest()  # noqa: S324  # so the server names scripts; it is no secret
        packed = pack(b"EVALSHA", name, 1, self._tag)
        return b"*%d%b" % (words, packed[packed.index(b"\r") :])

    def _limits_of(self, booking: Booking) -> msgspec.Raw:
        """A booking's limits, packed; those of many bookings are the same."""
        if booking.slices:
            return _packed_limits(booking.limits, booking.slices)
        packed = self._limits.get(booking.limits)
        if packed is None:
            if len(self._limits) >= KEPT_LIMITS:
                self._limits.clear()
            packed = self._limits[booking.limits] = _packed_limits(booking.limits, [""] * len(booking.limits))
        return packed


async def _check_memory(wire: Wire) -> None:
    """Say that the server may throw budgets away when its memory is full, if it may."""
    with contextlib.suppress(StoreUnreachable):  # it need not tell; a connection that broke is found by the next call
        memory = await wire.send(pack(b"INFO", b"memory"))
        if b"\nmaxmemory:0\r" not in memory and b"\nmaxmemory_policy:noeviction\r" not in memory:
            log.error("the budget store may evict budgets: set its maxmemory-policy to noeviction")


def pack(*words: bytes | str | int) -> bytes:
    """A command as it goes over the wire."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def _source(parts: Sequence[str]) -> bytes:
    folder = files("budget.ledgers") / "lua"
    return b"\n".join((folder / f"{part}.lua").read_bytes() for part in parts)


def _packed_limits(limits: Sequence[Limit], slices: Sequence[str]) -> msgspec.Raw:
    rows = [
        (f"{limit.scope}|{limit.unit}|{limit.window or ''}", UNITS[limit.unit], limit.window or "", limit.amount, 0, of)
        for limit, of in zip(limits, slices, strict=True)
    ]
    return msgspec.Raw(msgspec.msgpack.encode(rows))


def _amounts(amounts: Amounts, requests: int) -> tuple[int, int, int, int]:
    return amounts.tokens, amounts.thinking_tokens, amounts.nano_usd, requests


def _label(booking: Booking) -> str:
    """What usage is entered under; empty for a slice, which has none."""
    return msgspec.json.encode((booking.mode, *booking.scopes)).decode() if booking.scopes else ""


def _by(size: int, many: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for first in range(0, len(many), size):
        yield many[first : first + size]


def _ids(answers: Sequence[Any]) -> set[bytes]:
    """The hold ids in one answer, or in those of several calls; nothing is the answer where none are given."""
    return {each for answer in answers for each in (answer if isinstance(answer, list) else (answer,)) if each}


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
    standings = [
        rate_standing(limit, float(a), needs[limit.unit])
        if limit.window in RATES
        else Standing(limit, limit.amount - a - b, a, left_us / 1e6 if left_us >= 0 else math.inf)
        for limit, a, b, left_us in zip(limits, reply[1::3], reply[2::3], reply[3::3], strict=True)
    ]
    if reply[0] == TAKEN:
        return standings
    refused = refusal(standings, needs)
    refused.standings = standings
    raise refused


def _usage(days: Sequence[int], found: Sequence[Sequence[bytes]]) -> list[UsageRow]:
    """The rows of these days. There may be many: to be called off the event loop."""
    return [row for day, fields in zip(days, found, strict=True) for row in _usage_rows(day, fields)]


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
