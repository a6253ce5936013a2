"""Many requests at once, each of which goes wrong at another place of its chain of calls.

A `Story` is a request and how its backend serves it undisturbed. A `Case` is one such request with an incident in
one call of one choice. Cases run side by side on one gateway: a number in their prompts tells them apart.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from gateway.modes.guard import GRACE_TOKENS
from tests.gateway.live import DEADLINE_S, MODEL, Answer, Client, Json, Live, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange, Reply, Script
from tests.scripted_stream import Model, Say, tokens
from tests.scripted_tokens import decode

CAP = 1
MOST_AT_ONCE = 100
LABEL = re.compile(r"case(\d{4})")
TEXTS = re.compile(rb'"(?:reasoning|content)":"[^"]')
TOKEN_IDS = re.compile(rb'"token_ids":\[([^\]]*)\]')
LIMIT = {"scope": f"model:{MODEL}", "unit": "tokens", "amount": 10**9, "window": "total"}
LONG = [Say(thinking=tokens(f"{i} b c d e f g h i j k l m n"), answer=tokens(f"is {i}")) for i in range(3)]
WAITS = [Say(thinking=tokens(f"{i} b"), answer=tokens(f"is {i}"), again=[tokens("c d")]) for i in range(3)]
CUT_AFTER = CAP + GRACE_TOKENS  # thinking tokens; at the next one a choice is lost
NO_IDS = Model(honours_cap=False, gives_ids=False, takes_ids=False, tokenizes=False)


@dataclass(frozen=True, slots=True)
class Place:
    """A call of a choice (-1: all choices in one call), and the number of events it had sent by then.

    Attributes:
        last: the number of that call's last event.
    """

    call: int
    choice: int
    events: int
    last: int = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wrong(Script):
    """A script that goes wrong in one call of one choice; `others` is how the other choices are played."""

    place: Place
    how: Script | Reply
    others: Script = field(default_factory=Script)

    def for_call(self, number: int, choice: int, exchange: Exchange) -> Script | Reply:
        """See Script."""
        if choice != self.place.choice:
            return self.others
        return self.how if number == self.place.call else Script()


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """A request and how its backend serves it.

    Attributes:
        thinkgate: what it asks for.
        thinking: the model's configuration.
        say: what each choice says.
        serves: how the model behaves while it serves; None: as it was measured.
        measured: how it behaves when it is probed.
        kind: of the backend.
        step: of several choices' calls every so many events are places for an incident.
    """

    thinkgate: Json
    thinking: Json = field(default_factory=dict)
    say: Sequence[Say] = tuple(LONG)
    serves: Model | None = None
    measured: Model = field(default_factory=Model)
    kind: str = "vllm"
    step: int = 1

    def body(self, case: Case, *, n: int) -> Json:
        """The request of a case."""
        question = f"what is case{case.number:04} times 7"
        ids = {} if self.kind == "openai" else {"return_token_ids": True, "seed": 5}
        return {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "stream": case.stream,
            "n": n,
            "thinkgate": self.thinkgate,
            **ids,
        }

    def script(self, place: Place, how: Script | Reply, others: Script | None = None) -> Script | Reply:
        """What plays a case; `place.choice` is -1 where its call serves all choices."""
        if place.choice < 0:
            return how if isinstance(how, Reply) else replace(how, say=self.say, model=self.serves)
        rest = others or Script()
        return Wrong(say=self.say, model=self.serves, place=place, how=how, others=rest, seed=5)


STORIES = {
    "two-phase": Story(thinkgate={"thinking_tokens": CAP}, thinking={"enforce": "two_phase"}),
    "wait": Story(
        thinkgate={"thinking_tokens": 20, "min_thinking_tokens": 4},
        thinking={"enforce": "two_phase"},
        say=WAITS,
        step=2,
    ),
    "take-over": Story(thinkgate={"thinking_tokens": CAP}, serves=Model(honours_cap=False)),
    "soft": Story(thinkgate={"thinking_tokens": CAP}, measured=NO_IDS, serves=NO_IDS, kind="openai", step=3),
}


@dataclass(slots=True)
class Case:
    """One request that something happens to.

    Attributes:
        number: tells it from the others.
        place: where it happens,
        how: in what way.
        others: how its other choices are played; None: undisturbed.
        stream: whether its client streams.
        got: what its client got, if it read all of that.
        received: the bytes of it.
    """

    number: int
    place: Place
    how: Script | Reply
    others: Script | None
    stream: bool
    got: Answer | None = None
    received: bytes = b""

    @property
    def request_id(self) -> str:
        """As its log line has it."""
        return f"case-{self.number}"

    @property
    def answer(self) -> Answer:
        """What its client got."""
        assert self.got is not None
        return self.got

    def chunks(self) -> list[Json]:
        """The events of its answer that are JSON."""
        return self.answer.chunks()


class Stage:
    """A gateway on which a story is played again and again."""

    def __init__(self, story: Story, gateway: Live, scripted: ScriptedBackend, *, n: int) -> None:
        self.story, self.gateway, self.scripted, self.n = story, gateway, scripted, n
        self.cases: dict[int, Case] = {}
        self.hold = 0
        self._numbers = itertools.count(1)
        self._chats: Counter[int] = Counter()
        scripted.default = self._play

    def _play(self, exchange: Exchange) -> Script | Reply:
        """Answer a conversation's first call, or any chat call."""
        request = exchange.json
        text = json.dumps(request["messages"]) if "messages" in request else self._text(request["prompt"])
        found = LABEL.search(text)
        assert found is not None, text
        number = int(found[1])
        case = self.cases[number]
        before, self._chats[number] = self._chats[number], self._chats[number] + 1
        place = case.place
        if self.story.kind == "openai":
            here = before == (place.call and 1 + place.choice)
            chosen = case.how if here else case.others or Script()
            if isinstance(chosen, Reply):
                return chosen
            say = self.story.say if not before else [self.story.say[before - 1]]
            return replace(chosen, say=say, model=self.story.serves)
        return self.story.script(place, case.how, case.others)

    def _text(self, prompt: list[int]) -> str:
        return decode(prompt, self.scripted._texts)

    def case(
        self, place: Place, how: Script | Reply | None = None, others: Script | None = None, *, stream: bool = True
    ) -> Case:
        """A new one."""
        number = next(self._numbers)
        self.cases[number] = Case(number, place, how or Script(), others, stream)
        return self.cases[number]

    async def rehearse(self) -> list[Place]:
        """Play it undisturbed. Returns: every place of every call, an incident at which must be noticed."""
        case = self.case(Place(-1, 0, 0))
        await self.serve([case])
        assert case.answer.status == 200, case.answer.body
        assert case.answer.payloads()[-1] == "[DONE]", case.answer.body
        self.hold = next(c["thinkgate"] for c in case.chunks() if "thinkgate" in c)["hold"]["tokens"]
        calls = self.scripted.calls
        self.scripted.forget()
        return [place for number, call in enumerate(calls) for place in self._places(number, call)]

    def _places(self, number: int, call: Exchange) -> Iterator[Place]:
        if call.path.endswith("/chat/completions"):
            later = self.story.kind == "openai" and number > 0
            where = (1, number - 1) if later else (0, -1)
        else:
            where = (call.phase, call.choice)
        # What the gateway cuts off goes on for a few events that nobody takes note of any more.
        noticed = call.events_sent if call.done.is_set() else self.n * (2 + CUT_AFTER)
        # Among the choices of one call every fourth event is another choice's than the last one.
        step = 1 if self.n == 1 else 4 if where[1] < 0 else self.story.step
        return (Place(*where, events, call.events_sent - 1) for events in range(0, noticed, step))

    async def serve(self, cases: Sequence[Case]) -> None:
        """Ask for all of them at once, and read every answer to its end."""
        limit = asyncio.Semaphore(MOST_AT_ONCE)

        async def one(case: Case) -> None:
            async with limit, self.client(case) as client:
                case.got = await client.answer()
                case.received = case.got.body

        async with asyncio.TaskGroup() as tasks:
            for case in cases:
                tasks.create_task(one(case))

    @asynccontextmanager
    async def client(self, case: Case) -> AsyncIterator[Client]:
        """A client that has asked for a case."""
        async with Client(self.gateway.port) as client:
            body = self.story.body(case, n=self.n)
            client.send(body, headers={"x-request-id": case.request_id})
            yield client

    async def assert_clean(self, cases: Sequence[Case]) -> list[Json]:
        """Nothing is open or held; each was charged at least what it received. Returns: their log lines."""
        await self.gateway.idle()
        async with asyncio.timeout(DEADLINE_S):
            while not all(call.done.is_set() or call.closed.is_set() for call in self.scripted.exchanges):
                await asyncio.sleep(0)
            while self.gateway.pool().busy():
                await asyncio.sleep(0)
        await self.gateway.assert_settled()
        lines = {line["request_id"]: line for line in self.gateway.request_lines()}
        for case in cases:
            used = sum(lines[case.request_id]["tokens"].values())
            assert received(case.received) <= used <= self.hold, case
        assert self.gateway.settled_tokens() == sum(sum(line["tokens"].values()) for line in lines.values())
        return [lines[case.request_id] for case in cases]


