"""The cap matrix on real parts: what a cell asks for, and what its answer has to show however the cap was held.

Thinking is counted here from the token ids that the client got, not believed from the response.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from openai import OpenAI
from tokenizers import Tokenizer

from tests.e2e.sdk import NO_END, Answer, Choice, ask, check_accounts
from tests.e2e.servers import CAP_DEFAULT_TOKENS

QUESTION = "What is 17+25?"
CAPS = (0, 1, 5, 40, None)
TEMPLATE_TOKENS = 4  # vLLM counts what the template puts after the start marker; here that is one
ROOM = 10  # for the answer: its floor is 8
MARKUP_ROOM = 90  # a call letter by letter; it ends by itself
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
SAID = "forty two"


@dataclass(frozen=True, slots=True)
class Cell:
    """One request of the matrix; cap None: what the configuration says."""

    cap: int | None
    n: int
    stream: bool

    @property
    def bound(self) -> int:
        """Most thinking tokens of a choice."""
        return CAP_DEFAULT_TOKENS if self.cap is None else self.cap


class Vocabulary:
    """The model's tokens, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self._tokens = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(self, text: str) -> list[int]:
        """A text in token ids."""
        ids: list[int] = self._tokens.encode(text, add_special_tokens=False).ids
        return ids

    def compact(self) -> dict[str, float]:
        """A `logit_bias` without ends of turn and white space, with which a small model fills up JSON."""
        white = {str(token_id): -100 for name, token_id in self._tokens.get_vocab().items() if not name.strip("ĠĊĉč")}
        return {**NO_END, **white}


@dataclass(frozen=True, slots=True)
class Marks:
    """What can stand around the thinking in a choice's token ids."""

    opening: list[int]
    closing: list[int]
    wrap_up: list[int]
    kept_back: int = 0  # for a wrap-up that only a take-over would need

    @property
    def most_forced(self) -> int:
        """Most tokens that may be forced, with a blank line after the chain."""
        return len(self.opening) + len(self.closing) + len(self.wrap_up) + self.kept_back + 1

    def split(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """The thinking, and what came after it; without a closing marker nothing was thought."""
        size = len(self.closing)
        ends = [at for at in range(len(ids)) if list(ids[at : at + size]) == self.closing]
        if not ends:
            return [], list(ids)
        before, after = list(ids[: ends[0]]), list(ids[ends[0] + size :])
        if before[: len(self.opening)] == self.opening:
            before = before[len(self.opening) :]
        rest = len(before) - len(self.wrap_up)
        if before[max(0, rest) :] == self.wrap_up:
            before = before[:rest]
        return before, after


@dataclass(frozen=True, slots=True)
class Shape:
    """What is asked of the answer.

    Attributes:
        check: of one choice: its answer is whole.
        fields: of the request.
        room: tokens for the answer.
        is_compact: the answer is JSON: no white space.
        may_waste: the gateway ends it, and something more may be on its way.
    """

    check: Callable[[Choice], None]
    fields: dict[str, Any] = field(default_factory=dict)
    room: int = ROOM
    is_compact: bool = False
    may_waste: bool = False


def _is_text(choice: Choice) -> None:
    assert choice.content
    assert (choice.finish_reason, choice.calls) == ("length", {})


def _has_logprobs(choice: Choice) -> None:
    _is_text(choice)
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in choice.logprobs)
    assert "".join(entry.token for entry in choice.logprobs).endswith(choice.content)


def _is_stopped(choice: Choice) -> None:
    assert (choice.content, choice.finish_reason) == (SAID.partition(" ")[0], "stop")


def _is_sum(choice: Choice) -> None:
    assert json.loads(choice.content) == {"sum": 42}
    assert choice.finish_reason == "stop"


def _is_call(finish: set[str], choice: Choice) -> None:
    (call,) = choice.calls.values()
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", {"city": "Paris"})
    assert call["id"]
    assert choice.content == ""
    assert choice.finish_reason in finish


def _object(name: str, values: list[Any]) -> dict[str, Any]:
    properties = {name: {"enum": values}}
    return {"type": "object", "properties": properties, "required": [name], "additionalProperties": False}


