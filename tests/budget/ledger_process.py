"""One process of several that share a ledger, with real time; what it does is the JSON of its first argument.

    python -m tests.budget.ledger_process '{"kind": "sqlite", "address": "/tmp/a.db", "work": "drain", ...}'

`drain` holds and settles in `tasks` tasks at once until the limit is spent, or for `seconds`; it prints what it used.
`stream` keeps a hold in each task and uses a token every `gap_s`, which it counts in a file, until it is killed.
"""

from __future__ import annotations

import asyncio
import json
import mmap
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from budget.errors import HoldRefused
from budget.ledger import Amounts, Limit, Window
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.redis import RedisStore
from budget.ledgers.sqlite import SqliteStore
from budget.ledgers.store import Store

SCOPES = ("key:a", "team:ml", "org:acme")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to do.

    Attributes:
        kind, address: of the store.
        name: the mode under which it enters its usage.
        amount, window: the limit of the widest scope; the others are out of reach.
        ceiling: of each hold.
        ahead_s: of its clock.
        counters: the file of `stream`.
    """

    kind: str
    address: str
    name: str
    work: Literal["drain", "stream"]
    amount: int
    window: Window = "day"
    tasks: int = 64
    ceiling: int = 50
    seconds: float = 60.0
    lease_s: float = 10.0
    gap_s: float = 0.02
    ahead_s: float = 0.0
    counters: str = ""

    def limits(self) -> list[Limit]:
        """One that matters, and one in each other scope."""
        amounts = {"key:a": 10**12, "team:ml": 10**12, "org:acme": self.amount}
        return [Limit(scope=s, unit="tokens", window=self.window, amount=n) for s, n in amounts.items()]


def opened(kind: str, address: str, clock: Callable[[], float]) -> Store:
    """A process's way to a store."""
    if kind == "redis":
        return RedisStore(address, clock=clock)
    assert kind == "sqlite"
    return SqliteStore(Path(address), clock=clock)


async def drain(spec: Spec, ledger: LeasedLedger) -> int:
    """Use up the limit; how much this process used."""
    end_s = time.monotonic() + spec.seconds
    used = 0

    async def task() -> None:
        nonlocal used
        while time.monotonic() < end_s:
            hold = ledger.hold(SCOPES, Amounts(tokens=spec.ceiling), mode=spec.name)
            try:
                async with hold:
                    await asyncio.sleep(random.random() * 0.002)
                    if random.random() < 0.2:
                        await hold.extend(Amounts(tokens=spec.ceiling // 5))
                    mine = random.randint(0, hold.ceiling.tokens)
                    hold.report(Amounts(tokens=mine))
                    used += mine
            except HoldRefused as refused:
                if refused.kind != "budget_held":
                    return
                await asyncio.sleep(random.random() * 0.005)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(spec.tasks):
            tasks.create_task(task())
    return used


async def stream(spec: Spec, ledger: LeasedLedger) -> None:
    """Use tokens, one after the other, until killed."""
    with Path(spec.counters).open("r+b") as file:
        counters = mmap.mmap(file.fileno(), 0)

    async def task(number: int) -> None:
        used = 0
        async with ledger.hold(SCOPES, Amounts(tokens=spec.ceiling), mode=spec.name) as hold:
            hold.report(lambda: Amounts(tokens=used))
            while used < spec.ceiling:
                await asyncio.sleep(spec.gap_s)
                used += 1
                counters[8 * number : 8 * number + 8] = used.to_bytes(8, "little")

    async with asyncio.TaskGroup() as tasks:
        for number in range(spec.tasks):
            tasks.create_task(task(number))


async def main() -> None:
    """Work as the argument says."""
    spec = Spec(**json.loads(sys.argv[1]))

    def clock() -> float:
        return time.time() + spec.ahead_s

    store = opened(spec.kind, spec.address, clock)
    ledger = LeasedLedger(store, spec.limits(), clock=clock, lease_s=spec.lease_s, timeout_s=20)
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(ledger.run())
        print("ready", flush=True)
        if spec.work == "drain":
            print(json.dumps({"used": await drain(spec, ledger)}), flush=True)
        else:
            await stream(spec, ledger)
        running.cancel()
    await ledger.close()


if __name__ == "__main__":
    asyncio.run(main())
