"""Thinking markers inside the text, wherever its pieces begin and end."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.markers import AnswerFilter, MarkerSplitter, Piece, held_back
from gateway.backends.port import Kind

FEW = settings(max_examples=150, deadline=None)
A, T, I = Kind.ANSWER, Kind.THINKING, Kind.INJECTED  # noqa: E741  # the three kinds, in tables
MARKERS = st.sampled_from(
    [("<think>", "</think>"), ("<t>", "<t/>"), ("aab", "aba"), ("[THINK]", "[/THINK]"), ("x", "y")]
)
TEXTS = st.lists(
    st.sampled_from(
        [
            "<think>",
            "</think>",
            "<",
            "</",
            "think>",
            "<t",
            "<t>",
            "<t/>",
            "a",
            "b",
            "aa",
            "ab",
            "x",
            "y",
            " ",
            "\n",
            "[",
            "[/THINK]",
            "ä😀",
        ]
    ),
    max_size=10,
).map("".join)


def merged(pieces: list[Piece]) -> list[Piece]:
    """Neighbours of one kind put together; markers stay apart."""
    result: list[Piece] = []
    for kind, text in pieces:
        if result and result[-1][0] is kind is not I:
            result[-1] = (kind, result[-1][1] + text)
        else:
            result.append((kind, text))
    return result


def split(
    *texts: str, markers: tuple[str, str] = ("<think>", "</think>"), is_open: bool = False
) -> tuple[list[Piece], bool]:
    """The pieces of a text that arrives like this, and whether the thinking is still open."""
    splitter = MarkerSplitter(*markers, is_open=is_open)
    pieces = [piece for text in texts for piece in splitter.feed(text)]
    was_holding = splitter.is_holding
    held = splitter.finish()
    assert was_holding == bool(held)
    assert not splitter.is_holding
    return merged(pieces + held), splitter.is_open


@pytest.mark.parametrize(
    ("texts", "pieces", "is_open"),
    [
        (["<think>hm</think>42"], [(I, "<think>"), (T, "hm"), (I, "</think>"), (A, "42")], False),
        (["<th", "ink>h", "m</", "think", ">42"], [(I, "<think>"), (T, "hm"), (I, "</think>"), (A, "42")], False),
        (["\n <think>hm"], [(I, "<think>"), (T, "hm")], True),
        (["<think>", "</think>"], [(I, "<think>"), (I, "</think>")], False),
        (["no markers"], [(A, "no markers")], False),
        (["42 <think>late</think>"], [(A, "42 <think>late</think>")], False),
        (["<thin", " ice"], [(A, "<thin ice")], False),
        (["<think>a < b </ c"], [(I, "<think>"), (T, "a < b </ c")], True),
        (["<think>hm</thi"], [(I, "<think>"), (T, "hm</thi")], True),
        (["  "], [(A, "  ")], False),
        (["<think>a</think>b</think>c"], [(I, "<think>"), (T, "a"), (I, "</think>"), (A, "b</think>c")], False),
        ([], [], False),
    ],
)
def test_text_is_cut_at_its_markers(texts: list[str], pieces: list[Piece], is_open: bool) -> None:
    """An opening marker counts at the very beginning only, a closing one once; half a marker is text."""
    assert split(*texts) == (pieces, is_open)


def test_thinking_that_the_prompt_opened_needs_no_opening_marker() -> None:
    """Then the text begins with thinking, and a second opening marker is part of it."""
    assert split("hm<think>", "</think>42", is_open=True) == ([(T, "hm<think>"), (I, "</think>"), (A, "42")], False)


def test_only_what_may_be_a_marker_is_held_back() -> None:
    """Thinking text flows at once; a possible beginning of the closing marker waits for the rest."""
    splitter = MarkerSplitter("<think>", "</think>", is_open=True)
    assert splitter.feed("some thought") == [(T, "some thought")]
    assert splitter.feed(" <") == [(T, " ")]
    assert splitter.is_holding
    assert splitter.feed("3") == [(T, "<3")]
    assert not splitter.is_holding


@FEW
@given(text=TEXTS, markers=MARKERS, is_open=st.booleans(), cuts=st.lists(st.integers(0, 60), max_size=10))
def test_borders_do_not_change_the_pieces(text: str, markers: tuple[str, str], is_open: bool, cuts: list[int]) -> None:
    """Fed in any pieces, down to single characters, a text is cut as it is when fed whole."""
    borders = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    expected = split(text, markers=markers, is_open=is_open)
    assert split(*[text[a:b] for a, b in pairwise(borders)], markers=markers, is_open=is_open) == expected
    assert split(*text, markers=markers, is_open=is_open) == expected


@FEW
@given(text=TEXTS, markers=MARKERS, is_open=st.booleans())
def test_nothing_is_lost_but_white_space_before_the_thinking(
    text: str, markers: tuple[str, str], is_open: bool
) -> None:
    """All pieces together are the text; only white space before an opening marker is dropped."""
    pieces, _ = split(text, markers=markers, is_open=is_open)
    joined = "".join(piece for _, piece in pieces)
    assert joined == text or (joined == text.lstrip() and pieces[0] == (I, markers[0]))
    assert [kind for kind, _ in pieces].count(I) <= 2


@pytest.mark.parametrize(
    ("text", "marker", "length"),
    [("ab<", "</x>", 1), ("ab</x", "</x>", 3), ("</x>", "</x>", 0), ("aaa", "aab", 2), ("", "x", 0), ("x", "x", 0)],
)
def test_held_back_is_the_longest_beginning_of_the_marker(text: str, marker: str, length: int) -> None:
    """The end of the text that may still become the marker is measured, a whole marker is not."""
    assert held_back(text, marker) == length


@given(
    text=st.lists(st.sampled_from(["<a>", "</a>", "<", "a>", "x", " y"]), max_size=14).map("".join),
    cuts=st.lists(st.integers(0, 40), max_size=8),
)
def test_reopened_thinking_is_left_out_whatever_the_borders(text: str, cuts: list[int]) -> None:
    """The answer filter gives the same text for any chunks, and none of what stands between markers."""
    whole = AnswerFilter("<a>", "</a>").feed(text, is_last=True)
    borders = sorted({cut % (len(text) + 1) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]
    by = AnswerFilter("<a>", "</a>")
    assert "".join(by.feed(piece, is_last=i == len(pieces) - 1) for i, piece in enumerate(pieces)) == whole
    rest, shown = text, ""
    while (at := rest.find("<a>")) >= 0:
        shown, rest = shown + rest[:at], rest[at + 3 :].partition("</a>")[2]
    assert whole == shown + rest


@pytest.mark.parametrize(
    ("held", "cut", "left"), [("</rea", True, []), ("</rea", False, [(T, "</rea")]), ("<", True, [(T, "<")])]
)
def test_half_a_marker_is_not_shown_where_a_limit_falls_into_it(held: str, cut: bool, left: list[Piece]) -> None:
    """What a limit cut off in the middle of a marker is no thinking; a lone character is."""
    by = MarkerSplitter("<reason>", "</reason>", is_open=True)
    assert by.feed("so" + held) == [(T, "so")]
    assert by.finish(cut=cut) == left


@given(cuts=st.lists(st.integers(0, 40), max_size=8), openings=st.integers(0, 2))
def test_markers_that_are_announced_open_again(cuts: list[int], openings: int) -> None:
    """As many opening markers in the answer as are known to be there open the thinking again, whatever the borders."""
    text = "<t>a</t>b<t>c</t>d<t>e</t>f"
    borders = sorted({cut % (len(text) + 1) for cut in cuts})
    by = MarkerSplitter("<t>", "</t>")
    pieces = by.feed("", openings=openings + 1)
    for a, b in zip([0, *borders], [*borders, len(text)], strict=True):
        pieces += by.feed(text[a:b])
    pieces += by.finish()
    said = "".join(piece for kind, piece in pieces if kind is A)
    assert said == ("b<t>c</t>d<t>e</t>f", "bd<t>e</t>f", "bdf")[openings]
