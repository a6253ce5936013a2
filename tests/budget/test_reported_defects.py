"""What users of well-known gateways reported about budgets: tests named after defects that ours must not have."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Ledger
from tests.budget.clocks import TEN, tokens, utc
from tests.budget.places import PLACES, SHARED, LeasedPlace, Place
from tests.budget.virtual import Fault, FaultyStore, play
from tests.gateway.asgi import ask, gateway_of
from tests.gateway.live import INSTANT, MODEL, live, tree_of
from tests.gateway.live import ask as live_ask
from tests.gateway.still import CHAT, config_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import refusal

TODAY = int(utc(2024, 5, 17))


async def request(ledger: Ledger, scopes: list[str], used: Amounts = TEN) -> bool:
    """One request that takes a few turns of the loop; whether it was served."""
    try:
        async with ledger.hold(scopes, TEN) as hold:
            await asyncio.sleep(0)
            hold.report(used)
            await asyncio.sleep(0)
    except HoldRefused:
        return False
    return True


async def spent(place: Place, scope: str = "key:a") -> tuple[int, int, int]:
    """Settled, held and debt of today's tokens."""
    return (await place.books())[scope, "tokens", "day"][TODAY]


async def test_parallel_turns_overshoot(place: Place) -> None:
    """LiteLLM 34732: parallel turns that each check and then increment spend more than the limit; here none can."""
    ledger = place.ledger(tokens(95, "day"))
    served = await asyncio.gather(*(request(ledger, ["key:a"]) for _ in range(50)))
    assert sum(served) <= 9
    assert await spent(place) == (10 * sum(served), 0, 0)


async def test_reservations_leak_and_cause_phantom_429s(place: Place) -> None:
    """LiteLLM 27639: reservations of requests that failed stay; here whatever ends gives all of it back."""
    ledger = place.ledger(tokens(100, "day"))
    failing = [asyncio.create_task(ledger.hold(["key:a"], TEN).__aenter__()) for _ in range(5)]
    for task in failing:
        task.cancel()
    await asyncio.gather(*failing, return_exceptions=True)
    for error in (ValueError, asyncio.CancelledError):
        with pytest.raises(error):
            async with ledger.hold(["key:a"], Amounts(tokens=100)):
                raise error
    async with ledger.hold(["key:a"], Amounts(tokens=100)):
        pass
    assert await spent(place) == (0, 0, 0)


async def test_reservations_of_a_dead_process_leak(shared: LeasedPlace) -> None:
    """LiteLLM 27639, the other half: those of a process that died are free again when its lease is over."""
    dying, heir = shared.ledger(tokens(100, "day")), shared.ledger(tokens(100, "day"))
    await dying.hold(["key:a"], Amounts(tokens=100)).__aenter__()
    await shared.kill(dying)
    shared.clock.now += shared.lease_s
    await heir.beat()
    assert await request(heir, ["key:a"])


@pytest.mark.parametrize("fault", ["before", "after"])
@pytest.mark.parametrize("kind", SHARED)
def test_timeouts_of_the_store_inflate_counters(kind: str, tmp_path: Path, fault: Fault) -> None:
    """LiteLLM 30460: an increment whose reply timed out is made again; here each call counts once, by the hold's id."""

    async def story() -> None:
        place = PLACES[kind](tmp_path)
        assert isinstance(place, LeasedPlace)
        store = FaultyStore(place.store())
        ledger = place.ledger(tokens(100, "day"), store=store)
        store.faults.extend([fault] * 3)
        async with ledger.hold(["key:a"], TEN) as hold:
            hold.report(Amounts(tokens=6))
            store.faults.append(fault)
        await asyncio.sleep(0.01)
        for _ in range(3):
            store.faults.append(fault)
            await ledger.beat()
        await ledger.beat()
        assert await spent(place) == (6, 0, 0)
        await place.close()

    play(story())


async def test_replicas_seed_a_cold_counter_again_and_multiply_spend(shared: LeasedPlace) -> None:
    """LiteLLM 28247: each replica that starts adds what was spent before; here nobody seeds anything."""
    first = shared.ledger(tokens(100, "day"))
    assert await request(first, ["key:a"])
    replicas = [shared.ledger(tokens(100, "day")) for _ in range(4)]
    await asyncio.gather(*(replica.beat() for replica in replicas))
    assert await spent(shared) == (10, 0, 0)
    assert await asyncio.gather(*(request(replica, ["key:a"]) for replica in replicas)) == [True] * 4
    assert await spent(shared) == (50, 0, 0)


async def test_false_budget_errors_under_load(place: Place) -> None:
    """LiteLLM 36926: requests that fit are refused under load; here all that fit are served, to the last token."""
    scopes = ["key:a", "team:ml", "org:acme"]
    ledger = place.ledger(*(tokens(1000, "day", scope) for scope in scopes))
    assert all(await asyncio.gather(*(request(ledger, scopes) for _ in range(100))))
    assert [await spent(place, scope) for scope in scopes] == [(1000, 0, 0)] * 3
    assert not await request(ledger, scopes)


