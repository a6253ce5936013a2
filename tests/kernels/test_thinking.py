"""Markers in text that arrives token by token."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.params import Token
from kernels.thinking import MarkerFinder, chain_is_open
from tests.kernels.test_detokenize import cut

MARKER = "</t>"
TEXT = st.text("</t>a", max_size=30)
BORDERS = st.lists(st.integers(min_value=0, max_value=10_000))


def find(pieces):
    """Text and tokens before the marker, its own tokens, and what follows (None: no marker)."""
    finder = MarkerFinder(MARKER)
    before, tokens, marker, after = "", [], [], None
    for i, piece in enumerate(pieces):
        if after is not None:
            after += piece
            continue
        found = finder.push(Token(i), piece)
        before, after = before + found.before, found.after
        tokens += found.tokens
        marker += found.marker_tokens
    if after is None:
        found = finder.flush()
        before, tokens = before + found.before, tokens + found.tokens
    return before, [t.id for t in tokens], [t.id for t in marker], after


@given(TEXT, BORDERS)
def test_any_cut_finds_the_first_marker(text, borders):
    """Text before and after the marker is the same, however the text was cut."""
    before, found, after = text.partition(MARKER)
    got = find(cut(text, borders))
    assert got[0] == before
    assert got[3] == (after if found else None)


@given(TEXT, BORDERS)
def test_every_token_is_told_apart_exactly_once(text, borders):
    """Tokens before the marker come first, then its own, and none is lost or doubled."""
    pieces = cut(text, borders)
    before, tokens, marker, after = find(pieces)
    assert tokens + marker == list(range(len(tokens) + len(marker)))
    if after is None:
        assert len(tokens) == len(pieces)
    else:
        assert "".join(pieces[: len(tokens)]).startswith(before)
        assert "".join(pieces[: len(tokens) + len(marker)]).startswith(before + MARKER)


def test_a_token_that_writes_text_and_marker_counts_as_text():
    """A token that ends the thinking text and begins the marker was thinking."""
    assert find(["a<", "/t", ">b"]) == ("a", [0], [1, 2], "b")


def test_nothing_that_may_be_marker_is_shown():
    """Text that may begin the marker stays back with its tokens until it is refuted."""
    finder = MarkerFinder(MARKER)
    assert finder.push(Token(0), "a</").before == "a"
    assert [t.id for t in finder.pending] == [0]
    found = finder.push(Token(1), "x")
    assert (found.before, [t.id for t in found.tokens], finder.pending) == ("</x", [0, 1], [])


@pytest.mark.parametrize(
    ("prompt", "anywhere", "is_open"),
    [
        ("user: hi\n<think>\n", False, True),
        ("user: hi\n<think>", False, True),
        ("user: what is <think>?\nassistant:", False, False),
        ("<think>\n\n</think>\n\n", False, False),
        ("<think>\nso far", True, True),
        ("<think>a</think>b", True, False),
        ("no markers", True, False),
    ],
)
def test_an_open_chain_is_read_off_the_prompt(prompt, anywhere, is_open):
    """A chat is open if the marker ends the prompt, a completion if the last marker opens."""
    assert chain_is_open(prompt, "<think>", "</think>", anywhere=anywhere) is is_open
