"""The ladder's last step, a cheaper model, and the ladder while all backends are full."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget.degrade import STEPS, Step, step_under_load
from gateway.degrade import Request, relieved
from gateway.models import Model
from gateway.prepare import Prepared, prepare
from gateway.slots import Slot
from tests.gateway.live import ASK, INSTANT, MODEL, STREAM, Json, Live, live, tree_of
from tests.gateway.still import CHAT, config_of, key, models_of
from tests.gateway.test_bounds import whole
from tests.gateway.test_degrade import asked, tree
from tests.gateway.test_degrade_hold import DOES_ALL
from tests.scripted_backend import ScriptedBackend

DEAR, CHEAP = {"prompt": 10, "answer": 20}, {"prompt": 0.1, "answer": 0.2}


def two_models(dear: ScriptedBackend, cheap: ScriptedBackend, left: float, **how: Any) -> Json:
    """`qwen` at a price and `small` at a hundredth of it, for a key that may go down to it."""
    price = how.pop("price", CHEAP)
    found: Json = tree(dear, left, unit=how.pop("unit", "usd"), degrade=how.pop("degrade", list(STEPS)), **how)  # type: ignore[arg-type]  # dollars
    found["models"][MODEL] |= {"fallback": ["nobody", "small"], "price_usd_per_mtok": DEAR}
    found["models"]["small"] = {**tree_of(cheap)["models"][MODEL], "price_usd_per_mtok": price}
    return found


@pytest.mark.parametrize("body", [ASK, STREAM, INSTANT])
async def test_money_that_is_short_leads_to_a_cheaper_model(scripted: ScriptedBackend, body: Json) -> None:
    """It is held and charged at its own price, thinks as the request asked for, and the answer names it."""
    async with ScriptedBackend() as other, live(two_models(scripted, other, 0.001)) as running:
        scripted.forget()
        answer = await asked(running, body)
        _, told = whole(answer)
        assert (answer.status, answer.headers["x-thinkgate-degraded"]) == (200, "model")
        step = {"step": "model", "from": MODEL, "to": "small", "scope": "key:ada", "unit": "usd"}
        assert told["degraded"] == [step]
        assert told["hold"]["nano_usd"] <= 1_000_000
        assert told["settled"]["nano_usd"] > 0
        assert told["mode"] == ("instant" if body is INSTANT else "reasoning")
        assert scripted.calls == []
        (line,) = running.request_lines()
        assert (line["model"], line["degraded"]) == ("small", [step])
        assert running.metric("thinkgate_degraded_total", step="model", model="small") == 1


async def test_on_the_cheaper_model_the_ladder_goes_on(scripted: ScriptedBackend) -> None:
    """Where even there money is short, it thinks less there."""
    async with ScriptedBackend() as other:
        async with live(two_models(scripted, other, 0.001)) as running:
            hold = whole(await asked(running, ASK))[1]["hold"]["nano_usd"]
        async with live(two_models(scripted, other, (hold - 2000) / 1e9)) as running:
            _, told = whole(await asked(running, ASK))
        assert [step["step"] for step in told["degraded"]] == ["model", "cap"]
        assert (told["cap"]["tokens"] < 32, told["cap"]["clamped_from"]) == (True, 32)
        assert told["hold"]["nano_usd"] <= hold - 2000


async def test_what_is_left_of_one_model_leads_to_another(scripted: ScriptedBackend) -> None:
    """A limit of the model itself, of whatever unit, does not bind the other one."""
    async with ScriptedBackend() as other:
        config = two_models(scripted, other, 0.001)
        config["limits"] = [{"scope": f"model:{MODEL}", "unit": "requests", "amount": 1, "window": "day"}]
        async with live(config) as running:
            assert whole(await asked(running, ASK))[1].get("degraded") is None
            _, told = whole(await asked(running, ASK))
            assert [(d["step"], d["scope"], d["unit"]) for d in told["degraded"]] == [
                ("model", f"model:{MODEL}", "requests")
            ]


@pytest.mark.parametrize(
    ("how", "status"),
    [
        ({"degrade": ["cap", "effort", "instant"]}, 429),  # a step that is not allowed
        ({"price": {"prompt": 11, "answer": 21}}, 429),  # a model that costs more
        ({"models": [MODEL]}, 429),  # one that the key may not use
        ({"unit": "requests"}, 429),  # a unit of which a cheaper model takes as much
        ({}, 200),
    ],
)
async def test_not_every_model_is_a_way_down(scripted: ScriptedBackend, how: Json, status: int) -> None:
    """It has to be allowed, cheaper, and of use."""
    left = 1 if how.get("unit") == "requests" else 0.0005
    async with ScriptedBackend() as other, live(two_models(scripted, other, left, **how)) as running:
        if how.get("unit") == "requests":
            await asked(running, ASK)
        assert (await asked(running, ASK)).status == status


def full(model: Model, kv_use: float = 1.0) -> Slot:
    """A model whose only backend says that it is full, with so much of its memory in use."""
    (slot,) = model.slots
    slot.standing.limit, slot.in_flight, slot.standing.kv_use = 1, 1, kv_use
    return slot


def under_load(kv_use: float, steps: tuple[Step, ...] = STEPS, **fields: Any) -> tuple[Prepared, Prepared]:
    """A request before and after the load was looked at, with a cheaper model that has room."""
    entry = {"upstream_model": "up/small", "backends": [{"id": "b", "url": "http://127.0.0.1:2"}]}
    config = config_of({"fallback": ["small"]}, models={"small": entry})
    models = models_of(config, DOES_ALL)
    full(models["qwen"], kv_use)
    body, ada = json.dumps({**CHAT, **fields}).encode(), key(degrade=steps)
    before = prepare(body, "chat", ada, models, config, request_id="req-1", trace=())
    return before, relieved(Request(body, "chat", ada, models, config), before)


@pytest.mark.parametrize(
    ("kv_use", "step"),
    [(0.9, None), (0.93, "cap"), (0.95, "effort"), (0.97, "instant"), (0.99, "model"), (1.0, "model")],
)
def test_the_fuller_the_backends_the_further_down(kv_use: float, step: str | None) -> None:
    """From half on, in equal parts, one step each; what is told names the load."""
    before, after = under_load(kv_use)
    if step is None:
        assert after is before
        return
    (told,) = after.degraded
    assert (told.step, told.scope, told.unit) == (step, "model:qwen", "load")
    assert after.ceiling.tokens <= before.ceiling.tokens or step == "model"
    if step == "cap":
        assert (after.cap.tokens, after.cap.clamped_from, after.cap.clamped_by) == (250, 500, "the load of qwen")
    assert after.model.name == ("small" if step == "model" else "qwen")
    assert (after.decision.mode == "instant") is (step == "instant")


def test_a_step_that_cannot_be_had_gives_way_to_the_next() -> None:
    """A request that insists on its thinking goes past instant mode, and one without a cheaper model back up."""
    _, after = under_load(0.97, thinkgate={"min_thinking_tokens": 20})
    assert [told.step for told in after.degraded] == ["model"]
    _, after = under_load(0.97, ("cap", "instant"), thinkgate={"min_thinking_tokens": 20})
    assert [told.step for told in after.degraded] == ["cap"]
    _, after = under_load(1.0, ("cap", "instant"))
    assert [told.step for told in after.degraded] == ["instant"]


@pytest.mark.parametrize("limit", [None, 2])
def test_nothing_is_taken_while_a_backend_has_room(limit: int | None) -> None:
    """Saturation is 0 there, however much memory is in use."""
    config = config_of()
    model = models_of(config)["qwen"]
    full(model).standing.limit = limit
    assert model.admission.saturation() == 0.0


@given(st.floats(0, 1), st.floats(0, 1), st.lists(st.sampled_from(STEPS), unique=True))
def test_more_load_never_asks_for_less(one: float, other: float, steps: list[Step]) -> None:
    """Steps follow one another as saturation grows; there is always one at full saturation, if any is allowed."""
    low, high = sorted((one, other))
    for begins_at in (0.0, 0.5, 1.0):
        least, most = (step_under_load(level, begins_at, steps) for level in (low, high))
        assert least is None or (most is not None and steps.index(least) <= steps.index(most))
        assert (step_under_load(1.0, begins_at, steps) is None) is (not steps)
        if steps:
            assert step_under_load(1.0, begins_at, steps) == steps[-1]


async def test_a_request_that_waits_for_a_full_backend_thinks_less(scripted: ScriptedBackend) -> None:
    """It takes its step before it waits, and is served when there is room; nobody is refused."""
    async with live(tree(scripted, 10**6, degrade=["cap"])) as running:
        slot = full(running.gateway.serving.models[MODEL])
        async with asyncio.TaskGroup() as tasks:
            waiting = tasks.create_task(asked(running, ASK))
            await _until_waiting(running)
            slot.standing.limit = None
            slot.in_flight -= 1
            slot.became_free()
        _, told = whole(waiting.result())
        assert [(d["step"], d["from"], d["to"], d["unit"]) for d in told["degraded"]] == [("cap", 200, 100, "load")]


async def _until_waiting(running: Live) -> None:
    async with asyncio.timeout(10):
        while not len(running.gateway.serving.models[MODEL].admission):
            await asyncio.sleep(0)
