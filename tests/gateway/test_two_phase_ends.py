"""Other ways in which a request whose cap the gateway holds ends early, and what is counted of it."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from gateway.edge.watch import Watched
from tests.gateway.live import ASK, MODEL, STREAM, Client, Json, Live, ask, live, tree_of
from tests.gateway.wrecks import STORIES, Case, Place, stage
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Model, Say, Token, tokens

EVERY = pytest.mark.parametrize("name", STORIES)
CHOICES = pytest.mark.parametrize("n", [1, 3])
TOKEN_BYTES = 100_000
BIG = [Token(5000, " " + "x" * TOKEN_BYTES)] * 60
TWO_PHASE: Json = {"thinking": {"enforce": "two_phase"}}


def watched(gateway: Live, case: Case) -> Watched:
    """What watches a case's request."""
    return next(w for w in gateway.gateway.watch._running.values() if w.exchange.request_id == case.request_id)


@CHOICES
@EVERY
async def test_a_deadline_anywhere_ends_the_request_properly(scripted: ScriptedBackend, name: str, n: int) -> None:
    """Wherever its calls stand: what arrived is delivered and finished as `length`; if nothing arrived it is a 504."""
    async with stage(STORIES[name], scripted, n=n) as on:
        places = await on.rehearse()
        gates = [Gate() for _ in places]
        cases = [
            on.case(place, Script(gates={place.events: gate}), stream=i % 2 == 0)
            for i, (place, gate) in enumerate(zip(places, gates, strict=True))
        ]
        serving = asyncio.get_running_loop().create_task(on.serve(cases))
        for gate in gates:
            await gate.wait()
        for case in cases:
            watched(on.gateway, case).bound(0)
        await serving
        for case in cases:
            _assert_ended_at_its_deadline(case, n)
        await on.assert_clean(cases)


def _assert_ended_at_its_deadline(case: Case, n: int) -> None:
    answer = case.answer
    if case.place.call == 0 and case.place.choice <= 0 and case.place.events == 0:
        assert (answer.status, answer.error["code"]) == (504, "deadline_passed")
        return
    if answer.status == 504:  # of several choices' roles, or of one token without ids, nothing may have come
        assert case.place.call == 0
        assert case.place.events <= n
        return
    assert answer.status == 200
    chunks = case.chunks() if case.stream else [answer.json]
    (extension,) = [chunk["thinkgate"] for chunk in chunks if "thinkgate" in chunk]
    assert extension["ended_by"] == "envelope.seconds"
    ended = [one["finish_reason"] for chunk in chunks for one in chunk["choices"] if one["finish_reason"]]
    assert len(ended) == n
    assert "length" in ended or case.place.call > 0  # in the last events of the last call everything is said
    if case.stream:
        assert answer.payloads()[-1] == "[DONE]"


@pytest.mark.parametrize("phase", ["thinking", "answer"])
@CHOICES
async def test_a_client_that_does_not_read_is_given_up(scripted: ScriptedBackend, n: int, phase: str) -> None:
    """In either phase it stops all of its upstreams, costs bounded memory, and is cut after slow_client_s."""
    say = Say(thinking=BIG) if phase == "thinking" else Say(thinking=tokens("hm"), answer=BIG)
    tree = tree_of(scripted, model=TWO_PHASE, server={"timeouts": {"slow_client_s": 0.2}})
    async with live(tree) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[say]))
        body = {**STREAM, "n": n, "thinkgate": {"thinking_tokens": 100}, "max_completion_tokens": 250}
        async with Client(gateway.port, receive_buffer_bytes=4096) as client:
            client.send(body)
            assert (await client.head()).status == 200
            await gateway.idle()
            assert not (await client.closed()).endswith(b"0\r\n\r\n")
        for call in scripted.calls:
            if not call.done.is_set():
                await call.wait_closed()
        await gateway.assert_settled()
        (line,) = gateway.request_lines()
    assert line["ended_by"] == "slow_client"
    taken_bytes = line["tokens"][phase] * TOKEN_BYTES
    assert taken_bytes < n * 4_500_000  # of 6 MB each: the rest was never taken from upstream


