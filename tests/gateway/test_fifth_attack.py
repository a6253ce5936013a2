"""What the fifth attack on capped thinking found: each of these failed once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.live import ASK, STREAM, Answer, Json, ask, live, tree_of
from tests.gateway.matrix import INLINE, MANY
from tests.gateway.test_third_attack import events, soft, used
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import Model, Say, byte_tokens, tokens

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
