"""Several processes behind one address: `server.workers` above 1.

Owns: starting them, their sockets, restarting those that die or hang, forwarding signals, and one place for their
metrics. Does not own: what each of them does (server.py); budgets and keys are shared by the store, nothing else is.

Every worker listens on a socket of its own on the same port (SO_REUSEPORT): the kernel spreads connections evenly, and
those that wait for a worker that dies are reset instead of hanging.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import operator
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gateway.app import Gateway
from gateway.config.load import ConfigError, load_config
from gateway.log import configure
from gateway.metrics_files import MetricFiles, forget_gauges
from gateway.reload import Reloader
from gateway.server import CANCELLED_S, Server

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from gateway.config.schema import Config

log = logging.getLogger("thinkgate.workers")
LOOK_S = 1.0
HUNG_AFTER_LOOKS = 60  # without a sign of life between them
SHORT_LIFE_S = 30.0  # who dies sooner is restarted after a pause, the longer the more often
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
FAILED = 1
MEET_BACKENDS_S = (
    5.0  # a worker that has met its backends takes connections at once, any other leaves them to the others
)


class Source(NamedTuple):
    """Where a worker finds its configuration; it reads it itself, and again when it changes."""

    path: Path
    overrides: Mapping[str, object]


class Signs(NamedTuple):
    """What workers tell who watches them, in shared memory, by their number (ctypes arrays).

    Attributes:
        life: raised once a second as soon as it listens, whether or not a backend is up; 0 before.
        ready: 1 once all models had a backend.
    """

    life: Any
    ready: Any


@dataclass(eq=False)
class _Worker:
    """One of them, and its successors.

    Attributes:
        seen: its last sign of life, and how many looks ago that was.
        looked_s: when the last look was; what comes sooner after it is none.
        has_served: it or a predecessor could start.
        not_before_s: when it may be started again.
    """

    number: int
    process: BaseProcess | None = None
    started_s: float = 0.0
    seen: float = 0.0
    looks: int = 0
    looked_s: float = 0.0
    has_served: bool = False
    pause_s: float = 0.0
    not_before_s: float = 0.0


class Workers:
    """The processes, watched by the one that started them.

    Args:
        config: in force at the start.
        source: where workers read it.
        folder: for their metrics.
        on_ready: told once when all of them serve, with the port.
    """

    def __init__(self, config: Config, source: Source, folder: Path, *, on_ready: Callable[[int], None]) -> None:
        self._config = config
        self._source = source
        self._folder = folder
        self._on_ready = on_ready
        self._context = multiprocessing.get_context("spawn")
        life, ready = (self._context.Array("d", config.server.workers, lock=False) for _ in range(2))
        self._signs = Signs(life, ready)
        self._workers = [_Worker(number) for number in range(config.server.workers)]
        self._port = config.server.port
        self._was_ready = self._is_ending = False

    def run(self) -> int:
        """Serve until SIGTERM or SIGINT; returns the exit status. Raises: ConfigError for an address that is taken."""
        with _sockets(self._config.server.host, self._port, shared=False) as taken:
            self._port = taken[0].getsockname()[1]  # free, and known if it was 0
        wake, woken = socket.socketpair()
        with wake, woken, _signals_to(self._signalled, woken):
            try:
                for worker in self._workers:
                    self._start(worker)
                return self._watch(wake)
            finally:
                self._end()  # whatever went wrong here: nobody serves unwatched

    def _watch(self, wake: socket.socket) -> int:
        """Look after them until told to end; returns the exit status."""
        while not self._is_ending:
            wait([*self._sentinels(), wake], timeout=LOOK_S)
            with contextlib.suppress(BlockingIOError):
                wake.recv(4096, socket.MSG_DONTWAIT)
            status = self._look(time.monotonic())
            if status is not None:
                return status
        return 0

    def _sentinels(self) -> list[int]:
        return [worker.process.sentinel for worker in self._workers if worker.process is not None]

    def _start(self, worker: _Worker) -> None:
        """A process for a worker, on sockets of its own. Raises: ConfigError, OSError."""
        self._signs.life[worker.number] = self._signs.ready[worker.number] = worker.seen = 0.0
        worker.looks, worker.started_s = 0, time.monotonic()
        with _sockets(self._config.server.host, self._port, shared=True) as sockets:
            process = self._context.Process(
                target=work,
                args=(self._source, sockets, self._folder, worker.number, self._signs),
                name=f"thinkgate-{worker.number}",
            )
            process.start()
        worker.process = process

    def _look(self, now_s: float) -> int | None:
        """Restart who died, end who hangs; the exit status where none can ever serve."""
        for worker in self._workers:
            process = worker.process
            worker.has_served |= self._signs.life[worker.number] > 0
            if process is None:
                if now_s >= worker.not_before_s:
                    self._start_again(worker, now_s)
            elif not process.is_alive():
                if (process.exitcode or 0) > 0 and not worker.has_served:
                    log.error("a worker cannot start", extra={"worker": worker.number, "status": process.exitcode})
                    return FAILED
                self._bury(worker, process, now_s)
            elif self._is_hung(worker, now_s):
                log.error("a worker hangs and is killed", extra={"worker": worker.number, "pid": process.pid})
                process.kill()
        if not self._was_ready and all(self._signs.ready):
            self._was_ready = True
            self._on_ready(self._port)
        return None

    def _start_again(self, worker: _Worker, now_s: float) -> None:
        """A successor, or a later attempt: the others serve on where this one has no port, process or memory."""
        try:
            self._start(worker)
        except (ConfigError, OSError) as exc:
            worker.pause_s = _longer(worker.pause_s)
            worker.not_before_s = now_s + worker.pause_s
            log.error(  # noqa: TRY400  # the machine's trouble: a traceback would say nothing
                "a worker cannot be restarted",
                extra={"worker": worker.number, "reason": str(exc), "restart_s": worker.pause_s},
            )

    def _bury(self, worker: _Worker, process: BaseProcess, now_s: float) -> None:
        process.join()
        process.close()
        worker.process = None
        forget_gauges(self._folder, worker.number)
        lived_s = now_s - worker.started_s
        worker.pause_s = 0.0 if lived_s > SHORT_LIFE_S else _longer(worker.pause_s)
        worker.not_before_s = now_s + worker.pause_s
        log.error(
            "a worker died", extra={"worker": worker.number, "lived_s": round(lived_s, 1), "restart_s": worker.pause_s}
        )

    def _is_hung(self, worker: _Worker, now_s: float) -> bool:
        """Whether it served once, and gave no sign of life for many looks; looks, since a machine may have slept.

        A look counts once in LOOK_S: signals and deaths of others wake whoever looks more often.
        """
        seen = self._signs.life[worker.number]
        if seen != worker.seen or not seen:
            worker.seen, worker.looks, worker.looked_s = seen, 0, now_s
        elif now_s - worker.looked_s >= LOOK_S:
            worker.looks, worker.looked_s = worker.looks + 1, now_s
        return worker.looks >= HUNG_AFTER_LOOKS

    def _signalled(self, number: int) -> None:
        if number == signal.SIGHUP:
            self._send(signal.SIGHUP)  # each reloads by itself
        else:
            self._is_ending = True

    def _send(self, number: int) -> None:
        for worker in self._workers:
            # Before its first sign of life it may not be ready for a signal that can wait.
            if worker.process is not None and (number != signal.SIGHUP or self._signs.life[worker.number]):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker.process.pid or 0, number)

    def _end(self) -> None:
        """All of them drain; who takes longer than that may is killed."""
        self._send(signal.SIGTERM)
        ends_s = time.monotonic() + self._config.server.timeouts.drain_s + 2 * CANCELLED_S
        for process in [worker.process for worker in self._workers if worker.process is not None]:
            process.join(max(0.0, ends_s - time.monotonic()))
            if process.is_alive():
                log.error("a worker did not end in time and is killed", extra={"pid": process.pid})
                process.kill()
                process.join()


def _longer(pause_s: float) -> float:
    return min(LONGEST_PAUSE_S, 2 * pause_s or FIRST_PAUSE_S)


def work(source: Source, sockets: list[socket.socket], folder: Path, number: int, signs: Signs) -> None:
    """What a worker process does: as `thinkgate serve`, on given sockets, until it is told to end."""
    configure()
    try:
        config = load_config(source.path, overrides=source.overrides)
        gateway = Gateway(config, patience_s=MEET_BACKENDS_S)
    except ConfigError as exc:
        log.error("the configuration cannot be used", extra={"reason": str(exc)})  # noqa: TRY400
        raise SystemExit(FAILED) from exc
    files = MetricFiles(gateway.metrics, folder, number)
    server = Server(
        gateway,
        Reloader(gateway, source.path, overrides=source.overrides),
        on_listening=lambda: operator.setitem(signs.life, number, 1.0),
        on_ready=lambda _: operator.setitem(signs.ready, number, 1.0),
        beside=[_show(files, signs, number), _outlive_nobody()],
    )
    status = server.run_to_the_end(sockets)
    files.close()
    raise SystemExit(status)


async def _show(files: MetricFiles, signs: Signs, number: int) -> None:
    """Write the metrics, and once it listens give signs of life, until cancelled."""
    while True:
        await asyncio.to_thread(files.write)
        if signs.life[number]:
            signs.life[number] += 1.0
        await asyncio.sleep(LOOK_S)


async def _outlive_nobody() -> None:
    """End, as on SIGTERM, when the process that started this one is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    is_gone, loop = asyncio.Event(), asyncio.get_running_loop()
    loop.add_reader(parent.sentinel, is_gone.set)
    try:
        await is_gone.wait()
    finally:
        loop.remove_reader(parent.sentinel)
    log.error("the process that watches the workers is gone: ending")
    signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def metric_folder() -> Iterator[Path]:
    """For as long as the workers run."""
    with tempfile.TemporaryDirectory(prefix="thinkgate-metrics-") as name:
        yield Path(name)


@contextlib.contextmanager
def _sockets(host: str, port: int, *, shared: bool) -> Iterator[list[socket.socket]]:
    """Sockets bound to all addresses of a host, closed at the end. Raises: ConfigError."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in dict.fromkeys(found):
            sock = socket.socket(family, kind, protocol)
            sockets.append(sock)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind((address[0], port, *address[2:]))
            port = sock.getsockname()[1]
    except OSError as exc:
        for sock in sockets:
            sock.close()
        raise ConfigError(f"server.port: {host}:{port} cannot be bound ({exc.strerror}); set another") from exc
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


@contextlib.contextmanager
def _signals_to(handle: Callable[[int], None], woken: socket.socket) -> Iterator[None]:
    """Tell of SIGTERM, SIGINT and SIGHUP, and write to a socket, so that whoever waits looks."""
    woken.setblocking(False)
    before = signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
    handlers = {
        number: signal.signal(number, lambda number, _: handle(number))
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
