"""Stop strings across the borders of tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.stop import StopScanner, held_back
from tests.kernels.test_detokenize import cut

STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)
TEXT = st.text("abc", max_size=30)
BORDERS = st.lists(st.integers(min_value=0, max_value=10_000))


def scan(pieces, stops, *, include=False):
    """What a scanner shows of `pieces`, and the stop string that ended it."""
    scanner = StopScanner(stops, include=include)
    shown = "".join(scanner.push(piece) for piece in pieces)
    return shown + scanner.flush(), scanner.hit


@given(TEXT, STOPS, BORDERS, st.booleans())
def test_where_the_text_is_cut_does_not_matter(text, stops, borders, include):
    """Pieces give the same text and the same stop string as the whole."""
    assert scan(cut(text, borders), stops, include=include) == scan([text], stops, include=include)


@given(TEXT, STOPS)
def test_the_text_ends_where_the_first_complete_stop_string_begins(text, stops):
    """Among all occurrences the one that ends first wins, and of those the longest."""
    found = [(at + len(s), at, s) for s in stops for at in range(len(text)) if text.startswith(s, at)]
    end, start, stop = min(found, default=(len(text), len(text), None))
    assert scan([text], stops) == (text[:start], stop)
    assert scan([text], stops, include=True) == (text[:end], stop)


@given(TEXT, STOPS, BORDERS)
def test_nothing_of_a_stop_string_is_ever_shown(text, stops, borders):
    """What was shown before the end never contains the beginning of the stop string that ends it."""
    scanner = StopScanner(stops, include=False)
    whole, _ = scan([text], stops)
    shown = ""
    for piece in cut(text, borders):
        shown += scanner.push(piece)
        assert whole.startswith(shown)


@given(TEXT, STOPS, BORDERS)
def test_a_stop_string_that_is_kept_holds_nothing_back(text, stops, borders):
    """Where the stop string belongs to the text, every piece is shown at once up to the end of it."""
    scanner = StopScanner(stops, include=True)
    whole, _ = scan([text], stops, include=True)
    seen = shown = ""
    for piece in cut(text, borders):
        seen += piece
        shown += scanner.push(piece)
        assert shown == whole[: len(seen)]


@pytest.mark.parametrize(
    ("text", "needles", "size"),
    [("abc", ["cde"], 1), ("abc", ["bcd", "c!"], 2), ("abc", ["abc"], 0), ("", ["a"], 0), ("abc", [], 0)],
)
def test_only_an_end_that_may_grow_is_held_back(text, needles, size):
    """The longest end of the text that begins a needle, a complete needle excluded."""
    assert held_back(text, needles) == size
