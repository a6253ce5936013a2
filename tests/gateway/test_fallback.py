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


ADA = {"id": "ada", "secret_sha256": hashlib.sha256(b"sk-ada").hexdigest()}
AS_ADA = {"authorization": "Bearer sk-ada"}


async def test_a_fallback_that_limits_refuse_leaves_the_failure_as_the_answer(scripted: ScriptedBackend) -> None:
    """Who was let in hears why its model could not serve, not that another one would have been one request too many."""
    limits = [{"scope": "key:ada", "unit": "requests", "amount": 1, "window": "minute"}]
    async with ScriptedBackend() as other, live(chain_of(scripted, other, keys=[ADA], limits=limits)) as gateway:
        scripted.default = BROKEN
        answer = await ask(gateway, INSTANT, headers=AS_ADA)
        assert (answer.status, answer.error["type"]) == (502, "upstream_error")
        assert (await ask(gateway, INSTANT, headers=AS_ADA)).status == 429
        await gateway.assert_settled()


async def test_what_was_used_before_a_fallback_is_told(scripted: ScriptedBackend) -> None:
    """Log and metrics have every token and nano-USD that both models were settled for, each under its own name."""
    limits = [{"scope": "key:ada", "unit": "usd", "amount": 1000, "window": "day"}]
    async with ScriptedBackend() as other, live(chain_of(scripted, other, keys=[ADA], limits=limits)) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("a b c d e f g h"), answer=tokens("x"))], dies_after=6))
        answer = await ask(gateway, ASK, headers=AS_ADA)
        assert (answer.status, answer.json["model"]) == (200, "small")
        await gateway.assert_settled()
        (line,) = gateway.request_lines()
        (account,) = gateway.gateway.ledger.accounts(["key:ada"])  # type: ignore[attr-defined]  # in memory
        assert line["cost_nano_usd"] == sum(page.settled for page in account.books.values())
        assert line["cost_nano_usd"] > answer.json["thinkgate"]["settled"]["nano_usd"]
        assert gateway.metric("thinkgate_tokens_total", model=MODEL, mode="reasoning", kind="thinking") > 0
