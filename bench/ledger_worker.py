"""One process that holds and settles, as a worker of the gateway does; `bench.ledger` runs several.

    python -m bench.ledger_worker KIND ADDRESS     # loads as JSON lines on standard input, figures on standard output

Owns: how each kind of ledger is opened, and the load on it.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from budget.ledger import Amounts, Ledger, Limit, Unit, Window
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.memory import MemoryLedger
from budget.ledgers.store import Store

CEILING = Amounts(tokens=1500, thinking_tokens=1000, nano_usd=1_200_000)
USED = Amounts(tokens=700, thinking_tokens=400, nano_usd=500_000)
KINDS: list[tuple[Unit, Window]] = [
    ("requests", "minute"),
    ("tokens", "hour"),
    ("usd", "day"),
    ("thinking_tokens", "day"),
    ("tokens", "month"),
]
FILL_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to do.

    Attributes:
        scopes: of each request, its key among them; each has one limit.
        keys: among which requests are spread.
        seconds: for how long.
        tasks: requests under way at once.
        per_s: requests that begin each second; 0 begins one when another has ended.
        fill: hold once with every key before.
    """

    scopes: int
    keys: int
    seconds: float
    tasks: int
    per_s: float = 0.0
    fill: bool = False

    def limits(self) -> list[Limit]:
        """One of each scope, out of reach."""
        shared = [_limit(f"tag:{at}", at) for at in range(1, self.scopes)]
        return [*shared, *(_limit(f"key:{at}", 0) for at in range(self.keys))]


def _limit(scope: str, at: int) -> Limit:
    unit, window = KINDS[at % len(KINDS)]
    return Limit(scope=scope, unit=unit, window=window, amount=10**15)


def opened(kind: str, address: str) -> Ledger:
    """A ledger over the store at `address`. Raises: ImportError where what it needs is not installed."""
    if kind == "memory":
        return MemoryLedger(clock=time.time)
    store: Store
    if kind == "sqlite":
        from budget.ledgers.sqlite import SqliteStore

        path, _, synchronous = address.partition("?")
        store = SqliteStore(Path(path), clock=time.time, synchronous="full" if synchronous else "normal")
    else:
        store = importlib.import_module("budget.ledgers.redis").RedisStore(address)
    return LeasedLedger(store, clock=time.time, timeout_s=10)


class Worker:
    """One process's share of a load."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._waited_ns: list[int] = []

    async def carry_out(self, load: Load) -> dict[str, Any]:
        """Hold and settle; what it took."""
        self._ledger.set_limits(load.limits())
        shared = [f"tag:{at}" for at in range(1, load.scopes)]
        if load.fill:
            for first in range(0, load.keys, FILL_AT_ONCE):
                keys = range(first, min(load.keys, first + FILL_AT_ONCE))
                await asyncio.gather(*(self._request([f"key:{key}", *shared]) for key in keys))
        self._waited_ns = []
        began_s, began_cpu_s = time.perf_counter(), time.process_time()
        end_s = began_s + load.seconds
        async with asyncio.TaskGroup() as tasks:
            for _ in range(load.tasks):
                tasks.create_task(self._task(load, shared, end_s))
        await self._ledger.health()  # everything is settled
        elapsed_s, cpu_s = time.perf_counter() - began_s, time.process_time() - began_cpu_s
        return {"waited_ns": self._waited_ns, "elapsed_s": elapsed_s, "cpu_s": cpu_s}

    async def _task(self, load: Load, shared: list[str], end_s: float) -> None:
        gap_s = load.tasks / load.per_s if load.per_s else 0.0
        next_s = time.perf_counter() + random.random() * gap_s
        while (now_s := time.perf_counter()) < end_s:
            if gap_s:
                await asyncio.sleep(next_s - now_s)
                next_s += gap_s * random.uniform(0.5, 1.5)
            elif isinstance(self._ledger, MemoryLedger):
                await asyncio.sleep(0)
            await self._request([f"key:{random.randrange(load.keys)}", *shared])

    async def _request(self, scopes: list[str]) -> None:
        began_ns = time.perf_counter_ns()
        async with self._ledger.hold(scopes, CEILING, mode="reasoning") as hold:
            hold.report(USED)
        self._waited_ns.append(time.perf_counter_ns() - began_ns)


async def main() -> None:
    """Carry out loads until there are no more."""
    ledger = opened(sys.argv[1], sys.argv[2])
    worker = Worker(ledger)
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as tasks:
        beating = tasks.create_task(ledger.run())
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            print(json.dumps(await worker.carry_out(Load(**json.loads(line)))), flush=True)
        beating.cancel()
    await ledger.close()


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
