"""What /proc says about processor time and memory."""

import os
import socket
import time

import pytest

from bench import accounting
from bench.accounting import CpuTime

STAT = """cpu  900 9 900 900 9 9 9 9 0 0
cpu0 100 7 20 5000 30 1 2 3 0 0
cpu1 10 0 5 9000 0 0 0 4 0 0
intr 1
"""


def test_busy_ticks_leave_out_idle_and_niced_work():
    """User, system, interrupts and stolen time count, of the given cores only."""
    assert accounting.parse_busy_ticks(STAT, {0}) == 100 + 20 + 1 + 2 + 3
    assert accounting.parse_busy_ticks(STAT, {0, 1}) == 126 + 10 + 5 + 4
    assert accounting.parse_busy_ticks(STAT, {7}) == 0


@pytest.mark.parametrize(
    ("after", "seconds"),
    [
        (CpuTime(fine_ns=2_000_000_000, coarse_ns=2_010_000_000), 2.0),
        (CpuTime(fine_ns=100_000_000, coarse_ns=2_000_000_000), 2.0),
        (CpuTime(fine_ns=1_000_000, coarse_ns=20_000_000), 0.001),
    ],
)
def test_the_fine_clock_counts_unless_threads_have_ended(after, seconds):
    """The coarse clock takes over only where the fine one has forgotten more than its own error."""
    assert after.seconds_since(CpuTime(0, 0)) == pytest.approx(seconds)


def test_our_own_process_is_in_its_tree_with_time_and_memory():
    """The readers work on a process that certainly runs."""
    pids = accounting.process_tree(os.getpid())
    assert os.getpid() in pids
    assert accounting.memory_mb(pids) > 1
    assert accounting.cpu_time(pids).coarse_ns > 0


def test_a_process_that_has_ended_reads_as_nothing():
    """Processes end between two readings; that is no error."""
    gone = 2**22 + 1
    assert accounting.process_tree(gone) == []
    assert accounting.cpu_time([gone]) == CpuTime(0, 0)
    assert accounting.memory_mb([gone]) == 0


def test_waiting_for_quiet_gives_up_at_its_limit():
    """A busy machine delays a measurement, it does not prevent it."""
    began_s = time.monotonic()
    accounting.wait_until_quiet({0}, limit_s=0.1, most_percent=-1)
    assert 0.1 <= time.monotonic() - began_s < 5


def test_a_port_that_is_taken_is_replaced_by_a_free_one():
    """Two benchmarks, or a benchmark and a server, do not stop each other."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
        assert accounting.free_port(port) == port
        sock.listen()
        assert accounting.free_port(port) not in {0, port}
