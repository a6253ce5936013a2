"""Several worker processes behind one port: one budget, one set of metrics, and nobody's death is felt."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.budget.places import PLACES, SHARED, LeasedPlace
from tests.e2e.processes import Child, free_port, get
from tests.e2e.servers import samples
from tests.gateway.live import ASK, INSTANT, MODEL, Client, Json, ask, tree_of
from tests.gateway.test_drain import END_S, START_S, ends, log_of, process, until_refused
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Say, tokens

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
WORKERS, STREAMS = 4, 64
LEASE_S, REPORT_S = 4, 1.0
STREAM: Json = {**INSTANT, "stream": True, "max_tokens": 40}
COUNT = "thinkgate_requests_total"


@pytest.fixture(params=SHARED)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> LeasedPlace:
    """Where the budgets are."""
    found = PLACES[request.param](tmp_path)
    assert isinstance(found, LeasedPlace)
    return found


def shared_by(place: LeasedPlace, scripted: ScriptedBackend, *, amount: int, workers: int = WORKERS) -> Json:
    """Workers with one limit on all requests."""
    address = {"path" if place.kind == "sqlite" else "url": place.address}
    return tree_of(
        scripted,
        server={"workers": workers, "metrics": {"port": free_port()}, "timeouts": {"drain_s": 5}},
        store={"kind": place.kind, "lease_s": LEASE_S, **address},
        limits=[{"scope": f"model:{MODEL}", "unit": "tokens", "amount": amount, "window": "total"}],
    )


@asynccontextmanager
async def serving(tree: Json, folder: Path) -> AsyncIterator[tuple[Child, int]]:
    """The gateway, once all of its workers serve."""
    async with process(tree, folder) as (child, port):
        async with asyncio.timeout(START_S):
            while "is ready on" not in child.output():
                await asyncio.sleep(0.05)
        yield child, port


async def counts_of(place: LeasedPlace) -> tuple[int, int, int]:
    """Settled, held and debt of the limit."""
    books = await place.read()
    return next(iter(books[f"model:{MODEL}", "tokens", "total"].values())) if books else (0, 0, 0)


async def metrics_of(tree: Json, name: str, **labels: str) -> list[float]:
    """The series of all workers together."""
    _, text = await asyncio.to_thread(get, f"http://127.0.0.1:{tree['server']['metrics']['port']}/metrics")
    return samples(text, name, **labels)


async def until(holds: Callable[[], Awaitable[bool]], within_s: float = START_S) -> None:
    """Poll other processes."""
    async with asyncio.timeout(within_s):
        while not await holds():
            await asyncio.sleep(0.05)


def workers_of(child: Child) -> list[int]:
    """The process ids of the workers, by the kernel's list of the gateway's children."""
    children = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return [int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@asynccontextmanager
async def streams(port: int, count: int) -> AsyncIterator[list[Client]]:
    """So many clients that have sent their request."""
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(port)) for _ in range(count)]
        for client in clients:
            client.send(STREAM)
        yield clients


@asynccontextmanager
async def never_over(place: LeasedPlace, amount: int) -> AsyncIterator[set[int]]:
    """While the block runs, settled and held are never more than the limit."""
    seen: set[int] = set()

    async def look() -> None:
        while True:
            settled, held, debt = await counts_of(place)
            assert settled + held <= amount
            assert debt == 0
            seen.add(settled + held)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as tasks:
        looking = tasks.create_task(look())
        yield seen
        looking.cancel()


async def use_up(port: int) -> tuple[int, int]:
    """Ask until the budget is spent; tokens that were used, and the largest ceiling of a request."""
    used = ceiling = 0
    while True:
        answer = await ask(port, STREAM)
        if answer.status == 200:
            report = answer.chunks()[-1]["thinkgate"]
            used += report["settled"]["tokens"]
            ceiling = max(ceiling, report["hold"]["tokens"])
            continue
        if answer.error["code"] == "budget_exceeded":
            return used, ceiling
        # On a machine that is busy with other things the store may take longer than a request waits for it.
        assert answer.error["code"] in {"budget_held", "budget_store_unreachable"}
        await asyncio.sleep(0.02)


async def test_workers_use_up_one_limit_and_no_more(scripted: ScriptedBackend, place: LeasedPlace) -> None:
    """Of 256 streams at once none gets what is not there; at the end less than one request's ceiling is unused."""
    amount = 60_000
    scripted.default = Script(say=[Say(answer=tokens("it is 42, as always"))])
    tree = shared_by(place, scripted, amount=amount)
    async with serving(tree, place.folder) as (_, port), never_over(place, amount) as seen:
        results = await asyncio.gather(*(use_up(port) for _ in range(WORKERS * STREAMS)))
        used, ceiling = sum(used for used, _ in results), max(ceiling for _, ceiling in results)
        await until(lambda: _is(counts_of(place), (used, 0, 0)))
        assert amount - ceiling < used <= amount
        assert seen  # how often it was looked at while they ran, the machine decides
        served = sum(await metrics_of(tree, COUNT, status="200"))
        await until(lambda: _at_least(metrics_of(tree, "thinkgate_tokens_total"), used))
        assert sum(await metrics_of(tree, "thinkgate_tokens_total")) == used
        assert sum(await metrics_of(tree, COUNT, status="200")) >= served


