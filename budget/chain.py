"""One choice under two-phase enforcement: where its chain of thought ends, and what is sampled next.

Owns: the sans-IO state machine of a choice that is continued from exact token ids (docs/adr/0009). Phase
one samples thinking with what is left of the cap as its limit, so a backend cannot overrun it; phase two
goes on from the same ids, with whatever had to be forced in between. Pure; O(1) per token.
Sources: Qwen3's thinking budget (two calls), s1 (arXiv 2501.19393, section 3.1: "Wait").
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from budget.chain_step import Step
from budget.course import Course, Told
from budget.stopping import MOST_WAITS, MinimumThinking

TRIAL_TOKENS = 2  # in and out, when a backend is made to check what an answer asks for
Phase = Literal["thinking", "answer", "over"]


class Forcing(msgspec.Struct, frozen=True, kw_only=True):
    """Texts a chain may have to force, in the model's tokens.

    Attributes:
        opening: the start marker as a template writes it, newline included.
        closing: the end marker.
        after: what follows an end marker that was forced.
        wrap_up: stands before an end marker that a bound forced.
        wait: makes thinking go on that ended too early.
        start_id: the start marker, if it is one token.
        end_id: the end marker, if it is one token; else the caller finds it in the text.
    """

    opening: tuple[int, ...]
    closing: tuple[int, ...]
    after: tuple[int, ...] = ()
    wrap_up: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()
    start_id: int | None = None
    end_id: int | None = None

    def overhead(self) -> int:
        """Most tokens that opening and ending one chain by force can take."""
        return self.ending() + len(self.wrap_up)

    def ending(self) -> int:
        """Most tokens that putting an empty chain before an answer can take."""
        return len(self.opening) + len(self.closing) + len(self.after)

    def most_wasted(self) -> int:
        """Most tokens of one chain that reach no client: a trial's two, an end of turn, and a marker at each wait."""
        return TRIAL_TOKENS + 1 + MOST_WAITS * len(self.closing)


class Purse(msgspec.Struct, frozen=True, kw_only=True):
    """The money of one choice: its share of what is left for output, and prices, in femto-USD (per token)."""

    femto_usd: int
    thinking: int
    answer: int


