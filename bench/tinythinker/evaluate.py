"""What the model can do: instant, with all its thinking, and cut at caps, by level, with Wilson intervals.

Owns: generating in batches, cutting as the gateway cuts, and the figures. Does not own: policies; what is measured
here is the model alone.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.tinythinker.lessons import Teacher
from bench.tinythinker.task import Question
from bench.tinythinker.words import END_THINK, IM_END, WRAP_UP, build_tokenizer, prompt_of

CAPS = (5, 10, 20, 30, 40, 60, 80, 120)
MOST_TOKENS = 480  # no chain of the lessons is longer
_BATCH = 128
_Z = 1.959964


@dataclass(frozen=True, slots=True)
class Outcome:
    """One answer.

    Attributes:
        arm: `instant`, `full` or `cap N`.
        level: of the question.
        is_right: whether the answer was the right one.
        thinking_tokens, answer_tokens: generated; what was injected is not among them.
        capped: whether the cap ended the thinking.
    """

    arm: str
    level: int
    is_right: bool
    thinking_tokens: int
    answer_tokens: int
    capped: bool = False


class Examiner:
    """Asks a network.

    Args:
        model: of `load_folder`.
        seed: of the sampling.
        temperature: 0 for greedy; top-p and top-k are those of the model's generation configuration.
        wrap_up: put before the end marker where a chain is cut.
    """

    def __init__(self, model: Any, *, seed: int = 0, temperature: float = 0.6, wrap_up: str = WRAP_UP) -> None:  # noqa: ANN401
        self._model = model
        self._tokenizer = build_tokenizer()
        self._teacher = Teacher(self._tokenizer)
        self._temperature = temperature
        self._closing = self._teacher.ids(wrap_up + END_THINK)
        self._seed = seed

    def examine(self, questions: Sequence[Question], caps: Iterable[int] = CAPS) -> list[Outcome]:
        """Every arm on every question; the arms with caps cut the very chains of the full arm."""
        torch.manual_seed(self._seed)
        end = self._tokenizer.token_to_id(END_THINK)
        instant = self._ask([prompt_of(question.text, thinking=False) for question in questions])
        outcomes = [self._judge("instant", *pair, 0) for pair in zip(questions, instant, strict=True)]
        prompts = [self._teacher.ids(prompt_of(question.text, thinking=True)) for question in questions]
        whole = self._generate(prompts)
        thoughts = [ids[: ids.index(end)] if end in ids else ids for ids in whole]
        for question, ids, thought in zip(questions, whole, thoughts, strict=True):
            outcomes.append(self._judge("full", question, ids[len(thought) + 1 :], len(thought)))
        for cap in caps:
            outcomes += self._cut(questions, prompts, whole, thoughts, cap)
        return outcomes

    def _cut(
        self,
        questions: Sequence[Question],
        prompts: Sequence[list[int]],
        whole: Sequence[list[int]],
        thoughts: Sequence[list[int]],
        cap: int,
    ) -> list[Outcome]:
        """The arm of one cap; a chain that ends below it is left as it is."""
        over = [i for i, thought in enumerate(thoughts) if len(thought) > cap]
        asked = [[*prompts[i], *thoughts[i][:cap], *self._closing] for i in over]
        answers = dict(zip(over, self._generate(asked, most=16), strict=True))
        return [
            self._judge(f"cap {cap}", question, answers[i], cap, capped=True)
            if i in answers
            else self._judge(f"cap {cap}", question, whole[i][len(thoughts[i]) + 1 :], len(thoughts[i]))
            for i, question in enumerate(questions)
        ]

    def _ask(self, prompts: Sequence[str]) -> list[list[int]]:
        """Short answers to prompts."""
        return self._generate([self._teacher.ids(prompt) for prompt in prompts], most=16)

    def _judge(
        self, arm: str, question: Question, answer: Sequence[int], thinking: int, *, capped: bool = False
    ) -> Outcome:
        """Compare what was said with what is right."""
        said = self._tokenizer.decode(list(answer)).replace(IM_END, "").strip()
        return Outcome(arm, question.level, said == f"{question.answer:02}", thinking, len(answer), capped)

    def _generate(self, prompts: Sequence[list[int]], most: int = MOST_TOKENS) -> list[list[int]]:
        """What follows each prompt, up to and with the end of the turn."""
        out: list[list[int]] = [[]] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            for i, ids in zip(chosen, self._batch([prompts[i] for i in chosen], most), strict=True):
                out[i] = ids
        return out

    def _batch(self, prompts: Sequence[list[int]], most: int) -> list[list[int]]:
        """One batch, padded on the left."""
        pad, eos = self._model.config.pad_token_id, self._model.config.eos_token_id
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts])
        sampling = {"do_sample": True, "temperature": self._temperature} if self._temperature else {"do_sample": False}
        with torch.inference_mode():
            made = self._model.generate(
                input_ids=ids, attention_mask=(ids != pad).long(), max_new_tokens=most, **sampling
            )
        rows: list[list[int]] = made[:, longest:].tolist()
        return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def wilson(right: int, asked: int) -> tuple[float, float]:
    """The 95 % interval of a share, as Wilson gives it; (0, 1) for nothing asked."""
    if not asked:
        return 0.0, 1.0
    share, z2 = right / asked, _Z * _Z / asked
    middle = (share + z2 / 2) / (1 + z2)
    half = _Z / (1 + z2) * math.sqrt(share * (1 - share) / asked + z2 / (4 * asked))
    return max(0.0, middle - half), min(1.0, middle + half)


def summary(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Figures of each arm: over all questions and by level."""
    arms: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        arms[outcome.arm].append(outcome)
    return {
        arm: {
            **_figures(given),
            "by_level": {
                str(level): _figures([each for each in given if each.level == level])
                for level in sorted({each.level for each in given})
            },
        }
        for arm, given in arms.items()
    }


def _figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Accuracy with its interval and mean tokens."""
    asked, right = len(outcomes), sum(outcome.is_right for outcome in outcomes)
    low, high = wilson(right, asked)
    return {
        "asked": asked,
        "accuracy": right / asked,
        "interval": [low, high],
        "thinking_tokens": sum(outcome.thinking_tokens for outcome in outcomes) / asked,
        "answer_tokens": sum(outcome.answer_tokens for outcome in outcomes) / asked,
        "capped": sum(outcome.capped for outcome in outcomes) / asked,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as a Markdown table: accuracy in percent by level, tokens over all."""
    levels = list(next(iter(figures.values()))["by_level"])
    head = ["arm", "accuracy", "95 %", "thinking tokens", "capped", *[f"level {level}" for level in levels]]
    rows = [
        [
            arm,
            f"{100 * of['accuracy']:.1f}",
            f"{100 * of['interval'][0]:.1f}-{100 * of['interval'][1]:.1f}",
            f"{of['thinking_tokens']:.1f}",
            f"{100 * of['capped']:.0f} %",
            *[f"{100 * of['by_level'][level]['accuracy']:.0f}" for level in levels],
        ]
        for arm, of in figures.items()
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
