"""Another model along the chain, before the first byte, for those who may use it."""

from __future__ import annotations

import hashlib

import pytest

from tests.gateway.live import ASK, INSTANT, MODEL, STREAM, Json, ask, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_model import Say
from tests.scripted_script import Script, refusal
from tests.scripted_tokens import tokens

BROKEN = refusal(500, "out of memory", "InternalServerError")
BODIES = [STREAM, ASK, INSTANT]


def chain_of(*backends: ScriptedBackend, **more: object) -> Json:
    """A tree in which `qwen` falls back to a model that nobody serves, then to `small`, each with one backend."""
    first, second = backends
    tree = tree_of(first, **more)
    small = tree_of(second)["models"][MODEL]
    tree["models"][MODEL]["fallback"] = ["nobody", "small"]
    tree["models"]["small"] = small
    return tree


@pytest.mark.parametrize("body", BODIES)
async def test_a_model_that_cannot_serve_is_replaced(scripted: ScriptedBackend, body: Json) -> None:
    """Its failure leads to the next model of the chain that exists, and the answer says so."""
    async with ScriptedBackend() as other, live(chain_of(scripted, other)) as gateway:
        scripted.default = BROKEN
        answer = await ask(gateway, body)
        assert (answer.status, answer.headers["x-thinkgate-degraded"]) == (200, "model")
        told = (answer.chunks() if body is STREAM else [answer.json])[-1]
        assert told["model"] == "small"
        assert told["thinkgate"]["degraded"] == [
            {"step": "model", "from": MODEL, "to": "small", "scope": f"model:{MODEL}", "unit": "upstream_error"}
        ]
        (line,) = gateway.request_lines()
        assert (line["model"], line["status"]) == ("small", 200)


@pytest.mark.parametrize("body", BODIES)
async def test_a_model_that_is_down_is_replaced(scripted: ScriptedBackend, body: Json) -> None:
    """With no backend up the chain is taken, too; at its end the first failure's kind is the answer."""
    async with ScriptedBackend() as other, live(chain_of(scripted, other)) as gateway:
        scripted.stop()
        assert (await ask(gateway, body)).status == 200
        other.stop()
        assert (await ask(gateway, body)).status == 503


async def test_nobody_falls_back_to_a_model_its_key_may_not_use(scripted: ScriptedBackend) -> None:
    """A key for one model gets that model's failure, not another model."""
    sha256 = hashlib.sha256(b"sk-ada").hexdigest()
    ada = {"id": "ada", "secret_sha256": sha256, "models": [MODEL]}
    async with ScriptedBackend() as other, live(chain_of(scripted, other, keys=[ada])) as gateway:
        other.forget()
        scripted.default = BROKEN
        assert (await ask(gateway, INSTANT, headers={"authorization": "Bearer sk-ada"})).status == 502
        assert other.calls == []


async def test_there_is_no_falling_back_after_the_first_byte(scripted: ScriptedBackend) -> None:
    """A stream that has begun ends with its own error."""
    async with ScriptedBackend() as other, live(chain_of(scripted, other)) as gateway:
        other.forget()
        scripted.queue(Script(say=[Say(answer=tokens("one two three four five six"))], dies_after=4))
        answer = await ask(gateway, {**STREAM, **INSTANT})
        assert "error" in answer.chunks()[-1]
        assert other.calls == []
