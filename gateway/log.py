"""Structured logs: JSON lines, written off the event loop.

Owns: the one line per request (never prompts or keys) and the format of all other records. The hot path
appends to a queue; a thread, woken a few times a second, encodes and writes.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from datetime import UTC, datetime
from typing import IO, Any, Protocol

import msgspec

from budget.tokens import TokenCounts
from gateway.edge.extension import CascadeReport, DecisionReport, Degraded, TargetReport

FLUSH_EVERY_S = 0.2
MAX_PENDING = 50_000
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "taskName"}

_encoder = msgspec.json.Encoder()


class RequestLine(msgspec.Struct, omit_defaults=True):
    """What is said of one request; `time` is in seconds since 1970, `offline`: held without the budget store."""

    event: str
    time: float
    request_id: str
    route: str
    status: int
    key: str
    model: str
    mode: str
    mode_reason: str
    backend: str
    stream: bool
    seconds: float
    overhead_ms: float
    tokens: TokenCounts
    cap: int | None = None
    capped: bool = False
    ended_by: str | None = None
    cost_nano_usd: int = 0
    offline: bool = False
    error: str | None = None
    degraded: tuple[Degraded, ...] = ()
    replayed: bool = False
    decision: DecisionReport | None = None
    cascade: CascadeReport | None = None
    target: TargetReport | None = None

    def publish(self) -> RequestLine:
        """A line that is ready."""
        return self


class Publishable(Protocol):
    """What becomes a request line when the writer gets to it."""

    def publish(self) -> RequestLine:
        """Do what is left to do for a finished request, and give its line."""


class LineWriter:
    """Publishes finished requests and writes their lines, from a thread of its own and many at a time.

    Args:
        stream: where to.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._pending: deque[Publishable] = deque()
        self._lock = threading.Lock()
        self._dropped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="thinkgate-log", daemon=True)
        self._thread.start()

    def write(self, line: Publishable) -> None:
        """Queue one request; a writer that cannot keep up drops some and says how many."""
        if len(self._pending) < MAX_PENDING:
            self._pending.append(line)
        else:
            self._dropped += 1

    def close(self) -> None:
        """Write what is pending."""
        self._stop.set()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_EVERY_S):
            self.flush()
        self.flush()

    def flush(self) -> None:
        """Publish and write what is pending; from any thread."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        # One by one, so that a line that is written meanwhile is neither lost nor written twice.
        out: list[Any] = [self._pending.popleft().publish() for _ in range(len(self._pending))]
        dropped, self._dropped = self._dropped, 0
        if dropped:
            out.append({"level": "warning", "event": "log lines dropped", "count": dropped})
        try:
            if out:
                self._stream.write(_encoder.encode_lines(out).decode())
                self._stream.flush()
        except (OSError, ValueError):  # nobody reads any more: serving goes on, and later lines may get through
            self._dropped += len(out)


class JsonFormatter(logging.Formatter):
    """Every other record as one JSON line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            "logger": record.name,
        }
        line.update({k: v for k, v in vars(record).items() if k not in _STANDARD})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line, enc_hook=repr).decode()


def configure(level: str = "INFO") -> None:
    """Send all records as JSON lines to standard error, and uvicorn's own through the same."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for name in ("uvicorn", "uvicorn.error"):
        logging.getLogger(name).handlers.clear()


def _iso(epoch_s: float) -> str:
    return datetime.fromtimestamp(epoch_s, tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
