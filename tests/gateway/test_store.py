"""A gateway whose budgets outlive it: a store behind the whole request, and what happens without it."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import traceback
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from budget.ledger import told
from budget.ledgers.leased import LeasedLedger
from gateway.admin.store import open_ledger, open_records
from gateway.app import Gateway
from gateway.config.budgets import StoreConfig
from gateway.config.load import ConfigError
from gateway.config.schema import Config
from gateway.reload import Reloader
from tests.budget.valkey import valkey
from tests.budget.virtual import FaultyStore
from tests.gateway.live import ASK, DEADLINE_S, EMBEDDINGS, INSTANT, STREAM, Client, Json, Live, ask, live, tree_of
from tests.gateway.tenants import BreakableRecords, Clock
from tests.scripted_backend import ScriptedBackend
from tests.scripted_model import Model, Say
from tests.scripted_script import Gate, Script
from tests.scripted_tokens import tokens

LIMIT = {"scope": "model:qwen", "unit": "tokens", "amount": 3000, "window": "month"}
LONG = Say(thinking=tokens("hm " * 20), answer=tokens("so " * 20))
FIRST, LAST = dt.date(2020, 1, 1), dt.date(2100, 1, 1)


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Json:
    """The section of an empty store."""
    return in_file(tmp_path) if request.param == "sqlite" else in_valkey()


def in_file(folder: Path) -> Json:
    """A store in this folder."""
    return {"kind": "sqlite", "path": str(folder / "budgets.db")}


def in_valkey(**more: object) -> Json:
    """A store in Valkey, emptied."""
    with closing(valkey().client()) as client:
        client.flushall()
    return {"kind": "redis", "url": valkey().connection_url, **more}


def stored(scripted: ScriptedBackend, store: Json, **more: object) -> Json:
    """A configuration with its budgets in this store."""
    return tree_of(scripted, store=store, limits=[LIMIT], **more)


def ledger_of(gateway: Live) -> LeasedLedger:
    """Its ledger."""
    ledger = gateway.gateway.ledger
    assert isinstance(ledger, LeasedLedger)
    return ledger


def break_store(gateway: Live) -> FaultyStore:
    """Let the gateway's store not answer any more."""
    ledger = ledger_of(gateway)
    ledger._store = ledger._outbox._store = store = FaultyStore(ledger._store)
    ledger._timeout_s = 0.0
    store.always = "before"
    return store


async def mend_store(gateway: Live, store: FaultyStore) -> None:
    """Let it answer again, and the gateway notice."""
    ledger = ledger_of(gateway)
    ledger._timeout_s = DEADLINE_S
    store.always = None
    await ledger.beat()


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_a_budget_outlives_the_gateway(scripted: ScriptedBackend, store: Json, body: Json) -> None:
    """What one gateway settled, the next one finds settled, under the mode it was decided for."""
    async with live(stored(scripted, store)) as gateway:
        answer = await ask(gateway, body)
        used = (answer.chunks()[-1] if body is STREAM else answer.json)["thinkgate"]["settled"]["tokens"]
    async with live(stored(scripted, store)) as gateway:
        (row,) = await gateway.gateway.ledger.usage(FIRST, LAST)
        assert (row.mode, row.requests, row.tokens) == ("instant" if body is INSTANT else "reasoning", 1, used)
        answer = await ask(gateway, INSTANT)
        held = answer.json["thinkgate"]["hold"]["tokens"]
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) == 3000 - used - held


@pytest.mark.parametrize("path", ["/v1/chat/completions", EMBEDDINGS])
async def test_without_its_store_nothing_is_spent(scripted: ScriptedBackend, store: Json, path: str) -> None:
    """A request that cannot be held is a 503 that may be tried again, and no backend hears of it; we stay ready."""
    body = {"model": "qwen", "input": "hello"} if path == EMBEDDINGS else ASK
    async with live(stored(scripted, store)) as gateway:
        scripted.forget()
        broken = break_store(gateway)
        for _ in range(2):
            answer = await ask(gateway, body, path)
            assert (answer.status, answer.error["type"]) == (503, "service_unavailable_error")
            assert (answer.error["code"], answer.headers["retry-after"]) == ("budget_store_unreachable", "1")
            assert "x-should-retry" not in answer.headers
        assert scripted.calls == []
        ready = await ask(gateway, b"", "/health/ready", method="GET")
        assert ready.status == 200
        assert gateway.metric("thinkgate_store_reachable") == 0
        await mend_store(gateway, broken)
        assert (await ask(gateway, body, path)).status != 503
        assert gateway.metric("thinkgate_store_reachable") == 1


