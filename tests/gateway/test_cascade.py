"""A cascade: an instant draft that nobody sees until it was judged, and thinking where the model was not sure."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.live import ASK, MODEL, STREAM, Answer, Client, Json, Live, ask, live, tree_of
from tests.gateway.test_bounds import bounded, whole
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script, refusal
from tests.scripted_stream import Model, Say, tokens

SURE, UNSURE = -0.05, -2.0
DRAFT = "six times seven is forty two"
THOUGHT = Say(thinking=tokens("let me see now"), answer=tokens("it is 42"))
LIMIT: Json = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}


def cascading(*backends: ScriptedBackend, when: str = "uncertain", **more: Any) -> Json:
    """A configuration whose requests draft first."""
    cascade = {"when": when, "window_tokens": 3, **more.pop("cascade", {})}
    routing = {"scorer": "none", "cascade": cascade, **more.pop("routing", {})}
    return tree_of(*backends, routing=routing, limits=[LIMIT], **more)


def drafts(text: str = DRAFT, logprob: float = SURE, **more: Any) -> Script:
    """An instant answer, as sure as that."""
    return Script(say=[Say(answer=tokens(text, logprob))], **more)


def thinks(**more: Any) -> Script:
    """The answer that takes thinking."""
    return Script(say=[THOUGHT], **more)


async def outcome(running: Live, body: Json, **how: Any) -> tuple[Answer, dict[int, Json], Json]:
    """The response, its texts and its extension."""
    answer = await ask(running, body, **how)
    assert answer.status == 200, answer.body
    return answer, *whole(answer)


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_draft_that_was_sure_is_the_answer(scripted: ScriptedBackend, body: Json) -> None:
    """One call without thinking, answered as an instant request is, and charged for nothing else."""
    async with live(cascading(scripted)) as running:
        scripted.forget()
        scripted.queue(drafts())
        answer, texts, told = await outcome(running, body)
        assert texts[0]["content"] == DRAFT
        assert (told["mode"], answer.headers["x-thinkgate-mode"]) == ("instant", "instant")
        assert told["cascade"]["outcome"] == "accepted"
        assert told["cascade"]["confidence"] == pytest.approx(0.8187)  # the end of the sequence counts, too
        assert (told["cascade"]["least"], told["cascade"]["window_tokens"]) == (0.6, 3)
        assert (told["cap"]["tokens"], told["cap"]["source"]) == (0, "mode")
        assert (told["tokens"]["wasted"], told["tokens"]["thinking"]) == (0, 0)
        assert len(scripted.calls) == 1
        assert scripted.calls[0].json["chat_template_kwargs"] == {"enable_thinking": False}
        assert running.metric("thinkgate_cascades_total", model=MODEL, outcome="accepted") == 1
        (line,) = running.request_lines()
        assert (line["mode"], line["cascade"]["outcome"]) == ("instant", "accepted")
        assert running.settled_tokens() == told["settled"]["tokens"] == sum(told["tokens"].values())


@pytest.mark.parametrize("model", [Model(), Model(gives_ids=False), Model(gives_ids=False, gives_usage=False)])
@pytest.mark.parametrize("enforce", ["auto", "two_phase"])
@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_draft_that_was_not_sure_reaches_nobody(
    scripted: ScriptedBackend, body: Json, enforce: str, model: Model
) -> None:
    """The client sees the answer with thinking alone; the draft's tokens are wasted, and charged."""
    scripted.model = model
    if enforce == "two_phase" and not model.gives_ids:
        return  # nothing can be held that way there
    thinking = {"default_tokens": 32, "answer_floor_tokens": 16, "enforce": enforce}
    async with live(cascading(scripted, model={"thinking": thinking})) as running:
        scripted.forget()
        scripted.queue(drafts(logprob=UNSURE), thinks())
        answer, texts, told = await outcome(running, body)
        assert texts[0]["content"] == "it is 42"
        assert texts[0]["reasoning"].startswith("let me see now")
        assert (told["mode"], answer.headers["x-thinkgate-mode"]) == ("reasoning", "reasoning")
        assert told["cascade"]["outcome"] == "escalated"
        assert told["cascade"]["confidence"] < 0.6
        assert b"forty" not in answer.body
        assert b'"logprobs":{' not in answer.body
        assert told["tokens"]["wasted"] >= 3
        assert told["tokens"]["thinking"] >= 4
        assert running.settled_tokens() == told["settled"]["tokens"] == sum(told["tokens"].values())
        assert told["settled"]["tokens"] <= told["hold"]["tokens"]
        (line,) = running.request_lines()
        assert (line["mode"], line["cascade"]["outcome"]) == ("reasoning", "escalated")


