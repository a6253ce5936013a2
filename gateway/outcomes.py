"""Claims and outcomes of requests with an `Idempotency-Key`, in the store.

Owns: whose turn it is (a claim: a record with a lease, renewed while the request runs) and what takes its place.
Does not own: what an outcome is made of (idempotency.py), nor storage (budget/records).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from budget.errors import Conflict, RecordsUnreachable
from gateway.errors import Headers, IdempotencyMismatch, StillRunning, StoreUnavailable

if TYPE_CHECKING:
    from budget.records.port import Records
    from gateway.config.schema import IdempotencyConfig

log = logging.getLogger("thinkgate.outcomes")
TICK_S = 1.0
RENEWALS = 5  # per lease: with the tick, and a lease of 10 s at least, each comes within a third of it


class Claimed(msgspec.Struct, frozen=True, tag=True):
    """Some process works on it.

    Attributes:
        asked: digest of the request's body.
        owner: random; tells this claim from every other.
    """

    asked: bytes
    owner: bytes


class Outcome(msgspec.Struct, frozen=True, tag=True):
    """An answer as it was sent; `asked` as above."""

    asked: bytes
    status: int
    headers: Headers
    body: bytes


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Claimed | Outcome).decode


class Claim:
    """The right to carry out a request, and the duty to keep its outcome or to give the claim back.

    Attributes:
        name: of the record.
        asked: digest of the request's body.
        value: what stands in the record while the claim is held.
        version: of the record, as far as it is known.
        renew_at_s: when, in the time of the process.
        is_open: the record may hold `value`.
        became: what became of the request, for the metric.
        lock: a renewal and the end do not overtake each other.
    """

    __slots__ = ("asked", "became", "is_open", "lock", "name", "renew_at_s", "value", "version")

    def __init__(self, name: str, body: bytes) -> None:
        self.name = name
        self.asked = hashlib.sha256(body).digest()
        self.value = _encode(Claimed(self.asked, secrets.token_bytes(16)))
        self.version = 0
        self.renew_at_s = 0.0
        self.is_open = False
        self.became = "released"
        self.lock = asyncio.Lock()


class Kept(NamedTuple):
    """An outcome that this process kept; `ends_at_s` in its time."""

    name: str
    version: int
    size_bytes: int
    ends_at_s: float


class Outcomes:
    """Claims and outcomes in the store.

    Args:
        records: the store.
        rules: the configuration in force.
        clock: monotonic seconds.
        became: told what became of each request, and of outcomes that are removed before their time.
    """

    def __init__(
        self,
        records: Records,
        rules: Callable[[], IdempotencyConfig],
        *,
        clock: Callable[[], float],
        became: Callable[[str], None],
    ) -> None:
        self._records = records
        self._rules = rules
        self._clock = clock
        self._became = became
        self._running: set[Claim] = set()
        self._kept: deque[Kept] = deque()  # oldest first
        self._kept_bytes = 0

    @asynccontextmanager
    async def claimed(self, name: str, body: bytes) -> AsyncIterator[Claim | Outcome]:
        """The outcome that is kept; else a claim, which is given back at the end unless `keep` used it.

        Raises: IdempotencyMismatch, StillRunning, StoreUnavailable.
        """
        claim = Claim(name, body)
        try:
            kept = await self._take(claim)
            yield claim if kept is None else kept
        finally:
            self._running.discard(claim)
            if claim.is_open:
                await self._give_back(claim)
            self._became(claim.became)

    async def keep(self, claim: Claim, outcome: Outcome) -> None:
        """Put an outcome in the place of its claim; a store that fails costs the replay, not the answer."""
        self._running.discard(claim)
        value, ttl_s = _encode(outcome), self._rules().ttl_s
        async with claim.lock:
            try:
                is_kept = await self._write(claim, value, ttl_s)
            except RecordsUnreachable as exc:
                log.warning("an answer could not be kept for retries", extra={"reason": str(exc)})
                claim.became = "lost"
                return
        claim.is_open = False
        claim.became = "stored" if is_kept else "lost"
        if is_kept:
            self._kept.append(Kept(claim.name, claim.version, len(value), self._clock() + ttl_s))
            self._kept_bytes += len(value)

    async def renew(self) -> None:
        """Renew the claims whose time it is. O(claims)."""
        now_s = self._clock()
        for claim in [claim for claim in self._running if claim.renew_at_s <= now_s]:
            async with claim.lock:
                if claim not in self._running:  # it ended meanwhile
                    continue
                lease_s = self._rules().lease_s
                try:
                    is_ours = await self._write(claim, claim.value, lease_s)
                except RecordsUnreachable as exc:
                    log.warning("claims could not be renewed", extra={"reason": str(exc)})
                    return  # until the next tick
            claim.renew_at_s = now_s + lease_s / RENEWALS
            if not is_ours:
                log.warning("a claim was lost: its lease ended, and the request was taken up elsewhere")
                self._running.discard(claim)

    async def make_room(self) -> None:
        """Remove the oldest of this process's outcomes until the others fit. O(removed)."""
        now_s, most_bytes = self._clock(), self._rules().max_total_bytes
        while self._kept and (self._kept_bytes > most_bytes or self._kept[0].ends_at_s <= now_s):
            oldest = self._kept.popleft()
            self._kept_bytes -= oldest.size_bytes
            if oldest.ends_at_s > now_s:
                self._became("evicted")
                with suppress(Conflict, RecordsUnreachable):  # then it ends with its time
                    await self._records.delete(oldest.name, expect=oldest.version)

    async def keep_up(self) -> None:
        """Renew claims and make room, until cancelled; neither waits for the other."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_each_tick(self.renew))
            tasks.create_task(_each_tick(self.make_room))

    async def _take(self, claim: Claim) -> Outcome | None:
        """Claim the name, or what is kept under it."""
        try:
            claim.is_open = True
            lease_s = self._rules().lease_s
            claim.renew_at_s = self._clock() + lease_s / RENEWALS
            try:
                claim.version = await self._records.put(claim.name, claim.value, expect=0, ttl_s=lease_s)
            except Conflict:
                claim.is_open = False
                return await self._found(claim)
        except RecordsUnreachable as exc:
            claim.became = "unavailable"
            log.warning("a request was refused, since nothing can be promised", extra={"reason": str(exc)})
            raise StoreUnavailable(
                "The store cannot be reached, so this request cannot be kept from running twice: try again, or send it "
                "without Idempotency-Key."
            ) from exc
        self._running.add(claim)
        return None

    async def _found(self, claim: Claim) -> Outcome:
        """What another request left. Raises: IdempotencyMismatch, StillRunning, RecordsUnreachable."""
        record = await self._records.get(claim.name)
        if record is None:  # it gave up in this very moment
            claim.became = "running"
            raise StillRunning
        try:
            kept: Claimed | Outcome = _decode(record.value)
        except msgspec.MsgspecError as exc:
            raise RecordsUnreachable("the entry is not of this version of thinkgate") from exc
        if kept.asked != claim.asked:
            claim.became = "mismatch"
            raise IdempotencyMismatch
        if isinstance(kept, Claimed):
            claim.became = "running"
            raise StillRunning
        claim.became = "replayed"
        return kept

    async def _write(self, claim: Claim, value: bytes, ttl_s: float) -> bool:
        """Write over a claim, unless it is another's by now. Raises: RecordsUnreachable."""
        expect = claim.version
        for _ in range(2):
            try:
                claim.version = await self._records.put(claim.name, value, expect=expect, ttl_s=ttl_s)
            except Conflict:  # the lease ended, the store forgot, or it did what it could not confirm
                record = await self._records.get(claim.name)
                if record is not None and record.value != claim.value:
                    return False
                expect = 0 if record is None else record.version
            else:
                return True
        return False

    async def _give_back(self, claim: Claim) -> None:
        claim.is_open = False
        async with claim.lock:
            try:
                record = await self._records.get(claim.name)
                if record is not None and record.value == claim.value:
                    await self._records.delete(claim.name, expect=record.version)
            except Conflict:  # its lease ended just now, and somebody else has it
                return
            except RecordsUnreachable as exc:
                log.warning("a claim could not be given back: it ends with its lease", extra={"reason": str(exc)})


async def _each_tick(work: Callable[[], Awaitable[None]]) -> None:
    """Again and again, until cancelled."""
    while True:
        await asyncio.sleep(TICK_S)
        try:
            await work()
        except Exception:  # a bug here must not end the requests that run
            log.exception("keeping up with claims and outcomes failed")