async def test_before_the_limits_of_the_store_are_known_nothing_is_spent(
    scripted: ScriptedBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that starts while its store cannot be read is not ready, and serves nobody past a limit it may have."""
    records = BreakableRecords(clock=Clock())
    monkeypatch.setattr("gateway.app.open_records", lambda *_, **__: records)
    records.is_away = True
    async with live(stored(scripted, in_file(tmp_path))) as gateway:
        scripted.forget()
        for answer in (await ask(gateway, ASK), await ask(gateway, b"", "/health/ready", method="GET")):
            assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        assert scripted.calls == []
        records.is_away = False
        await gateway.gateway.stored.follow()
        assert (await ask(gateway, ASK)).status == 200


async def test_a_replica_without_redis_spends_its_share(scripted: ScriptedBackend) -> None:
    """Out of its slice requests are served and say so, in header, log line and metric, until the slice is spent."""
    body = {**ASK, "max_tokens": 700}
    async with live(stored(scripted, in_valkey(offline_share=0.5))) as gateway:
        assert "x-thinkgate-budget" not in (await ask(gateway, body)).headers
        await ledger_of(gateway).beat()
        broken = break_store(gateway)
        served = 0
        while (answer := await ask(gateway, body)).status == 200:
            assert answer.headers["x-thinkgate-budget"] == "offline"
            served += 1
        assert (answer.status, answer.error["code"]) == (503, "budget_store_unreachable")
        assert "x-thinkgate-budget" not in answer.headers
        assert gateway.metric("thinkgate_offline_holds_total") == served > 0
        await mend_store(gateway, broken)
        rows = await gateway.gateway.ledger.usage(FIRST, LAST)
        assert sum(row.requests for row in rows) == 1 + served
        await gateway.idle()
        assert [line.get("offline", False) for line in gateway.request_lines()] == [False, *[True] * served, False]


async def test_a_stream_is_not_cut_when_the_store_is_lost(scripted: ScriptedBackend, store: Json) -> None:
    """What was held before runs to its end, and is settled when the store is back."""
    gate = Gate()
    async with live(stored(scripted, store)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[LONG], gates={6: gate}))
        async with Client(gateway.port) as client:
            client.send(STREAM)
            await client.head()
            await gate.wait()
            broken = break_store(gateway)
            gate.open()
            while await client.event() is not None:
                pass
        await gateway.idle()
        assert gateway.metric("thinkgate_settlements_waiting") == 1
        await mend_store(gateway, broken)
        assert gateway.metric("thinkgate_settlements_waiting") == 0
        (row,) = await gateway.gateway.ledger.usage(FIRST, LAST)
        assert row.tokens > 0


@pytest.mark.parametrize(
    ("body", "events"),
    [
        (STREAM, 6),
        ({**STREAM, "thinkgate": {"mode": "instant"}}, 6),
        ({**STREAM, "thinkgate": {"min_thinking_tokens": 4}}, 6),
        (ASK, 6),
    ],
)
async def test_the_ledger_knows_what_a_running_request_has_used(
    scripted: ScriptedBackend, tmp_path: Path, body: Json, events: int
) -> None:
    """Whatever the mode, tokens that have arrived are known to whoever asks, and reach the store in its next round."""
    gate = Gate()
    async with live(stored(scripted, in_file(tmp_path))) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[LONG], gates={events: gate}))
        async with Client(gateway.port) as client:
            client.send(body)
            await gate.wait()
            ledger = ledger_of(gateway)
            (hold,) = ledger.open.values()
            async with asyncio.timeout(DEADLINE_S):
                while told(hold.used).tokens < 5:
                    await asyncio.sleep(0)
            used = told(hold.used)
            await ledger.beat()
            (reported,) = await ledger._store._call(  # type: ignore[attr-defined]  # it is SQLite's
                lambda sheet: sheet._connection.execute("SELECT used_tokens FROM holds WHERE state = 0").fetchall()
            )
            assert reported == (used.tokens,)
            gate.open()
            await client.head()


async def test_an_overrun_is_cut_and_booked_as_debt(scripted: ScriptedBackend, store: Json) -> None:
    """A backend that streams beyond its hold is cut; what it sent is settled, and told as debt."""
    lies = Say(answer=tokens("so " * 3000))
    async with live(stored(scripted, store)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[lies], model=Model(honours_limit=False), gates={}))
        answer = await ask(gateway, {**STREAM, "max_tokens": 10, "thinkgate": {"mode": "instant"}})
        await gateway.idle()
        used = answer.chunks()[-1]["thinkgate"]
        assert used["ended_by"] == "hold"
        assert scripted.calls[0].closed.is_set()
        await ledger_of(gateway).health()
        beyond = max(0, used["settled"]["tokens"] - used["hold"]["tokens"])
        assert gateway.metric("thinkgate_debt_tokens_total") == beyond
        (row,) = await gateway.gateway.ledger.usage(FIRST, LAST)
        assert row.tokens == used["settled"]["tokens"]


@pytest.mark.parametrize("was_seen", [True, False], ids=["by the probe", "in service"])
async def test_an_overrun_that_nobody_streams_is_cut_too(scripted: ScriptedBackend, was_seen: bool) -> None:
    """A whole answer in instant mode is watched once its backend was seen to ignore `max_tokens`; all of it is debt."""
    lies = Say(answer=tokens("so " * 3000))
    lax = Model(honours_limit=False)
    body = {**ASK, "max_tokens": 10, "thinkgate": {"mode": "instant"}}
    if was_seen:
        scripted.model = lax
        scripted.default = Script(say=[lies])
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        settled = []
        for _ in range(2):
            scripted.queue(Script(say=[lies], model=lax))
            report = (await ask(gateway, body)).json["thinkgate"]
            settled.append(report["settled"]["tokens"])
        assert report["ended_by"] == "hold"
        assert scripted.calls[-1].closed.is_set()
        assert settled[1] < 1000
        assert (settled[0] < 1000) is was_seen
        debt = sum(max(0, tokens_ - report["hold"]["tokens"]) for tokens_ in settled)
        assert gateway.metric("thinkgate_debt_tokens_total") == debt


def test_a_store_that_cannot_be_used_stops_the_start(tmp_path: Path) -> None:
    """A path that cannot be written is an error of the configuration, with its key."""
    tree = {"models": {"m": {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]}}}
    store = {"kind": "sqlite", "path": str(tmp_path / "missing" / "a.db")}
    with pytest.raises(ConfigError, match=r"^store\.path: .*missing"):
        Gateway(Config.model_validate({**tree, "store": store}))


@pytest.mark.parametrize("opened", [partial(open_ledger, limits=()), open_records])
@pytest.mark.parametrize("url", ["redis://:hunter2/x@host:6379/0", "redis://[hunter2", "redis://h:1/0?db=hunter2"])
def test_a_url_that_cannot_be_read_is_not_quoted(opened: Callable[..., object], url: str) -> None:
    """It may hold a password, so the error says how to write one instead, and carries no cause that quotes it."""
    with pytest.raises(ConfigError, match=r"^store\.url: .*percent-encode") as caught:
        opened(StoreConfig(kind="redis", url=url), clock=lambda: 0.0)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


async def test_a_running_gateway_keeps_its_store(
    scripted: ScriptedBackend, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A reload with another store is refused, and says that a restart is needed."""
    path = tmp_path / "thinkgate.yaml"
    async with live(stored(scripted, in_file(tmp_path))) as gateway:
        path.write_text(json.dumps(tree_of(scripted)))
        await Reloader(gateway.gateway, path)._reload()
        assert gateway.metric("thinkgate_config_reload_failed") == 1
    assert "store: cannot change while running: restart instead" in str(
        [getattr(record, "problems", "") for record in gateway.logs.records]
    )
