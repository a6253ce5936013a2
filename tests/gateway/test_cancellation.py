"""A request may be cancelled at any await: nothing stays held, open or running, and what came is settled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Generator, MutableMapping
from functools import partial
from types import coroutine
from typing import Any, TypeVar

import pytest

from gateway.backends.http_backend import HttpBackend
from gateway.edge.watch import Reason
from tests.gateway.live import (
    ASK,
    CHAT,
    COMPLETIONS,
    DEADLINE_S,
    EMBEDDINGS,
    INSTANT,
    MODEL,
    STREAM,
    Json,
    Live,
    live,
    tree_of,
)
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script, json_reply
from tests.scripted_stream import Model, Say, tokens

T = TypeVar("T")
SHORT = Say(thinking=tokens("let me see"), answer=tokens("it is 42"))
MOST_AWAITS = 400
REQUESTS: list[tuple[str, str, Json]] = [
    ("streamed", CHAT, STREAM),
    ("folded", CHAT, ASK),
    ("plain", CHAT, INSTANT),
    ("two choices", CHAT, {**STREAM, "n": 2, "stream_options": {"include_usage": True}}),
    ("stop string", CHAT, {**STREAM, "stop": "is"}),
    ("envelope", CHAT, {**STREAM, "thinkgate": {"envelope": {"tokens": 15}}}),
    ("cut at the cap", CHAT, {**STREAM, "thinkgate": {"thinking_tokens": 2}}),
    ("text", COMPLETIONS, {"model": MODEL, "prompt": "six", "stream": True}),
    ("embedding", EMBEDDINGS, {"model": MODEL, "input": "six"}),
]


@coroutine
def cancelled_at(work: Awaitable[T], number: int, cancel: Any) -> Generator[Any, Any, T]:
    """Await `work`, but call `cancel` when it is about to wait for the `number`th time."""
    inner = work.__await__()
    step = partial(inner.send, None)
    waits = 0
    while True:
        try:
            future = step()
        except StopIteration as stop:
            result: T = stop.value
            return result
        waits += 1
        if waits == number:
            cancel()
        try:
            given = yield future
        except BaseException as exc:  # noqa: BLE001  # whatever is thrown in goes where it was thrown
            step = partial(inner.throw, exc)
        else:
            step = partial(inner.send, given)


class Exchange:
    """One request without a server: its body, and what was sent back; each send is an await of its own."""

    def __init__(self, path: str, body: Json) -> None:
        self.scope: MutableMapping[str, Any] = {"type": "http", "method": "POST", "path": path, "headers": []}
        self._body: bytes | None = json.dumps(body).encode()
        self.sent: list[MutableMapping[str, Any]] = []

    async def receive(self) -> MutableMapping[str, Any]:
        """The body in two pieces, then nothing for ever."""
        await asyncio.sleep(0)
        if self._body is None:
            await asyncio.Event().wait()
        elif len(self._body) > 10:
            piece, self._body = self._body[:10], self._body[10:]
            return {"type": "http.request", "body": piece, "more_body": True}
        piece, self._body = self._body or b"", None
        return {"type": "http.request", "body": piece, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Remember one message."""
        await asyncio.sleep(0)
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        """What was sent."""
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    def is_complete(self) -> bool:
        """Whether the response came to its end."""
        return bool(self.sent) and self.sent[-1].get("more_body") is False


async def run_cancelled(gateway: Live, exchange: Exchange, number: int, reason: Reason | None) -> bool:
    """Serve one request, cancelled at its `number`th await; False when it was over before."""
    was_cancelled = False

    def cancel() -> None:
        nonlocal was_cancelled
        was_cancelled = True
        if reason is not None and len(gateway.gateway.watch):
            gateway.watched().cancel(reason)
        else:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

    work = gateway.gateway(exchange.scope, exchange.receive, exchange.send)
    task = asyncio.get_running_loop().create_task(_awaited(cancelled_at(work, number, cancel)))
    await asyncio.wait([task], timeout=DEADLINE_S)
    assert task.done(), f"hangs when cancelled at await {number}"
    if not task.cancelled():
        assert task.exception() is None, f"at await {number}"
    return was_cancelled


