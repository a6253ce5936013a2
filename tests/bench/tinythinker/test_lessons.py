"""Tokenizer, template and lessons."""

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("tokenizers", reason="needs the extra `embedded`")

from bench.tinythinker.lessons import IGNORED, Teacher, bucketed
from bench.tinythinker.task import LEVELS, draw_from
from bench.tinythinker.words import END_THINK, IM_END, THINK, WRAP_UP, build_tokenizer, prompt_of, wrap
from gateway.config.schema import ThinkingConfig

TOKENIZER = build_tokenizer()
TEACHER = Teacher(TOKENIZER)


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    """What is encoded and decoded again is what it was, in any script."""
    assert TOKENIZER.decode(TEACHER.ids(text), skip_special_tokens=False) == text


def test_digits_words_and_markers_are_one_token():
    """A digit, a marker and the words that the model or the gateway writes are one token each."""
    words = ("Wait", "So", "user", "assistant", " answer")
    assert {len(TEACHER.ids(text)) for text in (*"0123456789", THINK, END_THINK, IM_END, *words)} == {1}
    assert len(TEACHER.ids("47+38=85\n")) == 9
    assert len(TEACHER.ids(WRAP_UP)) == 14


def test_markers_are_not_special():
    """Markers are ordinary tokens: vLLM drops special ones from the text it parses."""
    added = {token.content: token.special for token in TOKENIZER.get_added_tokens_decoder().values()}
    assert (added[THINK], added[END_THINK], added[IM_END]) == (False, False, True)


def test_tokens_do_not_depend_on_where_a_text_is_cut():
    """A prompt, a chain, a closing and an answer have the same ids in one piece and one by one."""
    rng = random.Random(0)
    for level in LEVELS:
        parts = [prompt_of(draw_from(rng, level, "train").text, thinking=True), "47+38=85\nSo 85\n", WRAP_UP, END_THINK]
        apart = [token for part in parts for token in TEACHER.ids(part)]
        assert apart == TEACHER.ids("".join(parts))


@pytest.mark.parametrize("thinking", [True, False])
def test_the_template_makes_the_prompts_of_training(thinking):
    """What the server renders is what the model was trained on, with and without thinking."""
    pytest.importorskip("transformers", reason="needs the extra `embedded`")
    messages = [{"role": "user", "content": "47+38"}]
    rendered = wrap(TOKENIZER).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    assert rendered == prompt_of("47+38", thinking=thinking)


def test_the_wrap_up_is_the_default_of_the_gateway():
    """The model knows the wrap-up that the gateway writes where nothing else is configured."""
    assert ThinkingConfig().wrap_up == WRAP_UP


def learned(lesson):
    """The text that is learned."""
    return TOKENIZER.decode([each for each in lesson.labels if each != IGNORED], skip_special_tokens=False)


def test_only_what_the_model_writes_is_learned():
    """A whole chain is learned up to the end of the turn; of a cut one all but the question and the cut."""
    rng = random.Random(1)
    for level in LEVELS:
        question = draw_from(rng, level, "train")
        full, cut, instant = TEACHER.full(question, rng), TEACHER.cut(question, rng), TEACHER.instant(question)
        answer = f"{question.answer:02}{IM_END}"
        assert learned(instant) == answer
        assert learned(full).endswith(f"So {question.answer:02}\n{END_THINK}\n\n{answer}")
        assert THINK not in learned(full)
        assert THINK not in learned(cut)
        assert END_THINK not in learned(cut)
        assert re.search(r"\n\n\d\d" + re.escape(IM_END) + "$", learned(cut))
        assert all(label in (token, IGNORED) for token, label in zip(cut.ids, cut.labels, strict=True))


def test_blocks_repeat_and_keep_within_their_batches():
    """A block is the same for the same seed and number, and none of its batches is above the limit."""
    block = TEACHER.block(0, 5, batches=3, batch_tokens=900)
    assert block == TEACHER.block(0, 5, batches=3, batch_tokens=900)
    assert block != TEACHER.block(1, 5, batches=3, batch_tokens=900)
    assert block != TEACHER.block(0, 6, batches=3, batch_tokens=900)
    assert all(len(batch) * max(len(lesson.ids) for lesson in batch) <= 900 for batch in block)


def test_bucketing_loses_no_lesson():
    """Every lesson is in one batch, next to its like."""
    rng = random.Random(2)
    lessons = [TEACHER.lesson(rng) for _ in range(80)]
    batches = bucketed(lessons, 700)
    assert sorted(lesson.ids for batch in batches for lesson in batch) == sorted(lesson.ids for lesson in lessons)
    assert [len(lesson.ids) for batch in batches for lesson in batch] == sorted(len(lesson.ids) for lesson in lessons)
