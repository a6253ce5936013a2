"""A summary in place of the thinking text: who sees what, what it costs, and how it fails."""

from __future__ import annotations

import asyncio
import hashlib
import json
from typing import Any

import pytest

from gateway.asides import NO_ASIDE, Aside
from gateway.modes.summary import CLOSING, INSTRUCTION, MOST_TOKENS, OPENING
from tests.gateway.live import ASK, MODEL, STREAM, Client, Json, Live, ask, live, tree_of
from tests.gateway.still import config_of, prepared
from tests.gateway.test_cancellation import Exchange as Served
from tests.gateway.test_cancellation import assert_clean, run_cancelled
from tests.gateway.test_streaming import chunk_of, text_of
from tests.scripted_backend import CHAT, COMPLETIONS, ScriptedBackend
from tests.scripted_script import Exchange, Gate, Reply, Script, refusal
from tests.scripted_stream import END_OF_SEQUENCE, Model, Say, tokens, tool_call_tokens

THOUGHTS, ANSWER = "let me see", "it is 42"
THINKS = Say(thinking=tokens(THOUGHTS), answer=tokens(ANSWER))
TELLS = Say(answer=tokens("it was easy"))
AUTO: Json = {"reasoning": {"summary": "auto"}}
SHORT: Json = {"reasoning": {"summary": "concise"}}
CAPPED: Json = {**AUTO, "thinking_budget": 5}
TWO_PHASE: Json = {
    "thinking": {"default_tokens": 32, "max_tokens": 256, "answer_floor_tokens": 16, "enforce": "two_phase"}
}
PROMPT_NANO, CACHED_NANO, THINKING_NANO, ANSWER_NANO = 1000, 500, 4000, 2000


def said(answer: Json, index: int = 0) -> tuple[str | None, str | None]:
    """Reasoning and content of one choice of a whole answer."""
    message = answer["choices"][index]["message"]
    return message.get("reasoning"), message["content"]


def told(call: Exchange) -> str:
    """What a call asked, its only message."""
    (message,) = call.json["messages"]
    assert message["role"] == "user"
    return str(message["content"])


def used(call: Exchange) -> int:
    """Prompt and output tokens of a call that came to its end."""
    return len(Model().prompt_ids(call.json)) + sum(len(choice.ids()) for choice in call.choices)


