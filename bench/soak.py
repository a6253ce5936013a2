"""Whether the gateway leaks: memory and holds over 100,000 requests and 10,000 disconnects.

    python -m bench.soak [--quick] [--json]

Three clients run at once in every block: plain answers, capped streams to the end, and capped streams
that are hung up on in the middle. Memory is the proportional set size of the gateway's process tree,
read between the blocks, when nothing is under way. It is flat if the line fitted through the blocks
after the warm-up rises by no more than FLAT_MB over them. At the end nothing may be left: no hold, no
request in flight, no stream open at the upstream.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bench import accounting, figures, harness, result
from bench.targets import Cores, Target, read_peers

if TYPE_CHECKING:
    import argparse

FLAT_MB = 3.0
WARM_UP_SHARE = 0.4
"""Of the blocks, before the line is fitted: pools, caches and arenas fill first."""
BLOCKS = 20
STREAM_SHARE = 0.2
"""Of the requests that are streams."""
KNOBS = "think=200&answer=20&gap_us=2000&first_us=0&burst=1"
"""With a gap, so that who hangs up does it while the upstream still has tokens to send."""
STREAM_TOKENS = 70
"""50 of thinking under the cap, 20 of answer."""
LEFTOVERS = {"held_tokens": "thinkgate_held_tokens", "inflight_requests": "thinkgate_inflight_requests"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What runs between two readings of memory."""

    plain: int
    streams: int
    hangups: int

    @classmethod
    def of(cls, requests: int, hangups: int) -> Block:
        """`requests` whole answers, of which STREAM_SHARE are streams, and `hangups` broken ones."""
        streams = round(requests * STREAM_SHARE)
        return cls(plain=requests - streams, streams=streams, hangups=hangups)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How many blocks, and when no further one begins, on time.monotonic()."""

    block: Block
    blocks: int
    end_s: float = float("inf")


@dataclass(slots=True)
class Count:
    """What came of the requests so far."""

    requests: int = 0
    disconnects: int = 0
    bad: int = 0
    sample: str = ""

    def add(self, client: dict[str, Any]) -> None:
        """One load generator's object."""
        self.requests += client["ok"]
        self.disconnects += client["hangups"]
        self.bad += client["bad"] + client["errors"] + client["short"] + client["unfinished"]
        self.sample = self.sample or client.get("sample", "")


@dataclass(slots=True)
class Memory:
    """Readings: after so many requests, so many megabytes."""

    requests: list[int] = field(default_factory=list)
    mb: list[float] = field(default_factory=list)

    def add(self, requests: int, mb: float) -> None:
        """One reading."""
        self.requests.append(requests)
        self.mb.append(round(mb, 2))

    def verdict(self) -> dict[str, Any]:
        """Slope after the warm-up, and whether that is flat."""
        first = max(1, round(len(self.mb) * WARM_UP_SHARE))
        requests, mb = self.requests[first:], self.mb[first:]
        per_request_mb = figures.slope(requests, mb)
        growth_mb = per_request_mb * (requests[-1] - requests[0]) if requests else 0.0
        return {
            "growth_bytes_per_request": round(per_request_mb * 1024**2, 2),
            "growth_mb": round(growth_mb, 2),
            "flat_below_mb": FLAT_MB,
            "flat": len(mb) >= 3 and growth_mb <= FLAT_MB,
            "start_mb": self.mb[0],
            "end_mb": self.mb[-1],
            "peak_mb": max(self.mb),
        }


def run_block(target: Target, block: Block) -> list[dict[str, Any]]:
    """All three clients at once, each to its last request."""
    tokens = ["-t", str(STREAM_TOKENS)]
    clients = [
        (block.plain, [*harness.load_command(target, "plain"), "-c", "16"]),
        (block.streams, [*harness.load_command(target, "capped"), "-c", "48", *tokens]),
        (block.hangups, [*harness.load_command(target, "capped"), "-c", "16", "-x", "25"]),
    ]
    running = [
        subprocess.Popen([*command, "-n", str(n), "-w", "0", "-d", "115"], stdout=subprocess.PIPE)
        for n, command in clients
    ]
    return [json.loads(process.communicate()[0]) for process in running]