async def test_what_a_draft_wastes_is_no_part_of_the_usage(scripted: ScriptedBackend) -> None:
    """`usage` knows the delivered answer only; the prompt, though sent twice, counts once."""
    async with live(cascading(scripted)) as running:
        scripted.queue(thinks())
        alone = (await ask(running, {**ASK, "thinkgate": {"mode": "reasoning"}})).json
        scripted.queue(drafts(logprob=UNSURE), thinks())
        both = (await ask(running, ASK)).json
    assert both["usage"]["completion_tokens"] == alone["usage"]["completion_tokens"]
    assert abs(both["usage"]["prompt_tokens"] - alone["usage"]["prompt_tokens"]) <= 4  # the template's switch
    tokens_of = both["thinkgate"]["tokens"]
    assert tokens_of["wasted"] > 0
    assert tokens_of["prompt"] + tokens_of["cached"] == both["usage"]["prompt_tokens"]


async def test_nothing_of_a_draft_goes_out_before_it_was_judged(scripted: ScriptedBackend) -> None:
    """Not even the head of a stream, for it says the mode."""
    gate = Gate()
    async with live(cascading(scripted)) as running, Client(running.port) as client:
        scripted.queue(drafts(gates={5: gate}))
        client.send(STREAM)
        await gate.wait()
        assert client.received() == b""
        gate.open()
        answer = await client.answer()
        assert whole(answer)[0][0]["content"] == DRAFT


