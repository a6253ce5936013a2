"""What the third attack on capped thinking found: each of these failed once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.backends.events import EventSplitter
from tests.gateway.live import ASK, STREAM, Answer, Json, Live, ask, live, tree_of
from tests.gateway.matrix import OPENAI
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Reply, Script
from tests.scripted_stream import Model, Say, tokens

pytestmark = pytest.mark.anyio
CAP: Json = {"thinkgate": {"thinking_tokens": 5}}
NEVER_OFF: Json = {"thinking": {"off": {"chat_template_kwargs": {"enable_thinking": False}}}}
BODIES = pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])


def events(*deltas: Json, usage: Json, finish: str = "stop", finishing: Json | None = None) -> Reply:
    """A stream of a server that gives no token ids: these deltas, a finish, the usage."""
    choices: list[Json] = [{"index": 0, "delta": delta, "finish_reason": None} for delta in deltas]
    choices.append({"index": 0, "delta": finishing or {}, "finish_reason": finish})
    head: Json = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}
    chunks: list[Json] = [{**head, "choices": [choice]} for choice in choices]
    chunks.append({**head, "choices": [], "usage": usage})
    body = b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks)
    return Reply(body=body + b"data: [DONE]\n\n", content_type="text/event-stream")


def used(prompt: int, completion: int, thinking: int | None = None) -> Json:
    """A usage."""
    details: Json = {} if thinking is None else {"completion_tokens_details": {"reasoning_tokens": thinking}}
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion, **details}


def thoughts(words: Sequence[str], field: str = "reasoning") -> list[Json]:
    """A delta of thinking each."""
    return [{field: word} for word in words]


SECOND = events({"content": "in short"}, usage=used(60, 2))


async def soft(scripted: ScriptedBackend, body: Json, *replies: Reply, inline: bool = False) -> Answer:
    """The answer of a gateway before a server that takes neither caps nor ids, once it was probed."""
    backend = {"id": "a", "url": scripted.url, "kind": "openai"}
    scripted.model = OPENAI
    async with live(tree_of(scripted, model={"backends": [backend], **NEVER_OFF})) as gateway:
        assert (gateway.slot().capabilities or None) is not None
        scripted.forget()
        for reply in replies:
            scripted.queue(reply)
        answer = await ask(gateway, body)
        assert gateway.gateway.ledger.held().tokens == 0
        return answer


def read(answer: Answer) -> tuple[str, str, Json]:
    """Thinking, answer and extension."""
    assert answer.status == 200
    if answer.headers["content-type"] == "application/json":
        message = answer.json["choices"][0]["message"]
        return message.get("reasoning") or "", message["content"] or "", answer.json["thinkgate"]
    deltas = [choice["delta"] for chunk in answer.chunks() for choice in chunk["choices"]]
    thinking = "".join(delta.get("reasoning") or delta.get("reasoning_content") or "" for delta in deltas)
    return thinking, "".join(delta.get("content") or "" for delta in deltas), answer.chunks()[-1]["thinkgate"]


@BODIES
async def test_an_event_with_both_keeps_its_answer(scripted: ScriptedBackend, body: Json) -> None:
    """Thinking beyond the cap is dropped, the answer that came in the same event is not."""
    deltas = [*thoughts([f" t{i}" for i in range(5)]), {"reasoning": " t5", "content": "it is"}, {"content": " 42"}]
    thinking, said, report = read(await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 9, 6))))
    assert (thinking, said) == (" t0 t1 t2 t3 t4", "it is 42")
    assert report["tokens"]["thinking"] == 5 <= report["hold"]["thinking_tokens"]


@BODIES
async def test_what_is_dropped_is_counted_once(scripted: ScriptedBackend, body: Json) -> None:
    """Thinking within the grace is wasted, whatever the backend's usage calls it, and the answer keeps its tokens."""
    deltas = [*thoughts([f" t{i}" for i in range(8)]), {"content": "own"}, {"content": " answer"}]
    thinking, said, report = read(await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 10, 8))))
    assert (thinking, said) == (" t0 t1 t2 t3 t4", "own answer")
    counts = report["tokens"]
    assert (counts["thinking"], counts["answer"], counts["wasted"]) == (5, 2, 3)
    assert (report["cap"]["hit"], report["capped"]) == (True, True)