class ChainRules(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds a chain.

    Attributes:
        cap: most thinking tokens.
        total: most output tokens, everything forced included.
        answer_floor: tokens of `total` (and their price in `purse`) kept back for the answer.
        min_thinking: thinking that ends earlier is continued with `Forcing.wait`.
        answer_openers: tokens that begin the answer without a closing marker, as a tool call does.
        purse: bounds the money; None for no bound.
    """

    cap: int
    total: int
    answer_floor: int = 0
    min_thinking: int = 0
    answer_openers: frozenset[int] = frozenset()
    purse: Purse | None = None


class Chain:
    """One choice.

    Args:
        prompt: the rendered prompt in token ids.
        forcing: texts to force.
        rules: its bounds.
        is_open: the prompt ends inside the thinking.
        has_closed: the prompt already ends with a closed chain.
        course: what its thinking goes along: the steps of a plan, pauses for probes.

    Attributes:
        phase: what the next segment samples.
        ids: prompt and everything kept since.
        thinking, answer, injected: tokens so far.
        waits: how often "Wait" was forced.
        finish_reason, stop_reason: of the choice, once `phase` is over.
    """

    __slots__ = (
        "_forcing",
        "_is_reopened",
        "_rules",
        "answer",
        "course",
        "femto_usd",
        "finish_reason",
        "ids",
        "injected",
        "phase",
        "prompt_tokens",
        "stop_reason",
        "thinking",
        "waits",
    )

    def __init__(
        self,
        prompt: Sequence[int],
        forcing: Forcing,
        rules: ChainRules,
        *,
        is_open: bool,
        has_closed: bool = False,
        course: Course | None = None,
    ) -> None:
        self.ids = list(prompt)
        self.prompt_tokens = len(self.ids)
        self._forcing = forcing
        self._rules = rules
        self._is_reopened = False
        self.course = course
        self.thinking = self.answer = self.injected = self.waits = self.femto_usd = 0
        self.finish_reason: str | None = None
        self.stop_reason: object = None
        self.phase: Phase = "answer" if has_closed and not is_open else "thinking"

    def open(self, *, is_open: bool) -> Step:
        """Begin: force the opening marker where the prompt lacks it, and, without room, the closing one at once."""
        step = Step()
        if self.phase == "answer":
            return step
        if not is_open:
            self._force(step, self._forcing.opening)
        if self.course is not None:
            self._tell(step, self.course.begin(self.free()))
        if self.room() <= 0:
            self._close(step, ())
        return step

    def resume(self, ids: Sequence[int]) -> None:
        """Go on after output `ids` that another way of enforcement delivered; the last marker says in what phase."""
        for token_id in ids:
            if token_id in (self._forcing.start_id, self._forcing.end_id):
                self.injected += 1
                self.phase = "answer" if token_id == self._forcing.end_id else "thinking"
            elif self.phase == "answer":
                self.answer += 1
            else:
                self.thinking += 1
        self.ids += ids
        self._pay(self.thinking, self.answer + self.injected)

    def is_over(self) -> bool:
        """Whether the choice has its finish_reason."""
        return self.phase == "over"

    def room(self) -> int:
        """Most tokens the next segment may sample."""
        left = self.free()
        if self.course is not None and self.phase == "thinking":
            left = min(left, self.course.room(self.thinking))
        return max(0, left)

    def free(self) -> int:
        """The same, whatever the course says; below 0 where a bound is passed."""
        rules, left = self._rules, self._rules.total - self.output()
        purse = rules.purse
        if self.phase == "answer":
            if purse is not None and purse.answer:
                left = min(left, (purse.femto_usd - self.femto_usd) // purse.answer)
            return left
        reserve = rules.answer_floor + self._closing_tokens()
        left = min(rules.cap - self.thinking, left - reserve)
        if purse is not None and purse.thinking:
            free = purse.femto_usd - self.femto_usd - reserve * purse.answer
            left = min(left, free // purse.thinking)
        return left

    def stop_token_ids(self) -> tuple[int, ...]:
        """Tokens at which the thinking ends by itself."""
        end_id = self._forcing.end_id
        return (*(() if end_id is None else (end_id,)), *sorted(self._rules.answer_openers))

    def finds_end_by_text(self) -> bool:
        """Whether the closing marker is several tokens, so that its text ends the thinking."""
        return self._forcing.end_id is None

    def output(self) -> int:
        """Output tokens kept so far."""
        return self.thinking + self.answer + self.injected

    def feed(self, ids: Sequence[int], finish: str | None = None, stop: object = None) -> Step:
        """Take tokens the backend sampled, with the `finish_reason` and `stop_reason` it gave, if it did."""
        step = Step()
        if self.phase == "thinking":
            self._think(step, ids)
            if not step.is_over and finish is not None:
                self._end_thinking(step, ids, finish, stop)
        elif self.phase == "answer":
            self._say(step, ids)
            if not step.is_over and finish is not None:
                self._finish(step, finish, stop)
        else:
            step.wasted, step.is_over = len(ids), True
        return step

    def close(self, ids: Sequence[int]) -> Step:
        """Take tokens that wrote the closing marker, found by its text; the segment is over."""
        step = Step()
        if self.phase == "thinking":
            self._closed(step, list(ids))
        return step

    def begin_call(self, opener: tuple[int, ...]) -> Step:
        """End the thinking for a tool call whose beginning, of several tokens, was found by its text: force it anew."""
        step = Step()
        if self.phase == "thinking":
            self._close(step, ())
            self._force(step, opener)
            step.begins_call = True
        return step

    def cut(self, why: str, *, wraps_up: bool = True) -> Step:
        """End the thinking now, since a bound outside the chain (time) is met, or enough was thought."""
        step = Step()
        if self.phase == "thinking":
            self._close(step, self._forcing.wrap_up if wraps_up else (), why)
        return step

    def _think(self, step: Step, ids: Sequence[int]) -> None:
        rules, forcing, room = self._rules, self._forcing, self.room()
        for at, token_id in enumerate(ids):
            if token_id == forcing.end_id:
                step.wasted += len(ids) - at - 1  # a backend that went on after its stop token
                self._closed(step, [token_id])
                return
            if token_id in rules.answer_openers:
                step.wasted += len(ids) - at - 1
                self._close(step, ())
                step.answer += 1
                self.answer += 1
                self._keep(step, [token_id])
                return
            if step.thinking >= room:
                step.wasted += len(ids) - at
                self._meet_bound(step)
                return
            step.thinking += 1
            self.thinking += 1
            self._pay(1, 0)
            self._keep(step, [token_id])

    def _end_thinking(self, step: Step, ids: Sequence[int], finish: str, stop: object) -> None:
        """The backend ended the segment, and no marker was among its tokens."""
        if finish == "length":
            self._meet_bound(step)
            return
        if stop is not None and stop == self._forcing.end_id:  # it keeps the token it stopped at to itself
            if not self._go_on(step, has_ended=True):
                self._close(step, ())
            return
        if ids and step.thinking:  # the model ended its turn: that token is no part of a chain that goes on
            step.ids.pop()
            self.ids.pop()
            step.thinking -= 1
            self.thinking -= 1
            self._pay(-1, 0)
            step.wasted += 1
        if not (self._go_on(step, has_ended=True) or self._wait(step)):
            self._close(step, ())

    def _meet_bound(self, step: Step) -> None:
        """The thinking may not go on as it did."""
        if not self._go_on(step, has_ended=False):
            self._close(step, self._forcing.wrap_up, self._bound())

    def _go_on(self, step: Step, *, has_ended: bool) -> bool:
        """Follow the course, where it goes on: with the heading of the next step, or with nothing forced at all."""
        if self.course is None:
            return False
        told = self.course.turn(self.thinking, has_ended=has_ended, room=self.free())
        if told is None:
            return False
        self._tell(step, told)
        step.is_over = True
        return True

    def _tell(self, step: Step, told: Told | None) -> None:
        """Force a heading."""
        if told is not None:
            self._force(step, told.ids)
            step.shown, step.told = len(told.ids), told.text

    def _wait(self, step: Step) -> bool:
        """Make the thinking go on if it ended too early and there is room."""
        wait = self._forcing.wait
        goes_on = MinimumThinking(self._rules.min_thinking).goes_on(self.thinking, self.waits)
        if not (goes_on and wait and self.room() > len(wait)):
            return False
        self.waits += 1
        self._force(step, wait)
        step.shown, step.is_over = len(wait), True
        return True

    def _closed(self, step: Step, marker: list[int]) -> None:
        """The model closed its thinking itself."""
        if self._go_on(step, has_ended=True) or self._wait(step):
            step.wasted += len(marker)
            return
        self.injected += len(marker)
        step.injected += len(marker)
        self._pay(0, len(marker))
        self._keep(step, marker)
        self.phase, step.is_over = "answer", True

    def _close(self, step: Step, wrap_up: tuple[int, ...], why: str | None = None) -> None:
        """Force the end of the thinking."""
        forcing = self._forcing
        wrap_up = wrap_up if self.thinking else ()
        self._force(step, (*wrap_up, *forcing.closing, *forcing.after))
        step.shown, step.is_over, step.ended_by = len(wrap_up), True, why
        self.phase = "answer"

    def _say(self, step: Step, ids: Sequence[int]) -> None:
        forcing, room = self._forcing, self.room()
        for at, token_id in enumerate(ids):
            if step.answer >= room:
                step.wasted += len(ids) - at
                self._finish(step, "length", None)
                return
            if token_id == forcing.start_id:
                self._is_reopened = True
            if self._is_reopened or token_id == forcing.end_id:
                # Thinking in the answer is over the cap by definition: it is dropped, up to its marker.
                self._is_reopened = self._is_reopened and token_id != forcing.end_id
                step.wasted += 1
                continue
            step.answer += 1
            self.answer += 1
            self._pay(0, 1)
            self._keep(step, [token_id])

    def _finish(self, step: Step, finish: str, stop: object) -> None:
        self.finish_reason, self.stop_reason = finish, stop
        self.phase, step.is_over = "over", True

    def _bound(self) -> str:
        """What the thinking ran into: the cap, its plan, the purse, or what is kept of the total for the answer."""
        if self.thinking >= self._rules.cap:
            return "cap"
        if self.course is not None and self.course.steps is not None and self.free() > 0:
            return "plan"
        reserve = self._rules.answer_floor + self._closing_tokens()
        has_tokens = self._rules.total - self.output() > reserve
        return "usd" if has_tokens and self._rules.purse is not None else "total"

    def _closing_tokens(self) -> int:
        forcing = self._forcing
        return len(forcing.wrap_up) + len(forcing.closing) + len(forcing.after)

    def _force(self, step: Step, ids: tuple[int, ...]) -> None:
        self.injected += len(ids)
        step.injected += len(ids)
        step.forced += ids
        self._pay(0, len(ids))
        self._keep(step, ids)

    def _keep(self, step: Step, ids: Sequence[int]) -> None:
        step.ids += ids
        self.ids += ids

    def _pay(self, thinking: int, answer: int) -> None:
        purse = self._rules.purse
        if purse is not None:
            self.femto_usd += thinking * purse.thinking + answer * purse.answer
