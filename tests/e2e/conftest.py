"""Real servers for the end-to-end tests: one vLLM for the whole run, gateways as they are asked for."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.processes import get
from tests.e2e.servers import (
    THINKING_MODEL,
    Gateway,
    StartGateway,
    Vllm,
    capped_by,
    gateway_running,
    model_config,
    require,
    vllm_running,
)

UPSTREAM_NAME = "smollm2"


@pytest.fixture(scope="session")
def thinking_model() -> Path:
    """The folder of the small model that thinks."""
    return require(THINKING_MODEL)


@pytest.fixture(scope="session")
def vllm_server(thinking_model: Path) -> Iterator[Vllm]:
    """A real vLLM for the whole run, or the one at THINKGATE_TEST_VLLM_URL, if a developer keeps one."""
    kept = os.environ.get("THINKGATE_TEST_VLLM_URL")
    if kept:
        assert get(f"{kept}/health")[0] == 200, f"nobody answers at THINKGATE_TEST_VLLM_URL={kept}"
        yield Vllm(kept, UPSTREAM_NAME)
        return
    with vllm_running(thinking_model, UPSTREAM_NAME) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_config(vllm_server: Vllm) -> dict[str, Any]:
    """A gateway's configuration with one model, `smollm2`, served by the real vLLM."""
    backend = {"id": "vllm", "url": vllm_server.url, "kind": "vllm"}
    return model_config(backend, upstream_model=vllm_server.model)


@pytest.fixture(scope="session")
def embedded_config(thinking_model: Path) -> dict[str, Any]:
    """A gateway's configuration with one model, `smollm2`, served by the engine in the process."""
    return model_config({"id": "embedded", "kind": "embedded", "path": str(thinking_model)})


@pytest.fixture
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartGateway]:
    """Starts a gateway of the test's own: `gateway(config, env=...)`; it ends with the test, cleanly."""
    with ExitStack() as stack:

        def start(config: Mapping[str, Any], env: Mapping[str, str] | None = None) -> Gateway:
            folder = tmp_path_factory.mktemp("thinkgate")
            return stack.enter_context(gateway_running(config, folder, env))

        yield start


@pytest.fixture(scope="session")
def vllm_gateway(vllm_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway before the real vLLM, for all tests that leave it as they find it."""
    with gateway_running(vllm_config, tmp_path_factory.mktemp("thinkgate-vllm")) as gateway:
        yield gateway


@pytest.fixture(scope="session")
def cap_gateway(
    vllm_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Gateway]]:
    """One gateway before the real vLLM for each of the ways of `CAP_WAYS`, from when it is first asked for."""
    gateways: dict[str, Gateway] = {}
    with ExitStack() as stack:

        def start(way: str) -> Gateway:
            if way not in gateways:
                folder = tmp_path_factory.mktemp(f"thinkgate-{way}")
                gateways[way] = stack.enter_context(gateway_running(capped_by(vllm_config, way), folder))
            return gateways[way]

        yield start


@pytest.fixture(scope="session")
def embedded_gateway(embedded_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    """One gateway with the engine inside, for all tests that leave it as they find it."""
    with gateway_running(embedded_config, tmp_path_factory.mktemp("thinkgate-embedded")) as gateway:
        yield gateway