async def test_a_window_reset_loses_concurrent_spend(shared: LeasedPlace) -> None:
    """LiteLLM 34733: a plain SET at the roll-over wipes out what others spent just then; here nothing is reset."""
    ledgers = [shared.ledger(tokens(400, "day")) for _ in range(4)]
    assert all(await asyncio.gather(*(request(ledger, ["key:a"]) for ledger in ledgers)))
    async with ledgers[0].hold(["key:a"], TEN) as late:
        shared.clock.now = utc(2024, 5, 18)
        assert all(await asyncio.gather(*(request(ledger, ["key:a"]) for ledger in ledgers * 10)))
        late.report(Amounts(tokens=7))
    days = {TODAY: (47, 0, 0), TODAY + 86_400: (400, 0, 0)}
    assert (await shared.books())["key:a", "tokens", "day"] == days


@pytest.mark.parametrize("kind", SHARED)
def test_fails_open_when_the_store_is_lost(kind: str, tmp_path: Path) -> None:
    """LiteLLM 35528 and 35533: without its store everything is allowed; here nothing is, until the store is back."""

    async def story() -> None:
        place = PLACES[kind](tmp_path)
        assert isinstance(place, LeasedPlace)
        store = FaultyStore(place.store())
        ledger = place.ledger(tokens(100, "day"), store=store)
        store.always = "before"
        for _ in range(3):
            with pytest.raises(StoreUnreachable):
                await request(ledger, ["key:a"])
        store.always = None
        await ledger.beat()
        assert await request(ledger, ["key:a"])
        await place.close()

    play(story())


async def test_caps_per_replica_leak(shared: LeasedPlace) -> None:
    """Bifrost 3547: with a cap in each replica, n replicas allow n times as much; here the cap is one."""
    replicas = [shared.ledger(tokens(50, "day")) for _ in range(4)]
    served = await asyncio.gather(*(request(replica, ["key:a"]) for replica in replicas for _ in range(5)))
    assert sum(served) <= 5
    assert await spent(shared) == (10 * sum(served), 0, 0)


async def test_no_concurrency_cap_per_key(place: Place) -> None:
    """Bifrost 4790: one key can take all slots; here a key has a limit of requests at once, beside other keys."""
    ledger = place.ledger(*(tokens(2, None, key, "concurrency") for key in ("key:a", "key:b")))
    async with ledger.hold(["key:a"], TEN), ledger.hold(["key:a"], TEN):
        with pytest.raises(HoldRefused) as refused:
            await ledger.hold(["key:a"], TEN).__aenter__()
        assert (refused.value.kind, refused.value.scope) == ("rate", "key:a")
        assert await request(ledger, ["key:b"])
    assert await request(ledger, ["key:a"])


@pytest.mark.parametrize("owner", ["key:ada", "user:ada", "team:ml", "org:acme", "tag:night", "model:qwen"])
async def test_a_users_budget_is_ignored_when_the_key_has_a_team(owner: str) -> None:
    """LiteLLM 11962: a key with a team is not held to its user's budget; here to those of all its owners."""
    secret = "sk-ada"
    sha256 = hashlib.sha256(secret.encode()).hexdigest()
    ada = {"id": "ada", "secret_sha256": sha256, "user": "ada", "team": "ml", "org": "acme", "tags": ["night"]}
    limit = {"scope": owner, "unit": "requests", "amount": 1, "window": "day"}
    gateway, _ = gateway_of(config_of(keys=[ada], limits=[limit]))
    headers = {"authorization": f"Bearer {secret}"}
    assert (await ask(gateway, CHAT, headers=headers)).status == 200
    refused = await ask(gateway, CHAT, headers=headers)
    assert (refused.status, refused.error["code"]) == (429, "budget_exceeded")
    assert owner in refused.error["message"]


async def test_fallbacks_skip_the_budget(scripted: ScriptedBackend) -> None:
    """LiteLLM PR 41379: a fallback runs at the first model's hold; here it is held again, at its own price."""
    async with ScriptedBackend() as other:
        tree = tree_of(scripted, limits=[{"scope": "model:dear", "unit": "usd", "amount": 0.01, "window": "day"}])
        dear = tree_of(other)["models"][MODEL] | {"price_usd_per_mtok": {"prompt": 900, "answer": 900}}
        tree["models"] |= {"dear": dear}
        tree["models"][MODEL]["fallback"] = ["dear"]
        async with live(tree) as gateway:
            other.forget()
            scripted.default = refusal(500, "out of memory", "InternalServerError")
            answer = await live_ask(gateway, INSTANT)
            assert (answer.status, answer.error["code"]) == (502, "upstream_error")  # what went wrong first
            assert other.calls == []
