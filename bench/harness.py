"""Gateways side by side: start, measure in turn, stop.

Owns: the run. The gateway under test has one core alone; upstream and clients share the other. Every
scenario is put to one gateway after the other, A B C A B C, so that outside noise falls on all alike.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench import accounting, scenarios
from bench.compiled import compiled
from bench.figures import QUIET_PERCENT, Run, Spent
from bench.targets import PATH, Cores, Peer, Place, Target, TargetError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.scenarios import Scenario

UPSTREAM_PORT = 9100


def say(line: str) -> None:
    """Progress, on standard error: standard output is for results."""
    print(line, file=sys.stderr, flush=True)


class Upstream:
    """The fake vLLM server behind every gateway."""

    def __init__(self, cores: Cores) -> None:
        self.port = port = accounting.free_port(UPSTREAM_PORT)
        command = ["taskset", "-c", str(cores.clients), str(compiled("fastup")), "-p", str(port)]
        self.process = subprocess.Popen([*command, "-m", scenarios.MODEL], start_new_session=True)
        while not accounting.is_listening(port):
            if self.process.poll() is not None:
                raise TargetError("the fake upstream did not come up")
            time.sleep(0.01)

    def _get(self, path: str) -> bytes:
        status = self.process.poll()
        if status is not None:
            raise TargetError(f"the fake upstream ended with status {status}")
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
            return bytes(answer.read())

    def set(self, knobs: str) -> None:
        """Change how it answers, e.g. `think=50&answer=50`."""
        self._get(f"/__cfg?{knobs}")

    def stats(self) -> dict[str, int]:
        """Its counters; `open_streams` is what a gateway has not closed."""
        return dict(json.loads(self._get("/__stats")))

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


@contextmanager
def bench_place(cores: Cores) -> Iterator[tuple[Place, Upstream]]:
    """A scratch folder with the request bodies in it, and a running upstream."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        scenarios.write_bodies(Path(scratch))
        # a terminated benchmark must not leave gateways behind on a core that others measure on
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        upstream = Upstream(cores)
        try:
            # this process measures; it must not disturb the gateway's core while it does
            os.sched_setaffinity(0, {cores.clients})
            yield Place(upstream.port, upstream.process.pid, Path(scratch)), upstream
        finally:
            upstream.stop()


@contextmanager
def started(peers: list[Peer], place: Place, cores: Cores) -> Iterator[dict[str, Target]]:
    """Those of `peers` that come up, one after the other; the others are skipped with a line why."""
    targets = [Target(peer, place, cores) for peer in peers]
    body = json.dumps(scenarios.PLAIN).encode()
    up: dict[str, Target] = {}
    try:
        for target in targets:
            try:
                target.start(body)
            except TargetError as exc:
                say(f"skip {target.name}: {exc}")
                continue
            up[target.name] = target
            say(f"up   {target.name}: {target.start_s:.2f} s, {target.idle_mb:.0f} MB")
        yield up
    finally:
        for target in targets:
            target.stop()


def load_command(target: Target, body: str) -> list[str]:
    """The load generator on the clients' core, aimed at `target`."""
    command = ["taskset", "-c", str(target.cores.clients), str(compiled("load")), "-p", str(target.port)]
    command += ["-u", PATH, "-f", str(target.place.scratch / f"{body}.json")]
    for header in target.headers:
        command += ["-H", header]
    return command


@dataclass(frozen=True, slots=True)
class Clocks:
    """Processor time of everyone, at one moment."""

    at_s: float
    gateway: accounting.CpuTime
    upstream: accounting.CpuTime
    clients_s: float
    gateway_core_s: float
    clients_core_s: float

    @classmethod
    def read(cls, target: Target, pids: list[int]) -> Clocks:
        """Now. The load generator counts among our children once it has been waited for."""
        usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return cls(
            at_s=time.monotonic(),
            gateway=accounting.cpu_time(pids),
            upstream=accounting.cpu_time([target.place.upstream_pid]),
            clients_s=sum(usage.ru_utime + usage.ru_stime for usage in usages),
            gateway_core_s=accounting.busy_s({target.cores.gateway}),
            clients_core_s=accounting.busy_s({target.cores.clients}),
        )

    def since(self, before: Clocks) -> Spent:
        """What was spent between two readings, and how much of it by others."""
        elapsed_s = self.at_s - before.at_s
        gateway_s = self.gateway.seconds_since(before.gateway)
        ours_s = self.upstream.seconds_since(before.upstream) + self.clients_s - before.clients_s
        others_s = (
            self.gateway_core_s - before.gateway_core_s - gateway_s,
            self.clients_core_s - before.clients_core_s - ours_s,
        )
        return Spent(cpu_s=gateway_s, elapsed_s=elapsed_s, others_s=max(0.0, *others_s))


def measure(target: Target, scenario: Scenario, *, scale: float = 1.0) -> Run:
    """Put one scenario to one gateway, once."""
    warm_s = scenario.warm_s * (scale if scenario.ramp_ms == 0 else 1)
    command = load_command(target, scenario.body)
    command += ["-c", str(scenario.connections), "-r", str(scenario.ramp_ms), "-t", str(scenario.tokens)]
    command += ["-d", f"{scenario.measured_s * scale:.2f}", "-w", f"{warm_s:.2f}"]
    pids = target.pids()
    with _peak_memory(target, pids):
        before = Clocks.read(target, pids)
        said = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        spent = Clocks.read(target, pids).since(before)
    accounting.wait_until_idle(pids)
    client: dict[str, Any] = json.loads(said.stdout)
    return Run.of(client, scenario, spent)


@contextmanager
def _peak_memory(target: Target, pids: list[int]) -> Iterator[None]:
    """Watch memory from a thread: the measuring itself waits for the load generator."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):
            target.peak_mb = max(target.peak_mb, accounting.memory_mb(pids))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How hard a measurement tries to have the core for itself.

    Attributes:
        scale: of every measuring time.
        wait_s: for a quiet core before it begins.
        tries: measurements until other work took less than QUIET_PERCENT of the core.
    """

    scale: float
    wait_s: float
    tries: int


def measure_quietly(target: Target, scenario: Scenario, patience: Patience) -> Run:
    """Measure, again if need be; the quietest try counts."""
    best: Run | None = None
    for _ in range(patience.tries):
        accounting.wait_until_quiet({target.cores.gateway, target.cores.clients}, limit_s=patience.wait_s)
        run = measure(target, scenario, scale=patience.scale)
        if best is None or run.noise_percent < best.noise_percent:
            best = run
        if best.noise_percent <= QUIET_PERCENT:
            break
    assert best is not None
    return best
