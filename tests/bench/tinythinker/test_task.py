"""The questions: answers, levels, splits."""

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tinythinker.__main__ import main
from bench.tinythinker.task import LEVELS, SPLITS, Part, Question, draw, draw_from, questions, work


def drawn(seed, level):
    return draw(random.Random(seed), level)


def left_to_right(text):
    """The value of an expression without brackets, computed from its text alone."""
    start, *rest = re.findall(r"[-+*]?\d\d", text)
    value = int(start)
    for term in rest:
        operand = int(term[1:])
        value = {"+": value + operand, "-": value - operand, "*": value * operand}[term[0]] % 100
    return value


drawings = st.builds(drawn, st.integers(0, 2**32), st.sampled_from(LEVELS))


@given(drawings)
def test_the_answer_is_that_of_the_text(question):
    """The answer follows from what the user says, read from left to right, parts first."""
    outside = re.sub(r"\(([^)]*)\)", lambda found: f"{left_to_right(found[1]):02}", question.text)
    assert question.answer == left_to_right(outside)


@given(st.integers(0, 2**32), st.sampled_from(LEVELS))
def test_a_level_is_a_number_of_operations(seed, level):
    """A question of a level takes as many steps, in one to three parts of which none is empty."""
    question = drawn(seed, level)
    assert question.level == level == len(work(question))
    assert 1 <= len(question.parts) <= 3
    assert all(part.operations for part in question.parts)
    assert len(question.joins) == len(question.parts) - 1


def test_a_worked_example():
    """Parts are worked out one after the other, then joined."""
    question = Question((Part(47, (("+", 38), ("*", 3))), Part(9, (("*", 7),))), ("-",))
    assert question.text == "(47+38*03)-(09*07)"
    steps = [(step.left, step.sign, step.right, step.value) for step in work(question)]
    assert steps == [(47, "+", 38, 85), (85, "*", 3, 55), (9, "*", 7, 63), (55, "-", 63, 92)]


def test_every_number_of_parts_occurs():
    """From level 5 on there are questions of one, two and three parts."""
    assert {len(drawn(seed, 5).parts) for seed in range(60)} == {1, 2, 3}


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_distinct_and_of_their_split(split):
    """A split gives distinct questions of its own, the levels in turn, the same for the same seed."""
    found = list(questions(split, 160, seed=3))
    assert len({question.text for question in found}) == 160
    assert {question.split for question in found} == {split}
    assert [question.level for question in found[:8]] == list(LEVELS)
    assert found == list(questions(split, 160, seed=3))
    assert found != list(questions(split, 160, seed=4))


def test_splits_have_the_shares_they_should():
    """Eight questions of ten are for training, one for tuning, one for the last test."""
    rng = random.Random(0)
    found = [draw(rng, 6).split for _ in range(4000)]
    assert [round(found.count(split) / 400) for split in SPLITS] == [8, 1, 1]


def test_what_is_held_out_is_never_drawn_for_training():
    """No question of the training split is in another one, whatever the seed."""
    held_out = {question.text for split in ("tune", "test") for question in questions(split, 400, seed=0)}
    rng = random.Random(1)
    trained = {draw_from(rng, level, "train").text for level in (1, 2) for _ in range(1500)}
    assert not held_out & trained


def test_questions_are_printed_as_json_lines(capsys):
    """The command prints one question a line with its answer and level, for any harness to read."""
    assert main(["questions", "--split", "test", "--count", "9", "--seed", "2"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    asked = list(questions("test", 9, seed=2))
    assert [line["question"] for line in lines] == [question.text for question in asked]
    assert [int(line["answer"]) for line in lines] == [question.answer for question in asked]
    assert [line["level"] for line in lines] == [question.level for question in asked]
