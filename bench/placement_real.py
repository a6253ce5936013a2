"""Placement over two real vLLM servers: what the indexes say is cached, what was, and what it is worth.

Owns: two servers on the CPU with a small KV cache, one skewed, prefix-heavy trace, and the figures. The same trace,
with prompts of its own each time, is put to the servers in turns (round robin, without a gateway), through a gateway
that predicts (`predicted`) and through one that follows KV events (`exact`). Then one server is killed and started
again behind the second gateway, and the trace goes on. Takes minutes on two cores; the weights are those of
`make weights`, vLLM that of `make venv-vllm`.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import accounting, result

MODEL = result.ROOT / ".cache/models/smollm2-135m-thinking"
VLLM = result.ROOT / ".venv-vllm"
NAME = "smollm2"
KV_BLOCKS, BLOCK_TOKENS = 160, 32
HEADS, HEAD_WORDS = 12, 560  # about 600 tokens each: all of them are half as much again as one server holds
CALLERS = 3
START_S = 900  # of imports, mostly, on a machine that others use
AGREES_WITHIN = 0.1
WORDS = ("amber", "brook", "cliff", "delta", "ember", "field", "grove", "house", "inlet", "jetty", "knoll", "lakes")
_PREFIX = re.compile(r"^thinkgate_prefix_tokens_total\{(.*)\} (\S+)$", re.MULTILINE)


@dataclass(slots=True)
class Server:
    """One vLLM server, which may be killed and started again at the same place."""

    id: str
    folder: Path
    port: int = field(default_factory=lambda: accounting.free_port(9471))
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def entry(self) -> dict[str, Any]:
        """In a gateway's configuration."""
        where = {"endpoint": f"ipc://{self.folder}/{self.id}-events", "replay": f"ipc://{self.folder}/{self.id}-replay"}
        return {"id": self.id, "url": self.url, "kv_events": where}

    def start(self) -> None:
        """Begin; it is up later."""
        where = self.entry()["kv_events"]
        events = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": where["endpoint"]}
        events["replay_endpoint"] = where["replay"]
        command = [str(VLLM / "bin/python"), "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL)]
        command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "bfloat16", "--max-model-len", "4096", "--enforce-eager", "--reasoning-parser", "qwen3"]
        command += ["--enable-prompt-tokens-details", "--block-size", str(BLOCK_TOKENS)]
        command += ["--num-gpu-blocks-override", str(KV_BLOCKS), "--kv-events-config", json.dumps(events)]
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        env["VLLM_CPU_KVCACHE_SPACE"] = "1"
        if (VLLM / "lib/libiomp5.so").exists():
            env["LD_PRELOAD"] = str(VLLM / "lib/libiomp5.so")
        with (self.folder / f"{self.id}.log").open("ab") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def wait_up(self) -> None:
        """Until it answers. Raises: RuntimeError."""

        def is_up() -> bool:
            if self.process is not None and self.process.poll() is not None:
                tail = (self.folder / f"{self.id}.log").read_text(errors="replace").splitlines()[-20:]
                raise RuntimeError("\n".join(["vLLM ended:", *tail]))
            return get(f"{self.url}/health") is not None

        wait(is_up, f"vLLM {self.id}")

    def kill(self) -> None:
        """At once, with its engine."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def get(url: str) -> str | None:
    """The text of a page; None if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return str(answer.read().decode())
    except OSError:
        return None


def wait(holds: Callable[[], bool], what: str) -> None:
    """Poll. Raises: RuntimeError after START_S."""
    end_s = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > end_s:
            raise RuntimeError(f"not within {START_S} s: {what}")
        time.sleep(0.2)


@contextlib.contextmanager
def gateway(servers: list[Server], index: str, folder: Path) -> Iterator[tuple[str, str]]:
    """A gateway before the servers, ready: its URL and that of its metrics."""
    port, metrics = accounting.free_port(9480), accounting.free_port(9490)
    entries = [server.entry() for server in servers]
    if index != "exact":
        entries = [{name: value for name, value in entry.items() if name != "kv_events"} for entry in entries]
    config = {
        "server": {"port": port, "metrics": {"port": metrics}},
        "models": {NAME: {"backends": entries}},
        "routing": {"scorer": "none", "placement": {"index": index, "tokens_wait_s": 1}},
    }
    path = folder / f"{index}.json"  # JSON is YAML
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(path)]
    with (folder / f"{index}.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=result.ROOT, stdout=log, stderr=log)
    try:
        url, metrics_url = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics}/metrics"
        wait(lambda: all(f'backend="{each.id}",model="{NAME}"}} 1.0' in up(metrics_url) for each in servers), "gateway")
        yield url, metrics_url
    finally:
        process.terminate()
        process.wait()


def up(metrics_url: str) -> str:
    """The lines of the metrics that say which backends are up."""
    lines = (get(metrics_url) or "").splitlines()
    return "\n".join(line for line in lines if line.startswith("thinkgate_backend_up{"))


