"""Waiting while all backends are full: whose turn it is, how long, who is refused, and that nobody is forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.admission import Admission
from gateway.config.placing import QueueConfig
from gateway.errors import DeadlinePassed, Overloaded
from gateway.load import Load
from tests.gateway.live import ASK, EMBEDDINGS, INSTANT, MODEL, ask, live, tree_of
from tests.gateway.still import config_of, models_of
from tests.gateway.test_placing import Clock
from tests.scripted_backend import ScriptedBackend


def admission_of(limit: int, **config: Any) -> Admission:
    """To one backend that has room for so many calls."""
    model = models_of(config_of(routing={"queue": config}))["qwen"]
    model.slots[0].standing.limit = limit
    return Admission("qwen", model.slots, QueueConfig(**config), Clock())


async def served(admission: Admission, name: str, log: list[str], *, priority: int = 0) -> None:
    """One call that waits, is served for some turns of the loop, and ends."""
    if not admission.is_open():
        await admission.enter(name[0], priority=priority, tokens=10, deadline_s=None)
    with admission._slots[0]:
        log.append(name)
        assert admission._slots[0].in_flight <= (admission._slots[0].standing.limit or 99)
        for _ in range(3):
            await asyncio.sleep(0)


async def test_everybody_gets_a_turn_and_no_backend_gets_too_many() -> None:
    """Of many calls at once all are served, tenants in turns, never more at a time than there is room for."""
    admission, log = admission_of(2), list[str]()
    names = [*(f"a{i}" for i in range(20)), "b0", "b1"]
    await asyncio.gather(*(served(admission, name, log) for name in names))
    assert sorted(log) == sorted(names)
    assert {"b0", "b1"} <= set(log[:8])
    assert (len(admission), admission.waited) == (0, 20)


async def test_a_better_class_goes_first() -> None:
    """A priority call that came last is the next."""
    admission, log = admission_of(1), list[str]()
    calls = [served(admission, f"a{i}", log, priority=-(i == 9)) for i in range(10)]
    await asyncio.gather(*calls)
    assert log[:2] == ["a0", "a9"]


async def test_who_leaves_is_not_waited_for() -> None:
    """A client that goes away while it waits, or just as it is called, takes nobody's place."""
    admission, log = admission_of(1), list[str]()
    async with asyncio.TaskGroup() as calls:
        waiting = [calls.create_task(served(admission, f"a{i}", log)) for i in range(6)]
        await asyncio.sleep(0)
        waiting[2].cancel()
        while "a0" not in log or admission._slots[0].in_flight:
            await asyncio.sleep(0)
        waiting[1].cancel()
    assert set(log) >= {"a0", "a3", "a4", "a5"}
    assert (len(admission), admission._called) == (0, 0)