def _tool(*, strict: bool) -> dict[str, Any]:
    parameters = _object("city", ["Paris"])
    return {"type": "function", "function": {"name": "get_weather", "parameters": parameters, "strict": strict}}


_SUM = {"name": "sum", "strict": True, "schema": _object("sum", [42])}
_NAMED = {"type": "function", "function": {"name": "get_weather"}}
SHAPES = {
    "plain": Shape(_is_text),
    "logprobs": Shape(_has_logprobs, {"logprobs": True, "top_logprobs": 2}),
    # A blank stands in the thinking, too.
    "stop": Shape(_is_stopped, {"stop": [" "], "structured_outputs": {"choice": [SAID]}}, may_waste=True),
    "schema": Shape(
        _is_sum, {"response_format": {"type": "json_schema", "json_schema": _SUM}}, room=20, is_compact=True
    ),
    "named": Shape(
        partial(_is_call, {"stop", "tool_calls"}),
        {"tools": [_tool(strict=True)], "tool_choice": _NAMED},
        room=MARKUP_ROOM,
        is_compact=True,
    ),
    "required": Shape(
        partial(_is_call, {"tool_calls"}),
        {"tools": [_tool(strict=True)], "tool_choice": "required", "parallel_tool_calls": False},
        room=MARKUP_ROOM,
        is_compact=True,
    ),
    # With `strict` vLLM would put a grammar of its own in the place of this one.
    "auto": Shape(
        partial(_is_call, {"tool_calls"}),
        {"tools": [_tool(strict=False)], "structured_outputs": {"choice": [CALL]}},
        room=MARKUP_ROOM,
    ),
}


def ask_cell(client: OpenAI, shape: Shape, cell: Cell, marks: Marks, compact: dict[str, float]) -> Answer:
    """The request of a cell, to a model that would think for ever."""
    sampling: dict[str, Any] = {"n": cell.n, "temperature": 1.0, "seed": 7} if cell.n > 1 else {}
    return ask(
        client,
        QUESTION,
        stream=cell.stream,
        max_completion_tokens=cell.bound + marks.most_forced + shape.room,
        logit_bias=compact if shape.is_compact else NO_END,
        thinkgate={"mode": "reasoning"} if cell.cap is None else {"thinking_tokens": cell.cap},
        return_token_ids=True,
        **sampling,
        **shape.fields,
    )


def ask_cells(
    client: OpenAI, shape: Shape, cells: Sequence[Cell], marks: Marks, compact: dict[str, float]
) -> Iterable[Answer]:
    """All of them at once: a batch costs little more than its longest member."""
    with ThreadPoolExecutor(len(cells)) as threads:
        return list(threads.map(lambda cell: ask_cell(client, shape, cell, marks, compact), cells))


def check_cell(answer: Answer, shape: Shape, cell: Cell, marks: Marks) -> None:
    """Thinking stays within the cap by count and uses it up, the answer is whole, usage as defined, markup nowhere."""
    assert sorted(answer.choices) == list(range(cell.n))
    check_accounts(answer, cap=cell.bound, may_waste=shape.may_waste)
    thinking = spoken = logprobs = 0
    for choice in answer.choices.values():
        thought, after = marks.split(choice.token_ids)
        assert max(0, cell.bound - TEMPLATE_TOKENS) <= len(thought) <= cell.bound
        thinking, spoken, logprobs = thinking + len(thought), spoken + len(after), logprobs + len(choice.logprobs)
        assert not choice.thinking or cell.bound
        shown = choice.thinking + choice.content
        assert not any(tag in shown for tag in ("<think>", "</think>", "reason>", "tool_call"))
        shape.check(choice)
    assert thinking == answer.tokens["thinking"]
    ids = sum(len(choice.token_ids) for choice in answer.choices.values())
    assert ids == sum(answer.tokens[kind] for kind in ("thinking", "answer", "injected"))
    # An engine has logprobs for what it was made to say; tokens forced between two segments have none.
    assert logprobs in ((ids, thinking + answer.tokens["answer"]) if "logprobs" in shape.fields else (0,))
    assert answer.tokens["answer"] <= spoken  # what is forced behind the end marker is no answer
    assert answer.thinkgate["cap"]["tokens"] == cell.bound
    assert answer.thinkgate["capped"] == bool(cell.bound)
