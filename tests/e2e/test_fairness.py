"""Turns between tenants while a real vLLM is full: counted in answers, so that the machine's speed does not matter."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import UPSTREAM_NAME
from tests.e2e.servers import POLL_LIMIT_S, Gateway, StartGateway, Vllm, model_config, vllm_running

SMALL_CLIENTS, CALLS_EACH = 4, 4
CALL: dict[str, Any] = {
    "model": "smollm2",
    "messages": [{"role": "user", "content": "Count to ten."}],
    "max_tokens": 6,
    "ignore_eos": True,
    "thinkgate": {"mode": "instant"},
}


@pytest.fixture(scope="module")
def narrow_vllm(thinking_model: Path) -> Iterator[Vllm]:
    """A real vLLM that works on one call at a time, and is full with the second."""
    with vllm_running(thinking_model, UPSTREAM_NAME, "--max-num-seqs", "1", log="vllm-narrow.log") as server:
        yield server


class Crowd:
    """Tenants that call again as soon as they are answered.

    Args:
        gateway: whom they call.

    Attributes:
        answered: how many answers came, whoever they were for.
    """

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self.answered = 0

    async def wait_turns(self, client: httpx.AsyncClient, tenant: str) -> int:
        """One call; how many others were answered while it waited."""
        before = self.answered
        answer = await client.post(
            f"{self._gateway.url}/v1/chat/completions", json=CALL, headers={"authorization": f"Bearer sk-{tenant}"}
        )
        assert answer.status_code == 200, answer.text
        waited = self.answered - before
        self.answered += 1
        return waited

    async def _for_ever(self, client: httpx.AsyncClient, tenant: str) -> None:
        while True:
            await self.wait_turns(client, tenant)

    async def _some(self, client: httpx.AsyncClient, tenant: str) -> list[int]:
        return [await self.wait_turns(client, tenant) for _ in range(CALLS_EACH)]

    async def beside(self, large_clients: int) -> float:
        """How many turns a call of the small tenant waits, on average, beside so many clients of the large one."""
        async with (
            httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=None)) as client,
            asyncio.TaskGroup() as tasks,
        ):
            large = [tasks.create_task(self._for_ever(client, "large")) for _ in range(SMALL_CLIENTS)]
            async with asyncio.timeout(POLL_LIMIT_S):  # the backend says that it is full only once it is
                while not await asyncio.to_thread(self._gateway.metric, "thinkgate_queue_calls"):
                    await asyncio.sleep(0.05)
            large += [tasks.create_task(self._for_ever(client, "large")) for _ in range(large_clients - SMALL_CLIENTS)]
            small = [tasks.create_task(self._some(client, "small")) for _ in range(SMALL_CLIENTS)]
            await asyncio.wait(small)
            for task in large:
                task.cancel()
        return mean(turns for task in small for turns in task.result())


async def test_fifty_times_the_load_of_another_does_not_double_its_wait(
    narrow_vllm: Vllm, gateway: StartGateway
) -> None:
    """Beside 50 times its own clients a tenant waits at most twice as many turns as beside as many as its own."""
    keys = [
        {"id": name, "secret_sha256": hashlib.sha256(f"sk-{name}".encode()).hexdigest(), "org": name}
        for name in ("small", "large")
    ]
    config = model_config({"id": "vllm", "url": narrow_vllm.url, "kind": "vllm"}, upstream_model=narrow_vllm.model)
    config |= {"keys": keys}
    config["routing"] |= {"queue": {"backend_waiting": 1, "max_wait_s": 600}, "placement": {"poll_s": 0.05}}
    running = gateway(config)
    crowd = Crowd(running)
    beside_equal = await crowd.beside(SMALL_CLIENTS)
    await asyncio.to_thread(running.wait_settled)
    beside_large = await crowd.beside(50 * SMALL_CLIENTS)
    await asyncio.to_thread(running.wait_settled)
    print(f"turns waited: {beside_equal:.1f} beside as many clients, {beside_large:.1f} beside 50 times as many")
    assert beside_equal > 1
    assert beside_large <= 2 * beside_equal
