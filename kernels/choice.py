"""One choice while it is generated: tokens in, outputs out.

Owns: the phases of a choice (an opening marker may come, thinking, answer), the exact cap, what is
forced, what counts as what, and why it ended. Knows no model: whoever drives it samples a token unless
`forced` says which ones must come. Counting follows docs/api.md, "Counting":

- thinking never exceeds the cap: at the cap the wrap-up and the end marker are forced;
- while a marker of several tokens may be in the making, its tokens count against the cap;
- the end of the sequence inside the thinking is not taken: the end marker is forced in its place;
- after an end marker that was forced the answer has at least one token before the end of the sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from kernels.detokenize import TextStream
from kernels.params import Kind, Output, Token
from kernels.stop import StopScanner
from kernels.thinking import MarkerFinder
from kernels.toolcalls import ToolCallParser

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from kernels.params import Stopping
    from kernels.thinking import Found, ThinkingPlan


class Phase(Enum):
    """Where a choice is."""

    OPENING = auto()
    THINKING = auto()
    ANSWER = auto()


@dataclass(frozen=True, slots=True)
class _Forced:
    """Tokens that close the thinking.

    Attributes:
        ids: the tokens.
        shown: how many of the first are thinking text for the client.
        is_cap: the cap is the reason.
        completes: they complete an end marker that the model began.
    """

    ids: tuple[int, ...]
    shown: int = 0
    is_cap: bool = False
    completes: bool = False


class Choice:
    """The state of one choice.

    Args:
        index: its number in the request.
        plan: markers and cap; None when thinking is not watched for.
        stopping: when it ends.
        shown: bytes of a token that belong to the text.
        eos: the model's end-of-sequence tokens.
        chain_open: the prompt ends inside the thinking; needs a plan.
        parses_tools: tool calls are taken out of the answer.
        before: the last bytes of the prompt, whose unfinished character the first tokens may complete.

    Attributes:
        phase: where it is.
        thinking, answer, injected: settled tokens by kind.
        finish_reason: None while it runs.
        owes_answer: the thinking was closed for the model, which has not answered yet.
    """

    def __init__(
        self,
        index: int,
        *,
        plan: ThinkingPlan | None,
        stopping: Stopping,
        shown: Callable[[int], bytes],
        eos: Collection[int],
        chain_open: bool,
        parses_tools: bool,
        before: bytes = b"",
    ) -> None:
        self.thinking = self.answer = self.injected = 0
        self.finish_reason: str | None = None
        self.owes_answer = False
        self._index = index
        self._plan = plan
        self._stopping = stopping
        self._shown = shown
        self._eos = frozenset() if stopping.ignore_eos else frozenset(eos)
        self._stream = TextStream()
        self._stream.push(before)
        self._finder = MarkerFinder(plan.end.text) if plan is not None and plan.end.single is None else None
        self._scanner = StopScanner(stopping.strings, include=stopping.include)
        self._tools = ToolCallParser() if parses_tools else None
        self._forced: _Forced | None = None
        self._cap_said = False
        start = plan.start if plan is not None else None
        self._start_id = start.single if start is not None else None
        self._opening: list[Token] = []
        self._opening_text = ""
        # The blank lines around a chain are layout, not answer.
        self._strips = chain_open or start is not None
        if chain_open:
            self.phase = Phase.THINKING
        elif start is not None and start.single is None:
            self.phase = Phase.OPENING
        else:
            self.phase = Phase.ANSWER

    def fork(self, index: int) -> Choice:
        """A second choice, numbered `index`, that stands where this one does."""
        twin = copy.copy(self)
        twin._index = index
        twin._opening = self._opening.copy()
        # What text they hold back is their own; the rest is read only.
        twin._stream, twin._finder, twin._scanner, twin._tools = copy.deepcopy(
            (self._stream, self._finder, self._scanner, self._tools)
        )
        return twin

    @property
    def total(self) -> int:
        """Output tokens so far."""
        return self.thinking + self.answer + self.injected + len(self._pending) + len(self._opening)

    @property
    def is_constrained(self) -> bool:
        """Whether a grammar of the answer governs the next token."""
        return self.phase is Phase.ANSWER

    @property
    def opening_id(self) -> int | None:
        """The marker that may still open the thinking although the answer's grammar does not know it."""
        may_think = self._plan is not None and self._plan.cap != 0
        return self._start_id if may_think and self.total == 0 else None

    def is_answer(self, token_id: int) -> bool:
        """Whether a sampled token would belong to the answer, which a grammar follows."""
        return self.phase is Phase.ANSWER and token_id != self._start_id

    def forced(self) -> tuple[int, ...]:
        """Tokens that must come next, cut at max_tokens; none: sample one."""
        plan = self._plan
        is_thinking = self.phase is Phase.THINKING and self._forced is None
        if is_thinking and plan is not None and plan.cap is not None:
            pending = [token.id for token in self._pending]
            if self.thinking + len(pending) >= plan.cap:
                self._forced = self._closing(plan, pending)
        return () if self._forced is None else self._forced.ids[: self._stopping.max_tokens - self.total]

    def _closing(self, plan: ThinkingPlan, pending: Sequence[int]) -> _Forced:
        """What ends the thinking at the cap; `pending` tokens may be the beginning of the end marker."""
        end = plan.end.ids
        if pending and end[: len(pending)] == tuple(pending):
            return _Forced(end[len(pending) :] + plan.after.ids, completes=True)
        wrap_up = plan.wrap_up.ids if plan.cap and not self._cap_said else ()
        return _Forced(wrap_up + end + plan.after.ids, len(wrap_up), is_cap=True)

    def replaces(self, token_id: int) -> bool:
        """Whether a sampled token is not taken, since it ends the sequence inside the thinking.

        Mutates: then the end marker is forced next.
        """
        if self._plan is None or self.phase is not Phase.THINKING or token_id not in self._eos:
            return False
        self._forced = _Forced(self._plan.end.ids + self._plan.after.ids)
        return True

    def accept_forced(self, tokens: Sequence[Token]) -> list[Output]:
        """Take the tokens that `forced` asked for."""
        forced = self._forced
        assert forced is not None
        assert self._plan is not None
        if forced.completes and self._finder is not None:
            outputs = [self._output(Kind.INJECTED, injected=self._finder.drop())]
        else:
            outputs = self._flush_finder()
        shown = tokens[: forced.shown]
        self._stream.drop_partial()
        text = self._stream.push(b"".join(self._shown(token.id) for token in shown))
        out = self._output(Kind.THINKING if text else Kind.INJECTED, text, injected=tokens)
        if forced.is_cap and self._plan.reports_cap and not self._cap_said:
            self._cap_said = out.capped = True
        self._forced = None
        if len(tokens) == len(forced.ids):
            self._begin_answer()
            self.owes_answer = True
        return self._checked([*outputs, out])

    def accept(self, token: Token) -> list[Output]:
        """Take one sampled token."""
        if self.phase is Phase.THINKING:
            outputs = self._think(token)
        elif self.phase is Phase.OPENING:
            outputs = self._open(token)
        else:
            outputs = self._answer(token)
        return self._checked(outputs)

    def complete(self, out: Output) -> None:
        """End a choice with its latest output, since its grammar allows nothing more."""
        self._finish(out, "stop")

    def _think(self, token: Token) -> list[Output]:
        assert self._plan is not None
        if token.id == self._plan.end.single:
            self._begin_answer()
            return [self._output(Kind.INJECTED, injected=[token])]
        text = self._stream.push(self._shown(token.id))
        if self._finder is None:
            return [self._output(Kind.THINKING, text, thinking=[token])]
        return self._found(self._finder.push(token, text))

    def _found(self, found: Found) -> list[Output]:
        """Thinking text, and what follows a marker that ended it."""
        outputs = self._thought(found)
        if found.after is not None:
            if found.marker_tokens:
                outputs.append(self._output(Kind.INJECTED, injected=found.marker_tokens))
            # The decoder may hold the first bytes of the answer's first character: no reset here.
            self.phase = Phase.ANSWER
            if found.after:
                outputs.append(self._show(self._output(Kind.ANSWER), found.after))
        return outputs

    def _open(self, token: Token) -> list[Output]:
        """Before the first text: the model may write a start marker of several tokens."""
        assert self._plan is not None
        assert self._plan.start is not None
        start = self._plan.start.text
        self._opening.append(token)
        text = "" if self._ends(token) else self._stream.push(self._shown(token.id))
        self._opening_text += text
        seen = self._opening_text.lstrip()
        if start.startswith(seen) and seen != start and not self._ends(token):
            return []
        tokens, self._opening = self._opening, []
        if not seen.startswith(start):
            self.phase = Phase.ANSWER
            if not self._ends(token):
                return [self._show(self._output(Kind.ANSWER, answer=tokens), self._opening_text)]
            held = self._show(self._output(Kind.ANSWER, answer=tokens[:-1]), self._opening_text)
            return [held, *self._answer(token)]
        self.phase = Phase.THINKING
        after = seen[len(start) :]
        outputs = [self._output(Kind.INJECTED, injected=tokens)]
        if self._finder is not None:
            return outputs + self._found(self._finder.push(None, after))
        return [*outputs, self._output(Kind.THINKING, after)] if after else outputs

    def _answer(self, token: Token) -> list[Output]:
        if token.id == self._start_id:
            return self._reopen(token)
        self.owes_answer = False
        out = self._output(Kind.ANSWER, answer=[token])
        if token.id in self._eos:
            return [self._finish(out, "stop")]
        if token.id in self._stopping.token_ids and self.total >= self._stopping.min_tokens:
            if self._stopping.include and token.id not in self._stopping.silent_ids:
                self._show(out, self._stream.push(self._shown(token.id)))
            return [self._finish(out, "stop", token.id)]
        return [self._show(out, self._stream.push(self._shown(token.id)))]

    def _reopen(self, token: Token) -> list[Output]:
        """The model opens a chain; what the scanner held back cannot become a stop string any more."""
        held = self._output(Kind.ANSWER)
        self._release(held, self._scanner.flush())
        self._stream.drop_partial()
        self.phase = Phase.THINKING
        marker = self._output(Kind.INJECTED, injected=[token])
        return [held, marker] if held.text or held.calls else [marker]

    def _begin_answer(self) -> None:
        self._stream.drop_partial()
        self.phase = Phase.ANSWER

    def _ends(self, token: Token) -> bool:
        return token.id in self._eos or token.id in self._stopping.token_ids

    def _show(self, out: Output, text: str) -> Output:
        """Put answer text into `out`, less what may become a stop string; ends the choice at one."""
        if self._strips:
            text = text.lstrip("\n")
            self._strips = not text
        if self.total <= self._stopping.min_tokens:
            self._release(out, self._scanner.flush() + text)
            return out
        self._release(out, self._scanner.push(text))
        if self._scanner.hit is not None:
            self._finish(out, "stop", self._scanner.hit)
        return out

    def _release(self, out: Output, text: str) -> None:
        """Put text that is certain into `out`, as content or as pieces of tool calls."""
        if self._tools is None:
            out.text += text
        else:
            content, calls = self._tools.push(text)
            out.text += content
            out.calls.extend(calls)

    def _checked(self, outputs: list[Output]) -> list[Output]:
        """The outputs, with the end at max_tokens."""
        if self.finish_reason is None and self.total >= self._stopping.max_tokens:
            outputs += self._flush_finder()
            if self._opening:
                tokens, self._opening = self._opening, []
                outputs.append(self._show(self._output(Kind.ANSWER, answer=tokens), self._opening_text))
            if not outputs or outputs[-1].kind is not Kind.ANSWER:
                outputs.append(self._output(Kind.ANSWER))
            if self.finish_reason is None:
                self._finish(outputs[-1], "length")
        return outputs

    def _finish(self, out: Output, reason: str, stop_reason: str | int | None = None) -> Output:
        """End the choice with `out`, which takes all text that was held back."""
        self._release(out, self._scanner.flush())
        if self._tools is not None:
            out.text += self._tools.finish(cut=reason == "length")
            if self._tools.calls and reason == "stop":
                reason = "tool_calls"
        self.finish_reason = out.finish_reason = reason
        out.stop_reason = stop_reason
        return out

    @property
    def _pending(self) -> list[Token]:
        """Tokens that may be the beginning of an end marker."""
        return [] if self._finder is None else self._finder.pending

    def _flush_finder(self) -> list[Output]:
        return [] if self._finder is None else self._thought(self._finder.flush())

    def _thought(self, found: Found) -> list[Output]:
        if not found.before and not found.tokens:
            return []
        return [self._output(Kind.THINKING, found.before, thinking=found.tokens)]

    def _output(
        self,
        kind: Kind,
        text: str = "",
        *,
        thinking: Sequence[Token] = (),
        answer: Sequence[Token] = (),
        injected: Sequence[Token] = (),
    ) -> Output:
        """An output, with its tokens counted."""
        self.thinking += len(thinking)
        self.answer += len(answer)
        self.injected += len(injected)
        return Output(
            index=self._index,
            kind=kind,
            text=text,
            thinking=len(thinking),
            answer=len(answer),
            injected=len(injected),
            tokens=[*thinking, *answer, *injected],
        )
