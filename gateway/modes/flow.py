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
    counts: TokenCounts | None = None
    settled: Amounts | None = None

    def report(self) -> None:
        """Tell the hold what was used so far."""
        self.hold.report(self.tally.amounts(self.tally.counts()))

    def close_books(self) -> tuple[TokenCounts, Amounts]:
        """Final counts, reported to the hold; further calls return the same."""
        if self.counts is None or self.settled is None:
            self.counts = self.tally.counts()
            self.settled = self.tally.amounts(self.counts)
            self.hold.report(self.settled)
        return self.counts, self.settled

    def end(self, why: str) -> list[Delta]:
        """The finish of every choice that has none yet: cut short."""
        self.ended_by = why
        unfinished = [i for i in range(self.choices) if i not in self.finished]
        self.finished.update(unfinished)
        return [Delta(index=i, finish_reason="length") for i in unfinished]


async def placed(run: Run) -> AsyncGenerator[list[Delta], None]:
    """The call's deltas from the best backend; another one if a backend cannot be reached.

    Raises: Overloaded when none can; whatever the backend raises.
    """
    tried: list[Slot] = []
    while True:
        slot = run.slot = run.model.choose(without=tried)
        with slot as backend:
            try:
                async with aclosing(backend.generate(run.call)) as batches:
                    async for deltas in batches:
                        yield deltas
            except UpstreamUnreachable as exc:
                slot.mark_down(exc.message)
                tried.append(slot)
            else:
                return


async def flow(run: Run) -> AsyncGenerator[list[Delta], None]:
    """As `placed`, counted, reported, and ended when the envelope or the hold is used up.

    Raises: DeadlinePassed when the envelope's seconds end before anything arrived, UpstreamError when the
        backend says that it is done and a choice is not.
    """
    tally, finished = run.tally, run.finished
    is_bounded = run.envelope.is_bounded()
    most_output = run.call.max_tokens * run.choices
    reported_at = run.clock()
    async with aclosing(placed(run)) as batches:
        async for deltas in batches:
            for delta in deltas:
                tally.add(delta)
                if delta.finish_reason is not None:
                    finished.add(delta.index)
            yield deltas
            now = run.clock()
            spent = _spent(run, now) if is_bounded else None
            if spent is not None or (tally.output() > most_output and len(finished) < run.choices):
                yield _ended(run, spent or "hold")
                return
            if now - reported_at > REPORT_EVERY_S:
                reported_at = now
                run.report()
    if len(finished) < run.choices:
        raise UpstreamError("The backend ended its stream before every choice was finished.")


def _spent(run: Run, now_s: float) -> str | None:
    """The part of the envelope that is used up, or None."""
    used = run.tally.amounts(run.tally.counts())
    try:
        run.envelope.check(tokens=used.tokens, nano_usd=used.nano_usd, now_s=now_s)
    except EnvelopeSpent as exc:
        return f"envelope.{exc.part}"
    return None


def _ended(run: Run, why: str) -> list[Delta]:
    if len(run.finished) >= run.choices:
        return []
    if why == "envelope.seconds" and not run.tally.output():
        raise DeadlinePassed("The envelope's seconds passed before the first token.")
    return run.end(why)
