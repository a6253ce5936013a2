"""What a vLLM server says of its own load, read from its /metrics: the second signal beside our own counting.

Owns: reading it and the names of the series. It sees what other gateways and replicas of this one send there.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from gateway.backends.http import Pool

MOST_BYTES = 4 * 1024 * 1024
_WAITING = re.compile(rb"^vllm:num_requests_waiting(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)
_RUNNING = re.compile(rb"^vllm:num_requests_running(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)
_KV_USE = re.compile(rb"^vllm:(?:kv_cache|gpu_cache)_usage_perc(?:\{[^}]*\})? ([0-9.e+-]+)", re.MULTILINE)
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
    waiting = _WAITING.findall(text)
    if not waiting:
        return None
    use = [float(value) for value in _KV_USE.findall(text)]
    sizes = [_tokens(labels) for labels in _CACHE.findall(text)]
    return Load(
        running=int(sum(map(float, _RUNNING.findall(text)))),
        waiting=int(sum(map(float, waiting))),
        kv_use=max(use, default=0.0),
        cache_tokens=sum(sizes) or None,
    )


def _tokens(labels: bytes) -> int:
    found = {name: int(value) for name, value in re.findall(rb'(num_gpu_blocks|block_size)="(\d+)"', labels)}
    return found.get(b"num_gpu_blocks", 0) * found.get(b"block_size", 0)


async def read_load(pool: Pool) -> Load | None:
    """Ask a server; None if it has no such metrics. Raises: UpstreamError, DeadlinePassed."""
    connection = await pool.send("/metrics", b"", method="GET")
    try:
        body = await connection.read_all(MOST_BYTES)
        return parse_load(body) if connection.status == 200 else None
    finally:
        connection.release()
