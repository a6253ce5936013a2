"""Plans beside what else may happen to a request: a draft first, several models, a cheaper one, a kept decision."""

from __future__ import annotations

import pytest

from gateway.judge import Judge, load_scorer, priors_of
from gateway.shapes import Decisions
from router.utility import Statistics
from tests.gateway.live import ASK, MODEL, STREAM, Json, live, tree_of
from tests.gateway.still import config_of, key, models_of
from tests.gateway.test_cascade import DRAFT, UNSURE, cascading, drafts, outcome
from tests.gateway.test_judge import BETWEEN, CHAT, WORK, decided
from tests.gateway.test_planned import FIRST, FLAT, PLANS, SECOND, calls, thinks
from tests.gateway.upstream import FOUND
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import refusal

WISH: Json = {"thinkgate": {"plan": "on"}}
TIMED: Json = {"thinkgate": {"plan": "on", "envelope": {"seconds": 60}}}  # such drafts are chains themselves
CAP_40: Json = {"thinking": {"default_tokens": 40, "max_tokens": 256, "answer_floor_tokens": 16}}


@pytest.mark.parametrize("wish", [WISH, TIMED])
@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_draft_follows_no_plan(scripted: ScriptedBackend, body: Json, wish: Json) -> None:
    """Nobody is asked for one before the draft was judged, and one that was sure needs none."""
    async with live(cascading(scripted, model={**FLAT, **CAP_40})) as running:
        scripted.forget()
        scripted.queue(drafts())
        _, texts, told = await outcome(running, {**body, **wish})
    assert len(calls(scripted)) == 1
    assert (texts[0]["content"], texts[0].get("reasoning") or "") == (DRAFT, "")
    assert (told["cascade"]["outcome"], "plan" in told) == ("accepted", False)
    assert (told["tokens"]["planner"], told["tokens"]["thinking"], told["tokens"]["wasted"]) == (0, 0, 0)


@pytest.mark.parametrize("wish", [WISH, TIMED])
@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_what_replaces_a_draft_follows_its_plan(scripted: ScriptedBackend, body: Json, wish: Json) -> None:
    """The planner is asked once the draft is thrown away; both are in the one hold."""
    async with live(cascading(scripted, model={**FLAT, **CAP_40})) as running:
        scripted.forget()
        scripted.queue(drafts(logprob=UNSURE), PLANS, thinks(5, 6))
        _, texts, told = await outcome(running, {**body, **wish})
        assert running.settled_tokens() == told["settled"]["tokens"] == sum(told["tokens"].values())
    assert texts[0]["reasoning"].startswith(FIRST)
    assert SECOND in texts[0]["reasoning"]
    assert (told["cascade"]["outcome"], told["plan"]["outcome"]) == ("escalated", "planned")
    assert [step["thinking"] for step in told["plan"]["steps"]] == [5, 6]
    assert told["tokens"]["planner"] > 0
    assert told["tokens"]["wasted"] > 0
    assert told["settled"]["tokens"] <= told["hold"]["tokens"]


async def test_a_draft_that_is_the_answer_after_all_has_no_plan(scripted: ScriptedBackend) -> None:
    """Where the backend fails before it thinks, the plan that was made is paid for, and not told of."""
    async with live(cascading(scripted, model={**FLAT, **CAP_40})) as running:
        scripted.forget()
        scripted.queue(drafts("no idea", UNSURE), PLANS)
        scripted.default = refusal(500, "out of memory")
        _, texts, told = await outcome(running, {**ASK, **WISH})
        assert running.settled_tokens() == told["settled"]["tokens"] == sum(told["tokens"].values())
    assert texts[0]["content"] == "no idea"
    assert (told["cascade"]["outcome"], told["mode"], "plan" in told) == ("accepted", "instant", False)
    assert told["tokens"]["planner"] > 0


async def test_probing_leaves_a_draft_alone(scripted: ScriptedBackend) -> None:
    """It does not think, so there is nothing to ask it in between."""
    stop: Json = {"stop": {"rule": "stable", "every": 1, "agree": 2, "ask": "so \\boxed{"}}
    async with live(cascading(scripted, model={**stop, **CAP_40})) as running:
        for _ in range(6):  # more than there are controls
            scripted.forget()
            scripted.queue(drafts())
            _, _, told = await outcome(running, {**ASK, "thinkgate": {"envelope": {"seconds": 60}}})
            assert (told["cascade"]["outcome"], told["tokens"]["probe"]) == ("accepted", 0)
            assert len(calls(scripted)) == 1


async def test_a_name_of_several_models_is_planned_for_as_the_one_it_comes_to(scripted: ScriptedBackend) -> None:
    """That model's own settings and planner count, and the response tells of both choices."""
    tree = tree_of(scripted, model={**FLAT, **CAP_40})
    tree["models"]["any"] = {"targets": [{"model": MODEL}]}
    async with live(tree) as running:
        scripted.queue(PLANS, thinks(5, 6))
        _, texts, told = await outcome(running, {**ASK, **WISH, "model": "any"})
    assert texts[0]["reasoning"].startswith(FIRST)
    assert (told["target"]["model"], told["plan"]["planner"], told["plan"]["outcome"]) == (MODEL, MODEL, "planned")


async def test_another_model_is_planned_for_anew(scripted: ScriptedBackend) -> None:
    """Where the request goes along the chain, the plan is made with the settings of the model that serves it."""
    async with ScriptedBackend() as other:
        tree = tree_of(scripted, model={**FLAT, "fallback": ["spare"]})
        tree["models"]["spare"] = {**tree_of(other, model={**FLAT, **CAP_40})["models"][MODEL]}
        async with live(tree, up=2) as running:
            scripted.default = refusal(500, "out of memory")
            other.queue(PLANS, thinks(5, 6))
            answer, texts, told = await outcome(running, {**ASK, **WISH})
    assert answer.json["model"] == "spare"
    assert texts[0]["reasoning"].startswith(FIRST)
    assert [step["step"] for step in told["degraded"]] == ["model"]
    assert (told["plan"]["planner"], told["plan"]["outcome"]) == ("spare", "planned")


def test_a_kept_decision_plans_as_a_fresh_one() -> None:
    """Whether a plan pays goes by the level that each text has, so it is never another text's."""
    plan: Json = {"default": "auto", "level_tokens": {3: 100, 5: 9000}}
    thinking: Json = {"default_tokens": 9000, "max_tokens": 9000, "enforce": "two_phase"}
    config = config_of({"plan": plan, "thinking": thinking})

    def decisions() -> Decisions:
        judge = Judge(config.routing, Statistics(priors_of(config.routing.priors)), load_scorer("builtin"))
        return Decisions(config, models_of(config, FOUND), judge)

    kept, ada, seen = decisions(), key(), set()
    for text in ["Solve x^2 = 4.", WORK, "Solve x^2 = 4.", WORK * 9, CHAT, BETWEEN]:
        known, fresh = decided(kept, text, by=ada), decided(decisions(), text, by=ada)
        assert (known.planning is None) == (fresh.planning is None)
        if known.planning is not None and fresh.planning is not None:
            assert known.planning.refused == fresh.planning.refused
            seen.add(known.planning.refused)
        assert (known.aside, known.ceiling) == (fresh.aside, fresh.ceiling)
    assert len(seen) > 1


def test_a_planner_that_stands_for_several_models_is_said_at_the_start() -> None:
    """A name with `targets` cannot be asked for plans."""
    config = config_of({"planner": "any"}, models={"any": {"targets": [{"model": "qwen"}]}})
    assert config.not_built_yet() == ["models.qwen.planner (any stands for several models)"]
