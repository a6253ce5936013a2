"""Backends that do what no backend should: what reaches the client and the ledger all the same."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from budget.envelope import Envelope
from budget.ledger import Amounts, Remaining, Standing, Unit, Used
from budget.price import PriceTable
from gateway.ask.request import parse_chat
from gateway.ask.resolve import resolve_chat
from gateway.backends.port import Call, Delta, Kind, Thinking, Usage
from gateway.backends.reader import MarkerIds, StreamReader
from gateway.errors import InvalidRequest, UpstreamError
from gateway.modes.flow import Run
from gateway.tally import Tally

MARKERS = MarkerIds(15, 16)


class Held:
    """A hold that only remembers what it was told."""

    ceiling = Amounts()
    is_offline = False

    def __init__(self) -> None:
        self.used: Used = Amounts()

    async def __aenter__(self) -> Held:
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    async def extend(self, more: Amounts) -> None:
        """Nothing limits."""

    def report(self, used: Used) -> None:
        """Remember."""
        self.used = used

    def remaining(self, unit: Unit) -> Remaining | None:
        """Nothing limits."""
        return None

    def standings(self) -> tuple[Standing, ...]:
        """Nothing limits."""
        return ()


def call(*, enabled: bool = True, cap: int | None = 5) -> Call:
    """A chat call."""
    return Call(
        surface="chat",
        request_id="r",
        model="m",
        fields={},
        thinking=Thinking(enabled=enabled, cap=cap),
        max_tokens=20,
    )


def run(of: Call, *, choices: int = 1) -> Run:
    """A run of it."""
    tally = Tally(PriceTable(), most_prompt=100, most_output=20 * choices)
    model: Any = None
    return Run(model, of, tally, Held(), Envelope(), lambda: 0.0, choices=choices)


def event(delta: dict[str, Any], ids: list[int], **more: object) -> bytes:
    """A chunk as vLLM writes it."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": ids, **more}
    return msgspec.json.encode({"id": "c", "object": "chat.completion.chunk", "created": 1, "choices": [choice]})


def first(prompt: list[int]) -> bytes:
    """The first chunk, with the prompt's ids."""
    choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    return msgspec.json.encode({"id": "c", "created": 1, "choices": [choice], "prompt_token_ids": prompt})


def read(of: Call, *events: bytes) -> list[Delta]:
    """The deltas of some events."""
    reader = StreamReader(of, MARKERS, expects_ids=True)
    out: list[Delta] = []
    for one in events:
        reader.read(one, out)
    return out


def test_reasoning_without_any_marker_is_thinking() -> None:
    """Where no marker was ever seen, the field says what the text is: it counts under the cap and can be hidden."""
    deltas = read(call(), first([1, 2, 3]), *(event({"reasoning": f"t{i}"}, [100 + i]) for i in range(8)))
    assert [d.kind for d in deltas[1:]] == [Kind.THINKING] * 8
    assert sum(d.thinking for d in deltas) == 8
    assert sum(d.answer for d in deltas) == 0
    running = run(call())
    kept = running.take(deltas)
    assert sum(d.thinking for d in kept) <= 5
    assert (running.ended_by, running.overrun) == ("cap", 3)


def test_reasoning_after_a_closed_chain_is_answer() -> None:
    """Once the prompt closed the chain, text that a parser still calls reasoning is the answer."""
    deltas = read(call(enabled=False, cap=0), first([1, 15, 16, 9]), event({"reasoning": "Paris"}, [100]))
    assert (deltas[1].kind, deltas[1].answer, deltas[1].thinking) == (Kind.ANSWER, 1, 0)
    assert b'"content":"Paris"' in deltas[1].wire


def test_white_space_between_json_tokens_changes_nothing() -> None:
    """Events with spaces give the same deltas and leak no ids."""
    events = [first([1, 2, 15]), event({"reasoning": "a"}, [7]), event({}, [16]), event({"content": "b"}, [8])]
    spaced = [one.replace(b'":', b'": ').replace(b',"', b', "') for one in events]
    compact, loose = read(call(), *events), read(call(), *spaced)
    assert [(d.kind, d.text, d.thinking, d.answer, d.injected, d.prompt_tokens) for d in loose] == [
        (d.kind, d.text, d.thinking, d.answer, d.injected, d.prompt_tokens) for d in compact
    ]
    assert not any(b"token_ids" in d.wire for d in loose)


def test_unknown_finish_reason_becomes_stop() -> None:
    """Only OpenAI's five reasons reach a client; another one is kept as stop_reason."""
    (_, last) = read(call(), first([1]), event({"content": "x"}, [9], finish_reason="weird_abort"))
    assert (last.finish_reason, last.stop_reason) == ("stop", "weird_abort")
    choice = msgspec.json.decode(last.wire)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "weird_abort")


def test_content_after_the_finish_is_wasted() -> None:
    """What comes for a choice after its finish reaches no client, is counted, and ends the reading."""
    running = run(call())
    late = [Delta(text="x", answer=1, token_ids=[1]) for _ in range(30)]
    kept = running.take([Delta(text="a", answer=1, token_ids=[1], finish_reason="stop"), *late])
    assert [d.text for d in kept] == ["a"]
    assert (running.tally.answer, running.tally.wasted, running.ended_by) == (1, 30, "hold")


@pytest.mark.parametrize("index", [-1, 1, 99])
def test_choice_that_was_not_asked_for_is_an_upstream_error(index: int) -> None:
    """With n = 1 there is no choice but 0."""
    with pytest.raises(UpstreamError, match="not asked for"):
        run(call()).take([Delta(index=index, text="a", answer=1)])


def test_usage_beyond_what_was_sent_is_not_believed() -> None:
    """Ids received are the output; a prompt is at most its bound, cached at most the prompt."""
    tally = Tally(PriceTable(), most_prompt=100, most_output=20)
    tally.add(Delta(answer=3, token_ids=[1, 2, 3], prompt_tokens=7))
    tally.add(Delta(usage=Usage(prompt_tokens=10**9, completion_tokens=10**12, cached_tokens=10**10)))
    counts = tally.counts()
    assert (counts.prompt, counts.cached, counts.answer) == (0, 100, 3)


def test_negative_usage_is_an_upstream_error() -> None:
    """A count below zero makes the event no chunk."""
    usage = msgspec.json.encode({"choices": [], "usage": {"prompt_tokens": -5, "completion_tokens": 1}})
    with pytest.raises(UpstreamError):
        read(call(), usage)


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "conversation", "continue_final_message"])
def test_arguments_of_the_templating_are_refused_by_name(name: str) -> None:
    """A client may set what its template reads, not how templating works."""
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: True}}
    fields, _ = parse_chat(msgspec.json.encode(body))
    with pytest.raises(InvalidRequest) as caught:
        resolve_chat(fields, "m", None)
    assert caught.value.param == f"chat_template_kwargs.{name}"
