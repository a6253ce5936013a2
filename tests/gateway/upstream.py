"""A backend in memory that plays segments step by step, and a run to carry them out in."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from budget.chain import Forcing
from budget.envelope import Envelope
from budget.price import PriceTable
from gateway.backends.port import Call, Capabilities, Delta, Segment, Thinking, Usage
from gateway.errors import UpstreamError
from gateway.modes.chains import Chains
from gateway.modes.choice import TakeOver
from gateway.modes.flow import Run
from gateway.tally import Tally
from tests.gateway.test_strange_backends import Held

START, END, EOS, WRAP, WAIT = 15, 16, 2, 90, 91
PROMPT = [1, 7, 8, START]
FORCING = Forcing(opening=(START,), closing=(END,), wrap_up=(WRAP,), wait=(WAIT,), start_id=START, end_id=END)
FOUND = Capabilities(cap_binds=False, forcing=FORCING, token_ids_out=True)
Step = list[Delta] | BaseException | asyncio.Event | float


def say(*ids: int, finish: str | None = None, stop: object = None) -> list[Delta]:
    """A batch with one delta of these ids, each spelt as its number."""
    text = "".join("</think>" if token == END else f" {token}" for token in ids if token != EOS)
    return [Delta(text=text, token_ids=list(ids), finish_reason=finish, stop_reason=stop)]


def usage(prompt: int, cached: int = 0) -> list[Delta]:
    """The last batch of a segment."""
    return [Delta(usage=Usage(prompt_tokens=prompt, completion_tokens=0, cached_tokens=cached))]


class Upstream:
    """Plays segments; implements the part of the port that chains use.

    Args:
        play: by choice, the steps of each of its segments: a batch is given, an exception raised, an event waited
            for, a number of seconds passed.

    Attributes:
        asked: the segments, in order.
        open: how many are open.
        now_s: the time.
    """

    id, kind = "a", "vllm"

    def __init__(self, *play: Sequence[Sequence[Step]], prompt: Sequence[int] = PROMPT) -> None:
        self._play = [list(segments) for segments in play]
        self.prompt = list(prompt)
        self.asked: list[Segment] = []
        self.open = 0
        self.now_s = 0.0

    def clock(self) -> float:
        """The time."""
        return self.now_s

    async def tokenize(self, call: Call) -> list[int]:
        """See the port."""
        await asyncio.sleep(0)
        return self.prompt

    async def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        choice = msgspec.json.decode(segment.fields["seed"]) - 5
        self.asked.append(msgspec.structs.replace(segment, prompt=list(segment.prompt)))
        steps = self._play[choice].pop(0)
        self.open += 1
        try:
            for step in steps:
                await asyncio.sleep(0)
                if isinstance(step, BaseException):
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, float):
                    self.now_s += step
                else:
                    yield [msgspec.structs.replace(delta) for delta in step]
        finally:
            self.open -= 1

    def choice_of(self, segment: Segment) -> int:
        """Which choice a segment belongs to."""
        return int(msgspec.json.decode(segment.fields["seed"])) - 5


def call(n: int = 1, *, cap: int | None = 3, max_tokens: int = 20, fields: Mapping[str, Any] | None = None) -> Call:
    """A chat call."""
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in {"seed": 5, **(fields or {})}.items()}
    return Call(
        surface="chat",
        request_id="r",
        model="m",
        fields=raw,
        thinking=Thinking(enabled=True, cap=cap, wrap_up="so", answer_floor=2),
        max_tokens=max_tokens,
        n=n,
    )


def run_of(upstream: Upstream, of: Call, envelope: Envelope | None = None) -> Run:
    """A run of it."""
    tally = Tally(PriceTable(), most_prompt=100, most_output=20 * of.n)
    model: Any = type("Priced", (), {"prices": PriceTable()})
    return Run(model, of, tally, Held(), envelope or Envelope(), upstream.clock, choices=of.n)


async def read(run: Run, upstream: Upstream, found: Capabilities = FOUND, lost: Sequence[TakeOver] = ()) -> list[Delta]:
    """All deltas of a run's chains, counted as `flow` counts them."""
    backend: Any = upstream
    out: list[Delta] = []
    async with aclosing(Chains(run, backend, found).deltas(lost)) as batches:
        async for batch in batches:
            out += run.take(batch)
    assert upstream.open == 0
    return out


def ids_of(deltas: Sequence[Delta], choice: int = 0) -> list[int]:
    """The token ids of a choice."""
    return [token for delta in deltas if delta.index == choice and delta.usage is None for token in delta.token_ids]


def finishes(deltas: Sequence[Delta]) -> dict[int, str]:
    """The finish_reason of every choice."""
    return {delta.index: delta.finish_reason for delta in deltas if delta.finish_reason is not None}


BROKEN = UpstreamError("broken")
