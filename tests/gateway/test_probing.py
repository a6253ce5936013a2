"""Thinking that is probed ends when its answer stays the same; probes ride the prefix cache, and must pay."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import msgspec

from budget.plan import Plan, SubQuestion
from budget.stopping import ProbeWorth
from gateway.backends.port import Call, Delta, Segment
from gateway.config.planning import PlanConfig
from gateway.config.stopping import StopConfig
from gateway.modes.courses import Courses
from gateway.modes.flow import Run
from gateway.modes.probing import Probing, probe_tokens
from tests.gateway.live import STREAM, Json, ask, live, tree_of
from tests.gateway.still import config_of, prepared
from tests.gateway.test_streaming import text_of
from tests.gateway.upstream import BROKEN, END, EOS, FOUND, Step, Upstream, call, ids_of, read, run_of, say, usage
from tests.scripted_backend import COMPLETIONS, ScriptedBackend
from tests.scripted_chains import BLOCK
from tests.scripted_script import Script
from tests.scripted_stream import Say, tokens

ASKS = 77
STOP: Json = {"stop": {"rule": "stable", "every": 16, "agree": 2, "ask": "so \\boxed{"}}
LONG = Script(say=[Say(thinking=tokens("hm " * 200), answer=tokens("42} it is"))])
CONTROLS = 4


class Probed(Upstream):
    """Plays chains as ever, and probes from a list of their own."""

    def __init__(self, *play: Any, probes: list[list[Step]]) -> None:
        super().__init__(*play)
        self.probes = probes
        self.probed: list[list[int]] = []

    async def encode(self, text: str) -> list[int]:
        """See the port."""
        return [ASKS]

    async def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        if "seed" in segment.fields:
            async for batch in super().extend(call, segment):
                yield batch
            return
        self.probed.append(list(segment.prompt))
        self.open += 1
        try:
            for step in self.probes.pop(0):
                if isinstance(step, BaseException):
                    raise step
                assert isinstance(step, list)
                yield step
        finally:
            self.open -= 1


def answer(text: str, *ids: int) -> list[Delta]:
    """A probe's batch."""
    return [Delta(text=text, token_ids=list(ids))]


def probing_run(upstream: Upstream, *, worth: ProbeWorth | None = None, **more: Any) -> Run:
    """A run with a cap of 40 that is probed every 4 tokens, and stops at two equal answers."""
    asked = call(cap=40, max_tokens=90)
    least = more.pop("least", 0)
    asked = msgspec.structs.replace(asked, thinking=msgspec.structs.replace(asked.thinking, min_tokens=least))
    run = run_of(upstream, asked)
    settings = StopConfig(rule="stable", **{"every": 4, "agree": 2, "ask": "so \\boxed{", **more})
    if worth is None:
        worth = ProbeWorth(4, 3)
        for _ in range(CONTROLS):
            worth.learn_length(1000)
    run.courses = Courses(PlanConfig(), None, probing=Probing(settings, worth, run))
    return run


def thinks(*ids: int) -> list[Step]:
    """A segment of thinking that meets its limit."""
    return [say(*ids, finish="length"), usage(9, cached=8)]


ANSWERS: list[Step] = [say(200, EOS, finish="stop"), usage(9, cached=8)]
CLOSES: list[Step] = [say(100, END, finish="stop", stop=END), usage(4)]


async def test_two_equal_answers_end_the_thinking() -> None:
    """Probes go on from the chain's own ids behind its end; nothing of them is delivered, and no wrap-up is forced."""
    probes: list[list[Step]] = [[answer("7}", 7, 8)], [answer("42", 4), answer("}", 5), BROKEN], [answer("42.0}", 6)]]
    upstream = Probed([thinks(1, 2, 3, 4), thinks(5, 6, 7, 8), thinks(9, 10, 11, 12), ANSWERS], probes=probes)
    run = probing_run(upstream)
    deltas = await read(run, upstream)
    thought = list(range(1, 13))
    assert ids_of(deltas) == [*thought, END, 200, EOS]
    assert [prompt[-2:] for prompt in upstream.probed] == [[END, ASKS]] * 3
    assert upstream.probed[0][:-2] == upstream.asked[1].prompt
    assert (run.enforced.ended_by, run.enforced.probes, run.tally.capped) == ("stable", 3, False)
    counts = run.tally.counts()
    assert (counts.probe, counts.thinking, counts.injected) == (3 * 2 + 2 + 2 + 1, 12, 1)


async def test_a_second_backend_begins_the_plan_anew() -> None:
    """Where the first one failed before its first token, the report tells of the steps on the one that served."""
    upstream = Probed([thinks(*range(101, 121)), CLOSES, ANSWERS], probes=[])
    run = probing_run(upstream)
    plan = Plan((SubQuestion("a"), SubQuestion("b")))
    run.courses = Courses(PlanConfig(schedule="uniform", borrows=0), "m", plan)
    backend: Any = upstream
    await run.courses.begin(run.call, backend, FOUND)
    assert run.courses.new(0) is not None
    await read(run, upstream)
    report = run.courses.report()
    assert report is not None
    assert [(step.tokens, step.thinking) for step in report.steps] == [(20, 20), (20, 1)]


async def test_an_answer_that_is_not_complete_is_none() -> None:
    """A probe whose box is not closed within its tokens agrees with nothing."""
    probes: list[list[Step]] = [[answer("42", 4)], [answer("42", 4)], [answer("42", 4)]]
    upstream = Probed([thinks(1, 2, 3, 4), thinks(5, 6, 7, 8), thinks(9, 10, 11, 12), CLOSES, ANSWERS], probes=probes)
    run = probing_run(upstream)
    assert ids_of(await read(run, upstream)) == [*range(1, 13), 100, END, 200, EOS]
    assert (run.enforced.ended_by, run.enforced.probes) == (None, 3)


