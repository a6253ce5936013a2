"""What a request may use is held to while it streams: caps, envelopes and holds, against backends that lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.gateway.live import ASK, INSTANT, STREAM, Answer, Client, Json, Live, ask, live, tree_of
from tests.gateway.test_streaming import text_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange, Gate, Reply, Script
from tests.scripted_stream import START_MARKER, Model, Say, tokens
from tests.scripted_tokens import Token, tool_call_tokens

RAMBLES = Say(thinking=tokens("on and on " * 100), answer=tokens("at last"))
TALKS = Say(thinking=tokens("hm"), answer=tokens("word " * 400))
LAX = Model(honours_cap=False)
WRAP_UP = "\n\nTime is up: I answer with what I have.\n"
THINKS = Say(thinking=tokens("let me see"), answer=tokens("it is 42"))


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


@pytest.mark.parametrize(("per_event", "per_write"), [(1, 1), (1, 16), (5, 1), (5, 4)])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_backend_that_ignores_the_cap_is_taken_over_from(
    gateway: Live, scripted: ScriptedBackend, body: Json, n: int, per_event: int, per_write: int
) -> None:
    """Thinking beyond the cap reaches nobody; the choice is wrapped up, answered, and the backend not trusted again."""
    script = Script(
        say=[RAMBLES], model=Model(honours_cap=False), tokens_per_event=per_event, events_per_write=per_write
    )
    scripted.queue(script)
    answer = await ask(gateway, {**body, "n": n, "thinkgate": {"thinking_tokens": 10}})
    texts, extension = whole(answer)
    await gateway.assert_settled()
    assert sorted(texts) == list(range(n))
    thoughts = [message["reasoning"].removesuffix(WRAP_UP) for message in texts.values()]
    for message, thought in zip(texts.values(), thoughts, strict=True):
        assert message["reasoning"].endswith(WRAP_UP)
        assert len(thought.split()) <= 10
        assert message["content"] == "at last"
    assert extension["capped"]
    assert "ended_by" not in extension
    assert (extension["cap"]["hit"], extension["cap"]["enforcement"]) == (True, "two_phase")
    assert extension["cap"]["overrun_tokens"] > 0
    counted = extension["tokens"]
    assert counted["thinking"] == sum(len(thought.split()) for thought in thoughts)
    assert counted["wasted"] >= extension["cap"]["overrun_tokens"]
    assert extension["settled"]["thinking_tokens"] == counted["thinking"]
    assert gateway.metric("thinkgate_cap_overruns_total", model="qwen", backend="a") == 1
    assert gateway.metric("thinkgate_backend_cap_binds", model="qwen", backend="a") == 0
    again = await ask(gateway, {**ASK, "thinkgate": {"thinking_tokens": 10}})
    assert (again.json["thinkgate"]["cap"]["enforcement"], again.json["thinkgate"]["tokens"]["wasted"]) == (
        "two_phase",
        0,
    )


async def test_a_slip_past_the_cap_is_no_lie(gateway: Live, scripted: ScriptedBackend) -> None:
    """A backend that closes the thinking a few tokens late keeps its stream; what was too much is dropped."""
    scripted.queue(Script(say=[Say(thinking=tokens("a b c d e f g h"), answer=tokens("so"))], model=LAX))
    texts, extension = whole(await ask(gateway, {**STREAM, "thinkgate": {"thinking_tokens": 5}}))
    assert texts[0] == {"reasoning": "a b c d e", "content": "so"}
    assert (extension["tokens"]["thinking"], extension["tokens"]["wasted"]) == (5, 3)
    assert (extension["cap"]["enforcement"], extension["cap"]["overrun_tokens"]) == ("native", 3)
    assert len(scripted.calls) == 1


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
    floor = {"thinkgate": {**body.get("thinkgate", {}), "answer_tokens_min": 4}} if "thinkgate" in body else {}
    texts, extension = whole(await ask(gateway, {**bounded({**body, **floor}, **envelope), "max_tokens": 300}))
    await gateway.assert_settled()
    assert extension["ended_by"] == f"envelope.{next(iter(envelope))}"
    assert 0 < len(texts[0]["content"].split()) < 70
    assert extension["settled"]["tokens"] <= 66
    assert extension["cost_usd"] < 0.00013


@pytest.mark.parametrize("body", [STREAM, ASK])
@pytest.mark.parametrize("envelope", [{"tokens": 80}, {"usd": 0.0002}])
async def test_envelope_ends_the_thinking_in_time_for_an_answer(
    gateway: Live, scripted: ScriptedBackend, body: Json, envelope: Json
) -> None:
    """Thinking stops while the answer's floor still fits: wrapped up, answered, and within the envelope."""
    scripted.queue(Script(say=[Say(thinking=tokens("on and on " * 100), answer=tokens("word " * 400))]))
    thinkgate = {"thinking_tokens": 200, "answer_tokens_min": 12, "envelope": envelope}
    texts, extension = whole(await ask(gateway, {**body, "thinkgate": thinkgate, "max_tokens": 900}))
    assert texts[0]["reasoning"].endswith(WRAP_UP)
    assert len(texts[0]["content"].split()) >= 12
    assert extension["cap"]["ended_by"] == ("total" if "tokens" in envelope else "usd")
    assert extension["settled"]["tokens"] <= envelope.get("tokens", 1000)
    assert extension["cost_usd"] <= envelope.get("usd", 1)


