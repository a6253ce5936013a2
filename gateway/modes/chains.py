"""Two-phase enforcement: every choice is a chain of segments, continued from exact token ids.

Owns: carrying out what `budget/chain.py` decides: the prompt as ids, a segment at a time, text and tool
calls out of tokens, the end of thinking by time, taking over from a backend that does not hold its cap.
One uninterrupted stream of deltas for the caller. Does not own: placement, counting, the envelope's end
(flow.py).
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import msgspec

from budget.chain import TRIAL_TOKENS, Chain, ChainRules, Forcing
from budget.chain_step import Step
from budget.envelope import thinking_is_over
from gateway.backends.events import FINISH_REASONS
from gateway.backends.markers import AnswerFilter, MarkerSplitter
from gateway.backends.port import Capabilities, Delta, Kind, Usage
from gateway.backends.segments import WAIT, SegmentFields, tool_plan
from gateway.backends.tool_calls import OPENING
from gateway.errors import UpstreamError
from gateway.modes.chain_bounds import chain_rules, prompt_tail
from gateway.modes.choice import Choice, TakeOver
from gateway.modes.merge import merged

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from gateway.backends.port import Backend, Segment
    from gateway.modes.flow import Run


class Chains:
    """All choices of one request.

    Args:
        run: the request; what enforcement took is noted in `run.enforced`.
        backend: where every segment runs, so that each finds the one before it in the prefix cache.
        found: what that backend was measured to do.

    Raises: InvalidRequest for what cannot be served this way.
    """

    def __init__(self, run: Run, backend: Backend, found: Capabilities) -> None:
        assert found.forcing is not None
        self._run, self._call = run, run.call
        self._backend, self._found = backend, found
        self._forcing: Forcing = found.forcing
        self._prompt: list[int] = []
        self._cached: int | None = None
        self._rules: ChainRules
        self._is_shared = False  # the envelope's tokens leave each choice less than it might have had
        self._prompt_is_cached = asyncio.Event()
        self._plan = tool_plan(self._call, found.tool_format)
        finds_calls = self._plan.how == "auto" and bool(found.tool_opener_ids)
        self._fields = SegmentFields(self._call, self._plan, self._forcing, finds_calls=finds_calls)

    async def deltas(self, lost: Sequence[TakeOver] = ()) -> AsyncGenerator[list[Delta], None]:
        """Every choice from its beginning, or those of `lost` from where they are; at last the usage.

        Raises: as `Backend.generate`; InvalidRequest when the envelope cannot hold the prompt.
        """
        self._prompt = await self._backend.tokenize(self._call)
        # Where no thinking comes first, or the backend has taken the call already, mistakes show by themselves.
        trial = None if lost or self._call.thinking.cap == 0 else self._trial()
        is_open, has_closed = prompt_tail(self._run, self._found, self._prompt)
        self._rules, self._is_shared = chain_rules(
            self._run,
            self._found,
            max(len(self._prompt), self._run.tally.prompt),  # a draft's may have been longer: it counts once
            aside=self._run.spent_before + (0 if trial is None else TRIAL_TOKENS),
            has_closed=has_closed,
            finds_calls=self._plan.how == "auto",
        )
        if trial is not None:
            await self._try_answer(trial)
        courses = None if lost else self._run.courses
        if courses is not None:
            await courses.begin(self._call, self._backend, self._found)
        streams = []
        wanted: Sequence[TakeOver | int] = lost or range(self._call.n)
        for at, which in enumerate(wanted):
            index = which.index if isinstance(which, TakeOver) else which
            course = None if courses is None or has_closed else courses.new(index)
            chain = Chain(
                self._prompt, self._forcing, self._rules, is_open=is_open, has_closed=has_closed, course=course
            )
            step = self._resumed(chain, which) if isinstance(which, TakeOver) else chain.open(is_open=is_open)
            unthought = AnswerFilter(self._call.thinking.start, self._call.thinking.end)
            choice = Choice(index, chain, self._plan.reader(), unthought, segments=int(bool(lost)))
            streams.append(self._choice(choice, step, waits=at > 0))
        async with aclosing(merged(streams)) as batches:
            async for batch in batches:
                yield batch
        yield [Delta(usage=self._usage())]

    def _trial(self) -> Segment | None:
        """What the backend must check before any thinking is spent on it, if it has not found it right before."""
        trial, slot = self._fields.trial(self._prompt[0]), self._run.slot
        return None if trial is None or slot is None or slot.tried.has(_demand(trial)) else trial

    async def _try_answer(self, trial: Segment) -> None:
        """Have it checked. Raises: UpstreamRejected, as the backend says it."""
        async with aclosing(self._backend.extend(self._call, trial)) as batches:
            async for _ in batches:
                self._run.tally.probe = TRIAL_TOKENS  # it is in the hold, more is not
                break
        if self._run.slot is not None:
            self._run.slot.tried.add(_demand(trial))

    def _resumed(self, chain: Chain, lost: TakeOver) -> Step:
        """Bring a chain to where a lost choice was, and end its thinking."""
        chain.resume(lost.ids)
        if lost.end is not None:
            return chain.feed([lost.end], "stop")
        opener = self._found.tool_opener
        if lost.begins_call and opener is not None:
            return chain.feed([opener], "stop", opener)
        return chain.cut("cap")

    async def _choice(self, choice: Choice, step: Step, *, waits: bool) -> AsyncGenerator[list[Delta], None]:
        """One choice to its end. All but the first wait until the prompt is in the prefix cache."""
        chain = choice.chain
        # What was forced goes out with the first token, so that a refusal before it keeps its own status.
        head = self._head(choice, step)
        if waits:
            await self._prompt_is_cached.wait()
        while not chain.is_over():
            if chain.room() <= 0:
                self._prompt_is_cached.set()  # as far as it ever will be
                yield [*head, self._last(choice, Delta(index=choice.index), "length", None)]
                return
            async with aclosing(self._segment(choice)) as batches:
                async for batch in batches:
                    yield [*head, *batch]
                    head = []
                    if not chain.is_over() and choice.index in self._run.finished:
                        return  # a stop string was found in the answer
            head += await self._led(choice)

    async def _led(self, choice: Choice) -> list[Delta]:
        """Between two segments: what a probe that ends the thinking forces."""
        chain, courses = choice.chain, self._run.courses
        if courses is None or courses.probing is None or choice.is_learned:
            return []
        out = []
        if chain.course is not None and chain.course.is_due and chain.phase == "thinking":
            if await courses.probing.says_stop(choice.index, chain, self._backend):
                out = self._shown(choice, Delta(), chain.cut("stable", wraps_up=False))
            choice.ended_s = self._run.clock()
        if chain.phase != "thinking":
            choice.is_learned = True
            courses.probing.ended(choice.index, chain)
        return out

    def _head(self, choice: Choice, step: Step) -> list[Delta]:
        """What precedes a choice's first token: the prompt, and what was forced after it."""
        deltas = self._shown(choice, Delta(), step) or [Delta(index=choice.index, kind=Kind.INJECTED)]
        deltas[0].prompt_tokens = len(self._prompt)
        deltas[0].prompt_token_ids = self._prompt if self._call.wants_token_ids else None
        return deltas

    async def _segment(self, choice: Choice) -> AsyncGenerator[list[Delta], None]:
        """One call of the backend; ends when the backend does, or at once when the chain does."""
        segment = self._fields.segment(choice.chain, choice.index)
        self._begin(choice)
        async with aclosing(self._backend.extend(self._call, segment)) as batches:
            async for batch in batches:
                out = self._take(choice, batch)
                if out:
                    yield out
                if choice.is_over and not choice.is_finished:
                    break  # cut by us: what the backend still had to say would be waste
        if not choice.is_over:
            raise UpstreamError("The backend ended its stream before the choice was finished.")

    def _take(self, choice: Choice, batch: list[Delta]) -> list[Delta]:
        """Make of a batch what the client may see, and note whether the segment is over."""
        out: list[Delta] = []
        for delta in batch:
            if delta.usage is not None:
                self._note_usage(choice, delta.usage)
            elif choice.is_over:
                self._run.tally.wasted += len(delta.token_ids)
                choice.is_finished = False  # it goes on after its finish
            else:
                choice.is_finished = delta.finish_reason is not None
                choice.is_over = self._read(choice, delta, out)
        if not choice.is_over and self._time_is_up(choice):
            self._run.tally.wasted += len(choice.pending)
            out += self._shown(choice, Delta(), choice.chain.cut("seconds"))
            choice.is_over, choice.ended_s = True, self._run.clock()
        return out

    def _read(self, choice: Choice, delta: Delta, out: list[Delta]) -> bool:
        """Make of one delta of a segment what the client may see; whether the segment is over."""
        chain, ids = choice.chain, delta.token_ids
        if delta.text and not ids:
            raise UpstreamError("The backend does not return token ids any more.")
        choice.sampled += len(ids)
        if choice.sampled == len(ids):
            choice.first_s = self._run.clock()
        delta.index = choice.index
        self._prompt_is_cached.set()
        if chain.phase == "thinking":
            begins_call = delta.finish_reason == "stop" and delta.stop_reason == OPENING
            step = self._begin_call(choice, delta) if begins_call else self._think(choice, delta)
            out += self._shown(choice, delta, step)
        else:
            step = chain.feed(ids, delta.finish_reason, delta.stop_reason)
            self._run.tally.wasted += step.wasted
            delta.kind, delta.answer, delta.token_ids = Kind.ANSWER, step.answer, step.ids
            text = choice.answer_text(delta.text, step, has_ids=self._forcing.end_id is not None)
            delta.finish_reason = delta.stop_reason = None
            delta.text, calls = choice.reader.push(text)
            delta.tool_calls = calls or None
            if step.is_over:
                delta = self._last(choice, delta, chain.finish_reason or "stop", chain.stop_reason)
            out.append(delta)
        if step.is_over:
            choice.ended_s = self._run.clock()
        return step.is_over

    def _think(self, choice: Choice, delta: Delta) -> Step:
        """Feed one delta of thinking to the chain, its text cut where the thinking ends."""
        chain, ids = choice.chain, delta.token_ids
        finish, stop = delta.finish_reason, delta.stop_reason
        if choice.splitter is None:
            step = chain.feed(ids, finish, stop)
            if step.is_over:
                delta.text = self._before_end(delta.text, step)
            return step
        pieces = choice.splitter.feed(delta.text)
        if finish is not None:
            pieces += choice.splitter.finish(cut=finish == "length")
        is_closed = any(kind is Kind.INJECTED for kind, _ in pieces)
        delta.text = "".join(text for kind, text in pieces if kind is Kind.THINKING)
        if not is_closed and choice.splitter.is_holding:
            choice.hold(delta)
            return Step()
        ids = choice.release(delta)
        if not is_closed:
            step = chain.feed(ids, finish, stop)
            if step.is_over:
                delta.text = self._before_end(delta.text, step)
            return step
        border = max(0, len(ids) - len(self._forcing.closing))
        before, marker = chain.feed(ids[:border]), Step()
        if before.is_over:
            delta.text = self._before_end(delta.text, before)
        else:
            marker = chain.close(ids[border:])
        return before.plus(marker)

    def _begin_call(self, choice: Choice, delta: Delta) -> Step:
        """A tool call begins in the thinking: what opened it stays there, and is forced again behind its end."""
        step = choice.chain.feed(choice.release(delta))
        delta.text = delta.text.partition(OPENING)[0]
        return step if step.is_over else step.plus(choice.chain.begin_call(self._found.tool_opener_ids))

    def _before_end(self, text: str, step: Step) -> str:
        """The thinking text of a delta in which the thinking ends."""
        if step.answer:
            return text.partition(OPENING)[0]
        if step.wasted and step.ended_by is not None:
            return ""  # beyond the cap: how much of the text its first tokens wrote cannot be told
        return text.partition(self._call.thinking.end)[0]

    def _shown(self, choice: Choice, delta: Delta, step: Step) -> list[Delta]:
        """A step of the thinking as deltas: what was thought, what was forced, what already answers."""
        out, index, tally = [], choice.index, self._run.tally
        tally.wasted += step.wasted
        forced = len(step.forced)
        sampled = len(step.ids) - forced - step.answer
        logprobs = delta.logprobs
        if delta.text or sampled or step.injected > forced:
            delta.kind, delta.thinking, delta.injected = Kind.THINKING, step.thinking, step.injected - forced
            delta.token_ids = step.ids[:sampled]
            delta.logprobs = _part(logprobs, 0, sampled)
            delta.finish_reason = delta.stop_reason = None
            out.append(delta)
        if forced:
            is_wait = bool(step.shown) and choice.chain.phase == "thinking"
            text = step.told or (WAIT if is_wait else self._call.thinking.wrap_up if step.shown else "")
            ids = list(step.forced)
            out.append(Delta(index=index, kind=Kind.THINKING, text=text, injected=forced, token_ids=ids))
        if step.answer or step.begins_call:
            content, calls = choice.reader.push(OPENING)
            said = Delta(index=index, text=content, answer=step.answer, tool_calls=calls or None)
            said.token_ids = step.ids[len(step.ids) - step.answer :]
            said.logprobs = _part(logprobs, sampled, sampled + step.answer)
            out.append(said)
        if step.ended_by is not None:
            out[-1].capped = step.ended_by == "cap"
            self._run.enforced.ended_by = step.ended_by
        self._run.enforced.waits += choice.chain.phase == "thinking" and bool(step.shown) and not step.told
        return out

    def _last(self, choice: Choice, delta: Delta, finish: str, stop: object) -> Delta:
        """The delta with which a choice ends."""
        if finish == "length":
            self._run.enforced.spent = self._run.enforced.spent or self._envelope_spent(choice.chain)
        content, calls = choice.reader.finish(cut=finish == "length")
        delta.text += content
        if calls:
            delta.tool_calls = [*(delta.tool_calls or []), *calls]
        if finish not in FINISH_REASONS:
            finish, stop = "stop", finish
        delta.finish_reason, delta.stop_reason = choice.reader.finish_reason(finish), stop
        return delta

    def _envelope_spent(self, chain: Chain) -> str | None:
        """The part of the envelope that cut a choice's answer to its length, if one did."""
        if chain.output() >= self._rules.total:
            return "envelope.tokens" if self._is_shared else None
        return None if self._rules.purse is None else "envelope.usd"

    def _time_is_up(self, choice: Choice) -> bool:
        """Whether the thinking must end now, so that an answer still fits into the envelope's seconds."""
        deadline_s = self._run.envelope.deadline_s
        if deadline_s is None or choice.chain.phase != "thinking" or not choice.sampled:
            return False
        return thinking_is_over(
            now_s=self._run.clock(),
            deadline_s=deadline_s,
            first_token_s=choice.first_s - choice.began_s,
            sampling_s=self._run.clock() - choice.first_s,
            sampled=choice.sampled,
            answer_tokens=self._call.thinking.answer_floor,
        )

    def _begin(self, choice: Choice) -> None:
        now_s = choice.began_s = self._run.clock()
        choice.sampled = 0
        choice.is_over = choice.is_finished = False
        choice.segments += 1
        if self._forcing.end_id is None:
            choice.splitter = MarkerSplitter(self._call.thinking.start, self._call.thinking.end, is_open=True)
        if choice.ended_s is not None:
            self._run.enforced.switches_s.append(now_s - choice.ended_s)

    def _note_usage(self, choice: Choice, usage: Usage) -> None:
        if choice.segments > 1:  # of a segment that is cut nobody says what was cached: it counts on neither side
            self._run.enforced.resent_tokens += usage.prompt_tokens
            self._run.enforced.resent_cached_tokens += usage.cached_tokens or 0
        elif self._cached is None:
            self._cached = usage.cached_tokens
            self._run.tally.usage = self._usage()  # a stop string may end the request before its last delta

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=len(self._prompt), completion_tokens=0, cached_tokens=self._cached)


def _demand(trial: Segment) -> bytes:
    """What is asked for, to be recognised by."""
    return msgspec.json.encode((trial.fields, trial.stop_token_ids))


def _part(logprobs: Any, start: int, end: int) -> Any:  # noqa: ANN401  # JSON is of any type
    """The logprobs of some of the tokens; those of dropped ones would spell them."""
    return {"content": logprobs["content"][start:end]} if isinstance(logprobs, dict) else logprobs
