"""The scripted model goes on from any prompt: what stands in it already is not said again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.scripted_model import Model, Say
from tests.scripted_tokens import (
    END_MARKER,
    END_THINK,
    EOS,
    NAMES,
    NEWLINE,
    START_MARKER,
    THINK,
    Token,
    byte_tokens,
    decode,
    encode,
    tokens,
)

ASK: dict[str, Any] = {"messages": [{"role": "user", "content": "what is 6 times 7"}]}
THINKS = Say(thinking=tokens("a b c d e f g h"), answer=tokens("it is 42"))
THINKING, ANSWER = [t.id for t in THINKS.thinking], [t.id for t in THINKS.answer]
WHOLE = [*THINKING, END_THINK, *ANSWER, EOS]
SPLIT_START = (Token(41, "<"), Token(42, "think>"))
SPLIT_END = (Token(31, "</"), Token(32, "think"), Token(33, ">"))
WRAP_UP = [*(t.id for t in tokens("time is up")), END_THINK, NEWLINE]
KINDS = {
    "template opens": Model(),
    "model opens": Model(template_opens=False),
    "markers of several tokens": Model(start_marker=SPLIT_START, end_marker=SPLIT_END, template_opens=True),
    "both": Model(start_marker=SPLIT_START, end_marker=SPLIT_END),
}


def went_on(model: Model, base: list[int], tail: list[int], say: Say = THINKS, **fields: Any) -> list[int]:
    """What a model samples from a prompt on."""
    return model.play({"prompt": [*base, *tail], "max_tokens": 400, **fields}, 0, say, base, tail).ids()


@given(st.text())
def test_text_survives_the_tokenizer(text: str) -> None:
    """Any text comes back from its ids, and half a character becomes the replacement character."""
    special = {"<think>": START_MARKER, "</think>": END_MARKER}
    made = encode(text + "</think>\n<think> x", special)
    texts = {**NAMES, **{token.id: token.text for token in made if token.text}}
    assert decode([token.id for token in made], texts) == text + "</think>\n<think> x"
    assert decode([token.id for token in byte_tokens("é")][:1], {}) == "\ufffd"


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_chain_cut_anywhere_is_the_same_whole(model: Model) -> None:
    """Whatever of it stands in the prompt already, the rest follows, be it within a marker or a character."""
    say = Say(thinking=byte_tokens("é漢 x"), answer=byte_tokens("😀 ok"))
    base = model.prompt_ids(ASK)
    whole = model.generate(ASK, 0, say).ids()
    assert whole == went_on(model, base, [], say)
    for cut in range(len(whole)):
        assert whole[:cut] + went_on(model, base, whole[:cut], say) == whole
        assert went_on(model, base, whole[:cut], say, max_tokens=2) == whole[cut : cut + 2]


@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_forced_end_of_thinking_brings_the_answer(model: Model) -> None:
    """After a wrap-up and an end marker, forced anywhere in the thinking, comes the whole answer."""
    base = model.prompt_ids(ASK)
    opened = [] if model.opens else [token.id for token in model.opening]
    forced = [*(t.id for t in tokens("time is up")), *(t.id for t in model.end_marker), NEWLINE, NEWLINE]
    for cut in range(len(THINKING) + 1):
        assert went_on(model, base, [*opened, *THINKING[:cut], *forced]) == [*ANSWER, EOS]
        assert went_on(model, base, [*opened, *THINKING[:cut], *forced, *ANSWER[:2]]) == [*ANSWER[2:], EOS]


def test_wait_brings_more_thinking() -> None:
    """Text that is forced on a finished chain brings what it thinks further; without that, the end marker again."""
    wait = [token.id for token in tokens("Wait")]
    base, more = Model().prompt_ids(ASK), tokens("x y")
    say = Say(thinking=THINKS.thinking, answer=THINKS.answer, again=[more, more])
    again = [token.id for token in more]
    assert went_on(Model(), base, [*THINKING, *wait]) == [END_THINK, *ANSWER, EOS]
    assert went_on(Model(), base, [*THINKING, *wait], say) == [*again, END_THINK, *ANSWER, EOS]
    assert went_on(Model(), base, [*THINKING, *wait, *again, *wait, again[0]], say)[0] == again[1]
    assert went_on(Model(), base, THINKING, say) == [END_THINK, *ANSWER, EOS]


def test_cap_counts_what_was_thought_before() -> None:
    """The thinking that stands in the prompt counts towards `thinking_token_budget`."""
    base = Model().prompt_ids(ASK)
    assert went_on(Model(), base, THINKING[:3], thinking_token_budget=6)[:3] == [*THINKING[3:5], END_THINK]
    assert went_on(Model(honours_cap=False), base, THINKING[:3], thinking_token_budget=6) == WHOLE[3:]


def test_thinking_can_be_reopened_in_the_answer() -> None:
    """The start marker comes again unless its bias forbids it and the model cares; a cut there can be continued."""
    base, say = Model().prompt_ids(ASK), Say(thinking=THINKS.thinking, answer=THINKS.answer, reopens=tokens("x y"))
    again = [ANSWER[0], THINK, *(t.id for t in tokens("x y")), END_THINK, *ANSWER[1:], EOS]
    assert went_on(Model(), base, WRAP_UP, say) == again
    for cut in range(len(again)):
        assert went_on(Model(), base, [*WRAP_UP, *again[:cut]], say) == again[cut:]
    assert went_on(Model(), base, [*WRAP_UP, *again[:3], END_THINK], say) == [*ANSWER[1:], EOS]
    bias = {str(THINK): -100, str(END_THINK): -100}
    assert went_on(Model(), base, WRAP_UP, say, logit_bias=bias) == [*ANSWER, EOS]
    assert went_on(Model(honours_bias=False), base, WRAP_UP, say, logit_bias=bias) == again
