"""A second try while the first has no first byte: who answers, what is paid, and that nothing stays open or held."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway.backends.http_backend import HttpBackend
from gateway.slots import Slot
from router.hedging import FirstBytes, Hedging
from tests.gateway.live import ASK, CHAT, COMPLETIONS, INSTANT, MODEL, STREAM, Json, Live, ask, live, tree_of
from tests.gateway.still import config_of, models_of
from tests.gateway.test_cancellation import MOST_AWAITS, Exchange, assert_clean, run_cancelled
from tests.scripted_backend import ScriptedBackend
from tests.scripted_model import Model, Say
from tests.scripted_script import Gate, Reply, Script, refusal
from tests.scripted_tokens import tokens

SAY = [Say(answer=tokens("the answer is forty two"))]
QUICK = Script(say=SAY)
BROKEN = refusal(500, "out of memory", "InternalServerError")
BODIES = [{**STREAM, **INSTANT}, STREAM, INSTANT, {**STREAM, "n": 2, "seed": 7}]
LIMIT = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}
HEDGED = {"routing": {"hedging": {"share": 1}}, "limits": [LIMIT]}


@pytest.fixture
async def other() -> AsyncIterator[ScriptedBackend]:
    """A second server, which answers at once."""
    async with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
async def two(scripted: ScriptedBackend, other: ScriptedBackend) -> AsyncIterator[Live]:
    """A gateway over both, in which the first is chosen first, and any first byte there is late."""
    async with live(tree_of(scripted, other, **HEDGED)) as gateway:
        other.default = QUICK
        prepare(gateway, scripted, other)
        yield gateway
        gateway.slot(1).in_flight -= 1


def prepare(gateway: Live, *backends: ScriptedBackend) -> None:
    """Prefer the first backend, of which a first byte is expected at once; forget the probes."""
    for backend in backends:
        backend.forget()
    gateway.slot(1).in_flight += 1
    hurry(gateway.slot(0))


def hurry(slot: Slot) -> None:
    """So many first bytes came there at once that any wait is unusual."""
    for _ in range(256):
        slot.first_bytes.add(0.0)


def hedges(gateway: Live, outcome: str) -> float:
    """Second tries that ended so."""
    return gateway.metric("thinkgate_hedges_total", model=MODEL, outcome=outcome)


def extension(answer: Any) -> Json:
    """The `thinkgate` object of an answer, streamed or not."""
    if answer.headers["content-type"].startswith("application/json"):
        found: Json = answer.json["thinkgate"]
        return found
    return next(chunk["thinkgate"] for chunk in reversed(answer.chunks()) if "thinkgate" in chunk)


@pytest.mark.parametrize("body", BODIES)
async def test_the_second_answers_where_the_first_is_late(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend, body: Json
) -> None:
    """The other backend's answer is the client's; the first connection is closed, and its prompt paid as wasted."""
    scripted.default = Script(say=SAY, gates={-1: Gate()})
    answer = await ask(two, body)
    assert (answer.status, answer.headers["x-thinkgate-backend"]) == (200, "b")
    await scripted.calls[0].wait_closed()
    assert (len(scripted.calls), len(other.calls)) == (1, 1)
    told = extension(answer)
    prompt = told["tokens"]["prompt"] + told["tokens"]["cached"]
    assert told["tokens"]["wasted"] == prompt > 0
    assert two.settled_tokens() == sum(told["tokens"].values()) == told["settled"]["tokens"]
    tokens_of = told["tokens"]
    usd = 1000 * (tokens_of["prompt"] + prompt) + 500 * tokens_of["cached"] + 4000 * tokens_of["thinking"]
    assert told["settled"]["nano_usd"] == usd + 2000 * (tokens_of["answer"] + tokens_of["injected"])
    assert told["hold"]["tokens"] >= told["settled"]["tokens"]
    assert (hedges(two, "won"), hedges(two, "lost")) == (1, 0)
    assert two.slot(0).in_flight == 0
    assert [slot.standing.pending_tokens for slot in (two.slot(0), two.slot(1))] == [0, 0]
    assert [slot.breaker.outcomes.share(0.0)[1] > 0 for slot in (two.slot(0), two.slot(1))] == [False, True]


async def test_the_first_goes_on_where_it_answers_first(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """The second try is closed once the first one answers, and counts at its backend no longer."""
    gate, late = Gate(), Gate()
    scripted.default, other.default = Script(say=SAY, gates={-1: gate}), Script(say=SAY, gates={-1: late})
    async with asyncio.TaskGroup() as clients:
        client = clients.create_task(ask(two, STREAM))
        await late.wait()
        assert (two.slot(0).in_flight, two.slot(1).in_flight) == (1, 2)
        gate.open()
        await other.calls[0].wait_closed()
        assert two.slot(1).in_flight == 1
    answer = client.result()
    assert (answer.status, answer.headers["x-thinkgate-backend"]) == (200, "a")
    assert answer.payloads()[-1] == "[DONE]"
    assert extension(answer)["tokens"]["wasted"] > 0
    assert (hedges(two, "won"), hedges(two, "lost")) == (0, 1)


async def test_nothing_is_hedged_after_the_first_byte(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """A stream that stands still after its first event is waited for, and nobody else hears of it."""
    gate = Gate()
    two.slot(0).first_bytes = FirstBytes()
    scripted.default = Script(say=SAY, gates={2: gate})
    async with asyncio.TaskGroup() as clients:
        client = clients.create_task(ask(two, {**STREAM, **INSTANT}))
        await gate.wait()
        hurry(two.slot(0))
        for _ in range(50):
            await asyncio.sleep(0)
        gate.open()
    assert client.result().status == 200
    assert other.calls == []


async def assert_not_hedged(
    gateway: Live, late: ScriptedBackend, other: ScriptedBackend, body: Json, path: str = CHAT
) -> Json:
    """The request waits for its late backend; its extension."""
    gate, seen = Gate(), len(other.calls)
    late.default = Script(say=SAY, gates={-1: gate})
    async with asyncio.TaskGroup() as clients:
        client = clients.create_task(ask(gateway, body, path))
        await gate.wait()
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(other.calls) == seen
        gate.open()
    assert client.result().status == 200
    assert len(other.calls) == seen
    return extension(client.result())


@pytest.mark.parametrize(
    "body",
    [
        {**STREAM, "service_tier": "flex"},
        {**STREAM, "thinkgate": {"min_thinking_tokens": 1}},
    ],
    ids=["flex", "two phase"],
)
async def test_what_is_not_hedged(two: Live, scripted: ScriptedBackend, other: ScriptedBackend, body: Json) -> None:
    """Requests that can wait, and chains of segments, have one try."""
    await assert_not_hedged(two, scripted, other, body)


async def test_the_envelope_has_to_cover_both(two: Live, scripted: ScriptedBackend, other: ScriptedBackend) -> None:
    """An envelope without room for two such calls allows one; with room for them there are two."""
    text = {"model": MODEL, "prompt": "six", "stream": True, "max_tokens": 20}
    narrow, wide = ({**text, "thinkgate": {"envelope": {"tokens": tokens}}} for tokens in (500, 5000))
    await assert_not_hedged(two, scripted, other, narrow, COMPLETIONS)
    scripted.default = Script(say=SAY, gates={-1: Gate()})
    hurry(two.slot(0))
    answer = await ask(two, wide, COMPLETIONS)
    assert (answer.headers["x-thinkgate-backend"], hedges(two, "won")) == ("b", 1)


async def test_a_limit_without_room_for_both_allows_one(scripted: ScriptedBackend, other: ScriptedBackend) -> None:
    """Where the hold cannot be doubled there is no second try, and what is held stays as it was."""
    body = {**STREAM, **INSTANT, "max_tokens": 100}
    async with live(tree_of(scripted, other, **{**HEDGED, "limits": [{**LIMIT, "amount": 700}]})) as gateway:
        prepare(gateway, scripted, other)
        told = await assert_not_hedged(gateway, scripted, other, body)
        gateway.slot(1).in_flight -= 1
    assert 350 < told["hold"]["tokens"] <= 700


async def test_there_are_no_more_hedges_than_the_share(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """With the budget of second tries spent, a late first byte is waited for."""
    model = two.gateway.serving.models[MODEL]
    model.hedging = Hedging(1e-9)
    scripted.default = Script(say=SAY, gates={-1: Gate()})
    for _ in range(10):
        assert (await ask(two, INSTANT)).headers["x-thinkgate-backend"] == "b"
        hurry(two.slot(0))
    await assert_not_hedged(two, scripted, other, INSTANT)


@pytest.mark.parametrize("why", ["down", "failing", "full", "waiting"])
async def test_a_second_backend_must_be_well_and_have_room(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend, why: str
) -> None:
    """No second try at a backend that is down, whose breaker is not closed, or that is full, nor while calls wait."""
    slot = two.slot(1)
    if why == "down":
        slot.capabilities = None
    elif why == "failing":
        slot.breaker.open(slot.clock())
    elif why == "full":
        slot.standing.limit = 1
    else:
        looks = itertools.count()  # somebody comes after the call was let through
        admission = two.gateway.serving.models[MODEL].admission
        admission.is_open = lambda: next(looks) == 0  # type: ignore[method-assign]
    await assert_not_hedged(two, scripted, other, {**STREAM, **INSTANT})


@pytest.mark.parametrize("body", [{**STREAM, **INSTANT}, INSTANT])
async def test_where_one_of_two_fails_the_other_is_waited_for(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend, body: Json
) -> None:
    """A failure of one try is its backend's alone, costs no retry, and is not paid."""
    for failing, late in ((scripted, other), (other, scripted)):
        gate, failed = Gate(), Gate()
        late.default = Script(say=SAY, gates={-1: gate})
        failing.default = Reply(status=500, body=BROKEN.body, gate=failed)
        hurry(two.slot(0))
        async with asyncio.TaskGroup() as clients:
            client = clients.create_task(ask(two, body))
            await gate.wait()
            await failed.wait()
            failed.open()
            await failing.calls[-1].wait_done()
            gate.open()
        assert client.result().status == 200
        assert extension(client.result())["tokens"]["wasted"] == 0
    assert two.metric("thinkgate_retries_total", model=MODEL) == 0


