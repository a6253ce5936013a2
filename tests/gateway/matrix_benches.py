"""One gateway per column of the enforcement matrix, in this process, and what its backend says in a cell.

Owns: starting a column, making its backend (scripted, or the embedded engine over a tiny model) say a cell's
texts, and what that backend processed. No socket between client and gateway, no probe loop, no waiting.
"""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from budget.ledger import Amounts
from gateway.app import Gateway
from gateway.backends.embedded import EmbeddedBackend
from gateway.backends.http_backend import HttpBackend
from gateway.config.schema import Config
from gateway.modes.soft import ANSWER_NOW
from gateway.slots import Tried
from kernels.engine import Engine
from tests.gateway.asgi import Answered, ask
from tests.gateway.matrix import DEFAULT, FLOOR, NATURAL, SEED, STOP, Cell, Column, Json, arguments, thinking_of
from tests.kernels.tiny import END, HERMES, scripted, tiny_tokenizer
from tests.scripted_backend import ScriptedBackend, is_trial
from tests.scripted_script import DEADLINE_S, Exchange, Script
from tests.scripted_stream import Choice, Say, Token, tokens, tool_call_tokens

TEMPLATE = HERMES + (
    "{% if add_generation_prompt %}{{ '[assistant]' }}"
    "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}{% endif %}"
)
MUSING = f"hm {STOP} {'wxyz ' * NATURAL}"[:NATURAL]


@dataclass(slots=True, kw_only=True)
class Processed:
    """What a backend processed for one request, by its own books.

    Attributes:
        prompt: tokens of the rendered prompt.
        output: tokens sampled, and those forced on it.
        thinking: thinking tokens of each choice that were sampled.
        answer: answer tokens of all choices, of calls that were not cut.
        is_whole: no call was cut, so all of it was received.
        trials: calls that only made it check what the answer asks for; in none of the other figures.
    """

    prompt: int
    output: int
    thinking: list[int]
    answer: int
    is_whole: bool
    trials: int = 0


@dataclass(slots=True, kw_only=True)
class Bench:
    """A running column."""

    name: str
    column: Column
    gateway: Gateway

    def play(self, cell: Cell) -> None:
        """Let the backend say what belongs to a cell."""
        raise NotImplementedError

    def thoughts(self, choice: int) -> list[str]:
        """The texts of a choice's thinking tokens."""
        raise NotImplementedError

    async def processed(self, cell: Cell) -> Processed | None:
        """The books of the request that just ended; None: this backend keeps none."""
        raise NotImplementedError

    async def ask(self, cell: Cell, *, stream: bool) -> Answered:
        """One request. Nothing may be held, in flight or open afterwards."""
        self.play(cell)
        answered = await ask(self.gateway, cell.body(stream=stream))
        await self.assert_settled()
        return answered

    async def assert_settled(self) -> None:
        """Nothing is held, watched, in flight or open upstream."""
        assert self.gateway.ledger.held() == Amounts()
        assert len(self.gateway.watch) == 0
        (model,) = self.gateway.serving.models.values()
        (slot,) = model.slots
        assert slot.in_flight == 0
        if isinstance(slot.backend, HttpBackend):
            async with asyncio.timeout(DEADLINE_S):
                while slot.backend.pool.busy():  # the end of the message comes in by itself
                    await asyncio.sleep(0)


@dataclass(slots=True, kw_only=True)
class ScriptedBench(Bench):
    """A column over the scripted backend."""

    backend: ScriptedBackend
    _says: Sequence[Say] = ()
    _tokens_per_event: int = 1
    _events_per_write: int = 1
    _trusted: Any = None

    def __post_init__(self) -> None:
        """Answer every call of a cell by its script; the probe is over."""
        self._trusted = self._slot().capabilities
        self.backend.default = self._script

    def _slot(self) -> Any:
        (model,) = self.gateway.serving.models.values()
        return model.slots[0]

    def play(self, cell: Cell) -> None:
        """See above; a backend that lied is trusted again, and tried again what the answer asks for."""
        self.backend.forget()
        slot = self._slot()
        slot.tried = Tried()
        slot.capabilities = slot.backend.capabilities = self._trusted
        self._says = [cell.asks.says(choice) for choice in range(cell.n)]
        self._tokens_per_event, self._events_per_write = cell.packing()

    def _script(self, exchange: Exchange) -> Script:
        request = exchange.json
        says = self._says
        if "messages" in request and "stop" in request:
            says = [_stopped_by_the_backend(say) for say in says]
        thoughts = _thoughts_to_answer(request)
        if thoughts is not None:
            found = re.search(r"t(\d+)\.", thoughts)
            says = [says[int(found[1]) if found else 0]]
        return Script(
            say=says,
            model=self.column.serves,
            thinks=None if thoughts is None else False,
            seed=SEED,
            tokens_per_event=self._tokens_per_event,
            events_per_write=self._events_per_write,
        )

    def thoughts(self, choice: int) -> list[str]:
        """See above."""
        return [token.text for token in thinking_of(choice)]

    async def processed(self, cell: Cell) -> Processed | None:
        """See above."""
        for exchange in self.backend.exchanges:
            await _ended(exchange)
        trials = [call for call in self.backend.calls if is_trial(call.json)]
        calls = [call for call in self.backend.calls if call not in trials]
        model = self.column.serves or self.backend.model
        whole = [call for call in calls if call.done.is_set()]
        thinking = [0] * cell.n
        for call in calls:
            for choice in call.choices:
                thinking[call.choice + choice.index] += _of_kind(choice, "thinking")
        return Processed(
            prompt=calls[0].base or len(model.prompt_ids(calls[0].json)),
            output=sum(len(choice.parts) for call in calls for choice in call.choices)
            + sum(_forced(chain.calls) for chain in self.backend.chains),
            thinking=thinking,
            answer=sum(_of_kind(choice, "answer") + _of_kind(choice, "eos") for c in whole for choice in c.choices),
            trials=len(trials),
            is_whole=len(whole) == len(calls),
        )


