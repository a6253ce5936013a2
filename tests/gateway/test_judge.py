"""Asking the text: where it is found, when the scorer is missing, and that cached decisions still ask it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ask.request import Message, Part
from gateway.judge import BUILTIN, Judge, load_scorer, priors_of, text_of
from gateway.prepare import Prepared
from gateway.shapes import Decisions
from router.utility import Statistics
from tests.gateway.still import HOLDS_CAPS, Json, config_of, key, models_of

CHAT, WORK = "hello there, how are you?", "Prove that for all positive integers n the number n^2 + n is even."
BETWEEN = "How many squares are on the board?"


def judge_of(routing: Json | None = None, random: Random | None = None, **seen: Any) -> tuple[Decisions, Judge]:
    """Decisions with the scorer of the repository."""
    config = config_of(seen.pop("model", None), routing=routing or {})
    models = models_of(config, HOLDS_CAPS)
    statistics = Statistics(priors_of(config.routing.priors))
    judge = Judge(config.routing, statistics, load_scorer("builtin"), random)
    return Decisions(config, models, judge), judge


def decided(decisions: Decisions, text: str, *, by: Any = None, **fields: Any) -> Prepared:
    """What a chat with this text becomes."""
    body = {"model": "qwen", "messages": [{"role": "user", "content": text}], **fields}
    return decisions.prepare(json.dumps(body).encode(), "chat", by or key(), request_id="req-1", trace=())


def test_the_text_is_the_last_thing_the_user_said() -> None:
    """Answers, tool results and earlier turns are not it; parts of one message belong together."""
    told = [
        Message(role="user", content="first"),
        Message(
            role="user",
            content=[Part(type="text", text="see"), Part(type="image_url"), Part(type="text", text="this")],
        ),
        Message(role="assistant", content="yes"),
        Message(role="tool", content="42"),
    ]  # fmt: skip
    assert text_of(told) == "see\nthis"
    assert text_of(told[:1]) == "first"
    assert text_of([Message(role="system", content="be kind")]) == text_of([Message(role="user")]) == ""


def test_chat_is_instant_and_work_reasons() -> None:
    """A request that names no mode is decided by its text, and the decision says by what."""
    decisions, _ = judge_of()
    chat, work = decided(decisions, CHAT), decided(decisions, WORK)
    assert (chat.decision.mode, work.decision.mode) == ("instant", "reasoning")
    assert chat.decision.reason.startswith("the text: thinking pays with 0.")
    assert (chat.cap.tokens, work.cap.tokens) == (0, 500)
    assert chat.ceiling.thinking_tokens == 0


def test_a_named_mode_is_never_asked_about() -> None:
    """Neither a field nor an effort nor a suffix leaves anything to the text."""
    decisions, _ = judge_of()
    for fields in ({"reasoning_effort": "low"}, {"model": "qwen:reasoning"}, {"thinkgate": {"mode": "reasoning"}}):
        prepared = decided(decisions, CHAT, **fields)
        assert (prepared.decision.mode, prepared.decision.verdict) == ("reasoning", None)


def test_tools_of_the_client_change_nothing() -> None:
    """Tools and their results leave the decision to what the user said."""
    decisions, _ = judge_of()
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    assert decided(decisions, CHAT, tools=tools).decision.mode == "instant"
    assert decided(decisions, WORK, tools=tools).decision.mode == "reasoning"


def test_an_uncertain_text_thinks_a_little() -> None:
    """Inside the band the cap is the small one, and the response says why."""
    decisions, _ = judge_of({"uncertain_thinking_tokens": 64})
    prepared = decided(decisions, BETWEEN)
    assert (prepared.decision.mode, prepared.cap.tokens) == ("reasoning", 64)
    assert (prepared.cap.clamped_from, prepared.cap.clamped_by) == (500, "routing.uncertain_thinking_tokens")
    assert prepared.call.thinking.cap == 64
    assert prepared.ceiling.thinking_tokens == 64


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([CHAT, WORK, BETWEEN, "", "x" * 20_000]) | st.text(max_size=60), max_size=8))
def test_remembered_decisions_are_those_of_fresh_ones(told: list[str]) -> None:
    """However requests of one shape follow each other, each is decided by its own text."""
    decisions, _ = judge_of()
    ada = key()  # the same one: what was decided for another is not remembered
    for text in told:
        known, fresh = decided(decisions, text, by=ada), decided(judge_of()[0], text, by=ada)
        assert known.decision == fresh.decision
        assert (known.cap, known.ceiling) == (fresh.cap, fresh.ceiling)
        assert known.call.thinking == fresh.call.thinking
        assert {n: bytes(v) for n, v in known.call.fields.items()} == {
            n: bytes(v) for n, v in fresh.call.fields.items()
        }
    assert len(decisions) <= 1


def test_no_room_is_told_also_when_remembered() -> None:
    """Where ending the thinking leaves no room for any, a text that asks for it is instant, and the reason says so."""
    decisions, _ = judge_of()
    first, second = (decided(decisions, WORK, max_tokens=51) for _ in range(2))
    assert first.decision == second.decision
    assert (first.decision.mode, first.cap.tokens) == (second.decision.mode, second.cap.tokens)


def test_a_missing_or_wrong_artefact_leaves_structure_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The start goes on with a warning that names the file, and `none` goes on without one."""
    damaged = tmp_path / "scorer.json"
    damaged.write_bytes(BUILTIN.read_bytes().replace(b'"low": 0.55', b'"low": 0.05'))
    with caplog.at_level(logging.WARNING, logger="thinkgate.judge"):
        assert load_scorer("none") is None
        assert caplog.records == []
        assert load_scorer(str(damaged)) is None
        assert load_scorer(str(tmp_path / "none.json")) is None
    assert [str(tmp_path) in vars(record)["reason"] for record in caplog.records] == [True, True]
    config = config_of()
    judge = Judge(config.routing, Statistics(priors_of(config.routing.priors)), None)
    prepared = decided(Decisions(config, models_of(config), judge), CHAT)
    assert prepared.decision[:3] == ("reasoning", "nothing in the request decides it: routing.on_uncertain", None)


def test_a_key_that_weighs_money_changes_its_mind_with_the_load() -> None:
    """The same request is reasoned about on idle backends, and answered at once on busy ones."""
    model = {"price_usd_per_mtok": {"prompt": 1, "answer": 10}}
    decisions, _ = judge_of(model=model)
    models: Any = decisions._models
    thrifty = key(lambda_per_usd=5.0)
    assert decided(decisions, WORK, by=thrifty).decision.mode == "reasoning"
    models["qwen"].slots[0].in_flight = 200
    busy = decided(decisions, WORK, by=thrifty)
    assert busy.decision.mode == "instant"
    assert busy.decision.verdict is not None
    assert busy.decision.verdict.by == "utility"
    assert decided(decisions, WORK, by=key(lambda_per_usd=5.0, quality_floor=0.99)).decision.mode == "reasoning"


def test_exploring_draws_inside_the_band_only() -> None:
    """With `routing.explore` an uncertain text gets both modes over time; a certain one always the same."""
    decisions, _ = judge_of({"explore": True}, Random(1))
    modes = {decided(decisions, BETWEEN).decision.mode for _ in range(60)}
    assert modes == {"instant", "reasoning"}
    assert {decided(decisions, CHAT).decision.mode for _ in range(20)} == {"instant"}
