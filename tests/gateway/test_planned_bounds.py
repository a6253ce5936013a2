"""No plan, no model and no client make a request think, or spend, more than it may: 10,000 plans at random."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count
from typing import Any

import msgspec
import pytest

from budget.allocate import SCHEDULES
from budget.envelope import Envelope
from budget.plan import Plan, SubQuestion
from budget.stopping import ProbeWorth
from gateway.backends.port import Call, Delta, Segment
from gateway.config.planning import PlanConfig
from gateway.config.stopping import StopConfig
from gateway.errors import InvalidRequest, UpstreamError
from gateway.modes.chains import Chains
from gateway.modes.courses import Courses
from gateway.modes.flow import Run
from gateway.modes.planner import OPENING
from gateway.modes.probing import Probing
from tests.gateway.live import ASK, CHAT, Live, live, tree_of
from tests.gateway.test_cancellation import MOST_AWAITS, Exchange, assert_clean, run_cancelled
from tests.gateway.test_planned import ON, PLANS, thinks
from tests.gateway.upstream import END, EOS, FOUND, PROMPT, Upstream, call, run_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange as HttpExchange
from tests.scripted_script import Script

PLANS_AT_ONCE, BATCHES = 1000, 10
HEADING = 700


class Wild(Upstream):
    """A backend that samples anything for any length, ends where it likes, breaks, and may ignore its limits."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng
        self._is_honest = rng.random() < 0.7
        self._breaks = rng.random() < 0.2

    async def encode(self, text: str) -> list[int]:
        """See the port."""
        if self._rng.random() < 0.02:
            raise UpstreamError("cannot")
        marker = [END] if self._rng.random() < 0.02 else []
        return [HEADING + i for i in range(self._rng.randint(0, 6))] + marker

    async def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        rng, left = self._rng, segment.max_tokens
        assert left > 0
        self.open += 1
        try:
            length = rng.choice([1, 3, left, left, 10**6])
            for at in count(1):
                if self._breaks and rng.random() < 0.02:
                    raise UpstreamError("broke off")
                ids = [rng.choice([100, 101, 102, 102]) for _ in range(rng.randint(1, 4))]
                ids = ids[:left] if self._is_honest else ids
                left -= len(ids)
                over = at >= length or left <= (0 if self._is_honest else -40)
                if over and left > 0 and rng.random() < 0.8:
                    ids[-1] = rng.choice([END, EOS])
                stop = END if ids[-1] == END else None
                finish = None if not over else "stop" if ids[-1] in {END, EOS} else "length"
                yield [Delta(text="x" * len(ids), token_ids=ids, finish_reason=finish, stop_reason=stop)]
                if over:
                    return
        finally:
            self.open -= 1


def plan_of(rng: random.Random) -> Plan:
    """One to five steps with any credits."""
    steps = [SubQuestion("q", 3, rng.choice([0.01, 1, 5, 30, 99])) for _ in range(rng.randint(1, 5))]
    return Plan(tuple(steps), rng.randint(1, 5))


def request_of(rng: random.Random, upstream: Wild) -> Run:
    """A request with any cap, total, minimum, envelope and plan."""
    asked = call(rng.choice([1, 1, 1, 2, 3]), cap=rng.randint(1, 60), max_tokens=rng.randint(12, 120))
    least = rng.choice([0, 0, rng.randint(1, 20)])
    asked = msgspec.structs.replace(asked, thinking=msgspec.structs.replace(asked.thinking, min_tokens=least))
    tokens = rng.choice([None, None, rng.randint(20, 200)])
    run = run_of(upstream, asked, Envelope(tokens=tokens))
    run.slack = FOUND.forcing.most_wasted() if FOUND.forcing is not None else 0
    settings = PlanConfig(
        schedule=rng.choice(SCHEDULES),
        keeps_trend=rng.random() < 0.5,
        carry_out=rng.choice(["steps", "steps", "single"]),
        borrows=rng.choice([0, 0.5, 1]),
        level_tokens=rng.choice([{}, {3: rng.randint(1, 80)}]),
    )
    stop = StopConfig(rule="stable", every=rng.randint(1, 12), agree=rng.randint(1, 3), probe_tokens=5, ask="")
    worth = ProbeWorth(stop.every, 1)
    for _ in range(4):
        worth.learn_length(1000)
    probing = Probing(stop, worth, run) if rng.random() < 0.5 else None
    run.courses = Courses(settings, "m", plan_of(rng), probing)
    return run


