"""What the second attack on capped thinking found: each of these failed once."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.backends.events import EventSplitter
from gateway.backends.http_backend import short_way
from gateway.backends.port import Delta
from gateway.backends.reader import MarkerIds, StreamReader
from gateway.errors import UpstreamError
from tests.gateway.live import ASK, COMPLETIONS, STREAM, Json, ask, live, tree_of
from tests.gateway.matrix import TaughtModel
from tests.gateway.upstream import call
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import END_OF_SEQUENCE, Model, Say, tokens

pytestmark = pytest.mark.anyio
TOOL: Json = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
HEAD = b'{"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":'
TAIL = b'},"logprobs":null,"finish_reason":null,"token_ids":['
PREFILLED: Json = {"thinking": {"native": False, "answer_floor_tokens": 16}}


def event(text: bytes, token: bytes) -> bytes:
    """An ordinary event."""
    return HEAD + b'{"content":' + text + TAIL + token + b"]}]}"


@pytest.mark.parametrize(
    ("text", "token"),
    [
        (b'" \\x is"', b"7"),
        (b'" \x01 is"', b"7"),
        (b'" \xff is"', b"7"),
        (b'" is"', b"9" * 5000),
    ],
)
def test_what_is_no_json_is_not_passed_on(text: bytes, token: bytes) -> None:
    """An event that looks ordinary but is broken inside takes no short way, and is an upstream error."""
    reader = StreamReader(call(), MarkerIds(1000, 1001), expects_ids=True)
    out: list[Delta] = []
    for word in (b'" it"', b'" was"'):
        reader.read(event(word, b"6"), out)
    taken: list[Any] = []

    def express(*token: Any) -> bool:
        taken.append(token)
        return True

    sink = short_way(EventSplitter(), reader, express)
    assert sink(b"data: " + event(b'" so"', b"5") + b"\n\n")
    assert not sink(b"data: " + event(text, token) + b"\n\n")
    assert len(taken) == 1
    with pytest.raises(UpstreamError):
        reader.read(event(text, token), out)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize("cap", [3, 4, 20])
async def test_a_turn_that_ends_inside_the_thinking_has_an_answer(
    scripted: ScriptedBackend, body: Json, n: int, cap: int
) -> None:
    """Under a native cap, too: the end of the turn is dropped, the thinking is ended, and nobody is called a liar."""
    ends = Say(thinking=[*tokens("hm so"), END_OF_SEQUENCE], answer=tokens("it is 42"))
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[ends]))
        answer = await ask(gateway, {**body, "n": n, "thinkgate": {"mode": "reasoning", "thinking_tokens": cap}})
        chunks = answer.chunks() if body is STREAM else [answer.json]
        key = "delta" if body is STREAM else "message"
        texts = [""] * n
        for chunk in chunks:
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice[key].get("content") or ""
        counts = chunks[-1]["thinkgate"]["tokens"]
        assert texts == ["it is 42"] * n
        assert counts["thinking"] == 2 * n
        assert chunks[-1]["thinkgate"]["settled"]["tokens"] == sum(counts.values())
        assert gateway.slot().lies == 0


@pytest.mark.parametrize("limit", [1, 5, 22])
async def test_a_model_without_thinking_answers_instantly_within_any_limit(
    scripted: ScriptedBackend, limit: int
) -> None:
    """Where thinking is only ever prefilled, instant mode forces nothing, so no limit is too small for it."""
    async with live(tree_of(scripted, model=PREFILLED)) as gateway:
        scripted.queue(Script(say=[Say(answer=tokens("it is " * 20))], thinks=False))
        answer = await ask(gateway, {**ASK, "max_tokens": limit, "thinkgate": {"mode": "instant"}})
        assert (answer.status, answer.json["usage"]["completion_tokens"]) == (200, limit)
        assert answer.json["thinkgate"]["tokens"]["injected"] == 0


async def test_a_limit_without_room_is_named(scripted: ScriptedBackend) -> None:
    """A model that can only be kept from thinking by force says how much that takes, and by which field."""
    scripted.model = Model(template_switches=False)
    async with live(tree_of(scripted)) as gateway:
        answer = await ask(gateway, {**ASK, "max_tokens": 1, "thinkgate": {"mode": "instant"}})
        assert (answer.status, answer.error["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize("stop", ["see*", "seeQ", "eQQ"])
async def test_a_stop_string_that_does_not_come_costs_no_thinking(
    scripted: ScriptedBackend, body: Json, stop: str
) -> None:
    """What was held back at the end of the thinking, since a stop string might have begun there, is still shown."""
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("let me see"), answer=tokens("it is 42"))]))
        more = {"stop": [stop], "thinkgate": {"mode": "reasoning", "stop_in_thinking": True}}
        answer = await ask(gateway, {**body, **more})
        chunks = answer.chunks() if body is STREAM else [answer.json]
        key = "delta" if body is STREAM else "message"
        parts = [choice[key] for chunk in chunks for choice in chunk["choices"]]
        assert "".join(part.get("reasoning") or "" for part in parts) == "let me see"
        assert "".join(part.get("content") or "" for part in parts) == "it is 42"


@pytest.mark.parametrize("field", ["continue_final_message", "add_generation_prompt"])
async def test_switches_are_true_or_false(scripted: ScriptedBackend, field: str) -> None:
    """A number that a backend would read as a switch is refused, so that it cannot go past a rule about it."""
    async with live(tree_of(scripted)) as gateway:
        answer = await ask(gateway, {**ASK, field: 1})
        assert (answer.status, answer.error["param"]) == (400, field)


@pytest.mark.parametrize(
    "more",
    [
        {"reasoning_effort": "low"},
        {"enable_thinking": True},
        {"thinking": {"type": "enabled", "budget_tokens": 5}},
        {"reasoning": {"effort": "low"}},
        {"thinking_budget": 5},
    ],
)
async def test_a_raw_prompt_refuses_every_dialect_of_thinking(scripted: ScriptedBackend, more: Json) -> None:
    """Text completions cannot think by request: whatever asks for it is refused by name, not dropped."""
    async with live(tree_of(scripted)) as gateway:
        body = {"model": "qwen", "prompt": "six", "max_tokens": 20, **more}
        answer = await ask(gateway, body, COMPLETIONS)
        assert answer.status == 400
        assert answer.error["param"].split(".")[0] == next(iter(more))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
async def test_forced_calls_are_made_by_a_grammar(scripted: ScriptedBackend, choice: object) -> None:
    """With thinking before them, forced calls go the way where a grammar holds them to their schema."""
    scripted.model = TaughtModel()
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("hm"), answer=tokens("{}"))]))
        more: Json = {"tools": [TOOL], "tool_choice": choice, "thinkgate": {"mode": "reasoning"}}
        extension = (await ask(gateway, {**ASK, **more})).json["thinkgate"]
        assert extension["cap"]["enforcement"] == "two_phase"


async def test_a_trial_takes_nothing_from_the_answers_floor(scripted: ScriptedBackend) -> None:
    """In an envelope the tokens of a trial are kept back from the thinking."""
    model = {"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}}
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}
    async with live(tree_of(scripted, model=model)) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("on " * 200), answer=tokens("word " * 50))]))
        asked = {"mode": "reasoning", "envelope": {"tokens": 100}}
        answer = await ask(gateway, {**ASK, "response_format": schema, "thinkgate": asked})
        counts = answer.json["thinkgate"]["tokens"]
        assert counts["probe"] == 2
        assert counts["answer"] >= 16
        assert sum(counts.values()) <= 100


async def test_nothing_is_tried_for_nothing(scripted: ScriptedBackend) -> None:
    """A field that is null asks for nothing."""
    model = {"thinking": {"enforce": "two_phase", "answer_floor_tokens": 16}}
    async with live(tree_of(scripted, model=model)) as gateway:
        scripted.queue(Script(say=[Say(thinking=tokens("hm"), answer=tokens("ok"))]))
        more = {"structured_outputs": None, "thinkgate": {"mode": "reasoning"}}
        assert (await ask(gateway, {**ASK, **more})).json["thinkgate"]["tokens"]["probe"] == 0
