"""Backends that slip over the cap or lie about it, and the call that goes on where only text can be kept."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
import pytest

from budget.price import PriceTable
from gateway.backends.port import Call, Capabilities, Delta, Express, Kind, Thinking, Usage
from gateway.modes.guard import GRACE_TOKENS, Guard
from gateway.modes.soft import ANSWER_NOW, soft_answers, with_effort
from gateway.tally import Tally
from tests.gateway.live import STREAM, ask, live, tree_of
from tests.gateway.still import config_of, models_of
from tests.gateway.upstream import run_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import Model, Say, tokens

CAP = 3
WRITES = Capabilities(takes_effort=True)


def thought(count: int = 1, choice: int = 0, finish: str | None = None) -> Delta:
    """So many thinking tokens at once."""
    ids = list(range(100, 100 + count))
    return Delta(
        index=choice, kind=Kind.THINKING, text="t" * count, thinking=count, token_ids=ids, finish_reason=finish
    )


def said(choice: int = 0, finish: str | None = None) -> Delta:
    """An answer token."""
    return Delta(index=choice, text="a", answer=1, token_ids=[200], finish_reason=finish)


class Watched:
    """A guard over some choices, fed as a run feeds it."""

    def __init__(self, choices: int = 1, **keeps: Any) -> None:
        self.tally, self.finished = Tally(PriceTable()), set[int]()
        self.guard = Guard(self.tally, self.finished, choices, **(keeps or {"keeps_ids": True}))

    def feed(self, *deltas: Delta) -> list[Delta]:
        """What of a batch may be delivered."""
        for delta in deltas:
            self.tally.add(delta)
            if delta.finish_reason is not None:
                self.finished.add(delta.index)
        return self.guard.kept(self.guard.within(list(deltas), CAP))


def test_a_slip_is_dropped_and_forgiven() -> None:
    """A few tokens beyond the cap reach no client; a choice that then answers goes on."""
    watched = Watched()
    assert len(watched.feed(*[thought()] * (CAP + GRACE_TOKENS))) == CAP
    assert len(watched.feed(said(), said(finish="stop"))) == 2
    assert (watched.guard.is_lost(), watched.guard.overrun, watched.tally.wasted) == (False, GRACE_TOKENS, GRACE_TOKENS)
    assert watched.guard.ids[0] == [100] * CAP + [200] * 2


@pytest.mark.parametrize("size", [1, 2, 5, CAP + GRACE_TOKENS + 1])
def test_a_lie_is_found_after_the_grace(size: int) -> None:
    """However many tokens come at once: none beyond the cap is kept, and what is kept can be gone on from."""
    watched = Watched()
    seen, kept = 0, 0
    while not watched.guard.is_lost():
        kept += sum(delta.thinking for delta in watched.feed(thought(size)))
        seen += size
    assert CAP + GRACE_TOKENS < seen <= CAP + GRACE_TOKENS + size
    assert kept <= CAP
    assert (len(watched.guard.ids.get(0, [])), watched.tally.thinking, watched.tally.wasted) == (
        kept,
        kept,
        seen - kept,
    )


def test_thinking_has_no_gaps() -> None:
    """Where a long piece does not fit under the cap, a shorter one after it is dropped, too."""
    watched = Watched()
    assert [delta.thinking for delta in watched.feed(thought(2), thought(2), thought(1))] == [2]
    assert (watched.guard.ids[0], watched.guard.overrun, watched.tally.wasted) == ([100, 101], 2, 3)


@pytest.mark.parametrize("last", [thought(2, finish="stop"), Delta(finish_reason="length")])
def test_a_choice_that_ends_beyond_the_cap_is_lost(last: Delta) -> None:
    """It never answered: its finish is not delivered, and it is taken over."""
    watched = Watched()
    assert sum(delta.thinking for delta in watched.feed(*[thought()] * CAP)) == CAP
    assert watched.feed(thought(2), last) == []
    assert watched.guard.is_lost()
    assert watched.finished == set()


def test_a_lost_choice_waits_for_the_others() -> None:
    """They share its call: it is cut when each of them has finished, whatever the lost one still says."""
    watched = Watched(3)
    watched.feed(*[thought()] * (CAP + GRACE_TOKENS + 1))
    watched.feed(said(1), said(1, finish="stop"), said(0), said(0, finish="stop"))
    assert not watched.guard.is_lost()
    watched.feed(said(2, finish="stop"))
    assert watched.guard.is_lost()
    assert watched.guard.lost == {0}


def test_thoughts_are_kept_as_text_where_ids_mean_nothing() -> None:
    """The text up to the cap is what a soft second call goes on from."""
    watched = Watched(keeps_text=True)
    watched.feed(*[thought()] * (CAP + GRACE_TOKENS + 1))
    assert ("".join(watched.guard.thoughts[0]), watched.guard.ids) == ("ttt", {})
    assert watched.guard.can_take_over()
    assert not Guard(watched.tally, set(), 1).can_take_over()


async def test_choices_that_hold_the_cap_are_whole_beside_one_that_lies(scripted: ScriptedBackend) -> None:
    """A lost choice that its backend finishes first does not end the call that the others still answer in."""
    lies = Say(thinking=tokens("a b c d e f g h i j k l m n"), answer=tokens("never"))
    holds = Say(thinking=tokens("hm"), answer=tokens("word " * 29 + "word"))
    short = Say(thinking=tokens("hm"), answer=tokens("42"))
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[lies, short, holds], model=Model(honours_cap=False)))
        answer = await ask(gateway, {**STREAM, "n": 3, "thinkgate": {"thinking_tokens": CAP}})
        assert answer.payloads()[-1] == "[DONE]"
        texts = ["", "", ""]
        for one in (one for chunk in answer.chunks() for one in chunk["choices"]):
            texts[one["index"]] += one["delta"].get("content") or ""
        assert texts == ["never", "42", "word " * 29 + "word"]


# ---------------------------------------------------------------------------------------------- the soft fallback
class Chats:
    """A backend that answers chat calls from a list of batches, and remembers the calls."""

    id, kind = "a", "openai"

    def __init__(self, *batches: Sequence[Delta]) -> None:
        self._batches = batches
        self.calls: list[Call] = []

    async def generate(self, call: Call, express: Express | None = None) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        self.calls.append(call)
        for batch in self._batches:
            yield [msgspec.structs.replace(delta) for delta in batch]


def soft_call(n: int = 1, **fields: Any) -> Call:
    """A call of a request whose cap is held softly."""
    messages = [{"role": "user", "content": "six times seven"}]
    raw = {name: msgspec.Raw(json.dumps(value).encode()) for name, value in {"messages": messages, **fields}.items()}
    thinking = Thinking(enabled=True, cap=CAP, wrap_up=" so")
    return Call(surface="chat", request_id="r", model="m", fields=raw, thinking=thinking, max_tokens=60, n=n)


async def soft(chats: Chats, found: Capabilities = WRITES, n: int = 1) -> tuple[list[Delta], Any]:
    """The deltas of the second calls of choices that thought "hm" in two tokens, and the run."""
    upstream: Any = chats
    run = run_of(upstream_clock(), soft_call(n))
    run.model = models_of(config_of())["qwen"]
    for index in range(n):
        run.tally.add(thought(2, index))
    thoughts = {index: f"hm{index}" for index in range(n)}
    deltas: list[Delta] = []
    async for batch in soft_answers(run, upstream, found, thoughts, dict.fromkeys(thoughts, 2)):
        deltas += run.take(batch)
    return deltas, run


def upstream_clock() -> Any:
    """What tells a run the time."""
    return type("Clock", (), {"clock": staticmethod(lambda: 0.0)})


async def test_the_second_call_asks_for_the_answer() -> None:
    """It has the conversation, the thoughts as the assistant's in closed markers, the least effort, and less room."""
    chats = Chats([said()], [said(finish="stop")], [Delta(usage=Usage(prompt_tokens=20, completion_tokens=2))])
    deltas, run = await soft(chats)
    (call,) = chats.calls
    messages = json.loads(bytes(call.fields["messages"]))
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[1]["content"].startswith("<think>\nhm0 so</think>")
    assert messages[2]["content"] == ANSWER_NOW
    assert bytes(call.fields["reasoning_effort"]) == b'"low"'
    assert (call.n, call.thinking.enabled, call.max_tokens) == (1, False, 60 - 2 - GRACE_TOKENS - 1)
    assert "".join(delta.text for delta in deltas) == "aa"
    counts = run.tally.counts()
    assert (counts.prompt, counts.thinking, counts.answer) == (18, 2, 2)
    assert run.tally.is_estimated