async def test_a_draft_is_left_at_its_first_bad_window(scripted: ScriptedBackend) -> None:
    """The rest of it is not waited for."""
    long = Script(say=[Say(answer=(*tokens("one two three", UNSURE), *tokens("and so on " * 500, SURE)))])
    async with live(cascading(scripted)) as running:
        scripted.forget()
        gate = Gate()
        scripted.queue(Script(say=long.say, gates={8: gate}), thinks())
        _, texts, told = await outcome(running, STREAM)
        gate.open()
    assert texts[0]["content"] == "it is 42"
    assert told["tokens"]["wasted"] <= 8


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_every_choice_has_to_be_sure(scripted: ScriptedBackend, body: Json) -> None:
    """Of several choices one that is not sure is enough to think for all."""
    sure, unsure = Say(answer=tokens(DRAFT, SURE)), Say(answer=tokens("no idea at all really", UNSURE))
    async with live(cascading(scripted)) as running:
        scripted.queue(Script(say=[sure]))
        _, texts, told = await outcome(running, {**body, "n": 2})
        assert [texts[i]["content"] for i in (0, 1)] == [DRAFT, DRAFT]
        assert told["cascade"]["outcome"] == "accepted"
        scripted.queue(Script(say=[sure, unsure]), thinks())
        _, texts, told = await outcome(running, {**body, "n": 2})
        assert [texts[i]["content"] for i in (0, 1)] == ["it is 42", "it is 42"]
        assert told["cascade"]["outcome"] == "escalated"


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_client_gets_the_log_probabilities_it_asked_for_and_no_others(
    scripted: ScriptedBackend, body: Json
) -> None:
    """Of an accepted draft those that came, as many alternatives as asked for; of one that did not ask, none."""
    async with live(cascading(scripted)) as running:
        scripted.queue(drafts(), drafts())
        silent = await ask(running, body)
        asked = await ask(running, {**body, "logprobs": True, "top_logprobs": 2})
        assert b'"logprobs":{' not in silent.body
        assert b'"logprob":-0.05' in asked.body
        assert b"alternative1" in asked.body
        assert "top_logprobs" not in scripted.calls[-2].json
        assert whole(asked)[1]["cascade"]["outcome"] == "accepted"


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_stop_strings_end_the_draft_and_the_answer(scripted: ScriptedBackend, body: Json) -> None:
    """The backend looks for them in the draft, the gateway in what follows thinking."""
    async with live(cascading(scripted)) as running:
        scripted.forget()
        scripted.queue(drafts(logprob=UNSURE), thinks())
        _, texts, told = await outcome(running, {**body, "stop": " is"})
        assert texts[0]["content"] == "it"
        assert told["cascade"]["outcome"] == "escalated"
        draft, answer = scripted.calls
        assert (draft.json["stop"], "stop" in answer.json) == (" is", False)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "structured_outputs"),
        ({"logit_bias": {"7": 5}}, "logit_bias"),
    ],
)
async def test_it_steps_aside_where_probabilities_say_nothing(scripted: ScriptedBackend, more: Json, why: str) -> None:
    """The request goes on as it would without a cascade, and is told why."""
    async with live(cascading(scripted)) as running:
        scripted.forget()
        scripted.queue(thinks())
        _, _, told = await outcome(running, {**ASK, **more})
        assert (told["mode"], told["cascade"]["outcome"]) == ("reasoning", "aside")
        assert told["cascade"]["reason"].startswith(why)
        assert running.metric("thinkgate_cascades_total", model=MODEL, outcome="aside") == 1
        assert "logprobs" not in scripted.calls[-1].json


async def test_a_text_format_is_none(scripted: ScriptedBackend) -> None:
    """`response_format: text` forces nothing."""
    async with live(cascading(scripted)) as running:
        scripted.queue(drafts())
        _, _, told = await outcome(running, {**ASK, "response_format": {"type": "text"}, "logit_bias": {}})
        assert told["cascade"]["outcome"] == "accepted"


async def test_a_backend_without_log_probabilities_is_asked_for_none(scripted: ScriptedBackend) -> None:
    """It was measured when it came up, so no draft is made there."""
    scripted.model = Model(gives_logprobs=False)
    async with live(cascading(scripted)) as running:
        scripted.forget()
        scripted.queue(thinks())
        _, _, told = await outcome(running, ASK)
        assert told["cascade"] == {"outcome": "aside", "reason": "backend a gives no log probabilities"}
        assert len(scripted.calls) == 1


@pytest.mark.parametrize("length", [5, 40])
async def test_a_backend_that_stops_giving_them_is_not_believed(scripted: ScriptedBackend, length: int) -> None:
    """A draft that cannot be judged is thrown away, a long one before its end."""
    async with live(cascading(scripted)) as running:
        scripted.queue(drafts("word " * length, model=Model(gives_logprobs=False)), thinks())
        _, texts, told = await outcome(running, ASK)
        assert texts[0]["content"] == "it is 42"
        assert told["cascade"]["reason"] == "the backend gave no log probabilities"
        assert "confidence" not in told["cascade"]


