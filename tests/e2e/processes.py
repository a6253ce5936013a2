"""Servers as child processes: started, watched until they are ready, ended with the test run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOGS = ROOT / ".cache" / "logs"
POLL_S = 0.05
# Runs in the child before the server takes its place: when the test run dies, however, the kernel ends it.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() == int(sys.argv[1]):  # else it died before it was asked to say so
    os.execvp(sys.argv[2], sys.argv[2:])
"""


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def get(url: str, timeout_s: float = 10) -> tuple[int, str]:
    """Status and text of a GET; 0 if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except (OSError, TimeoutError):
        return 0, ""


def wait_until(holds: Callable[[], bool], *, within_s: float, what: str) -> None:
    """Poll until `holds`; for things outside this process only. Raises: AssertionError at the deadline."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s: {what}"
        time.sleep(POLL_S)


class Child:
    """A server in a process group of its own, which ends when this process does.

    Args:
        command: the command line.
        log: file that gets its output, emptied first.
        env: the whole environment.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), *command],
                cwd=ROOT,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pid = self._process.pid

    def output(self) -> str:
        """What it wrote so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self, url: str, *, within_s: float) -> None:
        """Until `url` answers 200. Raises: AssertionError with the end of the log."""
        deadline = time.monotonic() + within_s
        while get(url)[0] != 200:
            code = self._process.poll()
            tail = "\n".join(self.output().splitlines()[-40:])
            assert code is None, f"ended with {code} before it was ready; {self.log}:\n{tail}"
            assert time.monotonic() < deadline, f"not ready within {within_s} s; {self.log}:\n{tail}"
            time.sleep(POLL_S)

    def terminate(self, *, within_s: float = 60) -> int:
        """SIGTERM, then wait; kills the group when it does not end. Returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.kill()

    def kill(self) -> None:
        """SIGKILL to the whole group, whether its leader is alive or not."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None


@contextmanager
def running(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Iterator[Child]:
    """A child that is killed at the latest when the block ends."""
    child = Child(command, log, env)
    try:
        yield child
    finally:
        child.kill()
