"""What a request may use is held to while it streams: caps, envelopes and holds, against backends that lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.gateway.live import ASK, INSTANT, STREAM, Answer, Client, Json, Live, ask, live, tree_of
from tests.gateway.test_streaming import text_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange, Gate, Reply, Script
from tests.scripted_stream import START_MARKER, Choice, Model, Say, tokens

RAMBLES = Say(thinking=tokens("on and on " * 100), answer=tokens("at last"))
TALKS = Say(thinking=tokens("hm"), answer=tokens("word " * 400))
THINKS = Say(thinking=tokens("let me see"), answer=tokens("it is 42"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Unlimited(Model):
    """A model that ignores every limit of tokens."""

    def generate(self, request: Json, index: int, say: Say, *, thinks: bool) -> Choice:
        """As the honest one, with a limit of its own."""
        return Model.generate(self, {**request, "max_tokens": 10000}, index, say, thinks=thinks)


def whole(answer: Answer) -> tuple[dict[int, Json], Json]:
    """The texts by choice and field, and the extension, of a stream or a whole answer."""
    if answer.headers["content-type"] == "application/json":
        body = answer.json
        return {c["index"]: c["message"] for c in body["choices"]}, body["thinkgate"]
    chunks = answer.chunks()
    indexes = {choice["index"] for chunk in chunks for choice in chunk["choices"]}
    fields = ("content", "reasoning")
    return {i: {f: text_of(chunks, f, i) for f in fields} for i in indexes}, chunks[-1]["thinkgate"]


def bounded(body: Json, **envelope: Any) -> Json:
    """A request with an envelope."""
    return {**body, "thinkgate": {**body.get("thinkgate", {}), "envelope": envelope}}


@pytest.mark.parametrize(("per_event", "per_write"), [(1, 1), (1, 16), (5, 1), (5, 100)])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_cap_holds_when_the_backend_ignores_it(
    gateway: Live, scripted: ScriptedBackend, body: Json, n: int, per_event: int, per_write: int
) -> None:
    """A backend that thinks on is cut at the cap: per choice no more is delivered, what came beyond is wasted."""
    script = Script(
        say=[RAMBLES], model=Model(honours_cap=False), tokens_per_event=per_event, events_per_write=per_write
    )
    scripted.queue(script)
    answer = await ask(gateway, {**body, "n": n, "thinkgate": {"thinking_tokens": 10}})
    texts, extension = whole(answer)
    await gateway.assert_settled()
    assert sorted(texts) == list(range(n))
    for message in texts.values():
        assert len((message.get("reasoning") or "").split()) <= 10
        assert not message["content"]
    assert extension["capped"]
    assert extension["ended_by"] == "cap"
    assert extension["cap"]["hit"]
    assert extension["cap"]["overrun_tokens"] > 0
    counted = extension["tokens"]
    delivered = sum(len((message.get("reasoning") or "").split()) for message in texts.values())
    assert counted["thinking"] == delivered
    assert counted["wasted"] >= extension["cap"]["overrun_tokens"]
    received = sum(len(choice.parts) for choice in scripted.calls[0].choices)
    assert counted["wasted"] + counted["thinking"] <= received
    assert extension["settled"]["thinking_tokens"] == delivered
    assert gateway.metric("thinkgate_cap_overruns_total", model="qwen", backend="a") == 1
    was_all_sent_at_once = per_event * per_write > received
    assert scripted.calls[0].closed.is_set() or was_all_sent_at_once


async def test_honest_cap_is_no_overrun(gateway: Live, scripted: ScriptedBackend) -> None:
    """A backend that holds the cap itself answers in full, and nothing counts as wasted or overrun."""
    scripted.queue(Script(say=[RAMBLES]))
    texts, extension = whole(await ask(gateway, {**STREAM, "thinkgate": {"thinking_tokens": 10}}))
    assert texts[0]["content"] == "at last"
    assert len(texts[0]["reasoning"].split()) <= 10
    assert (extension["capped"], extension["tokens"]["wasted"]) == (True, 0)
    assert "ended_by" not in extension
    assert gateway.metric("thinkgate_cap_overruns_total", model="qwen", backend="a") == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_thinking_in_instant_mode_reaches_no_client(
    gateway: Live, scripted: ScriptedBackend, stream: bool
) -> None:
    """A backend that thinks although it was switched off: no thought is delivered, and all of it is wasted."""
    scripted.queue(Script(say=[THINKS], thinks=True, model=Model(start_marker=START_MARKER, honours_cap=False)))
    texts, extension = whole(await ask(gateway, {**INSTANT, "stream": stream}))
    assert not texts[0].get("reasoning")
    assert extension["tokens"]["thinking"] == 0
    assert extension["tokens"]["wasted"] > 0
    await gateway.assert_settled()


@pytest.mark.parametrize("body", [STREAM, ASK, {**INSTANT, "stream": True}, INSTANT])
@pytest.mark.parametrize("envelope", [{"tokens": 60}, {"usd": 0.00012}])
async def test_envelope_ends_the_answer(gateway: Live, scripted: ScriptedBackend, body: Json, envelope: Json) -> None:
    """Tokens or dollars of the envelope that are used up end the call: what came is delivered, and says why."""
    scripted.queue(Script(say=[TALKS]))
    texts, extension = whole(await ask(gateway, {**bounded(body, **envelope), "max_tokens": 300}))
    await gateway.assert_settled()
    assert extension["ended_by"] == f"envelope.{next(iter(envelope))}"
    assert 0 < len(texts[0]["content"].split()) < 70
    assert extension["settled"]["tokens"] <= 66
    assert extension["cost_usd"] < 0.00013
    assert scripted.calls[0].closed.is_set()


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_envelope_below_the_prompt_gives_an_empty_answer(gateway: Live, body: Json) -> None:
    """An envelope that the prompt alone uses up ends before the first token, and the prompt is charged."""
    texts, extension = whole(await ask(gateway, bounded(body, tokens=2)))
    assert extension["ended_by"] == "envelope.tokens"
    assert [message["content"] or "" for message in texts.values()] == [""]
    assert extension["tokens"]["prompt"] > 2


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_seconds_end_an_answer_in_the_middle(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """When the envelope's seconds are over, what has come is the answer, `length` its finish, the upstream closed."""
    gate = Gate()
    scripted.queue(Script(say=[TALKS], gates={8: gate}))
    async with Client(gateway.port) as client:
        client.send(bounded(body, seconds=0.2))
        await gate.wait()
        answer = await client.answer()
    texts, extension = whole(answer)
    assert extension["ended_by"] == "envelope.seconds"
    assert texts[0]["content"]
    if body is STREAM:
        assert answer.chunks()[-1]["choices"][0]["finish_reason"] == "length"
        assert answer.payloads()[-1] == "[DONE]"
    await scripted.calls[0].wait_closed()
    await gateway.assert_settled()
    assert extension["settled"]["tokens"] > 0


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_seconds_without_a_token_are_a_timeout(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """An envelope whose seconds pass before anything came is a 504, and the upstream is closed."""
    scripted.queue(Script(say=[THINKS], gates={-1: Gate()}))
    answer = await ask(gateway, bounded(body, seconds=0.1))
    assert (answer.status, answer.error["type"], answer.error["code"]) == (504, "timeout", "deadline_passed")
    await scripted.calls[0].wait_closed()
    await gateway.assert_settled()


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_no_request_lasts_longer_than_the_servers_limit(scripted: ScriptedBackend, body: Json) -> None:
    """server.timeouts.total_s ends a request that has no envelope: with what came, or with a 504."""
    async with live(tree_of(scripted, server={"timeouts": {"total_s": 0.2}})) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[TALKS], gates={-1 if body is INSTANT else 8: Gate()}))
        answer = await ask(gateway, body)
        if body is INSTANT:
            assert (answer.status, answer.error["code"]) == (504, "deadline_passed")
        else:
            assert whole(answer)[1]["ended_by"] == "timeout"
        await scripted.calls[0].wait_closed()