async def _awaited(work: Awaitable[None]) -> None:
    await work


async def assert_clean(gateway: Live, scripted: ScriptedBackend, tasks: set[asyncio.Task[Any]]) -> None:
    """Nothing of the request is left, here or upstream."""
    await gateway.assert_settled()
    for exchange in scripted.exchanges:
        if not exchange.done.is_set():
            await exchange.wait_closed()
    await asyncio.gather(*scripted._tasks)
    assert asyncio.all_tasks() - tasks == set()


@pytest.mark.parametrize("reason", [None, "disconnect", "envelope", "drain"])
@pytest.mark.parametrize(("path", "body"), [r[1:] for r in REQUESTS], ids=[r[0] for r in REQUESTS])
async def test_cancelled_at_every_await(
    scripted: ScriptedBackend, path: str, body: Json, reason: Reason | None
) -> None:
    """Wherever it is cancelled, by the server or by its watch: no hold, no upstream call and no task is left."""
    scripted.routes[EMBEDDINGS] = json_reply({"data": [], "usage": {"prompt_tokens": 1}})
    limit = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}
    async with live(tree_of(scripted, limits=[limit])) as gateway:
        lies = "thinking_tokens" in body.get("thinkgate", {})
        scripted.default = Script(say=[SHORT], events_per_write=4, model=Model(honours_cap=not lies))
        tasks = asyncio.all_tasks()
        await asyncio.gather(*scripted._tasks)
        for number in range(1, MOST_AWAITS):
            scripted.forget()
            before = gateway.settled_tokens()
            exchange = Exchange(path, body)
            was_cancelled = await run_cancelled(gateway, exchange, number, reason)
            await assert_clean(gateway, scripted, tasks)
            used = gateway.settled_tokens() - before
            if not was_cancelled:
                break
            assert used <= 40
            _assert_honest(exchange, used)
            gateway.pool().close()
        assert not was_cancelled, "MOST_AWAITS is too low"
        assert number > 5
        assert exchange.is_complete(), exchange.body
        assert (exchange.sent[0]["status"], used > 0) == (200, True), exchange.body


def _assert_honest(exchange: Exchange, used: int) -> None:
    """Tokens that reached the client are settled, and a response that broke off does not look complete."""
    if b'"text"' in exchange.body or b'"content":"' in exchange.body:
        assert used > 0
    if b"[DONE]" in exchange.body:
        assert b'"thinkgate"' in exchange.body
    assert not (b'"error"' in exchange.body and b"[DONE]" in exchange.body)


async def test_cancelled_while_the_next_backend_is_tried(scripted: ScriptedBackend) -> None:
    """The same where the first backend cannot be reached and the call goes to the second."""
    scripted.default = Script(say=[SHORT], events_per_write=4)
    async with ScriptedBackend() as gone, live(tree_of(gone, scripted)) as gateway:
        gone.stop()
        probing = [task for _, task in gateway.gateway._slots.values()]
        for task in probing:
            task.cancel()  # else the first backend would be probed again while we count tasks
        await asyncio.wait(probing)
        tasks = asyncio.all_tasks()
        await asyncio.gather(*scripted._tasks)
        known = gateway.slot(0).capabilities
        for number in range(1, MOST_AWAITS):
            scripted.forget()
            exchange = Exchange(CHAT, STREAM)
            gateway.slot(0).capabilities = known
            gateway.slot(1).in_flight += 1  # so that the first is chosen first
            try:
                was_cancelled = await run_cancelled(gateway, exchange, number, "disconnect")
            finally:
                gateway.slot(1).in_flight -= 1
            await assert_clean(gateway, scripted, tasks)
            if not was_cancelled:
                break
            backend = gateway.slot(1).backend
            assert isinstance(backend, HttpBackend)
            backend.pool.close()
        assert exchange.sent[0]["status"] == 200
        assert gateway.slot(0).capabilities is None
