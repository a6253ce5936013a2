"""An instant draft first, and thinking where the model was not sure of it: one answer, in one hold and one envelope.

Owns: reading the draft, judging it, and which of the two answers the client sees. Nothing of the draft goes out before
it was judged, so that the first byte of an accepted draft comes with its last token. Does not own: the measure
(router/confidence.py), for which requests this runs (router/mode.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from gateway.backends.port import Delta
from gateway.edge.extension import CascadeReport
from gateway.errors import GatewayError, UpstreamRejected
from gateway.modes.flow import flow
from router.confidence import Confidence

if TYPE_CHECKING:
    from gateway.backends.port import Call
    from gateway.cascade import Draft
    from gateway.modes.flow import Batches, Enforced, Run
    from gateway.tally import Discarded

MOST_UNMEASURED = 8  # tokens of a choice without a log probability, after which none is expected any more


class Thought(NamedTuple):
    """What runs where the draft is not taken.

    Attributes:
        call: with thinking.
        slack: as in `Run`; it has room for the draft.
        deltas: carries it out.
    """

    call: Call
    slack: int
    deltas: Callable[[], Batches]


class _Kept(NamedTuple):
    """A draft that was thrown away, as long as it may have to be the answer after all."""

    call: Call
    slack: int
    finished: set[int]
    enforced: Enforced
    gone: Discarded


class Cascade:
    """Of one request.

    Args:
        run: begins with the draft's call.
        draft: what is judged, and by what.
        thought: what runs instead.
        decided: told what became of the draft, before anything goes out.
    """

    def __init__(self, run: Run, draft: Draft, thought: Thought, decided: Callable[[CascadeReport], None]) -> None:
        self._run, self._draft, self._thought, self._decided = run, draft, thought, decided
        self._held: list[Delta] = []
        self._measures = [Confidence(draft.window) for _ in range(run.choices)]
        self._tokens = [0] * run.choices
        self._kept: _Kept | None = None
        self._is_open = True  # nothing has gone out yet
        self._is_whole = False

    async def deltas(self) -> Batches:
        """The draft, or the answer that thinking came to. Raises: as `flow`."""
        run, deliver = self._run, self._run.deliver
        run.deliver = None
        doubt = await self._read()
        if doubt is None:
            why = "it was sure of its answer" if run.ended_by is None else f"{run.ended_by} ended the draft"
            yield self._accept(why)
            return
        self._throw_away()
        run.deliver = deliver
        try:
            async with aclosing(self._think(doubt)) as batches:
                async for batch in batches:
                    yield batch
        except GatewayError as exc:
            if not self._is_open or not self._is_whole:
                raise
            doubt = f"{doubt}, but it could not think: {exc.code or exc.type}"
        if self._is_open:
            yield self._accept(doubt)

    async def _think(self, doubt: str) -> Batches:
        """The answer with thinking, and the usage of both. Raises: as `flow`."""
        async with aclosing(self._thought.deltas()) as batches:
            async for batch in batches:
                if self._is_open and not batch:
                    continue  # of what came nothing is for the client
                if self._is_open:
                    self._escalate(doubt)
                yield batch
        if self._kept is not None:
            self._run.tally.add_up(self._kept.gone)

    def rest(self) -> list[Delta]:
        """What there is of a draft when the request's time is over; empty where its answer has begun, or will not."""
        return self._accept("the time was over") if self._is_open and (self._held or self._kept) else []

    def close(self) -> None:
        """The request is over: a draft that nobody saw was wasted."""
        if self._is_open and self._kept is None:
            self._run.tally.discard(self._run.most_output)

    async def _read(self) -> str | None:
        """Read the draft until it is over or doubtful; why it is not good enough, or None."""
        run = self._run
        try:
            async with aclosing(flow(run)) as batches:
                async for batch in batches:
                    self._held += [self._bare(delta) for delta in batch]
                    doubt = None if run.is_bounded else self._doubt()  # an envelope may leave nothing but the draft
                    if doubt is not None and len(run.finished) < run.choices:
                        return doubt
        except UpstreamRejected:
            if run.has_output():
                raise
            return "the backend refused the draft"  # if that was the client's mistake, the next call says so
        self._is_whole = True
        if run.ended_by is not None:
            return None
        if any(2 * one.tokens < count for one, count in zip(self._measures, self._tokens, strict=True)):
            return NO_LOGPROBS
        return None if self._confidence() >= self._draft.confidence else UNSURE

    def _bare(self, delta: Delta) -> Delta:
        """Measure a delta; what of it a client may see who asked for no log probabilities."""
        if 0 <= delta.index < len(self._measures) and delta.usage is None:
            self._tokens[delta.index] += delta.answer
            for entry in _entries(delta.logprobs):
                logprob = entry.get("logprob")
                if isinstance(logprob, int | float):
                    self._measures[delta.index].add(logprob)
        delta.wire = b""  # it has them, too, and is what would go out
        if not self._draft.keeps_logprobs:
            delta.logprobs = None
        return delta

    def _doubt(self) -> str | None:
        """Why the rest of the draft need not be waited for; None where it must."""
        for one, count in zip(self._measures, self._tokens, strict=True):
            if one.lowest < self._draft.confidence:
                return UNSURE
            if not one.tokens and count > MOST_UNMEASURED:
                return NO_LOGPROBS
        return None

    def _confidence(self) -> float:
        return min(one.value for one in self._measures)

    def _throw_away(self) -> None:
        run = self._run
        call, slack, finished, enforced = run.call, run.slack, run.finished, run.enforced
        gone = run.tally.discard(run.most_output)
        self._kept = _Kept(call, slack, finished, enforced, gone)
        run.begin_anew(self._thought.call, self._thought.slack)

    def _escalate(self, why: str) -> None:
        self._is_open = False
        self._held = []
        self._decided(self._report("escalated", why))

    def _accept(self, why: str) -> list[Delta]:
        """The whole draft, each of its choices ended."""
        run, kept = self._run, self._kept
        if kept is not None:
            run.begin_anew(kept.call, kept.slack)
            run.tally.restore(kept.gone)
            run.finished, run.enforced = kept.finished, kept.enforced
            self._kept = None
        self._is_open = False
        self._decided(self._report("accepted", why))
        return self._held

    def _report(self, outcome: Any, why: str) -> CascadeReport:  # noqa: ANN401  # one of the outcomes
        is_measured = any(one.tokens for one in self._measures)
        return CascadeReport(
            outcome=outcome,
            reason=why,
            confidence=round(self._confidence(), 4) if is_measured else None,
            least=self._draft.confidence,
            window_tokens=self._draft.window,
        )


UNSURE = "it was not sure of its answer"
NO_LOGPROBS = "the backend gave no log probabilities"


def _entries(logprobs: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # JSON is of any type
    found = msgspec.json.decode(logprobs) if isinstance(logprobs, msgspec.Raw) else logprobs
    entries = found.get("content") if isinstance(found, dict) else None
    return entries if isinstance(entries, list) else []
