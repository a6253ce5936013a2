"""The questions: arithmetic modulo 100 in several steps, with 1-3 parts to combine.

Owns: what a question is, its answer, and which split it belongs to. Does not own: how anybody thinks about it
(chains.py). An expression is read from left to right, `*` binding no tighter than `+`; a level is a number of
operations; parts stand in brackets and are joined at the end:

    47+38*03                    level 2
    (47+38*03)-(09*07)+(12-60)  level 6: four operations inside the parts, two that join them
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "tune", "test"]
Reckon = Callable[[int, str, int], int]  # a value, an operation and an operand to the next value

MODULUS = 100
LEVELS = range(1, 9)
MOST_PARTS = 3
SPLITS: tuple[Split, ...] = ("train", "tune", "test")
# Tenths of all questions, in the order of SPLITS.
_SHARES = (8, 1, 1)
_OPERATIONS = ("+", "-", "*")
_WEIGHTS = (40, 35, 25)
# Level 2 has operands of one digit: two operations are then within reach of an instant answer.
_SMALL_LEVEL = 2


@dataclass(frozen=True, slots=True)
class Part:
    """A value and what is done to it, from left to right."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        """As it is written in a question."""
        return f"{self.start:02}" + "".join(f"{sign}{operand:02}" for sign, operand in self.operations)


@dataclass(frozen=True, slots=True)
class Step:
    """One line of working out."""

    left: int
    sign: str
    right: int
    value: int


@dataclass(frozen=True, slots=True)
class Question:
    """One to three independent parts, joined from left to right by `joins`."""

    parts: tuple[Part, ...]
    joins: tuple[str, ...]

    @property
    def level(self) -> int:
        """How many operations it takes."""
        return sum(len(part.operations) for part in self.parts) + len(self.joins)

    @property
    def text(self) -> str:
        """What the user says."""
        if not self.joins:
            return self.parts[0].text
        texts = [f"({part.text})" for part in self.parts]
        return texts[0] + "".join(sign + text for sign, text in zip(self.joins, texts[1:], strict=True))

    @property
    def answer(self) -> int:
        """The right one, 0-99."""
        return work(self)[-1].value

    @property
    def split(self) -> Split:
        """Where it belongs: decided by a hash of its text, so that nothing can be in two places."""
        place = hashlib.sha256(self.text.encode()).digest()[0] * 10 // 256
        return SPLITS[0 if place < _SHARES[0] else 1 if place < _SHARES[0] + _SHARES[1] else 2]


def reckon(value: int, sign: str, operand: int) -> int:
    """The next value, 0-99."""
    if sign == "+":
        return (value + operand) % MODULUS
    return (value - operand if sign == "-" else value * operand) % MODULUS


def work(question: Question, by: Reckon = reckon) -> list[Step]:
    """All steps, in the order in which a chain writes them: each part, then the joins.

    Args:
        question: what is asked.
        by: gives each value; one that errs gives the rest of a chain that erred.
    """
    steps: list[Step] = []
    ends: list[int] = []

    def take(value: int, sign: str, operand: int) -> int:
        after = by(value, sign, operand)
        steps.append(Step(value, sign, operand, after))
        return after

    for part in question.parts:
        value = part.start
        for sign, operand in part.operations:
            value = take(value, sign, operand)
        ends.append(value)
    total = ends[0]
    for sign, end in zip(question.joins, ends[1:], strict=True):
        total = take(total, sign, end)
    return steps


def draw(rng: random.Random, level: int) -> Question:
    """A random question of a level, of any split."""
    most = 1 if level <= _SMALL_LEVEL else min(MOST_PARTS, (level + 1) // 2)
    count = rng.randint(1, most)
    inside = level - (count - 1)
    cuts = sorted(rng.sample(range(1, inside), count - 1))
    sizes = [end - start for start, end in zip([0, *cuts], [*cuts, inside], strict=True)]
    parts = tuple(Part(rng.randrange(MODULUS), tuple(_operation(rng, level) for _ in range(size))) for size in sizes)
    return Question(parts, tuple(rng.choice("+-") for _ in range(count - 1)))


def _operation(rng: random.Random, level: int) -> tuple[str, int]:
    """A sign and its operand."""
    sign = rng.choices(_OPERATIONS, _WEIGHTS)[0]
    if sign == "*":
        return sign, rng.randint(2, 9)
    return sign, rng.randint(1, 9 if level == _SMALL_LEVEL else 99)


def draw_from(rng: random.Random, level: int, split: Split) -> Question:
    """A random question of a level and a split."""
    while True:
        question = draw(rng, level)
        if question.split == split:
            return question


def questions(split: Split, count: int, *, seed: int) -> Iterator[Question]:
    """Distinct questions of a split, the levels in turn; the same for the same seed."""
    rng = random.Random(f"{split}/{seed}")
    seen: set[str] = set()
    while len(seen) < count:
        question = draw_from(rng, LEVELS[len(seen) % len(LEVELS)], split)
        if question.text not in seen:
            seen.add(question.text)
            yield question