async def carried_out(run: Run, upstream: Wild, leaves_after: int | None) -> None:
    """Carry a request out as `flow` does, until the client leaves, or something breaks, or it is over."""
    backend: Any = upstream
    events = 0
    try:
        async with aclosing(Chains(run, backend, FOUND).deltas()) as batches:
            async for batch in batches:
                run.take(batch)
                events += 1
                if run.is_cut or events == leaves_after:
                    break
    except (UpstreamError, InvalidRequest):
        return


def assert_within(run: Run, upstream: Wild) -> None:
    """Every bound held, and nothing is open."""
    tally, cap, courses = run.tally, run.call.thinking.cap, run.courses
    assert cap is not None
    assert courses is not None
    assert upstream.open == 0
    assert max(tally.thinking_by_choice.values(), default=0) <= cap
    report = courses.report()
    assert report is not None
    if report.outcome == "planned":
        assert max(tally.thinking_by_choice.values(), default=0) <= report.tokens <= cap
        assert all(step.thinking <= step.tokens for step in report.steps)
    counts = tally.counts()
    assert counts.probe <= 16 * run.choices * (1 + 5 + 4)  # a lying backend is cut after the batch in which it lies
    kept = counts.thinking + counts.answer + counts.injected
    assert kept <= run.call.max_tokens * run.choices
    if run.envelope.tokens is not None:
        assert len(PROMPT) + kept <= max(run.envelope.tokens, len(PROMPT))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("batch", range(BATCHES))
async def test_thinking_never_exceeds_its_envelope(batch: int) -> None:
    """Adversarial lengths, broken calls, clients that leave: thinking stays within cap, plan and envelope."""
    outcomes = set()
    for number in range(PLANS_AT_ONCE):
        rng = random.Random(batch * PLANS_AT_ONCE + number)
        upstream = Wild(rng)
        run = request_of(rng, upstream)
        await carried_out(run, upstream, rng.choice([None, None, rng.randint(1, 40)]))
        assert_within(run, upstream)
        report = None if run.courses is None else run.courses.report()
        outcomes.add("none" if report is None else report.outcome)
    assert outcomes == {"planned", "too_small", "unencodable"}


async def test_a_client_may_leave_at_every_event() -> None:
    """Whichever event is its last, nothing stays open and no bound is broken."""
    for seed in range(40):
        for events in count(1):
            rng = random.Random(seed)
            upstream = Wild(rng)
            run = request_of(rng, upstream)
            await carried_out(run, upstream, events)
            assert_within(run, upstream)
            if run.is_cut or len(run.finished) == run.choices or run.tally.output() == 0 or events > 60:
                break


@pytest.mark.timeout(120)
async def test_cancelled_at_every_await(scripted: ScriptedBackend) -> None:
    """Wherever it is cancelled, planning included: no hold, no upstream call and no task is left."""
    async with live(tree_of(scripted)) as gateway:
        await asyncio.gather(*scripted._tasks)
        tasks = asyncio.all_tasks()
        for number in range(1, MOST_AWAITS):
            scripted.default = served
            exchange = Exchange(CHAT, {**ASK, **ON, "stream": bool(number % 2)})
            was_cancelled = await run_cancelled(gateway, exchange, number, None)
            await _closed(gateway)
            await assert_clean(gateway, scripted, tasks)
            scripted.forget()
            gateway.pool().close()
            if not was_cancelled:
                break
        assert not was_cancelled, "MOST_AWAITS is too low"
        assert exchange.is_complete()
        assert b"Step 2 of 2" in exchange.body


def served(exchange: HttpExchange) -> Script:
    """A plan for the planner's call, thoughts for every other."""
    return PLANS if OPENING.encode() in exchange.body else thinks(2, 2)


async def _closed(gateway: Live) -> None:
    async with asyncio.timeout(10):
        while gateway.pool().busy():
            await asyncio.sleep(0)