async def _is(found: Awaitable[Any], wanted: Any) -> bool:
    return bool(await found == wanted)


async def _at_least(found: Awaitable[list[float]], wanted: float) -> bool:
    return sum(await found) >= wanted


async def test_a_killed_worker_leaves_nothing_held(scripted: ScriptedBackend, place: LeasedPlace) -> None:
    """Its streams break and are settled at what was last reported, within the lease; another takes its place."""
    told = 6
    gate = Gate()
    tree = shared_by(place, scripted, amount=10**9)
    async with serving(tree, place.folder) as (child, port):
        first = (await ask(port, INSTANT)).json
        before, prompt = first["thinkgate"]["settled"]["tokens"], first["usage"]["prompt_tokens"]
        await until(lambda: _is(counts_of(place), (before, 0, 0)))
        scripted.forget()
        scripted.default = Script(say=[Say(answer=tokens("so " * 30))], gates={told: gate})
        async with streams(port, WORKERS * STREAMS) as clients:
            async with asyncio.timeout(START_S):
                while sum(1 for exchange in scripted.exchanges if exchange.path.endswith("completions")) < len(clients):
                    await asyncio.sleep(0.05)
                await gate.wait()
            await asyncio.sleep(2 * REPORT_S)  # what arrived is reported
            settled, held_before, _ = await counts_of(place)
            assert (settled, held_before > 0) == (before, True)
            victim = workers_of(child)[0]
            os.kill(victim, signal.SIGKILL)
            killed_s = time.monotonic()
            await until(lambda: _has_settled(place, before))
            gone_after_s = time.monotonic() - killed_s
            settled, held, debt = await counts_of(place)
            settled -= before
            await until(lambda: _is(_count(workers_of(child)), WORKERS))
            gate.open()
            broken = sum([await _is_broken(client) for client in clients])
        assert 0 < broken < len(clients)
        assert (held_before - held) % broken == 0, "all holds of the dead worker are gone, and no others"
        generated = broken * (told + prompt)
        assert generated - broken <= settled <= generated, "all that had come a second ago, but for the abort's lag"
        assert debt == 0
        assert gone_after_s <= LEASE_S + 2 * REPORT_S
        await until(lambda: _is(_held(place), 0))
        assert (await ask(port, INSTANT)).status == 200
        assert [line["event"] for line in log_of(child)].count("a worker died") == 1
        print(f"killed: {broken} streams, generated {generated}, settled {settled}, gone after {gone_after_s:.2f} s")


async def _count(found: list[int]) -> int:
    return len(found)


async def _held(place: LeasedPlace) -> int:
    return (await counts_of(place))[1]


async def _has_settled(place: LeasedPlace, before: int) -> bool:
    return (await counts_of(place))[0] > before


async def _is_broken(client: Client) -> bool:
    """Whether its stream ended before it was complete."""
    with suppress(OSError, EOFError, asyncio.IncompleteReadError, AssertionError):
        answer = await client.answer()
        return b"[DONE]" not in answer.body
    return True


async def test_counters_outlive_a_worker(scripted: ScriptedBackend, place: LeasedPlace) -> None:
    """What a dead worker counted stays counted, what it was doing does not, and its successor counts on."""
    tree = shared_by(place, scripted, amount=10**9, workers=2)
    async with serving(tree, place.folder) as (child, port):
        for _ in range(10):
            assert (await ask(port, INSTANT)).status == 200
        await until(lambda: _is(_total(tree), 10))
        for pid in workers_of(child):
            os.kill(pid, signal.SIGKILL)
        await until(lambda: _serves(port))
        await until(lambda: _at_least(metrics_of(tree, COUNT, status="200"), 11))
        assert await metrics_of(tree, "thinkgate_inflight_requests") == [0]
        assert child.is_running()


