"""What a vLLM server says of its own load, read from its /metrics: the second signal beside our own counting.

Owns: reading it and the names of the series. It sees what other gateways and replicas of this one send there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.backends.http import Pool

MOST_BYTES = 4 * 1024 * 1024
MOST = 1e12  # of anything; what says more is not believed
_WAITING = re.compile(rb"^vllm:num_requests_waiting(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_RUNNING = re.compile(rb"^vllm:num_requests_running(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_KV_USE = re.compile(rb"^vllm:(?:kv_cache|gpu_cache)_usage_perc(?:\{[^}]*\})? (\S+)", re.MULTILINE)
_CACHE = re.compile(rb"^vllm:cache_config_info\{([^}]*)\}", re.MULTILINE)


class Load(NamedTuple):
    """One reading.

    Attributes:
        running: calls that it works on.
        waiting: calls that have not begun.
        kv_use: part of its KV memory in use, 0 to 1.
        cache_tokens: how many its KV memory holds; None if it does not say.
    """

    running: int
    waiting: int
    kv_use: float
    cache_tokens: int | None


def parse_load(text: bytes) -> Load | None:
    """The reading in a text exposition, engines of one server added up; None where there is none."""
    waiting = _numbers(_WAITING, text)
    if not waiting:
        return None
    sizes = [_tokens(labels) for labels in _CACHE.findall(text)]
    return Load(
        running=int(sum(_numbers(_RUNNING, text))),
        waiting=int(sum(waiting)),
        kv_use=min(1.0, max(_numbers(_KV_USE, text), default=0.0)),
        cache_tokens=int(min(sum(sizes), MOST)) or None,
    )


def _numbers(series: re.Pattern[bytes], text: bytes) -> list[float]:
    """Its values, without those that cannot be: a server that says nonsense has said nothing."""
    return [number for value in series.findall(text) if (number := _number(value)) is not None]


def _number(value: bytes) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if 0 <= number <= MOST else None


def _tokens(labels: bytes) -> float:
    found = {name: _number(value) for name, value in re.findall(rb'(num_gpu_blocks|block_size)="(\d+)"', labels)}
    return (found.get(b"num_gpu_blocks") or 0.0) * (found.get(b"block_size") or 0.0)


async def read_load(pool: Pool) -> Load | None:
    """Ask a server; None if it has no such metrics. Raises: UpstreamError, also for a 5xx; DeadlinePassed."""
    connection = await pool.send("/metrics", b"", method="GET")
    try:
        body = await connection.read_all(MOST_BYTES)
        if connection.status >= 500:
            raise UpstreamError(f"The backend answered /metrics with status {connection.status}.")
        return parse_load(body) if connection.status == 200 else None
    finally:
        connection.release()