def received(body: bytes) -> int:
    """Tokens whose ids stand in some events; where there are none, events with text."""
    ids = sum(len(found.split(b",")) for found in TOKEN_IDS.findall(body) if found)
    return ids or len(TEXTS.findall(body))


def assert_broken_off(case: Case) -> Json:
    """The answer says that it failed: with a status of its own, or in the last event. Returns: the error."""
    answer = case.answer
    if not answer.headers["content-type"].startswith("text/event-stream"):
        assert answer.status >= 400, (case, answer)
        return answer.error
    assert (answer.status, answer.payloads().count("[DONE]")) == (200, 0), case
    *before, last = answer.chunks()
    assert list(last) == ["error"], case
    assert before, "an error before the first byte has a status"
    assert not any("error" in chunk or "thinkgate" in chunk for chunk in before), case
    error: Json = last["error"]
    return error


@asynccontextmanager
async def stage(
    story: Story, scripted: ScriptedBackend, *, n: int, more: Sequence[ScriptedBackend] = (), **server: Any
) -> AsyncIterator[Stage]:
    """A gateway for a story."""
    for backend in (scripted, *more):
        backend.model = story.measured
    thinking = {"default_tokens": 32, "max_tokens": 256, "answer_floor_tokens": 16, **story.thinking}
    tree = tree_of(scripted, *more, model={"thinking": thinking}, limits=[LIMIT], server=server)
    for entry in tree["models"][MODEL]["backends"]:
        entry["kind"] = story.kind
    async with live(tree) as gateway:
        for backend in (scripted, *more):
            backend.forget()
        # Every case meets a backend that is still trusted, or trusted again.
        vars(gateway.slot())["distrust"] = lambda **_: None
        yield Stage(story, gateway, scripted, n=n)