@pytest.mark.parametrize("stream", [True, False])
async def test_an_endless_second_call_of_the_soft_fallback_meets_the_hold(
    scripted: ScriptedBackend, stream: bool
) -> None:
    """A server that thinks on and on, whatever it is asked, is closed when all that was held is used up."""
    endless = Model(honours_cap=False, honours_limit=False, gives_ids=False, takes_ids=False, tokenizes=False)
    story = replace(STORIES["soft"], say=[Say(thinking=tokens("on and on"), ends=False)], serves=endless)
    async with stage(story, scripted, n=1) as on:
        case = on.case(Place(-1, -1, 0), stream=stream)
        await on.serve([case])
        extension = case.chunks()[-1]["thinkgate"] if stream else case.answer.json["thinkgate"]
        assert extension["ended_by"] == "hold"
        assert len(scripted.calls) == 2
        on.hold = extension["hold"]["tokens"]
        await on.assert_clean([case])


async def test_a_backend_that_could_not_be_reached_leaves_no_guard_behind(scripted: ScriptedBackend) -> None:
    """The next one is guarded for what it can do itself: one that cannot go on from ids is asked for the answer."""
    scripted.model = Model(tokenizes=True, takes_ids=False)
    async with ScriptedBackend() as gone, live(tree_of(gone, scripted)) as gateway:
        scripted.forget()
        gone.stop()
        gateway.slot(1).in_flight += 1  # so that the first is chosen first
        say = Say(thinking=tokens("on and on " * 20), answer=tokens("42"))
        scripted.queue(Script(say=[say], model=Model(honours_cap=False, takes_ids=False)))
        answer = await ask(gateway, {**ASK, "thinkgate": {"thinking_tokens": 5}})
        gateway.slot(1).in_flight -= 1
        extension = answer.json["thinkgate"]
        assert (extension["backend"], extension["cap"]["enforcement"]) == ("b", "soft")
        assert extension["tokens"]["thinking"] == 5
        assert answer.json["choices"][0]["message"]["content"] == "the answer is 42"


@pytest.mark.parametrize(("name", "how"), [("two-phase", "two_phase"), ("take-over", "two_phase"), ("soft", "soft")])
@CHOICES
async def test_what_holding_the_cap_took_is_measured(scripted: ScriptedBackend, name: str, how: str, n: int) -> None:
    """Requests by the way it was held, lies by backend, and what was sent again, cached or not."""
    async with stage(STORIES[name], scripted, n=n) as on:
        gateway = on.gateway
        await on.rehearse()
        await gateway.idle()
        gateway.gateway.metrics.render()  # publishes what has ended
        assert gateway.metric("thinkgate_enforced_total", model=MODEL, how=how) == 1
        assert gateway.metric("thinkgate_capped_total", model=MODEL) == 1
        lies = 1.0 if name != "two-phase" else 0.0
        assert gateway.metric("thinkgate_cap_overruns_total", model=MODEL, backend="a") == lies
        switched = gateway.metric("thinkgate_switch_seconds_count", model=MODEL)
        resent = [gateway.metric("thinkgate_resent_tokens_total", model=MODEL, cached=c) for c in ("yes", "no")]
        assert switched == (n if name == "two-phase" else 0)
        assert (sum(resent) > 0) == (how == "two_phase")


async def test_a_lie_is_told_by_a_metric_and_an_error_in_the_log(scripted: ScriptedBackend) -> None:
    """The gauge falls with the first lie, and every later request is held in two phases without another."""
    async with live(tree_of(scripted)) as gateway:
        binds = {"model": MODEL, "backend": "a"}
        assert gateway.metric("thinkgate_backend_cap_binds", **binds) == 1
        say = Say(thinking=tokens("on and on " * 20), answer=tokens("42"))
        scripted.default = Script(say=[say], model=Model(honours_cap=False))
        for expected in (1, 1):
            answer = await ask(gateway, {**ASK, "thinkgate": {"thinking_tokens": 5}})
            assert answer.json["choices"][0]["message"]["content"] == "42"
            await gateway.idle()
            gateway.gateway.metrics.render()
            assert gateway.metric("thinkgate_cap_overruns_total", **binds) == expected
            assert gateway.metric("thinkgate_backend_cap_binds", **binds) == 0
        assert gateway.metric("thinkgate_enforced_total", model=MODEL, how="two_phase") == 2
        record = await gateway.logs.wait("backend ignored its cap")
        assert (record.levelname, record.__dict__["backend"]) == ("ERROR", "a")
