"""What a scripted upstream is told to do, and what it remembers of each request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from tests.scripted_stream import Choice, Json, Model, Say, dump

DEADLINE_S = 10.0
END = -2


@dataclass(slots=True)
class Gate:
    """Holds a stream until the test opens it; `reached` says that the stream stands there."""

    reached: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Event = field(default_factory=asyncio.Event)

    async def hold(self) -> None:
        """Stand here until opened."""
        self.reached.set()
        await self.opened.wait()

    async def wait(self) -> None:
        """For the test: until the stream stands here."""
        async with asyncio.timeout(DEADLINE_S):
            await self.reached.wait()

    def open(self) -> None:
        """Let the stream go on."""
        self.opened.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How one conversation is answered: a chat call, or one chain of completions calls per choice.

    Attributes:
        say: what the model would say, per choice; the last entry serves all further choices.
        model: how the model behaves; None: as the server's.
        gates: where to stand still: number of events sent so far -> gate. -1: before the head;
            END: after the last event, before the end of the HTTP message.
        tokens_per_event: tokens that travel in one event.
        events_per_write: events that travel in one write.
        bytes_per_write: cut every write into pieces of so many bytes, each an HTTP chunk of its own.
        newline: line ending of the events.
        replace: events to send instead, or (None) to leave out, by their number.
        dies_after: break off after so many events.
        dies_by: `close` sends FIN in the middle of the chunked body, `reset` sends RST.
        thinks: whether the model thinks; None: as its prompt and its habits say.
        then: how the next call of a chain is played (its gates, events, deaths; `say`, `model`, `thinks` and
            `seed` stay as they are here), a plain answer to it, or what chooses; None: like this one,
            with no gates, nothing replaced and no death. A script's own `then` is for the call after that.
        only: `gates`, `replace` and death are for this choice's chain; None: for every chain.
        seed: of the first choice, if the chains' seeds are known: choice i has `seed + i`; None: the first
            seed to arrive.
    """

    say: Sequence[Say] = (Say(),)
    model: Model | None = None
    gates: Mapping[int, Gate] = field(default_factory=dict)
    tokens_per_event: int = 1
    events_per_write: int = 1
    bytes_per_write: int | None = None
    newline: bytes = b"\n"
    replace: Mapping[int, bytes | None] = field(default_factory=dict)
    dies_after: int | None = None
    dies_by: Literal["close", "reset"] = "close"
    thinks: bool | None = None
    then: Script | Reply | Callable[[Exchange], Script | Reply] | None = None
    only: int | None = None
    seed: int | None = None

    def without_incidents(self) -> Script:
        """The same, undisturbed."""
        return replace(self, gates={}, replace={}, dies_after=None)

    def for_call(self, number: int, choice: int, exchange: Exchange) -> Script | Reply:
        """What plays call `number` (from 0) of the chain of a choice."""
        script, played = self, None
        for _ in range(number):
            after = script.then
            played = after(exchange) if callable(after) else after
            script = played if isinstance(played, Script) else replace(script.without_incidents(), then=None)
        if isinstance(played, Reply):
            return played
        return script if script.only in {None, choice} else script.without_incidents()


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A plain answer; `raw` is written as it is instead, and the connection closed."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    raw: bytes | None = None
    gate: Gate | None = None


def refusal(status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> Reply:
    """An error as vLLM words it: `code` is the status, as a number."""
    error = {"message": message, "type": kind, "param": param, "code": status}
    return Reply(status=status, body=dump({"error": error}))


def json_reply(value: object, status: int = 200) -> Reply:
    """A JSON answer."""
    return Reply(status=status, body=dump(value))


NOT_FOUND = json_reply({"detail": "Not Found"}, 404)


@dataclass(slots=True)
class Exchange:
    """One request and what became of it.

    Attributes:
        connection: number of the connection it came on, in order of arrival.
        events_sent: SSE events handed to the socket.
        choices: what was generated; all of it, sent or not.
        choice: which choice of its conversation a completions call generates.
        phase: how many calls that chain had before.
        base: length of the rendered prompt in `prompt`; 0: its own prompt is text, or rendered here.
        cached: prompt tokens that the prefix cache held.
        done: the answer was written to its end.
        closed: the peer closed the connection before that.
    """

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    connection: int
    events_sent: int = 0
    choices: list[Choice] = field(default_factory=list)
    choice: int = 0
    phase: int = 0
    base: int = 0
    cached: int = 0
    done: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> Json:
        """The request body, decoded."""
        decoded: Json = json.loads(self.body)
        return decoded

    @property
    def tail(self) -> list[int]:
        """The prompt ids behind the rendered prompt: what was generated and forced so far."""
        return [int(token) for token in self.json["prompt"][self.base :]] if self.base else []

    async def wait_closed(self) -> None:
        """Until the peer has closed the connection under this exchange."""
        async with asyncio.timeout(DEADLINE_S):
            await self.closed.wait()

    async def wait_done(self) -> None:
        """Until the answer was written to its end."""
        async with asyncio.timeout(DEADLINE_S):
            await self.done.wait()
