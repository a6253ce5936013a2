"""Bytes to characters, whatever the borders."""

from hypothesis import given
from hypothesis import strategies as st

from kernels.detokenize import TextStream, TokenBytes


def cut(data, borders):
    """`data` in pieces, cut at `borders` taken modulo its length."""
    at = sorted({border % (len(data) + 1) for border in borders})
    return [data[a:b] for a, b in zip([0, *at], [*at, len(data)], strict=True)]


@given(st.text(), st.lists(st.integers(min_value=0, max_value=10_000)))
def test_any_cut_of_a_text_gives_the_text(text, borders):
    """Whole characters come out in order, however the bytes were cut."""
    stream = TextStream()
    assert "".join(stream.push(piece) for piece in cut(text.encode(), borders)) == text


@given(st.binary(), st.lists(st.integers(min_value=0, max_value=10_000)))
def test_any_cut_of_any_bytes_gives_what_decoding_them_whole_gives(data, borders):
    """Broken bytes become U+FFFD as in one go, and an unfinished character at the end is kept back."""
    stream = TextStream()
    pieces = "".join(stream.push(piece) for piece in cut(data, borders))
    whole = data.decode("utf-8", "replace")
    assert whole.startswith(pieces)
    assert whole[len(pieces) :] in {"", "\ufffd"}


@given(st.text(min_size=1))
def test_no_piece_shows_half_a_character(text):
    """One byte at a time, nothing but finished characters is ever shown."""
    stream = TextStream()
    shown = ""
    for byte in text.encode():
        shown += stream.push(bytes([byte]))
        assert text.startswith(shown)


def test_an_unfinished_character_can_be_dropped():
    """After dropping, the next bytes begin a text of their own."""
    stream = TextStream()
    assert stream.push("é".encode()[:1]) == ""
    stream.drop_partial()
    assert stream.push(b"ok") == "ok"


def test_special_tokens_and_padding_have_no_text():
    """A special token has bytes but shows none; an id beyond the vocabulary has none at all."""
    table = {0: b"a", 1: b"<end>"}
    tokens = TokenBytes(lambda ids: table[ids[0]], 2, {1})
    assert (tokens.of(1), tokens.shown(1), tokens.shown(0)) == (b"<end>", b"", b"a")
    assert (tokens.of(2), tokens.of(-1)) == (b"", b"")
