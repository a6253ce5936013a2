"""What the fifth attack on capped thinking found: each of these failed once."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.backends.port import Kind
from tests.gateway.live import ASK, STREAM, Answer, Json, ask, live, tree_of
from tests.gateway.matrix import INLINE, MANY, TOOL
from tests.gateway.test_strange_backends import call, event, first
from tests.gateway.test_strange_backends import read as deltas_of
from tests.gateway.test_third_attack import events, read, soft, used
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Reply, Script
from tests.scripted_stream import END_OF_SEQUENCE, Model, Say, byte_tokens, tokens

pytestmark = pytest.mark.anyio
BODIES = pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])
HIDDEN: Json = {"reasoning": {"exclude": True}, "thinkgate": {"thinking_tokens": 20}}


def choices_of(answer: Answer) -> list[Any]:
    """Every choice of every chunk, or of the whole answer."""
    assert answer.status == 200
    is_whole = answer.headers["content-type"] == "application/json"
    return [choice for part in ([answer.json] if is_whole else answer.chunks()) for choice in part["choices"]]


@BODIES
@pytest.mark.parametrize("events_of", [1, 3])
@pytest.mark.parametrize("model", [Model(), INLINE, MANY], ids=["native", "inline", "many_token_markers"])
async def test_half_a_character_of_hidden_thinking_is_hidden(
    scripted: ScriptedBackend, body: Json, model: Model, events_of: int
) -> None:
    """A token whose text comes with the next one is hidden all the same, and so are its id and logprobs."""
    scripted.model = model
    thinking = byte_tokens("日本😀")
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[Say(thinking=thinking, answer=tokens("it is"))], tokens_per_event=events_of))
        answer = await ask(gateway, {**body, **HIDDEN, "logprobs": True, "return_token_ids": True})
    shown = [token for choice in choices_of(answer) for token in choice.get("token_ids") or ()]
    spelled = [one for choice in choices_of(answer) for one in (choice.get("logprobs") or {}).get("content", ())]
    assert not {token.id for token in thinking} & set(shown)
    assert len(spelled) == len(shown)


@pytest.mark.parametrize("more", [HIDDEN, {"thinkgate": {"thinking_tokens": 20, "reasoning_field": "both"}}])
async def test_a_role_that_comes_with_a_thought_is_told(scripted: ScriptedBackend, more: Json) -> None:
    """Also where the thought itself is hidden, or goes out under both names."""
    deltas = [{"role": "assistant", "reasoning": "hm"}, {"reasoning": "so"}, {"content": "it is 42"}]
    answer = await soft(scripted, {**STREAM, **more}, events(*deltas, usage=used(20, 5, 2)))
    assert [choice["delta"].get("role") for choice in choices_of(answer)][:2] == ["assistant", None]


@BODIES
@pytest.mark.parametrize(
    "more", [{"tools": [TOOL]}, {"truncate_prompt_tokens": 200}], ids=lambda more: next(iter(more))
)
@pytest.mark.parametrize("lies", [False, True], ids=["ends_in_thinking", "ignores_the_cap"])
async def test_what_cannot_be_continued_by_ids_is_by_text(
    scripted: ScriptedBackend, body: Json, more: Json, lies: bool
) -> None:
    """A call that two-phase enforcement would refuse is no mistake of the client's once its backend has thought."""
    thinking = tokens(" ".join(f"t{i}" for i in range(40))) if lies else [*tokens("t0 t1 t2"), END_OF_SEQUENCE]
    say = Say(thinking=thinking, answer=tokens("never"))
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[say], model=Model(honours_cap=not lies)), Script(say=[Say(answer=tokens("it is"))]))
        answer = await ask(gateway, {**body, **more, "thinkgate": {"thinking_tokens": 10}})
        assert "error" not in json.dumps(choices_of(answer))
        thought, said, report = read(answer)
    assert said == "it is"
    assert thought.split() == [f"t{i}" for i in range(10 if lies else 3)]
    end_of_turn = 0 if lies else 1  # a token, too
    assert report["tokens"]["thinking"] == len(thought.split()) + end_of_turn
    assert report["cap"]["enforcement"] == "soft"


@pytest.mark.parametrize("ids", [[16], [100, 16], [100, 101]])
def test_a_call_that_comes_with_thoughts_is_no_thought(ids: list[int]) -> None:
    """It goes out where the thoughts are hidden or dropped, also where their ids are all the event has."""
    beside = event({"reasoning": "so", "tool_calls": [{"index": 0}]}, ids)
    thought, called = deltas_of(call(), first([1, 15]), beside)[1:]
    assert (thought.kind, thought.text, thought.tool_calls) == (Kind.THINKING, "so", None)
    assert (called.kind, called.text, called.tool_calls) == (Kind.ANSWER, "", [{"index": 0}])


@pytest.mark.parametrize("name", ["reasoning", "content"])
def test_text_without_ids_is_counted(name: str) -> None:
    """A list of ids that is empty makes no text free: neither the cap nor the hold would bound it."""
    deltas = deltas_of(call(), first([1, 15]), *(event({name: f" w{i} x"}, []) for i in range(8)))
    assert sum(delta.thinking + delta.answer for delta in deltas) == 16


@pytest.mark.parametrize("usage", [None, used(0, 0, 0)], ids=["none", "zeros"])
@BODIES
async def test_an_answer_without_a_usage_is_not_free(scripted: ScriptedBackend, body: Json, usage: Json | None) -> None:
    """It is counted by its words, and its prompt by its size: no budget outlives a backend that says nothing."""
    if body is STREAM:
        reply = events({"reasoning": " t0 t1"}, {"content": "it is 42"}, usage=usage or used(0, 0))
    else:
        message = {"role": "assistant", "content": "it is 42", "reasoning": " t0 t1"}
        whole = {"id": "c", "created": 1, "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        reply = Reply(body=json.dumps({**whole, "usage": usage}).encode())
    _, said, report = read(await soft(scripted, {**body, "thinkgate": {"mode": "instant"}}, reply))
    counts = report["tokens"]
    assert said == "it is 42"
    assert (counts["answer"], counts["wasted"], report["counted"]) == (3, 2, "estimated")
    assert 0 < counts["prompt"] < report["hold"]["tokens"]
    assert report["settled"]["tokens"] == sum(counts.values())
