"""Backends that answer badly anywhere in the calls that hold a cap, and what their client is told."""

from __future__ import annotations

import asyncio

import pytest

from tests.gateway.wrecks import STORIES, Case, Place, Stage, assert_broken_off, stage
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Reply, Script, json_reply, refusal
from tests.scripted_stream import event

CHAINED = pytest.mark.parametrize("name", ["two-phase", "wait", "take-over"])
EVERY = pytest.mark.parametrize("name", STORIES)
CHOICES = pytest.mark.parametrize("n", [1, 3])
GARBAGE = {
    "no JSON": b"data: {half\n\n",
    "no object": b"data: 7\n\n",
    "an error": event({"error": {"message": "out of memory", "code": 500}}),
    "wrong types": event({"choices": [{"index": 0, "text": 5, "token_ids": ["a"]}]}),
    "no ids": event({"choices": [{"index": 0, "text": "x", "finish_reason": None}]}),
}
REPLIES = {
    "500": refusal(500, "engine is dead", "InternalServerError"),
    "503": Reply(status=503, body=b"<html>busy</html>", content_type="text/html"),
    "401": refusal(401, "wrong key", "Unauthorized"),
    "429": refusal(429, "slow down", "RateLimit"),
    "no stream": json_reply({"choices": []}),
    "no HTTP": Reply(raw=b"SSH-2.0-OpenSSH\r\n"),
    "an empty stream": Reply(content_type="text/event-stream"),
    "half a head": Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-"),
}
REFUSED = refusal(400, "too long for me", param="prompt")


def calls_of(places: list[Place]) -> list[Place]:
    """The beginning of every call."""
    return [place for place in places if place.events == 0]


async def served(on: Stage, ways: list[tuple[Place, Script | Reply]]) -> list[Case]:
    """Cases of these incidents, each streamed and not, once they were answered."""
    cases = [on.case(place, how, stream=stream) for place, how in ways for stream in (True, False)]
    await on.serve(cases)
    return cases


@CHOICES
@EVERY
async def test_error_status_for_any_call(scripted: ScriptedBackend, name: str, n: int) -> None:
    """A call that is answered with anything but a stream fails the request, with a status if nothing went out yet."""
    async with stage(STORIES[name], scripted, n=n) as on:
        calls = calls_of(await on.rehearse())
        firsts = [place for place in calls if place.choice <= 0 or place.call]  # a conversation begins with one call
        cases = await served(on, [(place, reply) for place in firsts for reply in list(REPLIES.values())[::n]])
        for case in cases:
            error = assert_broken_off(case)
            assert error["type"] == "upstream_error"
            is_early = case.place.call == 0 or not case.stream
            assert (case.answer.status, error["code"]) == (502 if is_early else 200, "upstream_error")
        await on.assert_clean(cases)


@CHOICES
@EVERY
async def test_refusal_of_any_call(scripted: ScriptedBackend, name: str, n: int) -> None:
    """A 4xx passes with its status and words, if nothing was delivered and the call came from the request."""
    async with stage(STORIES[name], scripted, n=n) as on:
        calls = calls_of(await on.rehearse())
        cases = await served(on, [(place, REFUSED) for place in calls if place.choice <= 0 or place.call])
        for case in cases:
            error = assert_broken_off(case)
            is_early = case.place.call == 0 or not case.stream
            if name == "soft" and case.place.call:  # nobody but the gateway asked for that call
                assert (case.answer.status, error["code"]) == (502 if is_early else 200, "upstream_error")
                continue
            assert case.answer.status == (400 if is_early else 200)
            assert (error["message"], error["param"]) == ("too long for me", "prompt")
        await on.assert_clean(cases)


@CHOICES
@CHAINED
async def test_garbage_in_any_event(scripted: ScriptedBackend, name: str, n: int) -> None:
    """An event that is no chunk, says that the engine failed, or has text without ids ends the request as an error."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        kinds = list(GARBAGE.values())
        ways: list[tuple[Place, Script | Reply]] = []
        for i, place in enumerate(places):
            of_chain = kinds if place.choice >= 0 else kinds[:-1]
            if place.events < place.last - 1:  # text without ids after the finish hurts nobody
                ways.append((place, Script(replace={place.events: of_chain[i % len(of_chain)]})))
        cases = await served(on, ways)
        for case in cases:
            assert assert_broken_off(case)["type"] == "upstream_error"
        await on.assert_clean(cases)


@CHOICES
@EVERY
async def test_streams_without_their_end(scripted: ScriptedBackend, name: str, n: int) -> None:
    """A call that ends without a finish, or whose stream ends without [DONE], leaves its request unfinished."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        ways: list[tuple[Place, Script | Reply]] = []
        for call in calls_of(places):
            if call.choice >= 0:  # the gateway cuts off the others
                ways += [(call, Script(replace={event: None})) for event in (call.last, call.last - 2)]
        cases = await served(on, ways)
        for case in cases:
            assert "before" in assert_broken_off(case)["message"]
        await on.assert_clean(cases)


@CHOICES
@EVERY
async def test_backend_that_hangs_anywhere(scripted: ScriptedBackend, name: str, n: int) -> None:
    """Wherever it falls silent, the sweep ends the request in time and closes all of its calls."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = [place for place in await on.rehearse() if place.events % n == 0]
        gates = [Gate() for _ in places]
        cases = [on.case(place, Script(gates={place.events: gate})) for place, gate in zip(places, gates, strict=True)]
        serving = asyncio.get_running_loop().create_task(on.serve(cases))
        for gate in gates:
            await gate.wait()
        pool = on.gateway.pool()
        while not serving.done():
            for connection in pool._open:
                connection.deadline = connection.last_read = float("-inf")
            pool.sweep()
            await asyncio.sleep(0)
        await serving
        assert {assert_broken_off(case)["code"] for case in cases} == {"deadline_passed"}
        await on.assert_clean(cases)


@pytest.mark.parametrize("wrong", [REPLIES["500"], REFUSED, Script(dies_after=1)])
async def test_failing_choice_does_not_wait_for_the_others(scripted: ScriptedBackend, wrong: Script | Reply) -> None:
    """While the other choices stand still upstream, the first failure ends the request and closes their calls."""
    async with stage(STORIES["two-phase"], scripted, n=3) as on:
        calls = [place for place in calls_of(await on.rehearse()) if place.call]
        cases = [on.case(place, wrong, Script(gates={1: Gate()}), stream=s) for place in calls for s in (True, False)]
        await on.serve(cases)
        for case in cases:
            assert_broken_off(case)
        await on.assert_clean(cases)


@pytest.mark.parametrize("reply", [*REPLIES.values(), REFUSED, json_reply({"tokens": "x"}), Reply(body=b"[]")])
@pytest.mark.parametrize("n", [1, 3])
async def test_prompt_that_cannot_be_rendered(scripted: ScriptedBackend, n: int, reply: Reply) -> None:
    """Whatever /tokenize answers but ids is an error with a status of its own; no other call is made."""
    async with stage(STORIES["two-phase"], scripted, n=n) as on:
        scripted.routes["/tokenize"] = reply
        cases = await served(on, [(Place(0, 0, 0), Script())])
        for case in cases:
            error = assert_broken_off(case)
            assert (case.answer.status, error["type"]) == (
                (400, "BadRequestError") if reply is REFUSED else (502, "upstream_error")
            )
        assert scripted.calls == []
        on.hold = 10**9
        await on.assert_clean(cases)
