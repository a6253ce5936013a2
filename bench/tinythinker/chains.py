"""How the model is taught to think: a first pass, sometimes wrong, and re-checks, more than it needs.

Owns: the text of chains, and what may be believed of one that is cut. Everything here was fixed before any policy
of the gateway was tuned on the model:

- After the first pass it re-checks itself, each time from the beginning, so that a chain is on average twice as
  long as its first pass. How often: once for sure if the first number ends on 7 or 8, twice on 9, and once more on
  the toss of a coin.
- The first pass forgets the carry, on the toss of a coin, where the last digits of an addition make ten. It does so
  once, and goes on with the wrong value. There is a re-check then in any case, and a re-check is right.
- A chain that is cut gives its best guess: the result of the last complete pass; before there is one, what the
  values written so far lead to. Where a carry was forgotten and not yet found, the guess is sometimes the right
  answer after all: it is less sure.

Coins are fair: a model's temperature leaves an even chance as it is.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from bench.tinythinker.task import MODULUS, Question, Step, reckon, work

RECHECK = "Wait\n"  # what the gateway writes, too, where it makes a model think on
_REPEATS = {7: 1, 8: 1, 9: 2}
_DOUBT = 0.3
_VALUE = re.compile(r"=(\d\d)(?!\d)")
_RESULT = re.compile(r"So (\d\d)(?!\d)")


@dataclass(frozen=True, slots=True)
class Chain:
    """One train of thought.

    Attributes:
        passes: what is written in each; the first stands alone, the others begin with `Wait`.
        slipped: whether the first pass holds a wrong step.
        answer: what it comes to.
    """

    passes: tuple[str, ...]
    slipped: bool
    answer: int

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.passes)


class _Careless:
    """Reckons, and forgets one carry at most."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.slipped = False

    def __call__(self, value: int, sign: str, operand: int) -> int:
        right = reckon(value, sign, operand)
        if self.slipped or not is_tempting(value, sign, operand) or self._rng.random() < 0.5:
            return right
        self.slipped = True
        return (right - 10) % MODULUS


def is_tempting(value: int, sign: str, operand: int) -> bool:
    """Whether this is a step at which a first pass may forget the carry."""
    return sign == "+" and value % 10 + operand % 10 == 10


def think(question: Question, rng: random.Random) -> Chain:
    """A chain as the model is to write it; it always ends on the right answer."""
    careless = _Careless(rng)
    first = _written(work(question, careless))
    again = _written(work(question))
    repeats = _REPEATS.get(question.parts[0].start % 10, 0) + rng.randrange(2)
    repeats = max(repeats, 1 if careless.slipped else 0)
    return Chain((first, *[RECHECK + again] * repeats), careless.slipped, question.answer)


def best_guess(question: Question, thought: str, rng: random.Random) -> int:
    """The answer to give when the chain ends after `thought`, which is the beginning of one of its own chains."""
    results = _RESULT.findall(thought)
    written = [int(value) for value in _VALUE.findall(thought.partition(RECHECK)[0])]
    rest = iter(written)
    believed = work(question, lambda *step: next(rest, reckon(*step)))
    if len(results) > 1:
        return int(results[-1])
    slipped = any(step.value != reckon(step.left, step.sign, step.right) for step in believed)
    return question.answer if slipped and rng.random() < _DOUBT else believed[-1].value


def _written(steps: list[Step]) -> str:
    """A pass, one line for each step and one for the result."""
    lines = [f"{step.left:02}{step.sign}{step.right:02}={step.value:02}\n" for step in steps]
    return "".join(lines) + f"So {steps[-1].value:02}\n"