def _thoughts_to_answer(request: Json) -> str | None:
    """The thoughts that a second chat call hands over, be it as its last message or before its last word."""
    messages = request.get("messages") or [{"content": ""}]
    if request.get("continue_final_message"):
        return str(messages[-1]["content"])
    return str(messages[-2]["content"]) if messages[-1]["content"] == ANSWER_NOW else None


def _counts(exchange: Exchange) -> Script:
    """What is said while the backend is measured: counting goes on where the assistant's own message ends."""
    if exchange.json.get("continue_final_message"):
        return Script(say=[Say(answer=tokens("11, 12, 13"))], thinks=False)
    return Script(say=[Say(thinking=tokens("well " * NATURAL), answer=tokens("it is 42"))])


def _of_kind(choice: Choice, kind: str) -> int:
    return sum(what == kind for what, _ in choice.parts)


def _forced(calls: Sequence[Exchange]) -> int:
    """Ids in the prompts of a chain's calls that none of its earlier calls sampled."""
    forced, known = 0, list[int]()
    for call in calls:
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(known, call.tail, strict=False))
        forced += len(call.tail) - len(list(shared))
        sampled = next((choice for choice in call.choices if call.base or choice.index == call.choice), None)
        known = [*call.tail, *(sampled.ids() if sampled else ())]
    return forced


def _stopped_by_the_backend(say: Say) -> Say:
    """What a chat endpoint sends that matches the stop string itself, as in instant mode."""
    before = [token for token in say.answer if STOP not in token.text]
    at = next(i for i, token in enumerate(say.answer) if STOP in token.text)
    last = say.answer[at]
    shown = Token(last.id, last.text, {"content": last.text.partition(STOP)[0]})
    return Say(thinking=say.thinking, answer=(*before[:at], shown), stop_reason=STOP)


async def _ended(exchange: Exchange) -> None:
    """Until the answer was written, or the gateway closed the connection under it."""
    if exchange.done.is_set():
        return
    async with asyncio.timeout(DEADLINE_S):
        ends = [asyncio.ensure_future(event.wait()) for event in (exchange.done, exchange.closed)]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()


@dataclass(slots=True, kw_only=True)
class EmbeddedBench(Bench):
    """A column over the embedded engine. Every choice says the same: the tiny model does not know which it is."""

    engine: Engine
    script: Told

    def play(self, cell: Cell) -> None:
        """See above."""
        said = cell.asks.says(0)
        if cell.asks.hermes:
            said = Say(answer=tool_call_tokens("get_weather", arguments(0)))
        self.script.tell(MUSING + END if cell.tokens != 0 else "", "".join(t.text for t in said.json or said.answer))

    def thoughts(self, choice: int) -> list[str]:
        """See above: a token per byte."""
        return list(MUSING)

    async def processed(self, cell: Cell) -> Processed | None:
        """See above."""
        return None


class Told:
    """What the tiny model says: thinking until its end marker came, however that came, and then the answer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end: int = tokenizer.encode(END)[0]
        self.tell(MUSING + END, "ok")

    def tell(self, thinking: str, answer: str) -> None:
        """From now on."""
        self._thinking: list[int] = self._tokenizer.encode(thinking) if thinking else []
        self._answer: list[int] = self._tokenizer.encode(answer)

    def reply(self, so_far: list[int]) -> int:
        """The next token."""
        said, told = so_far, self._thinking or self._answer
        if self._end in so_far:
            said, told = so_far[so_far.index(self._end) + 1 :], self._answer
        eos: int = self._tokenizer.eos_token_id
        return told[len(said)] if len(said) < len(told) else eos


def _config(column: Column, **backend: Any) -> Config:
    model = {
        "upstream_model": "scripted",
        "backends": [{"id": "a", "kind": column.kind, **backend}],
        "thinking": {"default_tokens": DEFAULT, "max_tokens": 256, "answer_floor_tokens": FLOOR, **column.thinking},
        "answer": {"default_tokens": 128, "max_tokens": 1000},
        "price_usd_per_mtok": {"prompt": 1, "cached": 0.5, "thinking": 4, "answer": 2},
    }
    return Config.model_validate({"models": {"qwen": model}})


@asynccontextmanager
async def bench(name: str, column: Column) -> AsyncIterator[Bench]:
    """A column, measured and ready."""
    if column.model is None:
        tokenizer = tiny_tokenizer(template=TEMPLATE)
        told = Told(tokenizer)
        engine = Engine(scripted(tokenizer, told.reply))
        gateway = Gateway(_config(column, path="tiny"), log_stream=io.StringIO())
        (model,) = gateway.serving.models.values()
        (slot,) = model.slots
        slot.backend = EmbeddedBackend(id="a", path="tiny", engine=engine, thinking=model.thinking)
        slot.capabilities = await slot.backend.probe()
        try:
            yield EmbeddedBench(name=name, column=column, gateway=gateway, engine=engine, script=told)
        finally:
            await slot.backend.close()
        return
    async with ScriptedBackend(model=column.model) as backend:
        gateway = Gateway(_config(column, url=backend.url), log_stream=io.StringIO())
        (model,) = gateway.serving.models.values()
        (slot,) = model.slots
        if column.continues:
            backend.default = _counts
        slot.capabilities = await slot.backend.probe()
        try:
            yield ScriptedBench(name=name, column=column, gateway=gateway, backend=backend)
        finally:
            await slot.backend.close()
