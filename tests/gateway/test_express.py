"""The short way of ordinary tokens: from the backend's bytes to the client's without waking the request's task."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.backends.port import Delta
from gateway.edge.http_server import write_part
from gateway.modes.flow import Run
from tests.gateway.live import ASK, STREAM, Client, Json, Live, ask, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Say, tokens

pytestmark = pytest.mark.anyio
THINKS = Say(thinking=tokens("let me see now"), answer=tokens("it is 42 as far as I know"))
TOGETHER: Json = {**STREAM, "n": 3, "stream_options": {"include_usage": True}}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many deltas went the short way, and how many batches the long one."""
    counted = {"short": 0, "long": 0}
    express, take = Run._express, Run.take

    def counting_express(run: Run, *token: Any) -> bool:
        went = express(run, *token)
        counted["short"] += went
        return went

    def counting_take(run: Run, deltas: list[Delta]) -> list[Delta]:
        counted["long"] += 1
        return take(run, deltas)

    monkeypatch.setattr(Run, "_express", counting_express)
    monkeypatch.setattr(Run, "take", counting_take)
    return counted


def stable(answer: Any) -> list[Json]:
    """An answer's chunks without what differs between two requests."""
    chunks: list[Json] = answer.chunks()
    for chunk in chunks:
        chunk.pop("id", None)
        chunk.pop("created", None)
        chunk.get("thinkgate", {}).pop("request_id", None)
    return chunks


@pytest.mark.parametrize("body", [STREAM, TOGETHER, {**STREAM, "thinkgate": {"mode": "instant"}}])
async def test_the_short_way_changes_nothing_but_the_way(
    scripted: ScriptedBackend, ways: dict[str, int], monkeypatch: pytest.MonkeyPatch, body: Json
) -> None:
    """A stream's chunks and counts are the same, whichever way its tokens went; most went the short way."""
    async with live(tree_of(scripted)) as gateway:
        for _ in range(2):
            scripted.queue(Script(say=[THINKS], events_per_write=1))
        short = stable(await ask(gateway, body))
        went_short = ways["short"]
        monkeypatch.setattr(Run, "express", lambda _run: None)
        assert stable(await ask(gateway, body)) == short
    assert went_short >= body.get("n", 1) * 4
    assert ways["short"] == went_short


async def test_several_events_in_one_piece_go_the_long_way_together(
    scripted: ScriptedBackend, ways: dict[str, int]
) -> None:
    """Events that arrive together are one batch: one write for the client, not one each."""
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[THINKS], events_per_write=50))
        await ask(gateway, STREAM)
    assert ways["short"] == 0
    assert ways["long"] <= 3


@pytest.mark.parametrize(
    "more",
    [
        {"stop": ["far"]},
        {"thinkgate": {"envelope": {"tokens": 500}}},
        {"reasoning": {"exclude": True}},
    ],
)
async def test_what_is_worked_on_never_goes_the_short_way(
    scripted: ScriptedBackend, ways: dict[str, int], more: Json
) -> None:
    """Stop strings, an envelope and hidden thinking need every token looked at."""
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[THINKS], events_per_write=1))
        chunks = (await ask(gateway, {**STREAM, **more})).chunks()
    assert ways["short"] == 0
    assert chunks[-1]["thinkgate"]["mode"] == "reasoning"


async def test_a_whole_answer_has_no_short_way(scripted: ScriptedBackend, ways: dict[str, int]) -> None:
    """What is put together here goes through the task."""
    async with live(tree_of(scripted)) as gateway:
        scripted.queue(Script(say=[THINKS], events_per_write=1))
        assert (await ask(gateway, ASK)).json["usage"]["completion_tokens"] > 4
    assert ways["short"] == 0


async def test_a_token_is_delivered_before_the_next_arrives(scripted: ScriptedBackend, gateway: Live) -> None:
    """Each token reaches the client although the backend says nothing further."""
    gates = {number: Gate() for number in range(3, 8)}
    scripted.queue(Script(say=[THINKS], gates=gates, events_per_write=1))
    async with Client(gateway.port) as client:
        client.send(STREAM)
        await client.head()
        for gate in gates.values():
            await client.chunk()
            gate.open()
        while (event := await client.event()) not in {None, "[DONE]"}:
            last = event
    assert last is not None
    assert "thinkgate" in last


class Cycle:
    """uvicorn's, as far as a part of a body looks at it."""

    def __init__(self, **changed: Any) -> None:
        self.flow = type("Flow", (), {"write_paused": changed.get("write_paused", False)})
        self.disconnected = changed.get("disconnected", False)
        self.response_complete = changed.get("response_complete", False)
        self.chunked_encoding = changed.get("chunked_encoding", True)
        self.transport = self
        self.written: list[bytes] = []

    def write_now(self, data: bytes) -> None:
        self.written.append(data)

    async def send(self, message: Any) -> None:
        """What the extension is given."""


def test_a_part_is_one_chunk_on_the_wire() -> None:
    """Size in hexadecimal, the bytes, and nothing else."""
    cycle: Any = Cycle()
    assert write_part(cycle.send, b"data: twenty bytes\n\n")
    assert cycle.written == [b"14\r\ndata: twenty bytes\n\n\r\n"]


@pytest.mark.parametrize(
    "changed",
    [
        {"write_paused": True},
        {"disconnected": True},
        {"response_complete": True},
        {"chunked_encoding": False},
        {"chunked_encoding": None},
    ],
)
def test_anything_unusual_is_left_to_uvicorn(changed: dict[str, Any]) -> None:
    """A part is not written where it could not be, must wait, or would need another form."""
    cycle: Any = Cycle(**changed)
    assert not write_part(cycle.send, b"x")
    assert cycle.written == []


def test_an_empty_part_is_not_written() -> None:
    """An empty chunk would end the body."""
    cycle: Any = Cycle()
    assert not write_part(cycle.send, b"")
