"""Who watches the workers: what it does about those that die, hang or cannot be started, on processes made up here."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.config.schema import Config
from gateway.workers import FAILED, FIRST_PAUSE_S, HUNG_AFTER_LOOKS, SHORT_LIFE_S, Source, Workers

LONG_S = 10 * SHORT_LIFE_S


@dataclass(eq=False)
class Process:
    """Alive until it gets a signal that ends it."""

    pid: int
    sentinel: int
    exitcode: int | None = None
    got: list[int] = field(default_factory=list)

    def start(self) -> None:
        """Nothing runs."""

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        self.got.append(signal.SIGKILL)
        self.exitcode = -signal.SIGKILL

    def join(self, timeout: float | None = None) -> None:
        """It ends at once."""

    def close(self) -> None:
        """Nothing is open."""


class Machine:
    """Makes processes, as a multiprocessing context does, and carries signals to them."""

    def __init__(self) -> None:
        self.made: list[Process] = []
        self.failure: OSError | None = None
        self.most = 10**6
        self._never = socket.socketpair()

    def Process(self, **_given: Any) -> Process:  # noqa: N802  # the context's name
        if self.failure is not None or len(self.made) == self.most:
            raise self.failure or OSError("no more processes")
        self.made.append(Process(10**6 + len(self.made), self._never[0].fileno()))
        return self.made[-1]

    def kill(self, pid: int, number: int) -> None:
        """As os.kill."""
        process = next(process for process in self.made if process.pid == pid)
        process.got.append(number)
        if number == signal.SIGTERM:
            process.exitcode = 0

    def close(self) -> None:
        for end in self._never:
            end.close()


@dataclass
class Watched:
    """Two workers and who watches them."""

    workers: Workers
    machine: Machine
    ports: list[int]

    def start(self) -> list[Process]:
        """Both run."""
        self.workers._port = free_port()
        for worker in self.workers._workers:
            self.workers._start(worker)
        return self.machine.made[-2:]

    def give_signs(self) -> None:
        """Both are alive."""
        for worker in self.workers._workers:
            self.workers._signs.life[worker.number] += 1.0


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Workers none of which is a real process."""
    tree = {
        "server": {"workers": 2, "host": "127.0.0.1", "port": 0},
        "store": {"kind": "sqlite", "path": str(tmp_path / "budgets.db")},
        "models": {"m": {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]}},
    }
    ports: list[int] = []
    source = Source(tmp_path / "thinkgate.yaml", {})
    workers = Workers(Config.model_validate(tree), source, tmp_path, on_ready=ports.append)
    machine = Machine()
    monkeypatch.setattr(workers, "_context", machine)
    monkeypatch.setattr(os, "kill", machine.kill)
    yield Watched(workers, machine, ports)
    machine.close()


def test_nobody_serves_on_unwatched(watched: Watched) -> None:
    """When the second worker cannot be started, the first is ended before the error goes on."""
    watched.machine.most = 1
    with pytest.raises(OSError, match="no more processes"):
        watched.workers.run()
    assert [process.got for process in watched.machine.made] == [[signal.SIGTERM]]


@pytest.mark.parametrize("is_port_taken", [True, False])
def test_a_restart_that_fails_is_tried_again_later(watched: Watched, is_port_taken: bool) -> None:
    """With its port taken meanwhile, or no process to be had, a worker is missing until its next try; others stay."""
    first, second = watched.start()
    watched.give_signs()
    second.exitcode = -signal.SIGKILL
    assert watched.workers._look(LONG_S) is None
    (dead,) = [worker for worker in watched.workers._workers if worker.process is None]
    now_s = dead.not_before_s
    with ExitStack() as taken:
        if is_port_taken:
            taken.enter_context(socket.create_server(("127.0.0.1", watched.workers._port)))
        else:
            watched.machine.failure = OSError("no memory")
        assert watched.workers._look(now_s) is None
        assert (dead.process, dead.not_before_s - now_s) == (None, dead.pause_s)
        assert dead.pause_s >= FIRST_PAUSE_S
        assert len(watched.workers._sentinels()) == 1
    watched.machine.failure = None
    assert watched.workers._look(dead.not_before_s) is None
    assert len(watched.workers._sentinels()) == 2
    assert (first.got, len(watched.machine.made)) == ([], 3)


def test_ready_is_more_than_alive(watched: Watched) -> None:
    """The port is told once, when every worker has a backend for every model, however long they live without."""
    watched.start()
    for ready in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]):
        watched.give_signs()
        watched.workers._signs.ready[:] = ready
        assert watched.workers._look(LONG_S) is None
        assert watched.ports == [watched.workers._port] * (ready == [1.0, 1.0])


def test_a_worker_that_hangs_before_it_is_ready_is_killed(watched: Watched) -> None:
    """Signs of life count from when it listens, also while a backend is down."""
    first, second = watched.start()
    for second_s in range(HUNG_AFTER_LOOKS + 1):
        watched.workers._signs.life[1] += 1.0
        watched.workers._signs.life[0] = 1.0
        watched.workers._look(LONG_S + second_s)
    assert (first.got, second.got, watched.ports) == ([signal.SIGKILL], [], [])


def test_nobody_is_killed_for_being_looked_at_often(watched: Watched) -> None:
    """A storm of signals or deaths wakes whoever looks again and again within a second: that is one look."""
    first, second = watched.start()
    watched.give_signs()
    for look in range(50 * HUNG_AFTER_LOOKS):
        watched.workers._look(LONG_S + look / 100)
    assert (first.got, second.got) == ([], [])


def test_a_reload_reaches_workers_that_wait_for_a_backend(watched: Watched) -> None:
    """SIGHUP goes to all that listen, ready or not, and to none that may not have a handler for it yet."""
    first, second = watched.start()
    watched.workers._signs.life[0] = 1.0
    watched.workers._signalled(signal.SIGHUP)
    assert (first.got, second.got) == ([signal.SIGHUP], [])


def test_a_worker_that_served_and_fails_does_not_end_the_gateway(watched: Watched) -> None:
    """While a backend is down: who listened once is started again, also when its successor fails at once."""
    first, _ = watched.start()
    now_s = LONG_S
    watched.give_signs()
    for dying in (first, None):
        (dying or watched.machine.made[-1]).exitcode = FAILED
        assert watched.workers._look(now_s) is None
        now_s += LONG_S
        assert watched.workers._look(now_s) is None
    assert (len(watched.machine.made), watched.ports) == (4, [])


def test_a_worker_that_never_listened_and_fails_ends_the_gateway(watched: Watched) -> None:
    """What only a worker finds wrong is not tried again, also while others serve."""
    _, second = watched.start()
    watched.workers._signs.life[0] = 1.0
    second.exitcode = FAILED
    assert watched.workers._look(LONG_S) == FAILED