async def test_too_many_are_refused() -> None:
    """Beyond its bound the queue refuses, with the time after which to try again."""
    admission, log = admission_of(0, max_waiting=2), list[str]()
    waiting = [asyncio.create_task(served(admission, f"a{i}", log)) for i in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as refused:
        await served(admission, "a9", log)
    assert refused.value.retry_after_s is not None
    newcomer = asyncio.create_task(served(admission, "b0", log))
    with pytest.raises(Overloaded):
        await waiting[1]
    admission._slots[0].standing.limit = None
    admission._slots[0].became_free()
    await asyncio.gather(waiting[0], newcomer)
    assert (sorted(log), admission.shed) == (["a0", "b0"], 2)


async def test_nobody_waits_beyond_the_deadline_or_in_vain() -> None:
    """A call that could not be served in time is refused at once, one that was not when its time is over."""
    admission = admission_of(0, max_wait_s=0.01)
    with pytest.raises(DeadlinePassed):
        await admission.enter("a", priority=0, tokens=1, deadline_s=999.0)
    with pytest.raises(DeadlinePassed):
        await admission.enter("a", priority=0, tokens=1, deadline_s=1000.001)
    with pytest.raises(Overloaded, match=r"max_wait_s\), and that has passed"):
        await admission.enter("a", priority=0, tokens=1, deadline_s=None)
    assert len(admission) == 0


async def test_time_in_which_nobody_waited_is_no_wait() -> None:
    """What is expected follows from turns that were waited for: after a quiet hour a short deadline is no reason."""
    admission, log = admission_of(1), list[str]()
    clock: Any = admission._clock
    for _ in range(5):
        await asyncio.gather(served(admission, "a0", log), served(admission, "a1", log))
        clock.now_s += 3600
    with admission._slots[0]:
        waiting = asyncio.create_task(admission.enter("a", priority=0, tokens=1, deadline_s=clock.now_s + 5))
        await asyncio.sleep(0)
        assert len(admission) == 1
    await waiting


@pytest.mark.parametrize("how", ["down", "open"])
async def test_a_backend_that_takes_no_calls_is_no_room(how: str) -> None:
    """Calls wait for the full one where the other is down or behind its breaker; where none is left they do not."""
    backends = [{"id": name, "url": f"http://127.0.0.1:{port}"} for port, name in enumerate("ab", 1)]
    model = models_of(config_of({"backends": backends}))["qwen"]
    admission, (full, other) = model.admission, model.slots
    full.standing.limit = 0
    assert admission.is_open()
    if how == "down":
        other.mark_down("gone")
    else:
        other.breaker.open(other.clock())
    assert not admission.is_open()
    full.mark_down("gone")
    assert admission.is_open()


async def test_a_call_that_would_wait_too_long_is_refused_at_once() -> None:
    """Turns of a second each: beyond the longest wait a call is refused, with what it waits for; others get turns."""
    admission = admission_of(0, max_wait_s=10, max_waiting=100)
    admission._turn_s = 1.0
    async with asyncio.TaskGroup() as calls:
        waiting = [calls.create_task(served(admission, f"a{i}", [])) for i in range(11)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=r"waits 10 s at most .* about 11 s"):
            await served(admission, "a11", [])
        newcomer = calls.create_task(served(admission, "b0", []))
        await asyncio.sleep(0)
        with pytest.raises(DeadlinePassed):
            await admission.enter("b", priority=0, tokens=1, deadline_s=1002.0)
        assert (len(admission), admission.shed) == (12, 1)
        for call in (*waiting, newcomer):
            call.cancel()


async def test_turns_are_learned_from_those_that_waited_only() -> None:
    """That nobody waited says nothing of how long a turn takes; and a queue that was slow once recovers."""
    admission, clock = admission_of(0), Clock()
    admission._clock = clock
    for waited_s in (30.0, 30.0, 0.0, 0.0):
        clock.now_s += 3600
        async with asyncio.TaskGroup() as calls:
            calls.create_task(served(admission, "a0", []))
            await asyncio.sleep(0)
            clock.now_s += waited_s
            admission._slots[0].standing.limit = 1
            admission._slots[0].became_free()
        admission._slots[0].standing.limit = 0
        assert admission._turn_s <= 30 * 0.19 + 1e-9
    assert admission._turn_s == pytest.approx(30 * 0.19 * 0.81)


async def test_every_call_has_an_end_of_waiting(scripted: ScriptedBackend) -> None:
    """Streamed, read or passed on whole, and embeddings: what cannot be served within the request's time is a 504."""
    async with live(tree_of(scripted, server={"timeouts": {"total_s": 50}})) as gateway:
        gateway.slot().standing.limit = 0
        gateway.gateway.serving.models[MODEL].admission._turn_s = 51.0
        async with asyncio.TaskGroup() as clients:
            first = clients.create_task(ask(gateway, INSTANT))
            while gateway.metric("thinkgate_queue_calls", model=MODEL) < 1:
                await asyncio.sleep(0)
            for body in ({**INSTANT, "stream": True}, ASK, INSTANT):
                answer = await ask(gateway, body)
                assert (answer.status, answer.error["code"]) == (504, "deadline_passed")
            assert (await ask(gateway, {"model": MODEL, "input": "six"}, EMBEDDINGS)).status == 504
            gateway.slot().standing.limit = None
            gateway.slot().became_free()
        assert first.result().status == 200


def test_a_backend_is_full_by_its_own_account_only() -> None:
    """Calls that wait there lower its limit by as many as are too many; once none does the limit rises and goes."""
    standing = models_of(config_of())["qwen"].slots[0].standing

    def hears(waiting: int, in_flight: int) -> int | None:
        standing.hear(Load(running=8, waiting=waiting, kv_use=0.5, cache_tokens=None), 4.0, in_flight, 4)
        return standing.limit

    assert hears(0, 500) is None
    assert hears(4, 500) is None
    assert hears(20, 28) == 12
    assert hears(0, 12) == 13
    assert hears(9, 1) == 1
    assert [hears(0, 0) for _ in range(3)] == [None, None, None]


async def test_requests_wait_while_their_backend_is_full(scripted: ScriptedBackend) -> None:
    """Through the whole gateway: while the backend is full they wait, and once it has room they are answered."""
    async with live(tree_of(scripted)) as gateway:
        slot = gateway.slot()
        slot.standing.limit = 0
        async with asyncio.TaskGroup() as clients:
            answers = [clients.create_task(ask(gateway, {**INSTANT, "stream": i % 2 == 0})) for i in range(6)]
            while gateway.metric("thinkgate_queue_calls", model=MODEL) < 6:
                await asyncio.sleep(0)
            slot.standing.limit = 2
            slot.became_free()
        assert [answer.result().status for answer in answers] == [200] * 6
        assert gateway.metric("thinkgate_queue_calls", model=MODEL) == 0