async def _total(tree: Json) -> float:
    return sum(await metrics_of(tree, COUNT, status="200"))


async def _serves(port: int) -> bool:
    try:
        return (await ask(port, INSTANT)).status == 200
    except (OSError, EOFError, asyncio.IncompleteReadError):
        return False


async def test_a_reload_reaches_all_and_the_end_drops_no_stream(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """SIGHUP puts a changed file in force everywhere; on SIGTERM all workers drain, and it ends with 0."""
    tree = shared_by(PLACES["sqlite"](tmp_path), scripted, amount=10**9)  # type: ignore[arg-type]
    async with serving(tree, tmp_path) as (child, port):
        gate = Gate()
        scripted.default = Script(say=[Say(answer=tokens("so " * 8))], gates={4: gate})
        async with streams(port, 8) as clients:
            await gate.wait()
            child._process.send_signal(signal.SIGHUP)
            async with asyncio.timeout(END_S):
                while [line["event"] for line in log_of(child)].count("configuration reloaded") < WORKERS:
                    await asyncio.sleep(0.05)
            child._process.send_signal(signal.SIGTERM)
            await until_refused(port)
            gate.open()
            assert [b"[DONE]" in (await client.answer()).body for client in clients] == [True] * 8
        assert await ends(child) == 0


async def test_workers_that_wait_for_a_backend_reload(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """While a model has no backend at the start, SIGHUP reaches them, they end on SIGTERM, and nobody says ready."""
    tree = shared_by(PLACES["sqlite"](tmp_path), scripted, amount=10**9, workers=2)  # type: ignore[arg-type]
    tree["models"]["down"] = {**tree["models"][MODEL], "backends": [{"id": "z", "url": "http://127.0.0.1:9"}]}
    async with process(tree, tmp_path) as (child, _):
        async with asyncio.timeout(START_S):
            while [line["event"] for line in log_of(child)].count("configuration reloaded") < 2:
                os.kill(child.pid, signal.SIGHUP)
                await asyncio.sleep(0.5)
        assert "is ready on" not in child.output()
        os.kill(child.pid, signal.SIGTERM)
        assert await ends(child) == 0


async def test_workers_do_not_outlive_who_watches_them(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """When the first process is killed, the workers end too instead of serving on unseen."""
    tree = shared_by(PLACES["sqlite"](tmp_path), scripted, amount=10**9)  # type: ignore[arg-type]
    async with serving(tree, tmp_path) as (child, port):
        os.kill(child.pid, signal.SIGKILL)
        await until_refused(port)


async def test_a_taken_port_is_named(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """A second gateway does not share the first one's port by mistake."""
    tree = shared_by(PLACES["sqlite"](tmp_path), scripted, amount=10**9)  # type: ignore[arg-type]
    (tmp_path / "second").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        number = taken.getsockname()[1]
        with pytest.raises(AssertionError, match=rf"server\.port: 127\.0\.0\.1:{number} cannot be bound"):
            async with process(tree, tmp_path / "second", port=number):
                raise NotImplementedError


async def test_workers_that_cannot_start_end_the_gateway(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """What only a worker finds wrong, such as a store it cannot open, is said, and tried no second time."""
    tree = shared_by(PLACES["sqlite"](tmp_path), scripted, amount=1)  # type: ignore[arg-type]
    tree["store"]["path"] = str(tmp_path / "missing" / "a.db")
    with pytest.raises(AssertionError, match=r"(?s)ended with 1 before it was ready.*store\.path"):
        async with process(tree, tmp_path):
            raise NotImplementedError


async def test_many_requests_meet_all_workers(scripted: ScriptedBackend, place: LeasedPlace) -> None:
    """The kernel spreads connections: each worker serves some of 200."""
    tree = shared_by(place, scripted, amount=10**9)
    async with serving(tree, place.folder) as (child, port):
        answers = [await ask(port, {**ASK, "thinkgate": {"mode": "instant"}}) for _ in range(200)]
        assert {answer.status for answer in answers} == {200}
        processes = {line["request_id"].rpartition("-")[0] for line in log_of(child) if line["event"] == "request"}
        assert len(processes) == WORKERS
