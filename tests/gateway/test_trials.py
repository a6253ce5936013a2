"""What only the answer asks for is checked by the backend before any thinking is spent on it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gateway.slots import MOST_TRIED, Tried
from tests.gateway.live import ASK, STREAM, Json, ask, live, tree_of
from tests.scripted_backend import ScriptedBackend, is_trial
from tests.scripted_script import Exchange, Reply, Script, refusal
from tests.scripted_stream import Say, event, tokens

pytestmark = pytest.mark.anyio
TWO_PHASE: Json = {"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}}
SCHEMA: Json = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
THINKS = Script(say=[Say(thinking=tokens("hm let me see"), answer=tokens("{}"))])
CAPPED: Json = {**ASK, "thinkgate": {"mode": "reasoning", "thinking_tokens": 8}}


def rejecting_late(exchange: Exchange) -> Script | Reply:
    """One that finds out when its stream has begun, as vLLM does with grammars."""
    error = {"message": "no such grammar", "type": "BadRequestError", "param": None, "code": 400}
    asks = {"response_format", "structured_outputs"} & exchange.json.keys()
    return replace(THINKS, replace={0: event({"error": error})}) if asks else THINKS


def rejecting(exchange: Exchange) -> Script | Reply:
    """A backend that knows no such grammar."""
    asks = {"response_format", "structured_outputs"} & exchange.json.keys()
    return refusal(400, "no such grammar") if asks else THINKS


@pytest.mark.parametrize("refuses", [rejecting, rejecting_late])
@pytest.mark.parametrize("body", [CAPPED, {**CAPPED, "stream": True}])
async def test_a_schema_the_backend_refuses_costs_no_thinking(
    scripted: ScriptedBackend, body: Json, refuses: Any
) -> None:
    """The refusal is the answer, with its own status and nothing charged, also of a stream."""
    async with live(tree_of(scripted, model=TWO_PHASE)) as gateway:
        scripted.forget()
        scripted.default = refuses
        answer = await ask(gateway, {**body, "response_format": SCHEMA})
        assert (answer.status, answer.error["message"]) == (400, "no such grammar")
        await gateway.idle()
        (line,) = gateway.request_lines()
    assert sum(line.get("tokens", {}).values()) == 0
    assert all(is_trial(call.json) for call in scripted.calls if "prompt" in call.json)


@pytest.mark.parametrize("more", [{"response_format": SCHEMA}, {"stop_token_ids": [7]}])
async def test_a_demand_is_tried_once(scripted: ScriptedBackend, more: Json) -> None:
    """The first request with a demand pays two tokens for the trial, the next with the same one none."""
    async with live(tree_of(scripted, model=TWO_PHASE)) as gateway:
        probes = []
        for _ in range(2):
            scripted.queue(THINKS)
            answer = await ask(gateway, {**CAPPED, **more})
            counts = answer.json["thinkgate"]["tokens"]
            assert answer.json["thinkgate"]["settled"]["tokens"] == sum(counts.values())
            probes.append(counts["probe"])
            scripted.forget()
    assert probes == [2, 0]


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (CAPPED, TWO_PHASE),
        ({**CAPPED, "response_format": SCHEMA}, {}),
        ({**ASK, "thinkgate": {"mode": "instant"}, "response_format": SCHEMA}, TWO_PHASE),
    ],
)
async def test_nothing_is_tried_that_shows_by_itself(scripted: ScriptedBackend, body: Json, model: Json) -> None:
    """Without demands, under a native cap and without thinking, the first call already carries all of them."""
    async with live(tree_of(scripted, model=model)) as gateway:
        scripted.default = THINKS
        answer = await ask(gateway, body)
        assert answer.json["thinkgate"]["tokens"]["probe"] == 0
        assert not any(is_trial(call.json) for call in scripted.calls)


@pytest.mark.parametrize(("code", "status"), [(400, 400), (404, 404), (422, 422), (401, 502), (429, 502), (500, 502)])
async def test_an_error_event_has_the_status_of_its_code(scripted: ScriptedBackend, code: int, status: int) -> None:
    """A client's mistake that shows in the stream is a 4xx, also where nothing is tried; all else is a 502."""
    async with live(tree_of(scripted)) as gateway:
        scripted.default = replace(THINKS, replace={0: event({"error": {"message": "no", "code": code}})})
        answer = await ask(gateway, STREAM)
        assert answer.status == status
        assert "no" in answer.error["message"]


def test_the_oldest_demand_is_forgotten() -> None:
    """However many demands there are, only the last are remembered."""
    tried = Tried()
    for number in range(MOST_TRIED + 1):
        tried.add(b"%d" % number)
    assert not tried.has(b"0")
    assert tried.has(b"1")
    assert tried.has(b"%d" % MOST_TRIED)
