"""What the model is trained on: three kinds of lesson, cut into batches of like length.

Owns: the mixture, and what of a lesson is learned. Block number i of a seed is always the same, so that a training
that was interrupted goes on with what it would have seen.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from bench.tinythinker.chains import best_guess, think
from bench.tinythinker.task import LEVELS, Question, draw_from
from bench.tinythinker.words import END_THINK, IM_END, WRAP_UP, prompt_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Kind = Literal["full", "cut", "instant"]
IGNORED = -100  # torch's label for what is not learned
# In lessons, not tokens: an instant one is a third as long as one that is thought through.
_KINDS: tuple[Kind, ...] = ("full", "cut", "instant")
_KIND_WEIGHTS = (30, 20, 50)
# Deep questions are rare among instant lessons: they are for learning how a guess looks, not for getting right.
_INSTANT_WEIGHTS = (30, 45, 10, 3, 3, 3, 3, 3)
_THINKING_WEIGHTS = (6, 8, 10, 12, 14, 16, 17, 17)
# How thinking that is cut is closed: by the gateway's default, by a line's end, by nothing.
_CLOSINGS = (WRAP_UP, "\n", "")


@dataclass(frozen=True, slots=True)
class Lesson:
    """Token ids, and the same where they are learned, IGNORED where they are not."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]


class Teacher:
    """Makes lessons.

    Args:
        tokenizer: gives the ids.
        split: the only split it takes questions from is `train`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def ids(self, text: str) -> list[int]:
        """A text in token ids."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def lesson(self, rng: random.Random) -> Lesson:
        """One lesson of the mixture."""
        kind = rng.choices(_KINDS, _KIND_WEIGHTS)[0]
        weights = _INSTANT_WEIGHTS if kind == "instant" else _THINKING_WEIGHTS
        question = draw_from(rng, rng.choices(LEVELS, weights)[0], "train")
        if kind == "instant":
            return self.instant(question)
        return self.full(question, rng) if kind == "full" else self.cut(question, rng)

    def instant(self, question: Question) -> Lesson:
        """The answer at once, behind the template's empty thinking."""
        prompt = self.ids(prompt_of(question.text, thinking=False))
        return _lesson((prompt, False), (self.ids(f"{question.answer:02}{IM_END}"), True))

    def full(self, question: Question, rng: random.Random) -> Lesson:
        """A whole chain, then the answer."""
        chain = think(question, rng)
        prompt = self.ids(prompt_of(question.text, thinking=True))
        return _lesson((prompt, False), (self.ids(f"{chain.text}{END_THINK}\n\n{chain.answer:02}{IM_END}"), True))

    def cut(self, question: Question, rng: random.Random) -> Lesson:
        """A chain that is closed somewhere, then the best guess; that it is closed there is not learned."""
        thought = self.ids(think(question, rng).text)
        thought = thought[: rng.randrange(len(thought))]
        guess = best_guess(question, self._tokenizer.decode(thought), rng)
        prompt = self.ids(prompt_of(question.text, thinking=True))
        closing = self.ids(rng.choice(_CLOSINGS) + END_THINK)
        guessed = self.ids(f"\n\n{guess:02}{IM_END}")
        return _lesson((prompt, False), (thought, True), (closing, False), (guessed, True))

    def block(self, seed: int, number: int, *, batches: int, batch_tokens: int) -> list[list[Lesson]]:
        """About `batches` batches of at most `batch_tokens` tokens, padding included, in random order."""
        rng = random.Random(f"{seed}/{number}")
        lessons: list[Lesson] = []
        room = batches * batch_tokens
        while room > 0:
            lessons.append(self.lesson(rng))
            room -= len(lessons[-1].ids)
        out = bucketed(lessons, batch_tokens)
        rng.shuffle(out)
        return out


def _lesson(*parts: tuple[Sequence[int], bool]) -> Lesson:
    """A lesson of parts, each with whether it is learned."""
    ids = tuple(token for part, _ in parts for token in part)
    labels = tuple(token if learned else IGNORED for part, learned in parts for token in part)
    return Lesson(ids, labels)


def bucketed(lessons: Sequence[Lesson], batch_tokens: int) -> list[list[Lesson]]:
    """Batches of like length, none above `batch_tokens` tokens with padding (a longer lesson is alone)."""
    out: list[list[Lesson]] = [[]]
    for lesson in sorted(lessons, key=lambda lesson: len(lesson.ids)):
        if out[-1] and (len(out[-1]) + 1) * len(lesson.ids) > batch_tokens:
            out.append([])
        out[-1].append(lesson)
    return out
