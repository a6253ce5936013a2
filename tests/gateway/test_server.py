"""The serving process beyond its requests: it does not outlive the work that its requests depend on."""

from __future__ import annotations

import asyncio
import logging

import pytest

from gateway.app import Gateway
from gateway.server import Server
from tests.gateway.live import DEADLINE_S
from tests.gateway.still import config_of

pytestmark = pytest.mark.anyio


async def test_process_whose_background_work_broke_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without probes, sweeps and deadlines it would only seem to serve: it says so and exits with 1."""
    gateway = Gateway(config_of(server={"port": 0}))
    server = Server(gateway, None, on_ready=lambda _port: None)

    async def breaks() -> None:
        while not server.started:
            await asyncio.sleep(0)
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(gateway.watch, "run", breaks)
    with caplog.at_level(logging.CRITICAL):
        async with asyncio.timeout(DEADLINE_S):
            await server._serve_with_companions(None)
    assert server.exit_status() == 1
    assert "background work has failed" in caplog.text