@BODIES
async def test_many_words_in_an_event_are_many_tokens(scripted: ScriptedBackend, body: Json) -> None:
    """A server that sends several tokens at once does not get several times the cap."""
    deltas = [*thoughts([" a b c d"] * 5), {"content": "never"}]
    answer = await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 21, 20)), SECOND)
    thinking, said, report = read(answer)
    assert (thinking, said) == (" a b c d", "in short")
    assert report["tokens"]["thinking"] == 4
    assert report["cap"]["hit"]


@BODIES
async def test_thinking_that_only_the_usage_tells_of_is_an_overrun(scripted: ScriptedBackend, body: Json) -> None:
    """Where words hide tokens the report says how far beyond the cap it went."""
    deltas = [*thoughts(["abc"] * 3), {"content": "it is 42"}]
    _, said, report = read(await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 40, 30))))
    assert said == "it is 42"
    assert (report["cap"]["hit"], report["cap"]["overrun_tokens"]) == (True, 25)


@BODIES
async def test_an_off_switch_that_is_ignored_costs_no_answer(scripted: ScriptedBackend, body: Json) -> None:
    """In instant mode thinking is dropped and counted as wasted; the answer still comes."""
    instant = {**body, "thinkgate": {"mode": "instant"}}
    if body is STREAM:
        reply = events(*thoughts([" t0", " t1"]), {"content": "it is 42"}, usage=used(20, 6))
    else:
        message = {"role": "assistant", "content": "it is 42", "reasoning": " t0 t1"}
        whole = {"id": "c", "object": "chat.completion", "created": 1, "model": "scripted", "usage": used(20, 5)}
        whole |= {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        reply = Reply(body=json.dumps(whole).encode(), content_type="application/json")
    thinking, said, report = read(await soft(scripted, instant, reply))
    assert (thinking, said) == ("", "it is 42")
    assert (report["tokens"]["thinking"], report["tokens"]["wasted"], report["cap"]["hit"]) == (0, 2, True)


@BODIES
async def test_a_soft_turn_that_ends_in_its_thinking_is_answered(scripted: ScriptedBackend, body: Json) -> None:
    """A second call asks for the answer, as with any other choice that has none."""
    thinks = events(*thoughts([" t0", " t1"]), usage=used(20, 2, 2))
    _, said, _ = read(await soft(scripted, {**body, **CAP}, thinks, SECOND))
    assert said == "in short"


@BODIES
async def test_a_finish_on_the_last_thought_is_no_second_finish(scripted: ScriptedBackend, body: Json) -> None:
    """A turn that ends with a thought goes on to its answer: one finish, and nothing was capped."""
    thinks = events(*thoughts([" t0", " t1"]), usage=used(20, 3, 3), finishing={"reasoning": " t2"})
    answer = await soft(scripted, {**body, **CAP}, thinks, SECOND)
    thinking, said, report = read(answer)
    assert (thinking, said, report["capped"]) == (" t0 t1 t2", "in short", False)
    if body is STREAM:
        finishes = [c["finish_reason"] for chunk in answer.chunks() for c in chunk["choices"] if c["finish_reason"]]
        assert finishes == ["stop"]


@BODIES
async def test_an_answer_is_given_once(scripted: ScriptedBackend, body: Json) -> None:
    """A choice that thinks on after its answer began is cut, and not asked again."""
    deltas = [*thoughts([" t0", " t1"]), {"content": "it is"}, *thoughts([" more"] * 30), {"content": " 42"}]
    answer = await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 36, 32)), SECOND)
    _, said, report = read(answer)
    assert said == "it is 42"
    assert report["tokens"]["thinking"] <= 5