@pytest.mark.parametrize("envelope", [{"tokens": 2}, {"usd": 1e-9}])
@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT, {**INSTANT, "stream": True}, {**STREAM, "n": 3}])
async def test_envelope_below_the_prompt_is_refused(gateway: Live, body: Json, envelope: Json) -> None:
    """An envelope that the prompt alone uses up is a 400 that says how long the prompt is; nothing is charged."""
    answer = await ask(gateway, bounded(body, **envelope))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        400,
        "envelope_too_small",
        "thinkgate.envelope",
    )
    await gateway.assert_settled()


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_seconds_end_an_answer_in_the_middle(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """When the envelope's seconds are over, what has come is the answer, `length` its finish, the upstream closed."""
    gate = Gate()
    scripted.queue(held_in_answer(body, TALKS, 8, gate))
    async with Client(gateway.port) as client:
        client.send(bounded(body, seconds=0.5))
        await gate.wait()
        answer = await client.answer()
    texts, extension = whole(answer)
    assert extension["ended_by"] == "envelope.seconds"
    assert texts[0]["content"]
    if body is STREAM:
        assert answer.chunks()[-1]["choices"][0]["finish_reason"] == "length"
        assert answer.payloads()[-1] == "[DONE]"
    await scripted.calls[-1].wait_closed()
    await gateway.assert_settled()
    assert extension["settled"]["tokens"] > 0


@pytest.mark.parametrize("body", [STREAM, ASK, INSTANT])
async def test_seconds_without_a_token_are_a_timeout(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """An envelope whose seconds pass before anything came is a 504, and the upstream is closed."""
    scripted.queue(Script(say=[THINKS], gates={-1: Gate()}))
    answer = await ask(gateway, bounded(body, seconds=0.3))
    assert (answer.status, answer.error["type"], answer.error["code"]) == (504, "timeout", "deadline_passed")
    await scripted.calls[0].wait_closed()
    await gateway.assert_settled()


def held_in_answer(body: Json, say: Say, events: int, gate: Gate) -> Script:
    """A script that stands still after some events of the answer: of the second call where the first is thinking."""
    if body is INSTANT:
        return Script(say=[say], gates={events: gate})
    return Script(say=[say], then=Script(say=[say], gates={events: gate}))


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
    scripted.queue(Script(say=[TALKS], model=Model(honours_limit=False)))
    answer = await ask(gateway, {**body, "max_tokens": 40})
    texts, extension = whole(answer)
    assert extension["ended_by"] == "hold"
    assert len(texts[0]["content"].split()) <= 42
    assert extension["settled"]["tokens"] <= extension["hold"]["tokens"]
    assert scripted.calls[0].closed.is_set()


async def test_overrun_is_booked_and_burdens_the_next(scripted: ScriptedBackend) -> None:
    """What a lying backend used beyond its hold is settled all the same, and leaves less for later requests."""

    def lies(exchange: Exchange) -> Script | Reply:
        return Script(say=[TALKS], model=Model(honours_limit=False))

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


@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_a_tool_call_begun_in_native_thinking_is_not_cut_by_the_cap(
    gateway: Live, scripted: ScriptedBackend, body: Json
) -> None:
    """The call goes on in the answer, whole, from the token that opened it; the backend told no lie."""
    call = tool_call_tokens("get_time", '{"city": "Graz"}')
    slot = gateway.gateway.serving.models["qwen"].slots[0]
    assert slot.capabilities is not None
    slot.capabilities = replace(slot.capabilities, tool_format="hermes", tool_opener=call[0].id)
    scripted.queue(Script(say=[Say(thinking=[*tokens("let me call"), *call], answer=call)]))
    tools = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]
    answer = await ask(gateway, {**body, "tools": tools, "thinkgate": {"thinking_tokens": 6}})
    await gateway.assert_settled()
    extension = answer.chunks()[-1]["thinkgate"] if body is STREAM else answer.json["thinkgate"]
    assert extension["cap"]["enforcement"] == "two_phase"
    assert (extension["tokens"]["thinking"], extension["capped"]) == (3, False)
    assert slot.lies == 0
    if body is ASK:
        choice = answer.json["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_time", "arguments": '{"city": "Graz"}'}
        assert choice["message"]["reasoning"] == "let me call"
        assert not choice["message"]["content"]


@pytest.mark.parametrize("body", [STREAM, ASK])
@pytest.mark.parametrize("n", [1, 3])
async def test_what_a_lying_backend_wasted_takes_nothing_from_the_answer(
    gateway: Live, scripted: ScriptedBackend, body: Json, n: int
) -> None:
    """After a take-over every choice has its wrap-up and its answer's floor, though the hold is overrun."""
    scripted.queue(Script(say=[Say(thinking=tokens("on and on " * 100), answer=tokens("word " * 80))], model=LAX))
    thinkgate = {"thinking_tokens": 10, "answer_tokens_min": 20}
    texts, _ = whole(await ask(gateway, {**body, "n": n, "thinkgate": thinkgate, "max_tokens": 60}))
    await gateway.assert_settled()
    for message in texts.values():
        assert message["reasoning"].endswith(WRAP_UP)
        assert len(message["content"].split()) >= 20


async def test_a_client_cannot_make_an_honest_backend_distrusted(gateway: Live, scripted: ScriptedBackend) -> None:
    """What happens after the client biased the markers proves nothing about the backend."""
    scripted.queue(Script(say=[RAMBLES], model=LAX))
    await ask(gateway, {**ASK, "logit_bias": {"15": 100}, "thinkgate": {"thinking_tokens": 5}})
    await gateway.assert_settled()
    slot = gateway.gateway.serving.models["qwen"].slots[0]
    assert (slot.lies, slot.capabilities is not None and slot.capabilities.cap_binds) == (0, True)


async def test_thinking_ends_before_the_context_window_does(scripted: ScriptedBackend) -> None:
    """The prompt is counted, so the answer has its floor within the window; a prompt that fills it is refused."""
    config = tree_of(scripted, model={"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}})
    async with live(config) as gateway:
        slot = gateway.gateway.serving.models["qwen"].slots[0]
        assert slot.capabilities is not None
        slot.capabilities = replace(slot.capabilities, max_model_len=120)
        scripted.queue(Script(say=[Say(thinking=tokens("on and on " * 100), answer=tokens("word " * 80))]))
        texts, extension = whole(await ask(gateway, {**ASK, "thinkgate": {"mode": "reasoning"}, "max_tokens": 110}))
        assert texts[0]["reasoning"].endswith(WRAP_UP)
        assert len(texts[0]["content"].split()) >= 16
        assert extension["settled"]["tokens"] <= 120
        assert "ended_by" not in extension  # the window is no envelope
        long = [{"role": "user", "content": "word " * 115}]
        answer = await ask(gateway, {**ASK, "messages": long, "thinkgate": {"mode": "reasoning"}, "max_tokens": 110})
        assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize("field", [{"continue_final_message": True}, {"add_generation_prompt": False}])
async def test_a_continued_message_is_not_thought_about(gateway: Live, scripted: ScriptedBackend, field: Json) -> None:
    """Thinking cannot begin in the middle of a message: by itself it is instant mode, reasoning is refused by name."""
    scripted.queue(Script(say=[THINKS]))
    answer = await ask(gateway, {**ASK, "thinkgate": {}, **field})
    assert answer.json["thinkgate"]["mode"] == "instant"
    answer = await ask(gateway, {**ASK, "thinkgate": {"mode": "reasoning"}, **field})
    assert (answer.status, answer.error["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("value", ["5", [1], True, -1])
async def test_a_least_of_tokens_must_be_a_number(scripted: ScriptedBackend, value: object) -> None:
    """`min_tokens` of a wrong type is a 400 by name, before anything is sampled."""
    async with live(tree_of(scripted, model={"thinking": {"enforce": "two_phase"}})) as gateway:
        scripted.forget()
        answer = await ask(gateway, {**ASK, "min_tokens": value, "thinkgate": {"mode": "reasoning"}})
        assert (answer.status, answer.error["param"]) == (400, "min_tokens")
        assert not scripted.calls


@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_a_tool_call_begun_in_the_thinking_is_found_by_its_text(scripted: ScriptedBackend, body: Json) -> None:
    """Where `<tool_call>` is several tokens: the block is closed, the call begun anew behind it, and whole."""
    call = tool_call_tokens("get_time", '{"city": "Graz"}')
    async with live(
        tree_of(scripted, model={"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}})
    ) as gateway:
        slot = gateway.gateway.serving.models["qwen"].slots[0]
        assert slot.capabilities is not None
        slot.capabilities = replace(
            slot.capabilities, tool_format="hermes", tool_opener=None, tool_opener_ids=(call[0].id,)
        )
        scripted.queue(
            Script(say=[Say(thinking=[*tokens("let me call"), *call], answer=call, finish_reason="tool_calls")])
        )
        tools = [{"type": "function", "function": {"name": "get_time", "parameters": {"type": "object"}}}]
        answer = await ask(gateway, {**body, "tools": tools, "thinkgate": {"thinking_tokens": 6}})
        await gateway.assert_settled()
        if body is ASK:
            choice = answer.json["choices"][0]
            assert choice["message"]["reasoning"] == "let me call"
            function = choice["message"]["tool_calls"][0]["function"]
            assert function == {"name": "get_time", "arguments": '{"city": "Graz"}'}
            assert not choice["message"]["content"]
        assert not any(chunk in (answer.body or b"") for chunk in (b"<tool_call>", b"Time is up"))


@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_an_answer_may_speak_of_markers(scripted: ScriptedBackend, body: Json) -> None:
    """Text that looks like a marker but is other tokens is answer, and nothing after it is lost."""
    spoken = [*tokens("models write"), Token(5001, " <think>"), *tokens(" first")]
    async with live(
        tree_of(scripted, model={"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}})
    ) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("hm"), answer=spoken)]))
        texts, _ = whole(await ask(gateway, {**body, "thinkgate": {"mode": "reasoning"}}))
        assert texts[0]["content"] == "models write <think> first"
