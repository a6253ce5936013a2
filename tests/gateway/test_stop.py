"""Stop strings end the answer at the same place, whatever the borders of its pieces."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.stop import StopFilter
from tests.gateway.live import ASK, STREAM, Json, ask, live, tree_of
from tests.gateway.test_bounds import whole
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import Model, Say, tokens

FEW = settings(max_examples=150, deadline=None)
WORDS = st.text(alphabet="ab\n", max_size=14)
STOPS = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=4)


def filtered(pieces: list[str], stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """The text that comes through, and the stop string that ended it."""
    stop = StopFilter(stops, keep=keep)
    out = [stop.feed(piece, is_last=False) for piece in pieces]
    return "".join([*out, stop.feed("", is_last=True)]), stop.hit


def naively(text: str, stops: list[str], *, keep: bool) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends in a stop string, the longest if several."""
    for end in range(1, len(text) + 1):
        hits = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if hits:
            hit = max(hits, key=len)
            return text[: end if keep else end - len(hit)], hit
    return text, None


@pytest.mark.parametrize(
    ("text", "stops", "kept", "hit"),
    [
        ("one two three", ["two"], "one ", "two"),
        ("one two three", ["three", "two"], "one ", "two"),
        ("one two", ["four"], "one two", None),
        ("abcd", ["abcd", "bc"], "a", "bc"),
        ("abc", ["bc", "abc"], "", "abc"),
        ("two", ["two"], "", "two"),
        ("ab", ["abc"], "ab", None),
        ("text", [], "text", None),
        ("text", ["", "x"], "te", "x"),
        ("äöü", ["ö"], "ä", "ö"),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text: str, stops: list[str], kept: str, hit: str | None) -> None:
    """What is complete first ends the text, the longest of several; empty strings are none."""
    assert filtered([text], stops, keep=False) == (kept, hit)
    assert filtered([text], stops, keep=True) == (kept + (hit or ""), hit)


def test_only_a_possible_beginning_is_held_back() -> None:
    """Text flows until it may be the beginning of a stop string, and flows again when it is not."""
    stop = StopFilter(["STOP"], keep=False)
    assert [stop.feed(piece, is_last=False) for piece in ("hello", " ST", "AR", "ST", "OP", "more")] == [
        "hello",
        " ",
        "STAR",
        "",
        "",
        "",
    ]
    assert stop.hit == "STOP"


def test_the_last_piece_holds_nothing_back() -> None:
    """At the end of the answer half a stop string is text."""
    stop = StopFilter(["STOP"], keep=False)
    assert stop.feed("a STO", is_last=True) == "a STO"
    assert stop.hit is None


def test_after_the_hit_nothing_comes_through() -> None:
    """Whatever a backend sends after the stop string is not the answer any more."""
    stop = StopFilter(["x"], keep=True)
    assert stop.feed("axb", is_last=False) == "ax"
    assert (stop.feed("c", is_last=False), stop.feed("d", is_last=True)) == ("", "")


@FEW
@given(text=WORDS, stops=STOPS, keep=st.booleans(), cuts=st.lists(st.integers(0, 30), max_size=8))
def test_any_pieces_end_where_single_characters_would(text: str, stops: list[str], keep: bool, cuts: list[int]) -> None:
    """Text and hit are those of looking after every character, however the answer arrives."""
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    assert filtered(pieces, stops, keep=keep) == naively(text, stops, keep=keep)


@pytest.mark.parametrize("policy", ["auto", "two_phase"])
@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_a_stop_string_ends_the_thinking_only_when_asked_to(
    scripted: ScriptedBackend, body: Json, policy: str
) -> None:
    """What stands in the thinking ends nothing by default; with `stop_in_thinking` the choice ends right there."""
    say = Say(thinking=tokens("first STOP then"), answer=tokens("it is 42 STOP more"))
    async with live(tree_of(scripted, model={"thinking": {"enforce": policy, "answer_floor_tokens": 16}})) as gateway:
        for in_thinking, reasoning, content in ((False, "first STOP then", "it is 42 "), (True, "first ", "")):
            scripted.forget()
            scripted.queue(Script(say=[say]))
            thinkgate = {"mode": "reasoning", "stop_in_thinking": in_thinking}
            texts, extension = whole(await ask(gateway, {**body, "stop": "STOP", "thinkgate": thinkgate}))
            await gateway.assert_settled()
            assert texts[0].get("reasoning") == reasoning
            assert (texts[0]["content"] or "") == content
            assert len(scripted.calls) == (1 if in_thinking or policy == "auto" else 2)
            assert extension["cap"]["enforcement"] == ("native" if policy == "auto" else "two_phase")


@pytest.mark.parametrize("body", [STREAM, ASK])
async def test_thinking_that_was_held_back_keeps_its_name(scripted: ScriptedBackend, body: Json) -> None:
    """Looking for stop strings in the thinking changes nothing about the field that it comes in."""
    scripted.model = Model(field="reasoning_content")
    async with live(tree_of(scripted)) as gateway:
        scripted.forget()
        scripted.queue(Script(say=[Say(thinking=tokens("first ST"), answer=tokens("it is 42"))]))
        thinkgate = {"mode": "reasoning", "stop_in_thinking": True}
        answer = await ask(gateway, {**body, "stop": "STOP", "thinkgate": thinkgate})
    assert b'"reasoning":' not in answer.body
    text = "".join(re.findall(r'"reasoning_content":"([^"]*)"', answer.body.decode()))
    assert text == "first ST"
