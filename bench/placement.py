"""Which policy places calls best, in a simulated fleet (bench/fleet.py): hits, time to first token, balance.

    python -m bench.placement [--quick] [--json] [--real]

`results` has one object per policy, fleet and load: `hit_rate` of prompt blocks, `p50_ttft_ms` and `p99_ttft_ms` from
arrival to first token, `max_over_mean` of calls at a replica; each is the mean over the seeds. A load is the calls that
arrive per second and replica; about 5 of them fill a replica that finds nine tenths of its prompts cached. In the
middle of every run one replica dies for 15 s and comes back cold; `slow` runs have one of half the speed,
which nobody is told. Calls of ours wait at the gateway while every replica says that it is full, as they do in
gateway/admission.py; the others have no such queue, and `thinkgate_unqueued` is ours without it. `beaten` lists the
loads at which some policy is better than ours on both the hit rate and the 99th percentile.

With `--real` it is two vLLM servers on this machine instead, see bench/placement_real.py.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

from bench import figures, placement_real, result
from bench.fleet import Figures, Policy, play, trace
from bench.policies import CacheAwareTree, ConsistentHash, LeastLoaded, Ours, RoundRobin

OURS = "thinkgate"
POLICIES: dict[str, Callable[[int, int], Policy]] = {
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "consistent_hash": ConsistentHash,
    "bounded_hash": lambda replicas, seed: ConsistentHash(replicas, seed, 1.25),
    "cache_aware_tree": CacheAwareTree,
    "cache_aware_tree_mended": lambda replicas, seed: CacheAwareTree(replicas, seed, mends=True),
    "thinkgate_unqueued": lambda replicas, seed: Ours(replicas, seed, waits=False),
    OURS: Ours,
}
LOADS = (1.0, 3.0, 5.0, 7.0)
FLEETS = (2, 8, 64)
SECONDS = 120
FIGURES = ("hit_rate", "p50_ttft_ms", "p99_ttft_ms", "max_over_mean")


def measure(policy: str, replicas: int, per_s: float, seeds: range, *, slow: bool, seconds: float) -> dict[str, Any]:
    """One object: the mean of each figure over the seeds."""
    runs: list[Figures] = []
    for seed in seeds:
        requests = trace(seed, int(per_s * replicas * seconds), per_s * replicas)
        runs.append(play(POLICIES[policy](replicas, seed), requests, replicas, slow=slow))
    return {
        "policy": policy,
        "replicas": replicas,
        "calls_per_s_per_replica": per_s,
        "slow": slow,
        **{name: round(statistics.mean(getattr(run, name) for run in runs), 4) for name in FIGURES},
    }


def beaten(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where another's policy is better than ours on both the hit rate and the 99th percentile."""
    load = ("replicas", "calls_per_s_per_replica", "slow")
    ours = {tuple(each[name] for name in load): each for each in results if each["policy"] == OURS}
    return [
        {name: each[name] for name in ("policy", *load)}
        for each in results
        for own in [ours[tuple(each[name] for name in load)]]
        if not each["policy"].startswith(OURS)
        and each["hit_rate"] > own["hit_rate"]
        and each["p99_ttft_ms"] < own["p99_ttft_ms"]
    ]


def real(quick: bool, as_json: bool) -> int:
    """Two real servers. Returns 1 where the index and what was cached do not agree."""
    found = placement_real.measure(quick=quick)
    if not as_json:
        columns = ("policy", "hit_rate", "predicted_over_cached", "p50_ms", "p90_ms", "calls_per_s")
        rows = [[str(each.get(name, "")) for name in columns] for each in found["results"]]
        print(figures.table(list(columns), rows))
    result.emit({**result.envelope("placement", quick=quick), **found}, as_json=as_json)
    return 0 if found["agrees"] and found["restarts_seen"] else 1


def main() -> int:
    """Run every policy over every fleet and load."""
    parser = result.parser(__doc__ or "")
    parser.add_argument("--real", action="store_true", help="two real vLLM servers; minutes")
    flags = parser.parse_args()
    if flags.real:
        return real(flags.quick, flags.json)
    fleets, seeds, seconds = ((2, 8), range(1, 9), 60) if flags.quick else (FLEETS, range(1, 17), SECONDS)
    results: list[dict[str, Any]] = []
    for replicas in fleets:
        for slow, per_s in [*((False, load) for load in LOADS), (True, 3.0)]:
            few = seeds if replicas == 2 else seeds[: 2 if flags.quick or replicas > 8 else 4]
            results += [measure(name, replicas, per_s, few, slow=slow, seconds=seconds) for name in POLICIES]
            print(f"{replicas} replicas, {per_s} calls/s each{', one slow' if slow else ''}", file=sys.stderr)
    lost = beaten(results)
    if not flags.json:
        rows = [[str(each[name]) for name in ("replicas", "calls_per_s_per_replica", "slow", "policy", *FIGURES)]
                for each in results]  # fmt: skip
        print(figures.table(["replicas", "load", "slow", "policy", *FIGURES], rows))
    result.emit(
        {**result.envelope("placement", quick=flags.quick), "results": results, "beaten": lost, "unbeaten": not lost},
        as_json=flags.json,
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