@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_backend_that_ignores_the_limit_is_cut(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """Output beyond what was held ends the call, so that a lying backend cannot spend what nobody reserved."""
    scripted.queue(Script(say=[TALKS], model=Unlimited()))
    answer = await ask(gateway, {**body, "max_tokens": 40})
    texts, extension = whole(answer)
    assert extension["ended_by"] == "hold"
    assert len(texts[0]["content"].split()) <= 42
    assert extension["settled"]["tokens"] <= extension["hold"]["tokens"]
    assert scripted.calls[0].closed.is_set()


async def test_overrun_is_booked_and_burdens_the_next(scripted: ScriptedBackend) -> None:
    """What a lying backend used beyond its hold is settled all the same, and leaves less for later requests."""

    def lies(exchange: Exchange) -> Script | Reply:
        return Script(say=[TALKS], model=Unlimited())

    limit = {"scope": "model:qwen", "unit": "tokens", "amount": 1500, "window": "day"}
    async with live(tree_of(scripted, limits=[limit])) as gateway:
        scripted.default = lies
        first = await ask(gateway, {**INSTANT, "max_tokens": 10})
        used = first.json["thinkgate"]
        assert used["settled"]["tokens"] > used["hold"]["tokens"]
        second = await ask(gateway, {**INSTANT, "max_tokens": 10})
        assert int(second.headers["x-ratelimit-remaining-tokens"]) <= 1500 - used["settled"]["tokens"]
        third = await ask(gateway, {**INSTANT, "max_tokens": 1000})
        assert (third.status, third.error["code"]) == (429, "budget_exceeded")
