"""Real processes that share a ledger: never over a limit, nothing lost with a process that is killed."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from budget.ledgers.leased import LeasedLedger
from tests.budget.ledger_process import Spec, opened
from tests.budget.places import LeasedPlace

ROOT = Path(__file__).parents[2]
PROCESSES, TASKS = 4, 64
WINDOW = ("org:acme", "tokens")
FIRST, LAST = dt.date(2020, 1, 1), dt.date(2100, 1, 1)
REPORT_S = 1.0  # at least once in this time progress reaches the store
pytestmark = pytest.mark.e2e


async def started(spec: Spec) -> Process:
    """A process that has its ledger open."""
    command = [sys.executable, "-m", "tests.budget.ledger_process", json.dumps(asdict(spec))]
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=PIPE)
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def used_by(process: Process) -> int:
    """What a draining process says when it is done."""
    assert process.stdout is not None
    used: int = json.loads(await process.stdout.readline())["used"]
    assert await process.wait() == 0
    return used


@asynccontextmanager
async def watching(place: LeasedPlace, amount: int) -> AsyncIterator[list[int]]:
    """While the block runs, no window of the limit may ever have more settled and held than its amount."""
    seen: list[int] = []

    async def look() -> None:
        while True:
            for (scope, unit, _), windows in (await place.read()).items():
                if (scope, unit) == WINDOW:
                    for settled, held, debt in windows.values():
                        assert debt == 0
                        assert settled + held <= amount
                        seen.append(settled + held)
            await asyncio.sleep(0.005)

    looking = asyncio.create_task(look())
    yield seen
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking


async def windows_of(place: LeasedPlace) -> dict[int, tuple[int, int, int]]:
    """Settled, held and debt of the limit, by window."""
    return next(w for (scope, unit, _), w in (await place.read()).items() if (scope, unit) == WINDOW)


async def test_four_processes_use_up_one_limit_and_no_more(shared: LeasedPlace) -> None:
    """Of 256 requests at once none gets what is not there; at the end less than one request's ceiling is unused."""
    amount, ceiling = 240_000, 50
    specs = [
        Spec(
            kind=shared.kind,
            address=shared.address,
            name=f"p{number}",
            work="drain",
            amount=amount,
            window="total",
            ceiling=ceiling,
        )
        for number in range(PROCESSES)
    ]
    processes = await asyncio.gather(*(started(spec) for spec in specs))
    async with watching(shared, amount) as seen:
        used = sum(await asyncio.gather(*(used_by(process) for process in processes)))
    ((settled, held, debt),) = (await windows_of(shared)).values()
    assert (settled, held, debt) == (used, 0, 0)
    assert amount - ceiling < settled <= amount
    assert seen  # how often it was looked at while they ran, the machine decides


async def test_a_month_rolls_over_once_under_the_load_of_four_processes(shared: LeasedPlace) -> None:
    """Every token used is settled in one of the two months, whichever process saw the new one first."""
    amount = 10**7
    ahead_s = dt.datetime(2031, 3, 1, tzinfo=dt.UTC).timestamp() - time.time() - 6
    specs = [
        Spec(
            kind=shared.kind,
            address=shared.address,
            name=f"p{number}",
            work="drain",
            amount=amount,
            window="month",
            seconds=8.0,
            ahead_s=ahead_s,
        )
        for number in range(PROCESSES)
    ]
    processes = await asyncio.gather(*(started(spec) for spec in specs))
    used = sum(await asyncio.gather(*(used_by(process) for process in processes)))
    windows = await windows_of(shared)
    months = [int(dt.datetime(2031, month, 1, tzinfo=dt.UTC).timestamp()) for month in (2, 3)]
    assert sorted(windows) == months
    assert all(settled > 0 and (held, debt) == (0, 0) for settled, held, debt in windows.values())
    assert sum(settled for settled, _, _ in windows.values()) == used


def counted(path: Path) -> int:
    """Tokens that a streaming process has used."""
    data = path.read_bytes()
    return sum(int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8))


async def test_a_killed_process_is_settled_at_its_last_report(shared: LeasedPlace, tmp_path: Path) -> None:
    """After kill -9 its holds are gone within the lease; what it used until the last second is settled, and no more."""
    lease_s, gap_s = 2.0, 0.02
    specs = []
    for number in range(PROCESSES):
        path = tmp_path / f"counters-{number}"
        path.write_bytes(bytes(8 * TASKS))
        spec = Spec(
            kind=shared.kind,
            address=shared.address,
            name=f"p{number}",
            work="stream",
            amount=10**12,
            ceiling=5000,
            lease_s=lease_s,
            gap_s=gap_s,
            counters=str(path),
        )
        specs.append(spec)
    processes = await asyncio.gather(*(started(spec) for spec in specs))
    observer = LeasedLedger(opened(shared.kind, shared.address, time.time), clock=time.time, lease_s=lease_s)
    try:
        while (await observer.health()).holds < PROCESSES * TASKS:
            await asyncio.sleep(0.05)
        await asyncio.sleep(2 * REPORT_S)
        victim = Path(specs[0].counters)
        before = counted(victim)
        await asyncio.sleep(REPORT_S)
        processes[0].send_signal(signal.SIGKILL)
        killed_s = time.monotonic()
        await processes[0].wait()
        generated = counted(victim)
        while (await observer.health()).holds > (PROCESSES - 1) * TASKS:
            await asyncio.sleep(0.05)
        gone_after_s = time.monotonic() - killed_s
        rows = {row.mode: row for row in await observer.usage(FIRST, LAST)}
        assert set(rows) == {"p0"}
        settled = rows["p0"].tokens
        print(f"killed: generated {generated}, settled {settled}, gone after {gone_after_s:.2f} s")
        assert rows["p0"].requests == TASKS
        assert before <= settled <= generated
        assert generated - settled <= TASKS * (REPORT_S / gap_s + 1)
        assert gone_after_s <= lease_s + 2 * REPORT_S
        assert (await windows_of(shared)).popitem()[1] == (settled, (PROCESSES - 1) * TASKS * 5000, 0)
    finally:
        for process in processes[1:]:
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await observer.close()
