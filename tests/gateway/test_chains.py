"""Choices as chains of segments, against a backend in memory."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from budget.chain import Forcing
from budget.envelope import Envelope
from gateway.backends.port import Capabilities, Delta
from gateway.errors import InvalidRequest, UpstreamError
from gateway.modes.chains import Chains
from gateway.modes.choice import TakeOver
from tests.gateway.upstream import (
    BROKEN,
    END,
    EOS,
    FORCING,
    FOUND,
    PROMPT,
    WAIT,
    WRAP,
    Step,
    Upstream,
    call,
    finishes,
    ids_of,
    read,
    run_of,
    say,
    usage,
)

THINKS: list[Step] = [say(100), say(101), say(102, finish="length"), usage(4, cached=2)]
ANSWERS: list[Step] = [say(200), say(201, EOS, finish="stop"), usage(9, cached=8)]
CLOSES: list[Step] = [say(100), say(END, finish="stop", stop=END), usage(4)]


async def test_a_chain_is_one_stream() -> None:
    """Thinking up to the cap, wrap-up and marker forced, then the answer: each id once, and one finish."""
    upstream = Upstream([THINKS, ANSWERS])
    run = run_of(upstream, call())
    deltas = await read(run, upstream)
    assert ids_of(deltas) == [100, 101, 102, WRAP, END, 200, 201, EOS]
    assert [s.prompt for s in upstream.asked] == [PROMPT, [*PROMPT, 100, 101, 102, WRAP, END]]
    assert [(s.max_tokens, s.stop_token_ids) for s in upstream.asked] == [(3, (END,)), (15, ())]
    assert finishes(deltas) == {0: "stop"}
    assert (deltas[0].prompt_tokens, [d.prompt_tokens for d in deltas[1:-1]]) == (4, [0] * (len(deltas) - 2))
    counts = run.tally.counts()
    assert (counts.prompt, counts.cached, counts.thinking, counts.injected, counts.answer) == (2, 2, 3, 2, 3)
    assert (run.enforced.resent_tokens, run.enforced.resent_cached_tokens) == (9, 8)
    assert (run.enforced.ended_by, run.tally.capped, len(run.enforced.switches_s)) == ("cap", True, 1)


@pytest.mark.parametrize("prompt", [PROMPT, [*PROMPT, END]], ids=["thinking", "answer"])
async def test_the_other_choices_begin_at_the_first_token_of_the_first(prompt: list[int]) -> None:
    """They find the prompt in the prefix cache, and do not wait any longer than for that."""
    first, rest = asyncio.Event(), asyncio.Event()
    whole: list[list[Step]] = [CLOSES, ANSWERS] if prompt is PROMPT else [ANSWERS]
    upstream = Upstream([[first, say(100), rest, *whole[0][1:]], *whole[1:]], whole, whole, prompt=prompt)
    run = run_of(upstream, call(3))
    reading = asyncio.get_running_loop().create_task(read(run, upstream))
    await _turns()
    assert [upstream.choice_of(s) for s in upstream.asked] == [0]
    first.set()
    await _turns()
    assert run.finished == {1, 2}
    rest.set()
    deltas = await reading
    assert finishes(deltas) == {0: "stop", 1: "stop", 2: "stop"}


@pytest.mark.parametrize(
    ("envelope", "fits"),
    [
        (Envelope(tokens=len(PROMPT) + 3 * FORCING.ending()), False),
        (Envelope(tokens=len(PROMPT) + 3 * FORCING.ending() + 2), False),
        (Envelope(tokens=len(PROMPT) + 3 * FORCING.ending() + 3), True),
    ],
)
async def test_an_envelope_has_room_for_an_answer_of_each_choice(envelope: Envelope, fits: bool) -> None:
    """Where nothing but what is forced fits, the request is refused before anything is paid for."""
    upstream = Upstream([], [], [])
    with pytest.raises(InvalidRequest if not fits else IndexError) as refused:
        await read(run_of(upstream, call(3), envelope), upstream)
    if isinstance(refused.value, InvalidRequest):
        assert (refused.value.param, refused.value.code) == ("thinkgate.envelope", "envelope_too_small")


async def test_a_first_choice_that_fails_before_its_first_token_is_the_only_call() -> None:
    """The others would fail like it: they are not sent."""
    upstream = Upstream([[BROKEN]], [THINKS], [THINKS])
    with pytest.raises(UpstreamError, match="broken"):
        await read(run_of(upstream, call(3)), upstream)
    await _turns()
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_choice_that_fails_closes_the_others(failing: int) -> None:
    """The others are closed where they stand, even if they would never have said another word."""
    hangs: list[Step] = [say(100), asyncio.Event()]
    breaks: list[Step] = [say(100), BROKEN]
    upstream = Upstream(*([breaks if i == failing else hangs] for i in range(3)))
    with pytest.raises(UpstreamError, match="broken"):
        await read(run_of(upstream, call(3)), upstream)
    assert upstream.open == 0


async def test_time_ends_the_thinking() -> None:
    """When an answer of the floor's length just still fits before the deadline, the thinking is wrapped up."""
    thinks: list[Step] = [2.0, say(100), 1.0, say(101), 1.0, say(102), 1.0, say(103), asyncio.Event()]
    upstream = Upstream([thinks, [1.0, *ANSWERS]])
    run = run_of(upstream, call(cap=50, max_tokens=90), Envelope(deadline_s=8.5))
    deltas = await read(run, upstream)
    # After 4 s: 2 s to the answer's first token, and 2 tokens of 1 s each, would end at 8 s; a token later, at 9 s.
    assert ids_of(deltas) == [100, 101, 102, WRAP, END, 200, 201, EOS]
    assert (run.enforced.ended_by, run.tally.capped, upstream.now_s) == ("seconds", False, 5.0)
    assert (run.enforced.resent_tokens, run.enforced.resent_cached_tokens) == (9, 8)
    assert len(run.enforced.switches_s) == 1
    assert run.tally.counts().cached == 0  # of the prompt: what a later segment found there is no news