async def test_a_stream_tells_the_summary_before_the_answer(gateway: Live, scripted: ScriptedBackend) -> None:
    """The thinking text reaches no client; its summary comes in its place, then the answer, one stream of one id."""
    scripted.queue(Script(say=[THINKS]), Script(say=[TELLS]))
    answer = await ask(gateway, {**STREAM, **AUTO, "stream_options": {"include_usage": True}})
    chunks = answer.chunks()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    shown = [(name, delta[name]) for delta in deltas for name in ("reasoning", "content") if delta.get(name)]
    names = [name for name, _ in shown]
    at = names.index("content")
    assert set(names[:at]) == {"reasoning"}
    assert set(names[at:]) == {"content"}
    assert ("".join(t for _, t in shown[:at]), "".join(t for _, t in shown[at:])) == ("it was easy", ANSWER)
    assert deltas[0]["role"] == "assistant"
    assert [delta for delta in deltas[1:] if "role" in delta] == []
    assert (len({chunk["id"] for chunk in chunks}), {chunk["model"] for chunk in chunks}) == (1, {"qwen"})
    assert b" see" not in answer.body
    assert chunks[-2]["thinkgate"]["summary"] == "auto"
    assert chunks[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize(("length", "words"), [("concise", 50), ("auto", 100), ("detailed", 300)])
async def test_the_summarising_call_has_nothing_of_the_clients(
    gateway: Live, scripted: ScriptedBackend, length: str, words: int
) -> None:
    """One message with the quoted thoughts, in instant mode, at temperature 0, as long as the word says."""
    scripted.queue(Script(say=[THINKS]), Script(say=[TELLS]))
    more: Json = {"tools": [{"type": "function", "function": {"name": "f"}}], "seed": 7, "temperature": 0.5}
    answer = (await ask(gateway, {**ASK, **more, "reasoning": {"summary": length}})).json
    assert said(answer) == ("it was easy", ANSWER)
    assert answer["thinkgate"]["summary"] == length
    first, second = scripted.calls
    assert told(second) == f"{INSTRUCTION.format(words=words)}\n\n{OPENING}\n{THOUGHTS}\n{CLOSING}"
    asked = {**second.json, "messages": None}
    assert asked == {
        "messages": None,
        "model": "scripted",
        "temperature": 0,
        "max_tokens": {"concise": 96, "auto": 192, "detailed": 512}[length],
        "chat_template_kwargs": {"enable_thinking": False},
        "thinking_token_budget": 0,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "stream_interval": first.json["stream_interval"],
    }


async def test_thoughts_are_cached_for_their_tenant_only(scripted: ScriptedBackend) -> None:
    """The summarising call carries the tenant's salt, as the call does whose thoughts it quotes."""
    ada = {"id": "ada", "secret_sha256": hashlib.sha256(b"sk-ada").hexdigest()}
    async with live(tree_of(scripted, keys=[ada])) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[THINKS]), Script(say=[TELLS]))
        await ask(gateway, {**ASK, "reasoning": {"summary": "auto"}}, headers={"authorization": "Bearer sk-ada"})
        assert scripted.calls[1].json["cache_salt"] == scripted.calls[0].json["cache_salt"]


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_what_it_costs_is_counted_to_the_token(scripted: ScriptedBackend, body: Json) -> None:
    """Planner is the second call, in and out, at the prices of prompt, cached and answer; usage is as without it."""
    limit = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}
    async with live(tree_of(scripted, limits=[limit])) as gateway:
        scripted.forget()
        scripted.default = Script(say=[THINKS])
        await ask(gateway, body)  # from here on the prompt is in the prefix cache
        bare = _closing((await ask(gateway, body)).body)
        thoughts = Say(thinking=tokens("let me see " * 12), answer=tokens(ANSWER))
        scripted.queue(Script(say=[thoughts]), Script(say=[TELLS]))
        await ask(gateway, {**body, **AUTO, "thinking_budget": 100})
        before = gateway.settled_tokens()
        scripted.queue(Script(say=[thoughts]), Script(say=[TELLS]))
        extension = _closing((await ask(gateway, {**body, **AUTO, "thinking_budget": 100})).body)
        after = gateway.settled_tokens()
    call = scripted.calls[-1]
    prompt, output = len(Model().prompt_ids(call.json)), len(call.choices[0].ids())
    assert call.cached >= 32
    longer = len(thoughts.thinking) - 3
    counts = {**bare["tokens"], "thinking": 3 + longer, "planner": prompt + output}
    assert extension["tokens"] == counts
    assert extension["settled"] == {
        "tokens": bare["settled"]["tokens"] + longer + prompt + output,
        "thinking_tokens": 3 + longer,
        "nano_usd": bare["settled"]["nano_usd"]
        + longer * THINKING_NANO
        + (prompt - call.cached) * PROMPT_NANO
        + call.cached * CACHED_NANO
        + output * ANSWER_NANO,
    }
    assert after - before == extension["settled"]["tokens"] <= extension["hold"]["tokens"]
    assert "counted" not in extension


def _closing(body: bytes) -> Json:
    """The `thinkgate` object of a whole answer or of a stream."""
    events = body.decode().split("\n\n")
    texts = events if len(events) == 1 else [one.removeprefix("data: ") for one in events]
    (found,) = [json.loads(text)["thinkgate"] for text in texts if '"thinkgate"' in text]
    extension: Json = found
    return extension


async def test_usage_is_the_answers_own(gateway: Live, scripted: ScriptedBackend) -> None:
    """The whole answer's usage is what it would be without a summary."""
    scripted.default = Script(say=[THINKS])
    await ask(gateway, ASK)
    plain = (await ask(gateway, ASK)).json
    scripted.queue(Script(say=[THINKS]), Script(say=[TELLS]))
    assert (await ask(gateway, {**ASK, **AUTO})).json["usage"] == plain["usage"]
    assert "summary" not in plain["thinkgate"]


@pytest.mark.parametrize("length", MOST_TOKENS)
@pytest.mark.parametrize("n", [1, 3])
def test_the_hold_has_room_for_every_summary(length: str, n: int) -> None:
    """Per choice: a prompt of the cap and a margin, and the summary, at the model's prices."""
    config = config_of({"price_usd_per_mtok": {"prompt": 1, "cached": 0.5, "thinking": 2, "answer": 2}})
    summary = {"reasoning": {"summary": length}}
    body: Json = {"max_tokens": 300, "thinking_budget": 40, "n": n}
    bare, asked = prepared(body, config=config), prepared({**body, **summary}, config=config)
    prompt, output = n * (40 + 256), n * MOST_TOKENS[length]  # type: ignore[index]  # a parameter is a str
    request_bytes = len(json.dumps(summary)) - 2 + len(", ")
    assert asked.aside == Aside(prompt, output)
    assert asked.ceiling.tokens - bare.ceiling.tokens == prompt + output + request_bytes
    assert asked.ceiling.thinking_tokens == bare.ceiling.thinking_tokens
    money = asked.ceiling.nano_usd - bare.ceiling.nano_usd
    assert money == (prompt + request_bytes) * PROMPT_NANO + output * ANSWER_NANO