async def test_a_probe_that_fails_costs_the_probing_only() -> None:
    """The chain thinks on from where it was, without another pause."""
    upstream = Probed([thinks(1, 2, 3, 4), CLOSES, ANSWERS], probes=[[BROKEN]])
    run = probing_run(upstream)
    assert ids_of(await read(run, upstream)) == [1, 2, 3, 4, 100, END, 200, EOS]
    assert upstream.asked[1].max_tokens == 36
    assert run.tally.counts().probe == 2


async def test_probing_that_is_not_worth_it_is_off() -> None:
    """Where chains end soon anyhow no probe is made, and the first chains of a model are not even paused."""
    worth = ProbeWorth(4, 3)
    for _ in range(CONTROLS):
        upstream = Probed([CLOSES, ANSWERS], probes=[])
        await read(probing_run(upstream, worth=worth), upstream)
        assert upstream.asked[0].max_tokens == 40
    for _ in range(4):
        worth.learn_length(6)
    upstream = Probed([thinks(1, 2, 3, 4), CLOSES, ANSWERS], probes=[])
    run = probing_run(upstream, worth=worth)
    await read(run, upstream)
    assert ([segment.max_tokens for segment in upstream.asked[:2]], run.tally.counts().probe) == ([4, 36], 0)


async def test_no_more_probes_than_configured() -> None:
    """After the last one the chain thinks on undisturbed."""
    probes: list[list[Step]] = [[answer("1}", 1)], [answer("2}", 2)]]
    upstream = Probed([thinks(1, 2, 3, 4), thinks(5, 6, 7, 8), thinks(9, 10, 11, 12), CLOSES, ANSWERS], probes=probes)
    run = probing_run(upstream, most_probes=2)
    await read(run, upstream)
    assert (run.enforced.probes, upstream.asked[3].max_tokens) == (2, 28)


async def test_a_minimum_of_thinking_is_not_probed_away() -> None:
    """Before the fewest thinking tokens no probe is made."""
    probes: list[list[Step]] = [[answer("1}", 1)], [answer("1}", 2)]]
    upstream = Probed([thinks(1, 2, 3, 4), thinks(5, 6, 7, 8), thinks(9, 10, 11, 12), ANSWERS], probes=probes)
    run = probing_run(upstream, least=8)
    await read(run, upstream)
    assert (run.enforced.probes, run.tally.thinking) == (2, 12)


async def test_without_a_box_the_first_line_is_the_answer() -> None:
    """A probe without a box asks for an answer in the model's own way."""
    probes: list[list[Step]] = [[answer("42\n", 1), BROKEN], [answer("\n42 \nso", 2)]]
    upstream = Probed([thinks(1, 2, 3, 4), thinks(5, 6, 7, 8), ANSWERS], probes=probes)
    run = probing_run(upstream, ask="")
    assert ids_of(await read(run, upstream)) == [*range(1, 9), END, 200, EOS]
    assert [prompt[-1] for prompt in upstream.probed] == [END, END]


async def test_probes_ride_the_prefix_cache_and_are_part_of_the_hold(scripted: ScriptedBackend) -> None:
    """Each finds all but its tail in the cache; they are `probe` tokens, in and out, and nothing of them is seen."""
    body: Json = {**STREAM, "thinkgate": {"thinking_tokens": 250}}
    async with live(tree_of(scripted, model=STOP)) as gateway:
        scripted.default = LONG
        for _ in range(CONTROLS):
            await ask(gateway, body)
        scripted.forget()
        closing = await ask(gateway, body)
        await gateway.assert_settled()
    chunks = closing.chunks()
    report = chunks[-1]["thinkgate"]
    assert (report["cap"]["ended_by"], report["cap"]["probes"], report["capped"]) == ("stable", 2, False)
    assert (report["tokens"]["thinking"], report["tokens"]["injected"]) == (32, 1)
    assert text_of(chunks, "reasoning") == " ".join(["hm"] * 32)
    assert text_of(chunks, "content") == "42} it is"
    segments = [found for found in scripted.calls if found.path == COMPLETIONS]
    first, probe, second, again, last = segments
    assert probe.json["prompt"][: len(second.json["prompt"])] == second.json["prompt"]
    assert probe.json["temperature"] == 0
    for found in (probe, again):
        assert found.cached == (len(found.json["prompt"]) - 1) // BLOCK * BLOCK
    suffix = len(probe.json["prompt"]) - len(second.json["prompt"])
    assert report["tokens"]["probe"] >= 2 * (suffix + 1)
    assert report["hold"]["tokens"] >= 250 + 15 * probe_tokens(StopConfig(**STOP["stop"]))
    assert (first.json["max_tokens"], last.json["prompt"][-1]) == (16, again.json["prompt"][-suffix])


def test_what_is_probed_and_what_is_not() -> None:
    """Tools and envelopes of tokens or money are left alone; instant mode holds nothing for it."""
    config = config_of(STOP)
    thinking: Json = {"thinkgate": {"mode": "reasoning"}}
    tool: Json = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    bare = prepared(thinking, capabilities=FOUND)
    probed = prepared(thinking, config=config, capabilities=FOUND)
    assert probed.aside.output == 16 * probe_tokens(config.models["qwen"].stop)
    assert probed.ceiling.tokens == bare.ceiling.tokens + probed.aside.output
    for more in (tool, {"thinkgate": {"mode": "reasoning", "envelope": {"tokens": 4000}}}):
        assert prepared({**thinking, **more}, config=config, capabilities=FOUND).aside.output == 0
    assert prepared({"thinkgate": {"mode": "instant"}}, config=config, capabilities=FOUND).aside.output == 0
