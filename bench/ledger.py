"""What budgets cost: hold and settle over five scopes, in memory, in SQLite with four processes, and in Valkey.

    python -m bench.ledger [--quick] [--json]

`p50_us` and `p99_us` are what a request waits for its hold and its settlement, at a steady PACED_PER_S over all
processes; `ops_per_s` is how many requests are held and settled when every process has TASKS of them under way all the
time, the last settlement included; `cpu_us_per_op` is processor time of the gateway's side. Growth is the time of one
request after the other in one process, with 1 to 10 scopes and 10 to 100,000 keys.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from bench import figures, harness, result, stores
from bench.ledger_worker import Load

PROCESSES = {"memory": 1, "sqlite": 4, "valkey": 4}
PACED_PER_S = 400.0
TASKS = 16
SCOPES, KEYS = 5, 100
SCOPE_STEPS = (1, 2, 5, 10)
KEY_STEPS, QUICK_KEY_STEPS = (10, 1_000, 10_000, 100_000), (10, 1_000, 10_000)
TURNS = 5
FLAT = 1.5
"""Most that a request may take longer with the most keys than with the fewest."""


class Workers:
    """Processes that share one store."""

    def __init__(self, kind: str, address: str, count: int) -> None:
        command = [sys.executable, "-m", "bench.ledger_worker", kind, address]
        self._processes = [
            subprocess.Popen(command, cwd=result.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for _ in range(count)
        ]

    def carry_out(self, load: Load) -> dict[str, float]:
        """All at once; figures of all together."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(asdict(load)) + "\n")
            process.stdin.flush()
        found: list[dict[str, Any]] = []
        for process in self._processes:
            assert process.stdout is not None
            found.append(json.loads(process.stdout.readline()))
        waited_us = sorted(ns / 1000 for each in found for ns in each["waited_ns"])
        ops = len(waited_us)
        return {
            "p50_us": round(statistics.median(waited_us), 1),
            "p99_us": round(waited_us[int(ops * 0.99)], 1),
            "ops_per_s": round(ops / max(each["elapsed_s"] for each in found), 1),
            "cpu_us_per_op": round(1e6 * sum(each["cpu_s"] for each in found) / ops, 1),
        }

    def close(self) -> None:
        """Wait until all have ended."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(timeout=30)


@contextlib.contextmanager
def workers(kind: str, count: int) -> Iterator[Workers]:
    """Processes on a fresh store."""
    with stores.fresh(kind) as address:
        started = Workers(kind, address, count)
        try:
            yield started
        finally:
            started.close()


def measured(kind: str, seconds: float) -> dict[str, Any]:
    """One kind of ledger."""
    count = PROCESSES[kind]
    with workers(kind, count) as all_of_them:
        all_of_them.carry_out(Load(scopes=SCOPES, keys=KEYS, seconds=0.5, tasks=TASKS))
        paced = all_of_them.carry_out(
            Load(scopes=SCOPES, keys=KEYS, seconds=seconds, tasks=TASKS, per_s=PACED_PER_S / count)
        )
        full = all_of_them.carry_out(Load(scopes=SCOPES, keys=KEYS, seconds=seconds, tasks=TASKS))
    found = {
        "p50_us": paced["p50_us"],
        "p99_us": paced["p99_us"],
        "ops_per_s": full["ops_per_s"],
        "cpu_us_per_op": paced["cpu_us_per_op"],
        "saturated_p50_us": full["p50_us"],
        "saturated_p99_us": full["p99_us"],
        "saturated_cpu_us_per_op": full["cpu_us_per_op"],
        "processes": count,
    }
    harness.say(f"  {kind}: {found}")
    return found


def growth(kind: str, seconds: float, key_steps: tuple[int, ...]) -> dict[str, Any]:
    """How a request's time grows with its scopes, and with the keys there are."""
    by_scopes = interleaved(kind, seconds, {n: Load(scopes=n, keys=KEYS, seconds=0, tasks=1) for n in SCOPE_STEPS})
    by_keys = interleaved(kind, seconds, {n: Load(scopes=SCOPES, keys=n, seconds=0, tasks=1) for n in key_steps})
    harness.say(f"  {kind}: by scopes {by_scopes}, by keys {by_keys}")
    return {
        "p50_us_by_scopes": by_scopes,
        "p50_us_by_keys": by_keys,
        "ratio_most_to_fewest_keys": round(by_keys[key_steps[-1]] / by_keys[key_steps[0]], 2),
    }


def interleaved(kind: str, seconds: float, loads: dict[int, Load]) -> dict[int, float]:
    """The median wait under each load, on a store of its own, in turns; of each the turn that was disturbed least."""
    with contextlib.ExitStack() as stores:
        processes = {at: stores.enter_context(workers(kind, 1)) for at in loads}
        for at, load in loads.items():
            processes[at].carry_out(replace(load, seconds=0.1, fill=True))
        turns = [
            {
                at: processes[at].carry_out(replace(load, seconds=seconds / TURNS))["p50_us"]
                for at, load in loads.items()
            }
            for _ in range(TURNS)
        ]
    return {at: min(turn[at] for turn in turns) for at in loads}


def report(found: dict[str, Any]) -> str:
    """Two tables for people."""
    kinds = [kind for kind in PROCESSES if found.get(kind)]
    columns = ("processes", "p50_us", "p99_us", "ops_per_s", "cpu_us_per_op", "saturated_p99_us")
    rows = [[kind, *(figures.shown(found[kind][column], 0) for column in columns)] for kind in kinds]
    grown = [
        [f"{kind}, {what}", ", ".join(f"{at}: {figures.shown(us, 0)}" for at, us in found["growth"][kind][key].items())]
        for kind in kinds
        for what, key in (("scopes", "p50_us_by_scopes"), ("keys", "p50_us_by_keys"))
    ]
    return "\n\n".join(
        [figures.table(["hold + settle, 5 scopes", *columns], rows), figures.table(["growth", "p50 us"], grown)]
    )


def main() -> int:
    """Measure, print, and fail if a ledger slows down with the number of keys."""
    given = result.parser(__doc__ or "").parse_args()
    found = result.envelope("ledger", quick=given.quick)
    found["paced_ops_per_s"] = PACED_PER_S
    found["growth"] = {}
    seconds, key_steps = (2.0, QUICK_KEY_STEPS) if given.quick else (10.0, KEY_STEPS)
    for kind in PROCESSES:
        try:
            found[kind] = measured(kind, seconds)
            found["growth"][kind] = growth(kind, seconds / 3, key_steps)
        except ImportError as exc:
            harness.say(f"  {kind}: skipped, {exc}")
            found[kind] = None
    grown = [each["ratio_most_to_fewest_keys"] for each in found["growth"].values()]
    found["growth_is_flat"] = all(ratio <= FLAT for ratio in grown)
    print(report(found))
    result.emit(found, as_json=given.json)
    return 0 if found["growth_is_flat"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