def test_instant_mode_holds_nothing_for_summaries() -> None:
    """Where there will be no thinking there is nothing to summarise."""
    assert prepared(AUTO, config=config_of(routing={"default_mode": "instant"})).aside == NO_ASIDE


async def test_no_thinking_is_no_call(gateway: Live, scripted: ScriptedBackend) -> None:
    """A choice that answers at once, or thinks nothing but white space, needs no summary."""
    for thoughts in ("", "\n"):
        scripted.forget()
        scripted.queue(Script(say=[Say(thinking=tokens(thoughts), answer=tokens(ANSWER))]))
        answer = (await ask(gateway, {**ASK, **AUTO})).json
        assert (said(answer), answer["thinkgate"]["summary"]) == ((None, ANSWER), "auto")
        assert (answer["thinkgate"]["tokens"]["planner"], len(scripted.calls)) == (0, 1)


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_every_choice_has_its_own_summary(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """Three choices of which one does not think: two summaries, each with its choice, and both are counted."""
    others = Say(thinking=tokens("or maybe not"), answer=tokens("no idea"))
    scripted.queue(Script(say=[THINKS, Say(answer=tokens("at once")), others]))
    scripted.queue(Script(say=[TELLS]), Script(say=[Say(answer=tokens("doubts"))]))
    answer = await ask(gateway, {**body, **SHORT, "n": 3})
    calls = scripted.calls[1:]
    summary_of = {THOUGHTS: "it was easy", "or maybe not": "doubts"}
    told_of = [summary_of[text] for call in calls for text in summary_of if text in told(call)]
    assert sorted(told_of) == ["doubts", "it was easy"]
    wanted = [("it was easy", ANSWER), ("", "at once"), ("doubts", "no idea")]
    if body is STREAM:
        chunks = answer.chunks()
        found = [(text_of(chunks, "reasoning", i), text_of(chunks, "content", i)) for i in range(3)]
    else:
        found = [((said(answer.json, i)[0] or ""), said(answer.json, i)[1] or "") for i in range(3)]
    assert found == wanted
    assert _closing(answer.body)["tokens"]["planner"] == sum(map(used, calls))


BROKEN = Script(say=[TELLS], dies_after=2)
FAILURES: list[tuple[str, Script | Reply, str, int | None]] = [
    ("refused", refusal(400, "no"), "", 0),
    ("failing", refusal(500, "no"), "", 0),
    ("overloaded", refusal(429, "no"), "", 0),
    ("not a stream", Reply(body=b"{}"), "", 0),
    ("broken off", BROKEN, "it", 1),
    ("silent", Script(say=[Say()]), "", 1),
]


@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize(("script", "text", "output"), [f[1:] for f in FAILURES], ids=[f[0] for f in FAILURES])
async def test_a_failed_summary_does_not_cost_the_answer(
    gateway: Live, scripted: ScriptedBackend, body: Json, script: Script | Reply, text: str, output: int
) -> None:
    """The answer comes whole, the report says `failed`, and what did arrive of the summary is counted and shown."""
    scripted.queue(Script(say=[THINKS]), script)
    answer = await ask(gateway, {**body, **AUTO})
    extension = _closing(answer.body)
    shown = (
        (text_of(answer.chunks(), "reasoning"), text_of(answer.chunks()))
        if body is STREAM
        else (said(answer.json)[0] or "", said(answer.json)[1])
    )
    assert (answer.status, shown) == (200, (text, ANSWER))
    assert (extension["summary"], extension["tokens"]["answer"]) == ("failed", 4)
    prompt = len(Model().prompt_ids(scripted.calls[1].json)) if output else 0
    assert extension["tokens"]["planner"] == prompt + output
    assert gateway.slot().is_up


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_leaving_during_the_summary_closes_both_calls(
    gateway: Live, scripted: ScriptedBackend, body: Json, how: Any
) -> None:
    """A client that leaves while its summary is written: both calls are closed, and what they sent is settled."""
    answers, tells = Gate(), Gate()
    scripted.queue(Script(say=[THINKS], gates={7: answers}), Script(say=[TELLS], gates={3: tells}))
    async with Client(gateway.port) as client:
        client.send({**body, **AUTO})
        await tells.wait()
        await ask(gateway, {**ASK, "thinkgate": {"mode": "instant"}})  # a turn of the loop for what was sent
        client.leave(how)
        await scripted.calls[0].wait_closed()
        await scripted.calls[1].wait_closed()
    await gateway.assert_settled()
    line = next(line for line in gateway.request_lines() if line.get("ended_by") == "disconnect")
    tells_prompt = len(Model().prompt_ids(scripted.calls[1].json))
    assert line["tokens"]["planner"] == tells_prompt + 2  # the role came first
    assert line["tokens"]["thinking"] == 3
    assert line["cost_nano_usd"] > tells_prompt * CACHED_NANO


@pytest.mark.parametrize("reason", [None, "disconnect", "envelope", "drain"])
async def test_cancelled_at_every_await(scripted: ScriptedBackend, reason: Any) -> None:
    """Wherever the request is cancelled, no call of either kind, no hold and no task is left."""
    limit = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}
    async with live(tree_of(scripted, limits=[limit])) as gateway:
        tells = Script(say=[TELLS], events_per_write=4)
        scripted.default = lambda at: tells if OPENING in json.dumps(at.json) else Script(say=[THINKS])
        running = asyncio.all_tasks()
        await asyncio.gather(*scripted._tasks)
        number, was_cancelled = 0, True
        while was_cancelled:
            number += 1
            scripted.forget()
            before = gateway.settled_tokens()
            exchange = Served(CHAT, {**STREAM, **AUTO})
            was_cancelled = await run_cancelled(gateway, exchange, number, reason)
            await assert_clean(gateway, scripted, running)
            most = sum(used(call) for call in scripted.calls)
            assert gateway.settled_tokens() - before <= most
            gateway.pool().close()
        assert number > 15
        assert gateway.settled_tokens() - before == most
        assert exchange.is_complete()
        assert b'"summary":"auto"' in exchange.body