@BODIES
async def test_a_guess_is_no_overrun(scripted: ScriptedBackend, body: Json) -> None:
    """A server that thought exactly to the cap, and does not say how much it thought, is not charged above it."""
    deltas = [*thoughts([f" t{i}" for i in range(5)]), {"content": "it is"}]
    _, said, report = read(await soft(scripted, {**body, **CAP}, events(*deltas, usage=used(20, 10))))
    assert (said, report["tokens"]["thinking"], report["cap"]["hit"]) == ("it is", 5, False)
    assert "overrun_tokens" not in report["cap"]
    assert report["settled"]["thinking_tokens"] <= report["hold"]["thinking_tokens"]


async def test_a_stream_keeps_the_backends_name_for_thinking(scripted: ScriptedBackend) -> None:
    """Also where an event had to be cut, thinking is called what the backend calls it."""
    field = "reasoning_content"
    deltas = [*thoughts([" t0", " t1"], field), {field: " t2", "content": "it is"}, {"content": " 42"}]
    answer = await soft(scripted, {**STREAM, **CAP}, events(*deltas, usage=used(20, 5, 3)))
    assert not [c for chunk in answer.chunks() for c in chunk["choices"] if "reasoning" in c["delta"]]
    assert read(answer)[:2] == (" t0 t1 t2", "it is 42")


@BODIES
@pytest.mark.parametrize("per_event", [1, 2, 3, 5, 16])
@pytest.mark.parametrize(
    ("cap", "enforce", "model"),
    [
        (0, "auto", Model(honours_cap=False, template_opens=False)),
        (1, "auto", Model()),
        (5, "two_phase", Model(honours_cap=False, honours_bias=False)),
    ],
)
async def test_thinking_that_is_reopened_takes_no_answer_along(
    scripted: ScriptedBackend, body: Json, per_event: int, cap: int, enforce: str, model: Model
) -> None:
    """However many tokens an event has, the answer around a reopened thought is whole, and the thought unseen."""
    reopens = Say(
        thinking=tokens("t0"),
        answer=tokens("a0 a1 a2 a3 a4 a5"),
        reopens=tokens("again i think"),
        reopens_at=1,
    )
    async with live(tree_of(scripted, model={"thinking": {"enforce": enforce, "answer_floor_tokens": 16}})) as gateway:
        scripted.forget()
        scripted.model = model
        scripted.queue(Script(say=[reopens], tokens_per_event=per_event))
        answer = await ask(gateway, {**body, "thinkgate": {"thinking_tokens": cap}})
    thinking, said, report = read(answer)
    assert said == "a0 a1 a2 a3 a4 a5"
    assert len(thinking.split()) <= cap
    assert report["tokens"]["thinking"] <= cap


@pytest.mark.parametrize("text", ["<think>\nfirst", "so</think> then <think>again"])
async def test_a_message_that_ends_in_its_thinking_is_not_gone_on_from(gateway: Live, text: str) -> None:
    """What follows would be thinking that no cap holds: it is refused, naming the message."""
    messages = [*ASK["messages"], {"role": "assistant", "content": text}]
    go_on: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
    answer = await ask(gateway, {**ASK, "messages": messages, **go_on})
    assert (answer.status, answer.error["param"]) == (400, f"messages[{len(messages) - 1}].content")


def test_a_byte_order_mark_hides_no_event() -> None:
    """At the beginning of a stream it is passed over, as the format wants it, however the bytes are cut."""
    stream = "\ufeffdata: one\n\ndata: two\n\n".encode()
    for cut in range(len(stream)):
        splitter = EventSplitter()
        assert splitter.feed(stream[:cut]) + splitter.feed(stream[cut:]) + splitter.finish() == [b"one", b"two"]
