"""A cascade may be cancelled at any await: neither of its calls is left open, and both are settled."""

from __future__ import annotations

import asyncio

import pytest

from gateway.edge.watch import Reason
from tests.gateway.live import ASK, CHAT, STREAM, Json, live
from tests.gateway.test_cancellation import MOST_AWAITS, Exchange, assert_clean, run_cancelled
from tests.gateway.test_cascade import SURE, THOUGHT, UNSURE, cascading
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange as Upstream
from tests.scripted_script import Script
from tests.scripted_stream import Say, tokens


@pytest.mark.parametrize("reason", [None, "disconnect", "envelope", "drain"])
@pytest.mark.parametrize(("body", "logprob"), [(STREAM, SURE), (STREAM, UNSURE), (ASK, UNSURE), (ASK, SURE)])
async def test_cancelled_at_every_await(
    scripted: ScriptedBackend, body: Json, logprob: float, reason: Reason | None
) -> None:
    """Wherever it is cancelled, nothing is held, open or running, and what its line says is what was settled."""
    draft = Script(say=[Say(answer=tokens("it is so", logprob))], events_per_write=2)
    thought = Script(say=[THOUGHT], events_per_write=4)

    def answer(exchange: Upstream) -> Script:
        return draft if exchange.json.get("logprobs") else thought

    async with live(cascading(scripted)) as gateway:
        scripted.default = answer
        tasks = asyncio.all_tasks()
        await asyncio.gather(*scripted._tasks)
        for number in range(1, MOST_AWAITS):
            scripted.forget()
            before = gateway.settled_tokens()
            exchange = Exchange(CHAT, body)
            was_cancelled = await run_cancelled(gateway, exchange, number, reason)
            await assert_clean(gateway, scripted, tasks)
            used = gateway.settled_tokens() - before
            if not was_cancelled:
                break
            assert used <= 40
            if b"it is so" in exchange.body or b'"content":" so"' in exchange.body:
                assert used > 0
            if logprob == UNSURE and b'"thinkgate"' in exchange.body and b"escalated" in exchange.body:
                assert b'"content":"it is so' not in exchange.body
            gateway.pool().close()
        assert not was_cancelled, "MOST_AWAITS is too low"
        assert (exchange.is_complete(), exchange.sent[0]["status"], used > 0) == (True, 200, True)
        assert number > 5