async def test_thinking_in_the_summarising_call_is_dropped(gateway: Live, scripted: ScriptedBackend) -> None:
    """A model that thinks all the same shows nothing of it; its tokens, markers too, are planner tokens."""
    thinks_on = Model(honours_cap=False)
    tells = Say(thinking=tokens("hm hm"), answer=tokens("it was easy"))
    scripted.queue(Script(say=[THINKS]), Script(say=[tells], model=thinks_on, thinks=True))
    answer = (await ask(gateway, {**ASK, **AUTO})).json
    assert said(answer) == ("it was easy", ANSWER)
    tokens_by_kind = answer["thinkgate"]["tokens"]
    assert tokens_by_kind["planner"] == used(scripted.calls[1])
    assert (tokens_by_kind["thinking"], tokens_by_kind["wasted"]) == (3, 0)


async def test_a_summary_without_end_is_cut(gateway: Live, scripted: ScriptedBackend) -> None:
    """A backend that ignores the summary's limit is cut just beyond it, and every token received is counted."""
    talks = Say(answer=tokens("word " * 300))
    scripted.queue(Script(say=[THINKS]), Script(say=[talks], model=Model(honours_limit=False)))
    answer = await ask(gateway, {**STREAM, **SHORT})
    extension, call = _closing(answer.body), scripted.calls[1]
    await call.wait_closed()
    received = extension["tokens"]["planner"] - len(Model().prompt_ids(call.json))
    assert 96 < received <= call.events_sent - 1
    assert text_of(answer.chunks()) == ANSWER