async def test_tokens_after_the_finish_end_the_segment() -> None:
    """A backend that goes on after its own finish is cut off: nobody listens any more."""
    endless: list[Step] = [say(100), say(101, EOS, finish="stop"), *([say(7)] * 50)]
    upstream = Upstream([CLOSES, endless])
    run = run_of(upstream, call())
    deltas = await read(run, upstream)
    assert ids_of(deltas) == [100, END, 100, 101, EOS]
    assert run.tally.wasted == 1


async def test_a_stop_string_closes_its_own_chain_only() -> None:
    """A choice that the reader has finished is closed at its next token; the others go on."""
    never: list[Step] = [say(200), *([say(201)] * 3), asyncio.Event()]
    upstream = Upstream([CLOSES, never], [CLOSES, ANSWERS])
    run = run_of(upstream, call(2))
    backend: Any = upstream
    out: list[Delta] = []
    async with aclosing(Chains(run, backend, FOUND).deltas()) as batches:
        async for batch in batches:
            out += run.take(batch)
            if any(delta.index == 0 and 200 in delta.token_ids for delta in batch):
                run.finished.add(0)
    assert finishes(out) == {1: "stop"}
    assert upstream.open == 0


async def test_early_thinking_goes_on_with_wait() -> None:
    """The marker is dropped and "Wait" forced; the text of both thoughts reaches the client."""
    upstream = Upstream([CLOSES, [say(101), say(102), say(END, finish="stop", stop=END)], ANSWERS])
    of = call(cap=10)
    of = msgspec.structs.replace(of, thinking=msgspec.structs.replace(of.thinking, min_tokens=2))
    run = run_of(upstream, of)
    deltas = await read(run, upstream)
    assert ids_of(deltas) == [100, WAIT, 101, 102, END, 200, 201, EOS]
    assert "".join(d.text for d in deltas) == " 100Wait 101 102 200 201"
    assert (run.enforced.waits, run.tally.wasted, run.tally.thinking) == (1, 1, 3)


async def test_markers_of_several_tokens_are_found_again_after_wait() -> None:
    """Where the marker is found by its text, it is found in every stretch of thinking."""
    forcing = Forcing(opening=(31, 32), closing=(33, 34), wrap_up=(WRAP,), wait=(WAIT,))
    found = Capabilities(forcing=forcing, template_opens=True, token_ids_out=True)

    def closes(thought: int) -> list[Step]:
        marker = [Delta(text="</", token_ids=[33])], [Delta(text="think>", token_ids=[34], finish_reason="stop")]
        marker[1][0].stop_reason = "</think>"
        return [say(thought), *marker, usage(4)]

    upstream = Upstream([closes(100), closes(101), ANSWERS])
    of = call(cap=10)
    of = msgspec.structs.replace(of, thinking=msgspec.structs.replace(of.thinking, min_tokens=2))
    run = run_of(upstream, of)
    deltas = await read(run, upstream, found)
    assert ids_of(deltas) == [100, WAIT, 101, 33, 34, 200, 201, EOS]
    assert "".join(d.text for d in deltas) == " 100Wait 101 200 201"
    assert (run.tally.thinking, run.tally.injected, run.tally.wasted) == (2, 3, 2)


async def test_a_choice_that_is_taken_over_goes_on_from_what_was_delivered() -> None:
    """Its first segment here is not its first call: what the cache held of it says nothing about the prompt."""
    upstream = Upstream([], [ANSWERS])
    run = run_of(upstream, call(2))
    run.finished.add(0)
    deltas = await read(run, upstream, lost=[TakeOver(1, [100, 101])])
    assert upstream.asked[0].prompt == [*PROMPT, 100, 101, WRAP, END]
    assert ids_of(deltas, 1) == [WRAP, END, 200, 201, EOS]
    assert (run.enforced.resent_tokens, run.enforced.resent_cached_tokens) == (9, 8)
    assert run.tally.counts().cached == 0
    assert run.enforced.switches_s == []


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([say(100)], "before the choice was finished"),
        ([[Delta(text="x")]], "token ids any more"),
        ([], "before the choice was finished"),
    ],
)
async def test_segments_that_say_too_little_are_upstream_errors(steps: list[Step], why: str) -> None:
    """Without a finish, or without ids, a chain cannot go on."""
    upstream = Upstream([steps])
    with pytest.raises(UpstreamError, match=why):
        await read(run_of(upstream, call()), upstream)


async def test_an_envelope_that_the_prompt_fills_is_refused() -> None:
    """No segment is begun for which there is no room at all."""
    upstream = Upstream([])
    with pytest.raises(InvalidRequest, match="no room for an answer to a prompt of"):
        await read(run_of(upstream, call(), Envelope(tokens=len(PROMPT))), upstream)


async def _turns() -> None:
    for _ in range(100):
        await asyncio.sleep(0)