def trace(tag: str, calls: int, seed: int) -> list[list[dict[str, str]]]:
    """Chats that begin with one of few long system prompts, some of them far more often than others."""
    rng = random.Random(seed)
    heads = [f"{tag}, part {i}: " + " ".join(rng.choices(WORDS, k=HEAD_WORDS)) for i in range(HEADS)]
    drawn = rng.choices(range(HEADS), weights=[1 / (i + 2) for i in range(HEADS)], k=calls)
    return [
        [{"role": "system", "content": heads[head]}, {"role": "user", "content": f"Question {tag} {i}?"}]
        for i, head in enumerate(drawn)
    ]


def put(chats: list[list[dict[str, str]]], url_of: Callable[[int], str]) -> dict[str, Any]:
    """All of them, a few at a time, one token each: what was cached, and how long it took."""

    def call(at: int) -> tuple[float, int, int]:
        body = {"model": NAME, "messages": chats[at], "max_tokens": 1, "temperature": 0}
        body["chat_template_kwargs"] = {"enable_thinking": False}
        url, headers = f"{url_of(at)}/v1/chat/completions", {"content-type": "application/json"}
        began_s = time.perf_counter()
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=300) as it:
            usage = json.load(it)["usage"]
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return time.perf_counter() - began_s, usage["prompt_tokens"], cached

    began_s = time.perf_counter()
    with ThreadPoolExecutor(CALLERS) as pool:
        done = list(pool.map(call, range(len(chats))))
    times_ms = sorted(1000 * seconds for seconds, _, _ in done)
    prompt, cached = sum(each[1] for each in done), sum(each[2] for each in done)
    return {
        "calls": len(chats),
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "hit_rate": round(cached / prompt, 4),
        "p50_ms": round(statistics.median(times_ms), 1),
        "p90_ms": round(times_ms[int(0.9 * len(times_ms))], 1),
        "calls_per_s": round(len(chats) / (time.perf_counter() - began_s), 2),
    }


def told(metrics_url: str, kind: str) -> dict[str, float]:
    """By index: prompt tokens of this kind so far."""
    sums: dict[str, float] = {}
    for labels, value in _PREFIX.findall(get(metrics_url) or ""):
        found = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if found["kind"] == kind:
            sums[found["index"]] = sums.get(found["index"], 0.0) + float(value)
    return sums


def through(url: str, metrics_url: str, tag: str, calls: int, seed: int, index: str) -> dict[str, Any]:
    """A trace through a gateway, and what its index said before each call."""
    before = told(metrics_url, "predicted")
    figures = put(trace(tag, calls, seed), lambda _: url)
    after = told(metrics_url, "predicted")
    figures["predicted_tokens"] = int(sum(after.values()) - sum(before.values()))
    figures["by_index_tokens"] = int(after.get(index, 0) - before.get(index, 0))
    figures["predicted_over_cached"] = round(figures["predicted_tokens"] / max(1, figures["cached_tokens"]), 4)
    return figures


def measure(*, quick: bool) -> dict[str, Any]:
    """All of it: one object per policy, and the verdict."""
    calls = 40 if quick else 160
    with tempfile.TemporaryDirectory(prefix="placement-") as name:
        folder = Path(name)
        servers = [Server(id, folder) for id in "ab"]
        servers[1].port = accounting.free_port(servers[0].port + 1)
        try:
            for server in servers:
                server.start()
            for server in servers:
                server.wait_up()
            results = [{"policy": "round_robin", **put(trace("turns", calls, 1), lambda i: servers[i % 2].url)}]
            with gateway(servers, "predicted", folder) as (url, metrics):
                results.append({"policy": "predicted", **through(url, metrics, "bytes", calls, 1, "predicted")})
            with gateway(servers, "exact", folder) as (url, metrics):
                results.append({"policy": "exact", **through(url, metrics, "events", calls, 1, "exact")})
                servers[1].kill()
                servers[1].start()
                during = through(url, metrics, "one server", calls // 2, 2, "exact")
                results.append({"policy": "exact, one server dead", **during})
                servers[1].wait_up()
                wait(lambda: f'backend="b",model="{NAME}"}} 1.0' in up(metrics), "the gateway sees b")
                results.append(
                    {"policy": "exact, after a restart", **through(url, metrics, "again", calls, 3, "exact")}
                )
                seen = re.search(
                    r'thinkgate_kv_events_total\{backend="b",kind="restarts".*?\} (\S+)', get(metrics) or ""
                )
        finally:
            for server in servers:
                server.kill()
    turns, exact = results[0], results[2]
    return {
        "kv_tokens_per_server": KV_BLOCKS * BLOCK_TOKENS,
        "results": results,
        "restarts_seen": int(float(seen[1])) if seen else 0,
        "agrees": all(abs(each.get("predicted_over_cached", 1) - 1) <= AGREES_WITHIN for each in results),
        "hit_rate_over_round_robin": round(exact["hit_rate"] / turns["hit_rate"], 3),
    }