async def test_where_both_fail_the_failure_is_the_answer(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """With nobody left to try, the last failure is told, and both breakers know."""
    failed = [Gate(), Gate()]
    for backend, gate in zip((scripted, other), failed, strict=True):
        backend.default = Reply(status=500, body=BROKEN.body, gate=gate)
    async with asyncio.TaskGroup() as clients:
        client = clients.create_task(ask(two, STREAM))
        for gate in failed:
            await gate.wait()
        for gate in failed:
            gate.open()
    assert client.result().status == 502
    now_s = two.slot(0).clock()
    assert [two.slot(i).breaker.outcomes.share(now_s)[0] for i in range(2)] == [1.0, 1.0]


async def test_a_refusal_of_the_request_itself_ends_both(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """What one backend refuses with a 4xx of its own is refused, and the other is closed."""
    late, refusing = Gate(), Gate()
    scripted.default = Script(say=SAY, gates={-1: late})
    other.default = Reply(status=400, body=refusal(400, "no such thing").body, gate=refusing)
    async with asyncio.TaskGroup() as clients:
        client = clients.create_task(ask(two, STREAM))
        await late.wait()
        refusing.open()
    assert client.result().status == 400
    await scripted.calls[0].wait_closed()


async def test_a_probe_that_is_overtaken_has_failed(two: Live, scripted: ScriptedBackend) -> None:
    """Where the first try is the single probe of an open breaker and loses, the breaker opens again."""
    slot = two.slot(0)
    slot.breaker.open(slot.clock() - 10)
    two.slot(1).in_flight += 50
    assert slot.breaker.state(slot.clock()) == "half_open"
    scripted.default = Script(say=SAY, gates={-1: Gate()})
    answer = await ask(two, STREAM)
    two.slot(1).in_flight -= 50
    assert answer.headers["x-thinkgate-backend"] == "b"
    assert slot.breaker.state(slot.clock()) == "open"


def test_without_a_share_or_a_second_backend_nothing_is_hedged() -> None:
    """Nothing is kept for it then, and whole answers are read in one piece as ever."""
    entries = [{"id": name, "url": f"http://127.0.0.1:{port}"} for port, name in enumerate("ab", 1)]
    for count, share, is_on in ((2, 0, False), (1, 1, False), (2, 0.1, True)):
        config = config_of({"backends": entries[:count]}, routing={"hedging": {"share": share}})
        model = models_of(config)["qwen"]
        assert (model.hedging is not None, model.must_be_read()) == (is_on, is_on)


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT], ids=["streamed", "folded", "whole"])
@pytest.mark.parametrize("winner", ["first", "second"])
@pytest.mark.parametrize("reason", [None, "disconnect"])
async def test_cancelled_at_every_await_of_a_race(
    scripted: ScriptedBackend, other: ScriptedBackend, body: Json, winner: str, reason: Any
) -> None:
    """Wherever a hedged request is cancelled: no hold, no slot, no upstream call and no task is left."""
    async with live(tree_of(scripted, other, **HEDGED)) as gateway:
        prepare(gateway, scripted, other)
        gateway.slot(1).in_flight -= 1
        say = [Say(thinking=tokens("let me see"), answer=tokens("it is 42"))]
        script = Script(say=say, events_per_write=4, model=Model())
        scripted.default, other.default = script, script
        stuck = scripted if winner == "second" else other
        tasks = asyncio.all_tasks()
        await asyncio.gather(*scripted._tasks, *other._tasks)
        begun = 0
        for number in range(1, MOST_AWAITS):
            gate = Gate()
            stuck.default = Script(say=say, gates={-1: gate})
            scripted.forget()
            other.forget()
            hurry(gateway.slot(0))
            exchange = Exchange(CHAT, body)
            gateway.slot(1).in_flight += 1
            try:
                was_cancelled = await run_cancelled(gateway, exchange, number, reason)
            finally:
                gateway.slot(1).in_flight -= 1
            gate.open()
            begun += bool(scripted.calls and other.calls)
            await gateway.assert_settled()
            for each in other.exchanges:
                if not each.done.is_set():
                    await each.wait_closed()
            await asyncio.gather(*other._tasks)
            await assert_clean(gateway, scripted, tasks)
            assert [gateway.slot(i).standing.pending_tokens for i in range(2)] == [0, 0]
            for i in range(2):
                pooled = gateway.slot(i).backend
                assert isinstance(pooled, HttpBackend)
                pooled.pool.close()
            if not was_cancelled:
                break
        assert not was_cancelled, "MOST_AWAITS is too low"
        assert exchange.sent[0]["status"] == 200
        assert begun > 1
