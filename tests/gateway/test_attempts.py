"""A call that fails before its first byte is tried elsewhere, within a budget; after it, never."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator

import pytest

from router.health import RetryBudget
from tests.gateway.live import ASK, INSTANT, MODEL, STREAM, Json, Live, ask, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_model import Say
from tests.scripted_script import Exchange, Gate, Reply, Script, refusal
from tests.scripted_tokens import tokens

BODIES = [STREAM, ASK, INSTANT]
PLAIN = Script(say=[Say(answer=tokens("the answer is forty two"))])
BROKEN = refusal(500, "out of memory", "InternalServerError")


@pytest.fixture
async def other() -> AsyncIterator[ScriptedBackend]:
    """A second server."""
    async with ScriptedBackend() as backend:
        yield backend


@pytest.fixture
async def two(scripted: ScriptedBackend, other: ScriptedBackend) -> AsyncIterator[Live]:
    """A gateway over both, in which the first is chosen first."""
    async with live(tree_of(scripted, other)) as gateway:
        for backend in (scripted, other):
            backend.forget()
        gateway.slot(1).in_flight += 1
        yield gateway
        gateway.slot(1).in_flight -= 1


@pytest.mark.parametrize("body", BODIES)
async def test_a_failure_before_the_first_byte_is_tried_elsewhere(
    two: Live, scripted: ScriptedBackend, body: Json
) -> None:
    """A backend that answers 500 costs the client nothing: the other serves, and the retry is counted."""
    scripted.default = BROKEN
    answer = await ask(two, body)
    assert (answer.status, answer.headers["x-thinkgate-backend"]) == (200, "b")
    assert two.metric("thinkgate_retries_total", model=MODEL) == 1


@pytest.mark.parametrize("body", BODIES)
async def test_without_retries_left_the_failure_is_the_answer(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend, body: Json
) -> None:
    """With its retry budget spent, a model's failures are passed on rather than multiplied."""
    scripted.default = BROKEN
    two.gateway.serving.models[MODEL].retries = RetryBudget(0.0, per_s=0.0, most=0.0)
    answer = await ask(two, body)
    assert (answer.status, answer.error["type"]) == (502, "upstream_error")
    assert other.calls == []


async def test_a_refusal_of_the_request_itself_is_not_tried_elsewhere(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """What a backend refuses with a 4xx of its own would be refused by the others, too."""
    scripted.default = refusal(400, "no such thing")
    assert (await ask(two, INSTANT)).status == 400
    assert (len(other.calls), two.metric("thinkgate_retries_total", model=MODEL)) == (0, 0)


async def test_nothing_is_tried_again_after_the_first_byte(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """A stream that breaks off ends with an error event, and no other backend hears of it."""
    scripted.queue(Script(say=[Say(answer=tokens("one two three four five six"))], dies_after=4))
    answer = await ask(two, {**STREAM, **INSTANT})
    assert answer.status == 200
    assert "error" in answer.chunks()[-1]
    assert other.calls == []


async def test_the_only_backend_is_tried_once(scripted: ScriptedBackend) -> None:
    """Where there is no other backend a failure is the answer, and no breaker keeps later calls away."""
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(*[BROKEN] * 10)
        assert [(await ask(gateway, INSTANT)).status for _ in range(11)] == [502] * 10 + [200]


async def test_a_backend_that_keeps_failing_is_left_alone(
    two: Live, scripted: ScriptedBackend, other: ScriptedBackend
) -> None:
    """After five failures in a row its breaker is open and says so: the calls that follow go to the other at once."""
    scripted.default = BROKEN
    for _ in range(5):
        assert (await ask(two, INSTANT)).status == 200
    assert two.metric("thinkgate_backend_breaker_open", model=MODEL, backend="a") == 1
    scripted.forget()
    assert (await ask(two, INSTANT)).status == 200
    assert scripted.calls == []
    other.stop()
    scripted.default = Script()
    assert (await ask(two, INSTANT)).headers["x-thinkgate-backend"] == "a"


@pytest.mark.parametrize("body", BODIES)
async def test_a_clients_mistake_is_no_reason_to_leave_a_backend_alone(
    two: Live, scripted: ScriptedBackend, body: Json
) -> None:
    """Where the call that was to prove a backend was refused for its own fault, the next one proves it."""
    slot = two.slot()
    slot.breaker.open(slot.clock() - 100)
    scripted.queue(refusal(400, "no such thing"))
    assert (await ask(two, body)).status == 400
    assert (await ask(two, body)).headers["x-thinkgate-backend"] == "a"
    assert slot.breaker.state(slot.clock()) == "closed"


def question(exchange: Exchange) -> str:
    """Which of the questions a call asks."""
    asked: str = exchange.json["messages"][-1]["content"]
    return asked


async def test_chaos() -> None:
    """Of 200 streams over a killed, a slow and a failing backend only those fail that had begun on the killed one."""
    chance, gate, refused = random.Random(4), Gate(), Counter[str]()

    def at_random(exchange: Exchange) -> Script | Reply:
        if chance.random() < 0.3:
            refused[question(exchange)] += 1
            return BROKEN
        return PLAIN

    async with ScriptedBackend() as killed, ScriptedBackend() as slow, ScriptedBackend() as failing:
        killed.default = PLAIN
        async with live(tree_of(killed, slow, failing)) as gateway:
            for backend in (killed, slow, failing):
                backend.forget()
            slow.default = Script(say=PLAIN.say, gates={2: gate})
            failing.default = at_random
            answers: dict[str, tuple[str, bool]] = {}

            async def one(name: str) -> None:
                answer = await ask(gateway, {**STREAM, **INSTANT, "messages": [{"role": "user", "content": name}]})
                assert answer.status == 200, answer.body
                answers[name] = answer.headers["x-thinkgate-backend"], answer.payloads()[-1] == "[DONE]"
                if len(answers) == 40:
                    killed.stop()
                    gate.open()

            async with asyncio.TaskGroup() as clients:
                for i in range(200):
                    clients.create_task(one(f"question {i}"))
                    if i % 20 == 0:
                        await gateway.logs.wait("backend up", 3)
            await gateway.assert_settled()
            assert len(answers) == 200
            served_by_dead = [is_done for by, is_done in answers.values() if by == "a"]
            assert {by for by, is_done in answers.values() if not is_done} <= {"a"}
            assert any(served_by_dead)
            begun = Counter(question(call) for backend in (slow, failing) for call in backend.calls)
            begun.subtract(refused)
            assert [name for name, (by, _) in answers.items() if begun[name] != (by != "a")] == []
            assert gateway.metric("thinkgate_retries_total", model=MODEL) >= refused.total() > 0
