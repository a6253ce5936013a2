"""One call on the best backend, counted as it arrives and ended when a bound is met.

Owns: placement with fail-over before the first byte, counting, reporting to the hold, and the bounds of
the envelope and the hold. The modes build on `flow`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from budget.errors import EnvelopeSpent
from gateway.backends.http import UpstreamUnreachable
from gateway.backends.port import Delta
from gateway.errors import DeadlinePassed, UpstreamError

if TYPE_CHECKING:
    from budget.envelope import Envelope
    from budget.ledger import Amounts, Hold
    from budget.tokens import TokenCounts
    from gateway.backends.port import Call
    from gateway.models import Model, Slot
    from gateway.tally import Tally

REPORT_EVERY_S = 0.5


@dataclass(slots=True)
class Run:
    """One request being carried out.

    Attributes:
        model: where it runs.
        call: what runs.
        tally: what it has used.
        hold: where use is reported.
        envelope: the request's own bounds.
        clock: monotonic seconds, as the envelope's deadline uses them.
        choices: how many are expected.
        slot: the backend that serves it, once placed.
        ended_by: the bound that ended it early, or None.
        overrun: thinking tokens a backend sent beyond the cap.
        finished: choices that have a finish_reason.
        reported_at_s: when the hold was last told.
        most_output: output tokens of all choices together that were asked for.
        is_bounded: the envelope bounds anything.
        counts: tokens by kind, once the books are closed.
        settled: the same in the ledger's units.
    """

    model: Model
    call: Call
    tally: Tally
    hold: Hold
    envelope: Envelope
    clock: Callable[[], float]
    choices: int = 1
    slot: Slot | None = None
    ended_by: str | None = None
    overrun: int = 0
    finished: set[int] = field(default_factory=set)
    reported_at_s: float = 0.0
    most_output: int = field(init=False)
    is_bounded: bool = field(init=False)
    counts: TokenCounts | None = None
    settled: Amounts | None = None

    def __post_init__(self) -> None:
        """What stays the same for every token."""
        self.most_output = self.call.max_tokens * self.choices
        self.is_bounded = self.envelope.is_bounded()

    def close_books(self) -> tuple[TokenCounts, Amounts]:
        """Final counts, reported to the hold; further calls return the same."""
        if self.counts is None or self.settled is None:
            self.counts = self.tally.counts()
            self.settled = self.tally.amounts(self.counts)
            self.hold.report(self.settled)
        return self.counts, self.settled

    def take(self, deltas: list[Delta]) -> list[Delta]:
        """Count what arrived; what of it may be delivered, and every finish once a bound is met.

        Raises: DeadlinePassed when the envelope's seconds end before anything arrived; UpstreamError for a
            choice that was not asked for.
        """
        tally, cap = self.tally, self.call.thinking.cap
        deltas = self._count(deltas)
        if cap is not None and tally.most_thinking > cap:
            tally.capped = True
            return [*self._within(deltas, cap), *self.end("cap")]
        now_s = self.clock()
        spent = None
        if self.is_bounded or tally.output() > self.most_output:
            spent = self._spent(now_s)
        if spent == "hold" and len(self.finished) == self.choices:
            self.ended_by = spent  # it goes on after its end: nobody listens any more
        elif spent is not None and len(self.finished) < self.choices:
            if spent == "envelope.seconds" and not tally.output():
                raise DeadlinePassed("The envelope's seconds passed before the first token.")
            return [*deltas, *self.end(spent)]
        if now_s - self.reported_at_s > REPORT_EVERY_S:
            self.reported_at_s = now_s
            self.hold.report(tally.amounts(tally.counts()))
        return deltas

    def _count(self, deltas: list[Delta]) -> list[Delta]:
        """Count what arrived; what comes for a choice after its finish is wasted and dropped."""
        tally, finished, kept = self.tally, self.finished, []
        for delta in deltas:
            tally.add(delta)
            if delta.usage is None:
                index = delta.index
                if index in finished:
                    tally.waste(delta)
                    continue
                if not 0 <= index < self.choices:
                    raise UpstreamError("The backend sent a choice that was not asked for.")
                if delta.finish_reason is not None:
                    finished.add(index)
            kept.append(delta)
        return kept

    def _spent(self, now_s: float) -> str | None:
        """The bound that is met, or None."""
        if self.tally.output() > self.most_output:
            return "hold"
        used = self.tally.amounts(self.tally.counts())
        try:
            self.envelope.check(tokens=used.tokens, nano_usd=used.nano_usd, now_s=now_s)
        except EnvelopeSpent as exc:
            return f"envelope.{exc.part}"
        return None

    def _within(self, deltas: list[Delta], cap: int) -> list[Delta]:
        """Deltas up to the cap; the thinking of one that goes beyond is moved to `wasted`: it reaches no client."""
        used = dict(self.tally.thinking_by_choice)
        for delta in deltas:
            used[delta.index] = used.get(delta.index, 0) - delta.thinking
        kept = []
        for delta in deltas:
            before = used[delta.index]
            used[delta.index] += delta.thinking
            if delta.thinking and used[delta.index] > cap:
                self.overrun += used[delta.index] - max(cap, before)
                self.tally.waste(delta)
                self.finished.discard(delta.index)
            else:
                kept.append(delta)
        return kept

    def end(self, why: str) -> list[Delta]:
        """The finish of every choice that has none yet: cut short."""
        self.ended_by = why
        unfinished = [i for i in range(self.choices) if i not in self.finished]
        self.finished.update(unfinished)
        return [Delta(index=i, finish_reason="length") for i in unfinished]


async def flow(run: Run) -> AsyncGenerator[list[Delta], None]:
    """The call's deltas from the best backend, within every bound; another backend if one cannot be reached.

    Raises: Overloaded when none can; DeadlinePassed; UpstreamError when the backend says that it is done and
        a choice is not; whatever else the backend raises.
    """
    tried: list[Slot] = []
    is_done = False
    while not is_done:
        slot = run.slot = run.model.choose(without=tried)
        with slot as backend:
            try:
                async with aclosing(backend.generate(run.call)) as batches:
                    async for deltas in batches:
                        yield run.take(deltas)
                        if run.ended_by is not None:
                            return
                is_done = True
            except UpstreamUnreachable as exc:
                slot.mark_down(exc.message)
                tried.append(slot)
    if len(run.finished) < run.choices:
        raise UpstreamError("The backend ended its stream before every choice was finished.")
