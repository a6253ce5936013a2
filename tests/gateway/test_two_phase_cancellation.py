"""A request whose cap the gateway itself holds may be cancelled at any await, by the server or by its watch."""

from __future__ import annotations

import asyncio
import gc

import pytest

from gateway.edge.watch import Reason
from tests.gateway.live import CHAT, DEADLINE_S, Live
from tests.gateway.test_cancellation import MOST_AWAITS, Exchange, assert_clean, run_cancelled
from tests.gateway.wrecks import STORIES, Place, stage
from tests.scripted_backend import ScriptedBackend


@pytest.mark.parametrize("reason", [None, "envelope"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("name", STORIES)
async def test_cancelled_at_every_await(scripted: ScriptedBackend, name: str, n: int, reason: Reason | None) -> None:
    """Wherever it is cancelled: no hold, no upstream call, no task and no unread error is left."""
    async with stage(STORIES[name], scripted, n=n) as on:
        await asyncio.gather(*scripted._tasks)
        tasks = asyncio.all_tasks()
        for number in range(1, MOST_AWAITS):
            case = on.case(Place(0, -1, 0), stream=bool(number % 2))
            before = on.gateway.settled_tokens()
            exchange = Exchange(CHAT, on.story.body(case, n=n))
            was_cancelled = await run_cancelled(on.gateway, exchange, number, reason)
            await _closed(on.gateway)
            await assert_clean(on.gateway, scripted, tasks)
            if not was_cancelled:
                break
            used = on.gateway.settled_tokens() - before
            assert not (b'"error"' in exchange.body and b"[DONE]" in exchange.body)
            assert used > 0 or b'"token_ids":[' not in exchange.body
            on.gateway.pool().close()
            scripted.forget()
        assert not was_cancelled, "MOST_AWAITS is too low"
        assert number > 10
        assert exchange.sent[0]["status"] == 200
        gc.collect(1)  # an error that nobody retrieved would fail the test now


async def _closed(gateway: Live) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while gateway.pool().busy():
            await asyncio.sleep(0)
