"""Events of several tokens: every token, text and count goes to one delta, in the order they came."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.backends.port import Delta, Kind
from gateway.backends.reader import MarkerIds
from gateway.backends.stretches import by_counts, by_ids, cut, with_texts
from tests.gateway.live import ASK, STREAM, Json, ask, live, tree_of
from tests.gateway.test_third_attack import read
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import Model, Say, tokens

pytestmark = pytest.mark.anyio
MARKERS = MarkerIds(1, 2)
IDS = st.lists(st.sampled_from([1, 2, 7, 8, 9]), min_size=1, max_size=12)
TEXT = st.text(alphabet="ab ä😀", max_size=12)
T, A = Kind.THINKING, Kind.ANSWER
WAYS = pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])
AGAIN = Say(thinking=tokens("t0"), answer=tokens("a0 a1 a2 a3 a4 a5"), reopens=tokens(" I think again"), reopens_at=1)


@given(ids=IDS, is_open=st.booleans(), thought=TEXT, said=TEXT, calls=st.booleans())
@example(ids=[1], is_open=False, thought="a", said="", calls=True)
def test_nothing_is_lost_or_moved(ids: list[int], is_open: bool, thought: str, said: str, calls: bool) -> None:
    """The deltas of an event are of one kind each, and put together they are the event."""
    delta = Delta(token_ids=ids, tool_calls=[{}] if calls else None, finish_reason="stop", capped=True)
    delta.logprobs = {"content": [str(one) for one in ids]}
    pieces = [(kind, text) for kind, text in ((T, thought), (A, said)) if text]
    parts = cut(delta, with_texts(by_ids(ids, MARKERS, is_open=is_open), pieces, calls=calls))
    assert [one for part in parts for one in part.token_ids] == ids
    assert [one for part in parts if part.logprobs for one in part.logprobs["content"]] == delta.logprobs["content"]
    assert "".join(part.text for part in parts if part.kind is not A) == thought
    assert "".join(part.text for part in parts if part.kind is A) == said
    assert all(part.thinking + part.answer + part.injected == len(part.token_ids) for part in parts)
    assert all(not part.answer or part.kind is A for part in parts)
    assert all(not (part.thinking + part.injected) or part.kind is not A for part in parts)
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
    assert sum(part.tool_calls is not None for part in parts) == calls


@given(thinking=st.integers(0, 4), injected=st.integers(0, 2), answer=st.integers(0, 4), ids=st.integers(0, 8))
def test_counts_hold_where_ids_do_not_tell(thinking: int, injected: int, answer: int, ids: int) -> None:
    """Without known markers the thinking is taken to come first; every id goes to one of the two."""
    delta = Delta(thinking=thinking, injected=injected, answer=answer, token_ids=list(range(ids)))
    parts = cut(delta, with_texts(by_counts(delta), [(T, "so"), (A, "it is")], calls=False))
    assert [(part.kind, part.text) for part in parts] == [(T, "so"), (A, "it is")]
    assert [(part.thinking, part.injected, part.answer) for part in parts] == [(thinking, injected, 0), (0, 0, answer)]
    assert [one for part in parts for one in part.token_ids] == delta.token_ids


def test_pieces_of_the_same_kinds_keep_their_texts() -> None:
    """Where markers were found in the text, too, each stretch has just what its tokens wrote."""
    found = by_ids([7, 2, 8, 9, 1, 7], MARKERS, is_open=True)
    pieces = [(T, "one"), (Kind.INJECTED, "</t>"), (A, "two"), (Kind.INJECTED, "<t>"), (T, "three")]
    texts = [(one.is_thought, one.tokens, one.injected, one.text) for one in with_texts(found, pieces, calls=False)]
    assert texts == [(True, 2, 1, "one"), (False, 2, 0, "two"), (True, 2, 1, "three")]


async def answered(scripted: ScriptedBackend, body: Json, say: Say, *, model: Model, events_of: int) -> Any:
    """Thinking, answer and extension of a request to a model that was probed as `scripted.model` is."""
    async with live(tree_of(scripted)) as gateway:
        assert (gateway.slot().capabilities or None) is not None
        scripted.forget()
        scripted.model = model
        scripted.queue(Script(say=[say], tokens_per_event=events_of))
        return read(await ask(gateway, body))


@WAYS
@pytest.mark.parametrize("events_of", [1, 2, 3, 5, 16])
async def test_thinking_that_is_reopened_repeats_no_answer(
    scripted: ScriptedBackend, body: Json, events_of: int
) -> None:
    """An event from thinking to answer and back keeps that order: the answer is given once, whole."""
    capped = {**body, "thinkgate": {"thinking_tokens": 1}}
    liar = Model(honours_cap=False)
    thinking, said, report = await answered(scripted, capped, AGAIN, model=liar, events_of=events_of)
    assert said == "a0 a1 a2 a3 a4 a5"
    assert report["tokens"]["thinking"] == 1
    assert thinking  # where one event has thoughts from before and after the answer their border is not told
    assert "t0 I think again".startswith(thinking)


@WAYS
@pytest.mark.parametrize("events_of", [1, 2, 3, 5])
async def test_reopened_inline_thinking_is_no_answer(scripted: ScriptedBackend, body: Json, events_of: int) -> None:
    """Where ids show that a marker in the content is one, what follows it is thinking, under any batching."""
    scripted.model = Model(field="inline", template_opens=False, takes_ids=False)
    plenty = {**body, "thinkgate": {"thinking_tokens": 40}}
    thinking, said, _ = await answered(scripted, plenty, AGAIN, model=scripted.model, events_of=events_of)
    assert (thinking, said) == ("t0 I think again", "a0 a1 a2 a3 a4 a5")


@WAYS
async def test_an_answer_may_speak_of_markers(scripted: ScriptedBackend, body: Json) -> None:
    """Text that only looks like a marker opens no thinking."""
    scripted.model = Model(field="inline", template_opens=False, takes_ids=False)
    say = Say(thinking=tokens("t0"), answer=tokens("write < think > as <think > here"))
    _, said, _ = await answered(scripted, body, say, model=scripted.model, events_of=2)
    assert said == "write < think > as <think > here"


@WAYS
@pytest.mark.parametrize("events_of", [1, 2, 5])
async def test_counts_of_markers_of_several_tokens_go_with_their_half(
    scripted: ScriptedBackend, body: Json, events_of: int
) -> None:
    """Beyond the cap the thinking of a mixed event is dropped, and not its answer."""
    marked = {"thinking": {"start": "<reason>", "end": "</reason>", "enforce": "native"}}
    async with live(tree_of(scripted, model=marked)) as gateway:
        scripted.forget()
        say = Say(thinking=tokens("t0 t1 t2 t3"), answer=tokens("a0 a1 a2"))
        scripted.queue(Script(say=[say], tokens_per_event=events_of))
        _, said, report = read(await ask(gateway, body))
    assert said == "a0 a1 a2"
    assert report["tokens"]["thinking"] + report["tokens"]["answer"] + report["tokens"]["injected"] == 9


@WAYS
async def test_a_liar_that_takes_no_ids_still_answers(scripted: ScriptedBackend, body: Json) -> None:
    """Its cap was measured, does not hold, and nothing can be continued by ids: it is asked for the answer."""
    scripted.model = Model(takes_ids=False)
    say = Say(thinking=tokens(" ".join(f"t{i}" for i in range(30))), answer=tokens("a0"))
    capped = {**body, "thinkgate": {"thinking_tokens": 5}}
    liar = Model(takes_ids=False, honours_cap=False)
    thinking, said, report = await answered(scripted, capped, say, model=liar, events_of=1)
    assert thinking == "t0 t1 t2 t3 t4"
    assert said == "the answer is 42"
    assert (report["cap"]["enforcement"], report["tokens"]["thinking"]) == ("soft", 5)
