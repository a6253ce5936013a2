"""What the gateway costs per request and per token, beside other gateways, in one run.

    python -m bench.overhead [--quick] [--json]
    python -m bench.overhead --only thinkgate,nginx,ref-asgi --scenarios ns32,gap200 --rounds 5

The gateway under test has one core alone and is started with keys, limits, prices and metrics on
(refs/thinkgate.yaml); a fake vLLM (native/fastup.c) and the clients (native/load.c) share the other.
`us_per_*` is processor time of the gateway's process tree, from the scheduler's counters, over what it
delivered: it barely moves when other work steals the core, unlike requests per second.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import figures, harness, result
from bench.scenarios import SCENARIOS
from bench.targets import Cores, Peer, read_peers

if TYPE_CHECKING:
    import argparse

    from bench.figures import Run
    from bench.targets import Target

    Runs = dict[str, dict[str, list[Run]]]  # by scenario, then gateway

OURS = "thinkgate"
QUICK_SCENARIOS = ("ns32", "gap200", "capped_gap200", "st64", "capped64")
QUICK_SHARED = ("ns32",)
"""Scenarios that others run too in a quick run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is measured.

    Attributes:
        scenarios: names, in order.
        rounds: how often everything is measured, interleaved.
        shared: names of those that other gateways run too.
        end_s: on time.monotonic(); after the first round, no measurement begins later than this.
    """

    scenarios: tuple[str, ...]
    rounds: int
    shared: tuple[str, ...]
    patience: harness.Patience
    end_s: float = float("inf")

    def includes(self, scenario: str, target: str) -> bool:
        """Whether `target` runs `scenario`."""
        return target == OURS or (scenario in self.shared)


def run(targets: dict[str, Target], upstream: harness.Upstream, plan: Plan) -> Runs:
    """All scenarios on all targets, A B C A B C, `rounds` times."""
    runs: Runs = {name: {t: [] for t in targets if plan.includes(name, t)} for name in plan.scenarios}
    for number in range(plan.rounds):
        harness.say(f"round {number + 1} of {plan.rounds}")
        for scenario, by_target in runs.items():
            upstream.set(SCENARIOS[scenario].knobs)
            for name, found in by_target.items():
                if number and time.monotonic() > plan.end_s:
                    return runs
                one = harness.measure_quietly(targets[name], SCENARIOS[scenario], plan.patience)
                found.append(one)
                harness.say(
                    f"  {scenario:13} {name:14} {figures.shown(one.us_per_unit, 1):>9} us "
                    f"{one.units_per_s:>9,.0f}/s  cpu {one.cpu_percent:3.0f} %  "
                    f"noise {one.noise_percent:3.0f} %  bad {one.bad} {one.sample[:120]}"
                )
    return runs


def collect(runs: Runs) -> dict[str, Any]:
    """The figures of the result object."""
    scenarios = {
        name: {target: figures.summary(rs, SCENARIOS[name]) for target, rs in by_target.items() if rs}
        for name, by_target in runs.items()
        if any(by_target.values())
    }

    def figure(scenario: str, key: str, target: str = OURS) -> float | None:
        value: float | None = scenarios.get(scenario, {}).get(target, {}).get(key)
        return value

    def ratio_to(peer: str, scenario: str = "ns32", key: str = "us_per_request") -> float | None:
        return figures.ratio(figure(scenario, key), figure(scenario, key, peer))

    def extra(target: str) -> float | None:
        ours, other = figure("ns32", "us_per_request"), figure("ns32", "us_per_request", target)
        return None if ours is None or other is None else figures.rounded(other - ours, 1)

    return {
        "us_per_request": figure("ns32", "us_per_request"),
        "extra_us_per_request_sqlite": extra("thinkgate-sqlite"),
        "extra_us_per_request_valkey": extra("thinkgate-valkey"),
        "us_per_token": figure("gap200", "us_per_token"),
        "us_per_capped_token": figure("capped_gap200", "us_per_token"),
        "us_per_capped_request": figure("cap32", "us_per_request"),
        "us_per_token_saturated": figure("st64", "us_per_token"),
        "us_per_capped_token_saturated": figure("capped64", "us_per_token"),
        "delivered": figure("gap200", "delivered"),
        "delivered_capped": figure("capped_gap200", "delivered"),
        "token_delay_p99_us": figure("gap200", "p99_us"),
        "ratio_vs_smg": ratio_to("smg"),
        "ratio_vs_vllm_router": ratio_to("vllm-router"),
        "ratio_vs_nginx": ratio_to("nginx"),
        "ratio_vs_litellm": ratio_to("litellm"),
        "token_ratio_vs_smg": ratio_to("smg", "gap200", "us_per_token"),
        "token_ratio_vs_vllm_router": ratio_to("vllm-router", "gap200", "us_per_token"),
        "ratio_means": "our processor time over theirs, same scenario, same run; below 1 we are cheaper",
        "bad": sum(by[OURS]["bad"] for by in scenarios.values() if OURS in by),
        "scenarios": scenarios,
    }


def process_figures(target: Target) -> dict[str, float | None]:
    """Start-up and memory of one gateway."""
    return {
        "start_s": figures.rounded(target.start_s),
        "idle_mb": figures.rounded(target.idle_mb, 1),
        "peak_mb": figures.rounded(target.peak_mb, 1),
    }


def report(found: dict[str, Any]) -> str:
    """The tables for people: one per scenario, then the processes."""
    parts = []
    for name, by_target in found["scenarios"].items():
        unit = "token" if SCENARIOS[name].is_stream else "request"
        digits = {f"us_per_{unit}": 1, f"{unit}s_per_s": 0, "p50_us": 0, "p99_us": 0, "delivered": 3}
        digits |= {"bad": 0, "cpu_percent": 0, "noise_percent": 0}
        rows = [
            [
                target,
                *(figures.shown(row.get(key), d) for key, d in digits.items()),
                f"{row['quiet_runs']}/{row['runs']}",
            ]
            for target, row in by_target.items()
        ]
        head = ["gateway", *digits, "quiet"]
        parts.append(f"### {name}: {SCENARIOS[name].title}\n\n{figures.table(head, rows)}")
    head = ["gateway", "start_s", "idle_mb", "peak_mb"]
    rows = [[name, *(figures.shown(row[key], 1) for key in head[1:])] for name, row in found["processes"].items()]
    return "\n\n".join([*parts, f"### processes\n\n{figures.table(head, rows)}"])


def chosen(flags: argparse.Namespace) -> list[Peer]:
    """The peers this run starts, ours first."""
    peers = read_peers()
    if flags.only:
        return [peers[name] for name in flags.only.split(",")]
    default = [peer for peer in peers.values() if peer.default]
    for peer in default:
        if flags.quick and peer.is_slow:
            harness.say(f"skip {peer.name}: not part of --quick")
    return [peer for peer in default if not (flags.quick and peer.is_slow)]


def plan_of(flags: argparse.Namespace) -> Plan:
    """How much this run measures."""
    named = tuple(flags.scenarios.split(",")) if flags.scenarios else ()
    rounds = flags.rounds or 3
    if not flags.quick:
        patience = harness.Patience(scale=1, wait_s=20, tries=3)
        names = named or tuple(SCENARIOS)
        return Plan(scenarios=names, shared=names, rounds=rounds, patience=patience)
    return Plan(
        scenarios=named or QUICK_SCENARIOS,
        shared=named or QUICK_SHARED,
        rounds=rounds,
        patience=harness.Patience(scale=0.4, wait_s=0.6, tries=1),
        end_s=time.monotonic() + 32,
    )


def main() -> int:
    """Measure, print, and fail if our own gateway could not be measured."""
    flags = result.parser(__doc__ or "")
    flags.add_argument("--only", help="gateways of peers.toml, comma separated; default: ours and the usual peers")
    flags.add_argument("--scenarios", help=f"comma separated; default: all of {', '.join(SCENARIOS)}")
    flags.add_argument("--rounds", type=int)
    given = flags.parse_args()
    cores = Cores.available()
    found = result.envelope("overhead", quick=given.quick)
    plan = plan_of(given)
    with (
        harness.bench_place(cores) as (place, upstream),
        harness.started(chosen(given), place, cores) as targets,
    ):
        found |= collect(run(targets, upstream, plan))
        found["processes"] = {name: process_figures(target) for name, target in targets.items()}
        found["versions"] |= {t.name: t.version() for t in targets.values() if t.name != OURS}
    print(report(found))
    result.emit(found, as_json=given.json)
    return 0 if OURS in targets or given.only else 1


if __name__ == "__main__":
    raise SystemExit(main())
