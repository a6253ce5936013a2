"""A backend or a client that goes away anywhere in the calls that hold a cap: nothing stays open, held or unsaid."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Literal

import pytest

from tests.gateway.wrecks import STORIES, Case, Place, assert_broken_off, stage
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import END, Gate, Script

How = Literal["close", "reset"]
HOWS: tuple[How, How] = ("close", "reset")
EVERY = pytest.mark.parametrize("name", STORIES)
CHOICES = pytest.mark.parametrize("n", [1, 3])


def ways(places: list[Place], n: int) -> list[tuple[Place, How, bool]]:
    """Places with FIN and RST, and a stream and none, in turn: one choice's with both, of several's with either."""
    turns = range(2 if n == 1 else 1)
    return [(place, HOWS[(i + j) % 2], (i // 2 + j) % 2 == 1) for i, place in enumerate(places) for j in turns]


def is_first(place: Place) -> bool:
    """Whether nothing of a choice can have been delivered by then."""
    return place.call == 0 and place.choice <= 0 and place.events == 0


@CHOICES
@EVERY
async def test_backend_that_breaks_off_anywhere(scripted: ScriptedBackend, name: str, n: int) -> None:
    """Wherever its stream ends, by FIN or RST, the client is told, and everything else of the request is closed."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        assert len(places) > 7 * n
        cases = [
            on.case(place, Script(dies_after=place.events, dies_by=how), stream=stream)
            for place, how, stream in ways(places, n)
        ]
        await on.serve(cases)
        for case in cases:
            assert_broken_off(case)
            if (
                isinstance(case.how, Script) and case.how.dies_by == "close"
            ):  # a reset may overtake what was sent before
                assert (case.answer.status == 200) == (case.stream and not is_first(case.place))
        await on.assert_clean(cases)


@CHOICES
@EVERY
async def test_client_that_leaves_anywhere(scripted: ScriptedBackend, name: str, n: int) -> None:
    """Wherever its backend's calls stand, they are all closed, and what was received is settled."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        places.append(replace(places[0], events=-1))

        async def leave(place: Place, how: How, stream: bool) -> Case:
            gate = Gate()
            case = on.case(place, Script(gates={place.events: gate}), stream=stream)
            async with on.client(case) as client:
                await gate.wait()
                case.received = client.received()
                client.leave(how)
            return case

        cases = await asyncio.gather(*(leave(*which) for which in ways(places, n)))
        lines = await on.assert_clean(cases)
        assert {line["ended_by"] for line in lines} == {"disconnect"}


@CHOICES
@EVERY
async def test_backend_that_stops_altogether(name: str, n: int) -> None:
    """A process that dies at any call takes no other request with it: each is told, and the backend is out."""
    story = STORIES[name]
    async with ScriptedBackend() as dying, stage(story, dying, n=n) as on:
        calls = [place for place in await on.rehearse() if place.events == 1]
        gates = [Gate() for _ in calls]
        cases = [
            on.case(place, Script(gates={1: gate}), stream=bool(i % 2))
            for i, (place, gate) in enumerate(zip(calls, gates, strict=True))
        ]
        serving = asyncio.get_running_loop().create_task(on.serve(cases))
        for gate in gates:
            await gate.wait()
        dying.stop()
        await serving
        for case in cases:
            assert_broken_off(case)
        late = on.case(Place(0, 0, 0))
        await on.serve([late])
        assert assert_broken_off(late)["code"] == "server_is_overloaded"
        assert not on.gateway.slot().is_up
        await on.assert_clean(cases)


@pytest.mark.parametrize("stream", [True, False])
@CHOICES
@EVERY
async def test_backend_that_is_gone_at_the_second_call(
    scripted: ScriptedBackend, name: str, n: int, stream: bool
) -> None:
    """A choice that has begun is not begun anew elsewhere: it fails, and its backend is out."""
    story = STORIES[name]
    async with ScriptedBackend() as other, stage(story, scripted, n=n, more=[other]) as on:
        on.gateway.slot(1).in_flight += 1  # so that the first is chosen
        places = await on.rehearse()
        # The first call does not end, so that the second one needs a connection of its own.
        gate, end = Gate(), Gate()
        case = on.case(replace(places[0], events=1), Script(gates={1: gate, END: end}), stream=stream)
        serving = asyncio.get_running_loop().create_task(on.serve([case]))
        await gate.wait()
        scripted._server.close()
        on.gateway.pool()._idle.clear()
        gate.open()
        await serving
        end.open()
        on.gateway.slot(1).in_flight -= 1
        error = assert_broken_off(case)
        assert (case.answer.status, error["type"]) == (200 if stream else 502, "upstream_error")
        assert other.calls == []
        assert not on.gateway.slot().is_up
        await on.assert_clean([case])


@CHOICES
@EVERY
async def test_connection_that_ends_between_two_calls(scripted: ScriptedBackend, name: str, n: int) -> None:
    """A kept connection that the server closed meanwhile is replaced: the answer is whole."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        scripted.drops_reused = True
        cases = [on.case(places[0], stream=stream) for stream in (True, False)]
        await on.serve(cases)
        for case in cases:
            assert case.answer.status == 200
            assert b'"thinkgate"' in case.answer.body
        await on.assert_clean(cases)
