"""Processor time, memory and noise, as the Linux scheduler counts them.

Owns: reading /proc. Figures per process tree, because a gateway may be several processes.
"""

from __future__ import annotations

import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

PROC = Path("/proc")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """Processor time of a process tree, by two clocks.

    Attributes:
        fine_ns: exact, but forgets threads that have ended.
        coarse_ns: remembers them, in steps of 10 ms.
    """

    fine_ns: int
    coarse_ns: int

    def seconds_since(self, before: CpuTime) -> float:
        """Seconds used since `before`: the fine clock, unless threads ended in between."""
        fine_ns = self.fine_ns - before.fine_ns
        coarse_ns = self.coarse_ns - before.coarse_ns
        return (coarse_ns if coarse_ns > fine_ns * 1.1 + 3e7 else fine_ns) / 1e9


def read(path: Path) -> str:
    """A file of /proc; empty when its process has just ended."""
    try:
        return path.read_text()
    except OSError:
        return ""


def process_tree(pid: int) -> list[int]:
    """`pid` and everything it started that is still alive."""
    found: list[int] = []
    todo = [pid]
    while todo:
        parent = todo.pop()
        if not (PROC / str(parent)).exists():
            continue
        found.append(parent)
        for children in (PROC / str(parent)).glob("task/*/children"):
            todo += [int(child) for child in read(children).split()]
    return found


def cpu_time(pids: Iterable[int]) -> CpuTime:
    """What these processes have used so far."""
    fine_ns = coarse_ns = 0
    for pid in pids:
        for schedstat in (PROC / str(pid)).glob("task/*/schedstat"):
            fine_ns += int((read(schedstat).split() or ["0"])[0])
        fields = read(PROC / str(pid) / "stat").rpartition(")")[2].split()
        if fields:
            coarse_ns += (int(fields[11]) + int(fields[12])) * TICK_NS
    return CpuTime(fine_ns, coarse_ns)


def memory_mb(pids: Iterable[int]) -> float:
    """Proportional set size: shared pages count once over all sharers."""
    total_kb = 0
    for pid in pids:
        match = re.search(r"^Pss:\s+(\d+)", read(PROC / str(pid) / "smaps_rollup"), re.MULTILINE)
        total_kb += int(match[1]) if match else 0
    return total_kb / 1024


def busy_s(cpus: set[int]) -> float:
    """Busy seconds of these cores since boot, without niced work, which gives way to ours."""
    return parse_busy_ticks((PROC / "stat").read_text(), cpus) * TICK_NS / 1e9


def parse_busy_ticks(stat: str, cpus: set[int]) -> int:
    """User, system, interrupt and stolen ticks of `cpus` in the text of /proc/stat."""
    ticks = 0
    for core, counters in re.findall(r"^cpu(\d+) (.*)$", stat, re.MULTILINE):
        if int(core) in cpus:
            user, _nice, system, _idle, _iowait, *rest = (int(x) for x in counters.split())
            ticks += user + system + sum(rest[:3])
    return ticks


def wait_until_quiet(cpus: set[int], *, limit_s: float, most_percent: float = 15.0) -> None:
    """Hold on until nothing else wants these cores, or `limit_s` has passed."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        before = busy_s(cpus)
        time.sleep(0.3)
        if 100 * (busy_s(cpus) - before) / 0.3 / len(cpus) <= most_percent:
            return


def wait_until_idle(pids: list[int], *, limit_s: float = 8.0) -> None:
    """Let a gateway finish answers nobody waits for, so that the next one is not charged for them."""
    end = time.monotonic() + limit_s
    while pids and time.monotonic() < end:
        before = cpu_time(pids)
        time.sleep(0.1)
        if cpu_time(pids).seconds_since(before) < 0.01:
            return


def is_listening(port: int) -> bool:
    """Whether any process listens on this local TCP port."""
    for table in ("tcp", "tcp6"):
        for line in read(PROC / "net" / table).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                return True
    return False


def free_port(preferred: int) -> int:
    """`preferred`, or any other port where somebody listens there already."""
    if not is_listening(preferred):
        return preferred
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