async def test_a_server_that_continues_is_not_asked_again() -> None:
    """It goes on from the assistant's own message, where whatever it says is the answer."""
    chats = Chats([thought(1)], [thought(1, finish="stop")])
    deltas, run = await soft(chats, Capabilities(continues_assistant=True))
    (call,) = chats.calls
    assert [m["role"] for m in json.loads(bytes(call.fields["messages"]))] == ["user", "assistant"]
    assert bytes(call.fields["continue_final_message"]) == b"true"
    assert [(delta.kind, delta.answer, delta.thinking) for delta in deltas] == [(Kind.ANSWER, 1, 0)] * 2
    assert (run.tally.thinking, run.tally.answer, run.tally.wasted) == (2, 2, 0)


async def test_thinking_in_the_second_call_is_dropped() -> None:
    """It reaches no client and counts as wasted; a choice that only thinks ends all the same."""
    chats = Chats([thought(1)], [thought(2, finish="length")])
    deltas, run = await soft(chats)
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("", "length")]
    assert (run.tally.thinking, run.tally.wasted) == (2, 3)


async def test_every_choice_has_a_second_call_of_its_own() -> None:
    """Their deltas keep their index, and lose the wire of a call that the client never made."""
    chats = Chats([msgspec.structs.replace(said(finish="stop"), wire=b"{}")])
    deltas, _ = await soft(chats, n=3)
    assert sorted(delta.index for delta in deltas) == [0, 1, 2]
    assert not any(delta.wire for delta in deltas)
    assert len(chats.calls) == 3


@pytest.mark.parametrize(
    ("found", "fields", "effort"),
    [
        (WRITES, {}, b'"low"'),
        (WRITES, {"reasoning_effort": "high"}, b'"high"'),
        (Capabilities(), {}, None),
    ],
)
def test_the_effort_follows_the_cap(found: Capabilities, fields: dict[str, Any], effort: bytes | None) -> None:
    """A server that takes an effort gets the one that the cap allows, unless the client named one."""
    run = run_of(upstream_clock(), soft_call(**fields))
    run.model = models_of(config_of())["qwen"]
    sent = with_effort(run, found).fields.get("reasoning_effort")
    assert (None if sent is None else bytes(sent)) == effort
