"""One public name over several models: which is taken, what is told of it, and who may use it."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.schema import Config
from gateway.errors import InvalidRequest, PermissionDenied
from gateway.judge import Judge, load_scorer, priors_of
from gateway.models import Model
from gateway.prepare import Prepared
from gateway.shapes import Decisions
from router.utility import Arm, Statistics, TargetArm, best, best_target
from tests.gateway.live import ASK, COMPLETIONS, EMBEDDINGS, MODEL, STREAM, Json, ask, key_headers, live, tree_of
from tests.gateway.still import HOLDS_CAPS, config_of, key, models_of
from tests.gateway.test_bounds import whole
from tests.gateway.test_judge import CHAT, WORK, decided
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import refusal

DEAR, CHEAP = {"prompt": 10, "answer": 100}, {"prompt": 0.1, "answer": 1}


def smart(**routing: Any) -> tuple[Decisions, Statistics, dict[str, Model]]:
    """Decisions over `smart`, which stands for `qwen`, dear, and `small`, a hundred times cheaper."""
    small = {"backends": [{"id": "b", "url": "http://127.0.0.1:2"}], "price_usd_per_mtok": CHEAP}
    several = {"targets": [{"model": "qwen"}, {"model": "small"}]}
    config = config_of({"price_usd_per_mtok": DEAR}, models={"small": small, "smart": several}, routing=routing)
    models = models_of(config, HOLDS_CAPS)
    statistics = Statistics(priors_of(config.routing.priors))
    return Decisions(config, models, Judge(config.routing, statistics, load_scorer("builtin"))), statistics, models


def asked(decisions: Decisions, text: str = WORK, **more: Any) -> Prepared:
    """What a chat with `smart` becomes."""
    return decided(decisions, text, model="smart", **more)


def learn(statistics: Statistics, model: str, score: float) -> None:
    """Many scores of a model, whatever the mode and difficulty."""
    for mode in ("instant", "reasoning"):
        for level in range(1, 6):
            for _ in range(200):
                statistics.of(model, mode, level).saw_score(score)


def test_without_money_the_better_model_is_taken_and_of_equals_the_cheaper() -> None:
    """The prior is the same for both, so price decides; what was seen of them decides later."""
    decisions, statistics, _ = smart()
    first = asked(decisions)
    assert (first.model.name, first.decision.mode) == ("small", "reasoning")
    learn(statistics, "small", 0.2)
    learn(statistics, "qwen", 0.9)
    later = asked(decisions)
    assert (later.model.name, later.call.model) == ("qwen", "up/qwen")
    assert later.target is not None
    assert (later.target.name, later.target.model) == ("smart", "qwen")
    assert {arm.model for arm in later.target.arms} == {"qwen", "small"}


@pytest.mark.parametrize(("lambda_per_usd", "model"), [(0.001, "qwen"), (1000.0, "small")])
def test_a_key_that_weighs_money_gets_the_model_worth_its_price(lambda_per_usd: float, model: str) -> None:
    """Quality less what it costs: the dear model is better, and not worth it to everybody; its mode goes with it."""
    decisions, statistics, _ = smart()
    learn(statistics, "qwen", 0.99)
    learn(statistics, "small", 0.6)
    found = asked(decisions, by=key(lambda_per_usd=lambda_per_usd))
    assert found.model.name == model
    assert found.target is not None
    assert len(found.target.arms) == 4
    chosen = max(found.target.arms, key=lambda arm: arm.utility)
    assert (chosen.model, chosen.mode) == (model, found.decision.mode)


def test_a_quality_floor_comes_before_the_price() -> None:
    """However dear a dollar is, a model that is not good enough is not taken for its price."""
    decisions, statistics, _ = smart()
    learn(statistics, "qwen", 0.95)
    learn(statistics, "small", 0.5)
    assert asked(decisions, by=key(lambda_per_usd=1000.0)).model.name == "small"
    assert asked(decisions, by=key(lambda_per_usd=1000.0, quality_floor=0.9)).model.name == "qwen"


def test_load_is_part_of_the_price() -> None:
    """Calls in flight make a model dearer, also for a request that was decided before."""
    decisions, statistics, models = smart(busy_at=1)
    learn(statistics, "small", 0.8)
    learn(statistics, "qwen", 0.95)
    by = key(lambda_per_usd=0.5)
    before = asked(decisions, by=by)
    assert before.model.name == "qwen"
    models["qwen"].slots[0].in_flight = 100
    assert asked(decisions, by=by).model.name == "small"


@pytest.mark.parametrize(("text", "mode"), [(CHAT, "instant"), (WORK, "reasoning")])
def test_the_mode_is_what_it_would_be(text: str, mode: str) -> None:
    """A key that weighs no money has its mode by the text, and one that is named is kept."""
    decisions, _, _ = smart()
    assert asked(decisions, text).decision.mode == mode
    found = decided(decisions, text, model="smart:reasoning")
    assert (found.decision.mode, found.target is not None) == ("reasoning", True)


def test_a_model_that_is_down_is_passed_over() -> None:
    """As long as another one is up."""
    decisions, _, models = smart()
    models["small"].slots[0].capabilities = None
    found = asked(decisions)
    assert found.target is not None
    assert (found.model.name, found.target.reason) == ("qwen", "the only one that is up")
    models["qwen"].slots[0].capabilities = None
    assert asked(decisions).model.name == "small"


def test_who_may_use_the_name_may_use_what_it_stands_for() -> None:
    """And nobody else; a key without any mode is refused, whatever the models."""
    decisions, _, _ = smart()
    assert asked(decisions, by=key(models=frozenset({"smart"}))).model.name == "small"
    with pytest.raises(PermissionDenied):
        asked(decisions, by=key(models=frozenset({"qwen", "small"})))
    with pytest.raises(PermissionDenied):
        asked(decisions, by=key(modes=frozenset({"agentic"})))
    assert asked(decisions, by=key(modes=frozenset({"instant"}))).decision.mode == "instant"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=6), st.floats(0, 1))
def test_the_best_target_has_the_best_arm(arms: list[tuple[float, float]], floor: float) -> None:
    """Over models the same rule holds as over modes."""
    weighed = [
        TargetArm(str(i), Arm("instant", quality, cost, quality - cost)) for i, (quality, cost) in enumerate(arms)
    ]
    assert best_target(weighed, floor).arm == best([one.arm for one in weighed], floor)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"targets": [{"model": "nobody"}]}, "'nobody' is no model with `backends` \\(qwen\\)"),
        ({"targets": [{"model": "smart"}]}, "'smart' is no model with `backends`"),
        ({"targets": [{"model": "qwen"}], "max_n": 3}, "has `targets`, so `max_n` belongs to the models"),
        ({}, "needs at least one entry in `backends`, or in `targets`"),
    ],
)
def test_a_name_for_nothing_stops_the_start(entry: Json, says: str) -> None:
    """Targets are models with backends, and have all settings."""
    with pytest.raises(ValueError, match=says):
        config_of(models={"smart": entry})


def test_a_limit_in_dollars_needs_the_prices_of_what_a_name_stands_for() -> None:
    """The name itself has none."""
    limits = [{"scope": "model:smart", "unit": "usd", "amount": 1, "window": "day"}]
    several = {"targets": [{"model": "qwen"}]}
    with pytest.raises(ValueError, match=r"models\.qwen\.price_usd_per_mtok"):
        config_of(models={"smart": several}, limits=limits)
    assert isinstance(config_of({"price_usd_per_mtok": DEAR}, models={"smart": several}, limits=limits), Config)


def tree(*backends: ScriptedBackend, **more: Any) -> Json:
    """`smart` over two models with a backend each."""
    dear, cheap = backends
    found = tree_of(dear, **more)
    found["models"]["small"] = {**tree_of(cheap)["models"][MODEL], "price_usd_per_mtok": {"prompt": 0.1, "answer": 0.2}}
    found["models"]["smart"] = {"targets": [{"model": MODEL}, {"model": "small"}]}
    return found


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_the_answer_names_the_model_and_both_names_are_charged(scripted: ScriptedBackend, body: Json) -> None:
    """Response, log and `/v1/route` say which it came to and why; a limit on the public name counts."""
    limit = {"scope": "model:smart", "unit": "requests", "amount": 2, "window": "day"}
    async with ScriptedBackend() as other, live(tree(scripted, other, limits=[limit])) as running:
        smartly = {**body, "model": "smart"}
        planned = (await ask(running, smartly, "/v1/route")).json
        answer = await ask(running, smartly)
        told = whole(answer)[1]
        assert (answer.chunks()[0] if body is STREAM else answer.json)["model"] == "small"
        assert told["target"] == planned["target"]
        assert (told["target"]["name"], told["target"]["model"], planned["model"]) == ("smart", "small", "small")
        assert (await ask(running, {"model": "smart", "prompt": "hi"}, COMPLETIONS)).json["model"] == "small"
        assert (await ask(running, smartly)).status == 429
        assert [line.get("target", {}).get("model") for line in running.request_lines()] == ["small"] * 4


async def test_a_target_that_fails_leads_along_its_own_chain(scripted: ScriptedBackend) -> None:
    """It is an ordinary model: its fallback, for those who may use that."""
    async with ScriptedBackend() as other:
        config = tree(scripted, other)
        config["models"]["small"]["fallback"] = [MODEL]
        async with live(config) as running:
            other.default = refusal(500, "out of memory")
            answer = await ask(running, {**ASK, "model": "smart"})
            assert (answer.status, answer.json["model"]) == (200, MODEL)
            assert [step["step"] for step in answer.json["thinkgate"]["degraded"]] == ["model"]


async def test_the_list_of_models_has_the_name(scripted: ScriptedBackend) -> None:
    """For keys that may use it, with the smallest window behind it; embeddings have to name one model."""
    keys = [{"id": "ada", "secret_sha256": hashlib.sha256(b"s").hexdigest(), "models": ["smart"]}]
    async with ScriptedBackend() as other, live(tree(scripted, other, keys=keys)) as running:
        headers = key_headers("s")
        listed = (await ask(running, b"", "/v1/models", method="GET", headers=headers)).json["data"]
        assert [(entry["id"], entry["max_model_len"]) for entry in listed] == [("smart", 4096)]
        assert (await ask(running, b"", "/v1/models/smart", method="GET", headers=headers)).json["id"] == "smart"
        assert (await ask(running, {**ASK, "model": "smart"}, headers=headers)).status == 200
        assert (await ask(running, {**ASK, "model": MODEL}, headers=headers)).status == 403
        refused = await ask(running, {"model": "smart", "input": "x"}, EMBEDDINGS, headers=headers)
        assert (refused.status, refused.error["param"]) == (InvalidRequest.status, "model")