async def test_a_draft_that_the_backend_refuses_is_no_refusal(scripted: ScriptedBackend) -> None:
    """What it refuses of the draft was perhaps ours; the client's own mistakes are refused a second time."""
    async with live(cascading(scripted)) as running:
        scripted.queue(refusal(400, "logprobs are off"), thinks())
        _, texts, told = await outcome(running, ASK)
        assert (texts[0]["content"], told["cascade"]["reason"]) == ("it is 42", "the backend refused the draft")
        scripted.queue(refusal(400, "no"), refusal(400, "no such thing"))
        answer = await ask(running, ASK)
        assert (answer.status, answer.error["message"]) == (400, "no such thing")


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_whole_draft_is_the_answer_where_thinking_fails(scripted: ScriptedBackend, body: Json) -> None:
    """A backend that fails before the first byte of the second call costs the thinking, not the answer."""
    async with live(cascading(scripted)) as running:
        scripted.queue(drafts("no idea", UNSURE), refusal(500, "out of memory"))
        _, texts, told = await outcome(running, body)
        assert (texts[0]["content"], told["mode"]) == ("no idea", "instant")
        assert told["cascade"]["outcome"] == "accepted"
        assert "could not think" in told["cascade"]["reason"]
        assert told["tokens"]["wasted"] == 0
        assert running.settled_tokens() == told["settled"]["tokens"]


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_an_envelope_bounds_draft_and_answer_together(scripted: ScriptedBackend, body: Json) -> None:
    """What the draft used is missing afterwards; where nothing is left for thinking the draft is the answer."""
    async with live(cascading(scripted)) as running:
        for most in range(20, 60, 3):
            scripted.forget()
            scripted._queue.clear()
            scripted.queue(drafts(logprob=UNSURE), thinks())
            answer = await ask(running, bounded(body, tokens=most))
            if answer.status == 200:
                texts, told = whole(answer)
                assert told["settled"]["tokens"] <= most
                assert texts[0]["content"]
                assert told["cascade"]["outcome"] in {"accepted", "escalated"}
        assert told["cascade"]["outcome"] == "escalated"
        scripted._queue.clear()
        scripted.queue(drafts(logprob=UNSURE, text="and so on " * 30))
        _, texts, told = await outcome(running, bounded(body, tokens=30))
        assert (told["cascade"]["outcome"], told["ended_by"]) == ("accepted", "envelope.tokens")
        assert texts[0]["content"].startswith("and so on")


@pytest.mark.parametrize("when", ["draft", "thought"])
@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_a_deadline_leaves_the_draft(scripted: ScriptedBackend, body: Json, when: str) -> None:
    """Where the seconds are over before thinking has begun to arrive, what there is of the draft is delivered."""
    gate = Gate()
    async with live(cascading(scripted)) as running, Client(running.port) as client:
        if when == "draft":
            scripted.queue(drafts(gates={4: gate}))
        else:
            scripted.queue(drafts(logprob=UNSURE), thinks(gates={-1: gate}))
        client.send(bounded(body, seconds=1000))
        await gate.wait()
        running.watched().cancel("envelope")
        answer = await client.answer()
        texts, told = whole(answer)
        assert DRAFT.startswith(texts[0]["content"])
        assert (told["ended_by"], told["cascade"]["outcome"]) == ("envelope.seconds", "accepted")
        assert told["cascade"]["reason"] == "the time was over"


@pytest.mark.parametrize("at", ["draft", "thought"])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_leaves_pays_for_what_came(scripted: ScriptedBackend, at: str, how: Any) -> None:
    """The backend's call is closed, and the draft's tokens are settled as wasted, in whichever call it left."""
    gate = Gate()
    async with live(cascading(scripted)) as running:
        scripted.forget()
        async with Client(running.port) as client:
            if at == "draft":
                scripted.queue(drafts(gates={5: gate}))
            else:
                scripted.queue(drafts(logprob=UNSURE), thinks(gates={-1: gate}))
            client.send(STREAM)
            await gate.wait()
            client.leave(how)
            await scripted.calls[-1].wait_closed()
        await running.assert_settled()
        (line,) = running.request_lines()
        assert line["ended_by"] == "disconnect"
        assert line["tokens"]["answer"] == 0
        assert line["tokens"]["wasted"] > 0
        assert running.settled_tokens() == sum(line["tokens"].values())
