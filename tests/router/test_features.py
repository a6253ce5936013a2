"""The features of a text."""

from hypothesis import given
from hypothesis import strategies as st

from router.features import NAMES, READ_CHARS, features


def named(text):
    """The features by name."""
    return dict(zip(NAMES, features(text), strict=True))


@given(st.text(max_size=3000))
def test_any_text_has_every_feature_within_bounds(text):
    """Whatever the text, each name has one number, between 0 and a little above 1."""
    found = features(text)
    assert len(found) == len(NAMES) == len(set(NAMES))
    assert all(0 <= value <= 2 for value in found)


@given(st.text(min_size=READ_CHARS, max_size=READ_CHARS + 50), st.text(max_size=50))
def test_only_the_beginning_is_read(text, more):
    """What stands behind the first characters changes nothing."""
    assert features(text[:READ_CHARS] + more) == features(text[:READ_CHARS])


def test_kinds_of_words_are_told_apart():
    """Mathematics, code and writing raise their own number."""
    assert named("the sum of two prime integers")["words_math"] > 0.5
    assert named("debug this python function")["words_code"] > 0.5
    assert named("a poem and an essay")["words_write"] > 0.4
    assert named("the sum of two prime integers")["words_write"] == 0


def test_asking_for_something_written_is_seen():
    """A verb of writing counts with its noun close behind it, in Chinese by its characters."""
    assert named("Please write me a short email to my landlord")["writes"] == 1
    assert named("Please write a program that sorts")["writes"] == 0
    assert named("请帮我撰写一份工作报告")["writes"] == 1


def test_greetings_have_no_symbols():
    """Punctuation of sentences is no sign of work, however little else there is."""
    assert named("Hello!!!???")["symbol_share"] == 0
    assert named("x^2 + 3*x = 0")["symbol_share"] > 0