def parse_metric(text: str, name: str) -> float | None:
    """The sum over all label sets of one metric in Prometheus text; None if it is not there."""
    values = re.findall(rf"^{name}(?:\{{[^}}]*\}})? (\S+)", text, re.MULTILINE)
    return sum(float(value) for value in values) if values else None


def scraped(port: int) -> str:
    """Prometheus text; empty from a gateway that has none here."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return ""


def leftovers(target: Target, upstream: harness.Upstream, limit_s: float = 10.0) -> dict[str, float | None]:
    """What is still held, in flight or open, once it had `limit_s` to settle."""
    end = time.monotonic() + limit_s
    while True:
        text = scraped(target.metrics_port)
        left: dict[str, float | None] = {key: parse_metric(text, name) for key, name in LEFTOVERS.items()}
        left["upstream_open_streams"] = upstream.stats()["open_streams"]
        if not any(left.values()) or time.monotonic() > end:
            return left
        time.sleep(0.2)


def soak(target: Target, upstream: harness.Upstream, plan: Plan) -> dict[str, Any]:
    """All blocks, memory after each; then what is left."""
    upstream.set(KNOBS)
    count, memory = Count(), Memory()
    memory.add(0, accounting.memory_mb(target.pids()))
    for _ in range(plan.blocks):
        if time.monotonic() > plan.end_s:
            harness.say("  no time left: fewer blocks than planned")
            break
        for client in run_block(target, plan.block):
            count.add(client)
        accounting.wait_until_idle(target.pids())
        memory.add(count.requests + count.disconnects, accounting.memory_mb(target.pids()))
        harness.say(
            f"  {count.requests:>7,} requests {count.disconnects:>6,} disconnects "
            f"{memory.mb[-1]:7.1f} MB  bad {count.bad} {count.sample[:120]}"
        )
    left = leftovers(target, upstream)
    return {
        **asdict(count),
        **memory.verdict(),
        **left,
        "nothing_left": all(value == 0 for value in left.values()),
        "memory_mb": memory.mb,
    }


def plan_of(flags: argparse.Namespace) -> Plan:
    """How much this run does."""
    if flags.quick:
        return Plan(block=Block.of(1_500, 150), blocks=20, end_s=time.monotonic() + 36)
    return Plan(block=Block.of(flags.requests // BLOCKS, flags.disconnects // BLOCKS), blocks=BLOCKS)


def report(found: dict[str, Any]) -> str:
    """One table for people."""
    rows = [
        ["requests answered", f"{found['requests']:,}"],
        ["disconnects in mid-stream", f"{found['disconnects']:,}"],
        ["failed", f"{found['bad']:,}"],
        ["memory at start, MB", figures.shown(found["start_mb"], 1)],
        ["memory at the end, MB", figures.shown(found["end_mb"], 1)],
        [f"growth after warm-up, MB (flat below {FLAT_MB:g})", figures.shown(found["growth_mb"], 2)],
        ["tokens still held", figures.shown(found["held_tokens"])],
        ["requests still in flight", figures.shown(found["inflight_requests"])],
        ["streams still open upstream", figures.shown(found["upstream_open_streams"])],
    ]
    return figures.table(["soak", "measured"], rows)


def main() -> int:
    """Measure, print, and fail if it leaks, leaves anything, or refused anything."""
    flags = result.parser(__doc__ or "")
    flags.add_argument("--target", default="thinkgate", help="another gateway of peers.toml, for comparison")
    flags.add_argument("--requests", type=int, default=100_000)
    flags.add_argument("--disconnects", type=int, default=10_000)
    given = flags.parse_args()
    cores = Cores.available()
    plan = plan_of(given)
    found = result.envelope("soak", quick=given.quick)
    with (
        harness.bench_place(cores) as (place, upstream),
        harness.started([read_peers()[given.target]], place, cores) as targets,
    ):
        if not targets:
            return 1
        found |= soak(targets[given.target], upstream, plan)
    print(report(found))
    result.emit(found, as_json=given.json)
    return 0 if found["flat"] and found["nothing_left"] and not found["bad"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