async def test_thinking_that_never_answers_is_summarised(gateway: Live, scripted: ScriptedBackend) -> None:
    """A choice that ends in its thinking has its summary before its finish_reason."""
    scripted.queue(Script(say=[Say(thinking=(*tokens("hm well"), END_OF_SEQUENCE))]), Script(say=[TELLS]))
    chunks = (await ask(gateway, {**STREAM, **AUTO})).chunks()
    assert (text_of(chunks, "reasoning"), text_of(chunks)) == ("it was easy", "")
    assert [one["choices"][0]["finish_reason"] for one in chunks[-2:]] == [None, "stop"]


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_logprobs_and_ids_are_the_answers(gateway: Live, scripted: ScriptedBackend, body: Json) -> None:
    """With the thinking text go its logprobs and token ids, which spell it; those of the answer stay."""
    scripted.queue(Script(say=[THINKS]), Script(say=[TELLS]))
    answer = await ask(gateway, {**body, **AUTO, "logprobs": True, "return_token_ids": True})
    choices = [one for chunk in (answer.chunks() if body is STREAM else [answer.json]) for one in chunk["choices"]]
    entries = [e["token"] for one in choices if one["logprobs"] for e in one["logprobs"]["content"]]
    ids = [token for one in choices for token in one.get("token_ids") or ()]
    call = scripted.calls[0].choices[0]
    thinking = {token.id for kind, token in call.parts if kind == "thinking"}
    assert entries[-4:] == ["it", " is", " 42", "<|im_end|>"]
    assert not {"let", " me", " see"} & set(entries)
    assert ids[-4:] == call.ids()[-4:]
    assert not thinking & set(ids)


async def test_a_tool_call_begins_the_answer(gateway: Live, scripted: ScriptedBackend) -> None:
    """The summary comes before the first delta of a tool call."""
    calls = Say(thinking=tokens(THOUGHTS), answer=tool_call_tokens("f", '{"a": 1}'), finish_reason="tool_calls")
    scripted.queue(Script(say=[calls]), Script(say=[TELLS]))
    tool = {"type": "function", "function": {"name": "f"}}
    chunks = (await ask(gateway, {**STREAM, **AUTO, "tools": [tool]})).chunks()
    order = [name for c in chunks for name in ("reasoning", "tool_calls") if c["choices"][0]["delta"].get(name)]
    assert order.index("tool_calls") == order.count("reasoning") > 0
    assert text_of(chunks, "reasoning") == "it was easy"


async def test_the_role_survives_where_it_comes_with_the_first_thought(
    gateway: Live, scripted: ScriptedBackend
) -> None:
    """A server that says the role in the first event of thinking: the client has the role, not the thought."""
    first = chunk_of({"role": "assistant", "reasoning": "let"})
    scripted.queue(Script(say=[THINKS], replace={0: None, 1: first}), Script(say=[TELLS]))
    chunks = (await ask(gateway, {**STREAM, **AUTO})).chunks()
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert (text_of(chunks, "reasoning"), text_of(chunks)) == ("it was easy", ANSWER)


@pytest.mark.parametrize("body", [ASK, STREAM])
async def test_two_phase_enforcement_is_summarised_without_its_wrap_up(scripted: ScriptedBackend, body: Json) -> None:
    """A chain that is cut at its cap: what was thought is summarised, what was forced is not."""
    long = Say(thinking=tokens("one two three four five six seven"), answer=tokens(ANSWER))
    async with live(tree_of(scripted, model=TWO_PHASE)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[long]), Script(say=[TELLS]))
        answer = await ask(gateway, {**body, **CAPPED})
    (call,) = [call for call in scripted.calls if call.path == CHAT]
    assert [other.path for other in scripted.calls if other is not call] == [COMPLETIONS] * 2
    assert f"{OPENING}\none two three four five\n{CLOSING}" in told(call)
    extension = _closing(answer.body)
    assert (extension["cap"]["enforcement"], extension["capped"]) == ("two_phase", True)
    assert extension["tokens"]["planner"] == used(call)
    assert (extension["tokens"]["thinking"], extension["summary"]) == (5, "auto")


@pytest.mark.parametrize(
    ("envelope", "is_told"),
    [({"tokens": 2000}, True), ({"tokens": 230}, False), ({"usd": 0.01}, True), ({"usd": 0.0003}, False)],
)
async def test_the_envelope_holds_for_summaries(
    gateway: Live, scripted: ScriptedBackend, envelope: Json, is_told: bool
) -> None:
    """Where the envelope has no room for a summary beside the answer floor, no call is made; the answer comes."""
    scripted.queue(Script(say=[THINKS]))
    scripted.default = Script(say=[TELLS])
    answer = (await ask(gateway, {**ASK, **AUTO, "thinkgate": {"envelope": envelope}})).json
    extension = answer["thinkgate"]
    assert said(answer) == ("it was easy" if is_told else None, ANSWER)
    assert extension["summary"] == ("auto" if is_told else "failed")
    assert (extension["tokens"]["planner"] > 0) is is_told
    assert "ended_by" not in extension
