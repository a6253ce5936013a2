"""A gateway under test, as a process of its own on its own core.

Owns: reading peers.toml, filling in its placeholders, starting and stopping.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from bench import accounting, stores

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PATH = "/v1/chat/completions"


class TargetError(Exception):
    """A gateway that cannot be measured: not installed, or it did not come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """Who runs where: the gateway alone on one core, upstream and clients on the other."""

    gateway: int
    clients: int

    @classmethod
    def available(cls) -> Cores:
        """The first two cores this process may use; one core does for both if there is only one."""
        cpus = sorted(os.sched_getaffinity(0))
        return cls(gateway=cpus[0], clients=cpus[1 % len(cpus)])


@dataclass(frozen=True, slots=True)
class Place:
    """What surrounds the gateways of a run."""

    upstream_port: int
    upstream_pid: int
    scratch: Path
    peers: Path = field(
        default_factory=lambda: Path(os.environ.get("PEERS_DIR") or Path.home() / ".cache/gateway-peers")
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One `[[peer]]` of peers.toml, placeholders as written."""

    name: str
    port: int
    cmd: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    headers: tuple[str, ...] = ()
    cwd: str | None = None
    dist: str | None = None
    store: stores.Kind = "memory"
    version: tuple[str, ...] = ()
    default: bool = True
    is_slow: bool = False
    start_limit_s: float = 90.0


def read_peers(path: Path = HERE / "peers.toml") -> dict[str, Peer]:
    """Every peer of the file, by name, in its order."""
    peers = msgspec.convert(tomllib.loads(path.read_text())["peer"], list[Peer])
    return {peer.name: peer for peer in peers}


class Target:
    """A peer in one run.

    Attributes:
        start_s: seconds from start to the first right answer.
        port: where it listens; that of peers.toml if it is free.
        metrics_port: a second port, for its metrics.
        idle_mb: memory half a second later.
        peak_mb: most memory seen while it was measured.
    """

    def __init__(self, peer: Peer, place: Place, cores: Cores) -> None:
        self.peer = peer
        self.place = place
        self.cores = cores
        self.port = accounting.free_port(peer.port)
        self.metrics_port = accounting.free_port(peer.port + 20_000)
        self.process: subprocess.Popen[bytes] | None = None
        self._store = contextlib.ExitStack()
        self._store_address = ""
        self.start_s: float | None = None
        self.idle_mb: float | None = None
        self.peak_mb = 0.0

    @property
    def name(self) -> str:
        """As in peers.toml."""
        return self.peer.name

    @property
    def headers(self) -> list[str]:
        """Request headers, `Name: value`."""
        return [self.fill(header) for header in self.peer.headers]

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return self.place.scratch / f"{self.name}.log"

    def fill(self, text: str, mark: str = "{%s}") -> str:
        """`text` with its placeholders filled in; `{render:FILE}` becomes the path of a filled-in copy."""
        values = {
            "up": self.place.upstream_port,
            "port": self.port,
            "metrics": self.metrics_port,
            "store": stores.section(self.peer.store, self._store_address),
            "here": HERE,
            "root": ROOT,
            "tmp": self.place.scratch,
            "python": sys.executable,
            "peers": self.place.peers,
        }
        for key, value in values.items():
            text = text.replace(mark % key, str(value))
        return re.sub(r"\{render:([^}]+)\}", lambda match: str(self._render(match[1])), text)

    def _render(self, name: str) -> Path:
        copy = self.place.scratch / f"{self.name}-{Path(name).name}"
        copy.write_text(self.fill((HERE / name).read_text(), mark="@%s@"))
        return copy

    def is_installed(self) -> bool:
        """Whether the program is there at all."""
        program = self.fill(self.peer.cmd[0])
        return Path(program).exists() if "/" in program else _which(program)

    def pids(self) -> list[int]:
        """Its living processes."""
        return accounting.process_tree(self.process.pid) if self.process else []

    def start(self, body: bytes) -> None:
        """Start it, pinned; wait until it answers `body` rightly; measure its memory at rest.

        Raises: TargetError if it is not there, ends, or `start_limit_s` passes first; nothing is left then.
        """
        if not self.is_installed():
            raise TargetError("not installed (bench/setup_peers.sh installs peers)")
        self._start_store()
        began_s = time.monotonic()
        self._launch()
        while problem := self._is_not_up(body):
            assert self.process is not None
            status = self.process.poll()
            if status is not None or time.monotonic() - began_s > self.peer.start_limit_s:
                self.stop()
                how = problem if status is None else f"ended with status {status}"
                raise TargetError(f"did not come up: {how}\n{self._log_tail()}")
            time.sleep(0.03)
        self.start_s = time.monotonic() - began_s
        time.sleep(0.5)
        self.idle_mb = accounting.memory_mb(self.pids())

    def _start_store(self) -> None:
        """Its server, if it is one, runs beside the clients: what it costs is not the gateway's."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self.cores.clients})
        try:
            self._store_address = self._store.enter_context(stores.fresh(self.peer.store))
        finally:
            os.sched_setaffinity(0, before)

    def _launch(self) -> None:
        command = ["taskset", "-c", str(self.cores.gateway), *(self.fill(part) for part in self.peer.cmd)]
        environment = {key: self.fill(value) for key, value in self.peer.env.items()}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, **environment},
                cwd=self.fill(self.peer.cwd) if self.peer.cwd else None,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _is_not_up(self, body: bytes) -> str:
        try:
            answer = json.loads(self.ask(body))
            return "" if answer["choices"][0]["message"]["content"] else "an answer without content"
        except (OSError, ValueError, LookupError) as exc:
            return repr(exc)

    def _log_tail(self, lines: int = 12) -> str:
        said = self.log.read_text(errors="replace").splitlines()
        return "\n".join(f"     | {line}" for line in said[-lines:])

    def ask(self, body: bytes) -> bytes:
        """One plain request. Raises: OSError (urllib's errors are such)."""
        headers = {"content-type": "application/json", **dict(h.split(": ", 1) for h in self.headers)}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{PATH}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as exc:
            raise OSError(f"{exc.code} {exc.read(300)!r}") from exc

    def stop(self) -> None:
        """End it and everything it started; first politely."""
        try:
            self._stop_processes()
        finally:
            self._store.close()

    def _stop_processes(self) -> None:
        if self.process is None:
            return
        pids = self.pids()
        for sig, limit_s in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 2.0)):
            for pid in pids:
                _signal(pid, sig)
            end = time.monotonic() + limit_s
            while time.monotonic() < end:
                is_down = self.process.poll() is not None
                if is_down and not any(_is_alive(pid) for pid in pids):
                    return
                time.sleep(0.02)

    def version(self) -> str | None:
        """As installed; None if it does not say."""
        if self.peer.version:
            command = [self.fill(part) for part in self.peer.version]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
            match = re.search(r"\d+(\.\d+)+", said.stdout + said.stderr)
            return match[0] if match else None
        if self.peer.dist is None:
            return None
        venv, dist = self.peer.dist.split(":")
        site = (self.place.peers / "v" / venv / "lib").glob(f"python*/site-packages/{dist}-*.dist-info")
        return next((path.name.removesuffix(".dist-info").rpartition("-")[2] for path in site), None)


def _which(program: str) -> bool:
    return any((Path(folder) / program).exists() for folder in os.environ["PATH"].split(":"))


def _signal(pid: int, sig: signal.Signals) -> None:
    try:
        os.kill(pid, sig)
    except ProcessLookupError:
        return


def _is_alive(pid: int) -> bool:
    state = accounting.read(accounting.PROC / str(pid) / "stat").rpartition(")")[2].split()
    return bool(state) and state[0] != "Z"
