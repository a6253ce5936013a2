"""One call on the best backend, counted as it arrives and ended when a bound is met.

Owns: placement with fail-over before the first byte, counting, reporting to the hold, and the bounds of
the envelope and the hold. The modes build on `flow`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from budget.errors import EnvelopeSpent
from gateway.attempts import Attempts
from gateway.backends.port import Delta
from gateway.errors import DeadlinePassed, UpstreamError
from gateway.modes.guard import Guard
from gateway.modes.hedge import Hedge

if TYPE_CHECKING:
    from budget.envelope import Envelope
    from budget.ledger import Amounts, Hold
    from budget.tokens import TokenCounts
    from gateway.backends.port import Call, Express
    from gateway.models import Model
    from gateway.modes.courses import Courses
    from gateway.slots import Slot
    from gateway.tally import Tally

Batches = AsyncGenerator[list[Delta], None]


@dataclass(slots=True)
class Enforced:
    """How the cap of one request was held, beyond counting.

    Attributes:
        how: `native`, `two_phase`, `soft`, `switch` or `none`.
        ended_by: what ended the thinking: `cap`, `total`, `usd`, `seconds`, `plan` or `stable`.
        spent: the part of the envelope that a chain's answer used up.
        overrun: thinking tokens beyond the cap of a call that was taken over.
        dropped: tokens that were dropped for it.
        waits: how often "Wait" was forced.
        resent_tokens: prompt tokens of all segments after a choice's first.
        resent_cached_tokens: those of them that the backend took from its prefix cache.
        switches_s: gateway's time between two segments, each.
        probes: made in all chains.
    """

    how: str = "native"
    ended_by: str | None = None
    spent: str | None = None
    overrun: int = 0
    dropped: int = 0
    waits: int = 0
    resent_tokens: int = 0
    resent_cached_tokens: int = 0
    switches_s: list[float] = field(default_factory=list)
    probes: int = 0


class Enforcer(Protocol):
    """How the cap is held on one slot; `gateway/modes/enforce.py` knows which."""

    def begin(self, run: Run, slot: Slot) -> Batches:
        """The call's deltas from a slot."""

    def take_over(self, run: Run, slot: Slot) -> Batches:
        """The lost choices, continued within the cap."""


@dataclass(slots=True)
class Run:
    """One request being carried out.

    Attributes:
        model: where it runs.
        call: what runs.
        tally: what it has used.
        hold: asks for what is used while it runs, and is told at the end.
        envelope: the request's own bounds.
        clock: monotonic seconds, as the envelope's deadline uses them.
        choices: how many are expected.
        enforcer: how the cap is held; None: nothing thinks that should not.
        slack: output tokens beyond `call.max_tokens` per choice that enforcement itself may waste.
        slot: the backend that serves it, once placed.
        ended_by: the bound that ended it early, or None.
        finished: choices that have a finish_reason.
        most_output: output tokens of all choices together that were asked for.
        is_bounded: the envelope bounds anything.
        counts: tokens by kind, once the books are closed.
        settled: the same in the ledger's units.
        enforced: how the cap was held.
        deliver: writes an event to the client at once, if it can; None where deltas are worked on first.
        guard: watches that the cap is held, once there is something to watch.
        is_cut: what is being read now is to be closed.
        tenant: in whose turn it waits, where it has to, and
        deadline_s: until when, on the clock; None: as long as anybody may.
        spent_before: output tokens of an answer that was thrown away.
        courses: what its chains go along; None: only their bounds.
    """

    model: Model
    call: Call
    tally: Tally
    hold: Hold
    envelope: Envelope
    clock: Callable[[], float]
    choices: int = 1
    enforcer: Enforcer | None = None
    slack: int = 0
    slot: Slot | None = None
    ended_by: str | None = None
    finished: set[int] = field(default_factory=set)
    most_output: int = field(init=False)
    is_bounded: bool = field(init=False)
    counts: TokenCounts | None = None
    settled: Amounts | None = None
    enforced: Enforced = field(default_factory=Enforced)
    guard: Guard | None = None
    is_cut: bool = False
    deliver: Callable[[bytes], bool] | None = None
    tenant: str = ""
    deadline_s: float | None = None
    spent_before: int = 0
    courses: Courses | None = None

    def __post_init__(self) -> None:
        """What stays the same for every token."""
        self.most_output = (self.call.max_tokens + self.slack) * self.choices
        self.is_bounded = self.envelope.is_bounded()
        self.hold.report(self.used)

    def begin_anew(self, call: Call, slack: int) -> None:
        """Another call in the place of the one before, of which nothing was delivered; what that used stays counted."""
        self.call, self.slack = call, slack
        self.most_output = (call.max_tokens + slack) * self.choices
        self.spent_before = self.tally.output()
        self.finished, self.enforced, self.guard, self.courses = set(), Enforced(), None, None
        self.ended_by, self.is_cut = None, False

    def has_output(self) -> bool:
        """Whether anything of this call came."""
        return self.tally.output() > self.spent_before

    def used(self) -> Amounts:
        """What was used so far; whoever holds for it asks at least once a second."""
        return self.tally.amounts(self.tally.counts())

    @property
    def overrun(self) -> int:
        """Thinking tokens a backend sent beyond the cap."""
        return self.enforced.overrun + (0 if self.guard is None else self.guard.overrun)

    def _dropped(self) -> int:
        """Tokens of a lie: they are the backend's debt, and take nothing away from the answer."""
        return self.enforced.dropped + (0 if self.guard is None else self.guard.dropped)

    def close_books(self) -> tuple[TokenCounts, Amounts]:
        """Final counts, reported to the hold; further calls return the same."""
        if self.counts is None or self.settled is None:
            self.counts = self._within_cap(self.tally.counts())
            self.settled = self.tally.amounts(self.counts)
            self.hold.report(self.settled)
            self.ended_by = self.ended_by or self.enforced.spent
        return self.counts, self.settled

    def _within_cap(self, counts: TokenCounts) -> TokenCounts:
        """The counts of a soft cap: what only the backend's usage says beyond it is told, what is guessed is no lie."""
        cap = self.call.thinking.cap
        over = 0 if cap is None or self.enforced.how != "soft" else counts.thinking - cap * self.choices
        if over > 0 and self.tally.is_guess:
            counts.thinking, counts.answer = counts.thinking - over, counts.answer + over
        elif over > 0:
            self.enforced.overrun += over
            self.tally.capped = True
        return counts

    def begin(self, slot: Slot) -> Batches:
        """The call's deltas from a slot. Raises: InvalidRequest for what it cannot serve under a cap."""
        if self.enforcer is None:
            return slot.backend.generate(self.call, self.express())
        return self.enforcer.begin(self, slot)

    def express(self) -> Express | None:
        """The short way for ordinary tokens, where every one of them may take it."""
        return None if self.deliver is None or self.is_bounded else self._express

    def _express(self, index: int, is_thinking: bool, token_id: int, event: bytes) -> bool:
        """Count and deliver one ordinary token; False, and nothing done, where `take` must look at it."""
        tally, guard, deliver = self.tally, self.guard, self.deliver
        if deliver is None or self.finished or tally.output() >= self.most_output:
            return False
        if is_thinking and not self._is_within_cap(index):
            return False
        if guard is not None and not guard.is_ordinary(token_id):
            return False
        if not deliver(event):
            return False
        tally.add_one(index, is_thinking=is_thinking)
        if guard is not None:
            guard.remember(index, token_id)
        return True

    def _is_within_cap(self, index: int) -> bool:
        """Whether a choice may think one more token."""
        cap = self.call.thinking.cap
        return cap is None or self.tally.thinking_by_choice.get(index, 0) < cap

    def go_on(self, slot: Slot) -> Batches | None:
        """Where lost choices go on, after a call that was cut for them; None when there is nothing more to read."""
        if self.ended_by is not None or self.guard is None or not self.guard.is_lost() or self.enforcer is None:
            return None
        self.is_cut = False
        return self.enforcer.take_over(self, slot)

    def take(self, deltas: list[Delta]) -> list[Delta]:
        """Count what arrived; what of it may be delivered, and every finish once a bound is met.

        Raises: DeadlinePassed when the envelope's seconds end before anything arrived; UpstreamError for a
            choice that was not asked for.
        """
        tally, cap, guard = self.tally, self.call.thinking.cap, self.guard
        deltas = self._count(deltas)
        if guard is not None:
            deltas = guard.unended(deltas)
        if cap is not None and tally.most_thinking > cap:
            guard = self.guard = guard or Guard(tally, self.finished, self.choices)
            can_take_over = guard.can_take_over()
            deltas = guard.within(deltas, cap) if cap or can_take_over else guard.unthought(deltas)
            if cap and not can_take_over:
                tally.capped = True
                return [*deltas, *self.end("cap")]
        if guard is not None:
            deltas = guard.kept(deltas)
            self.is_cut = guard.is_lost()
        if self.is_bounded or tally.output() > self.most_output:
            spent = self._spent()
            if spent is not None:
                return self._end_spent(deltas, spent)
        return deltas

    def _end_spent(self, deltas: list[Delta], spent: str) -> list[Delta]:
        """The last deltas of a call whose bound is met."""
        if len(self.finished) == self.choices:
            if spent == "hold":
                self.end(spent)  # it goes on after its end: nobody listens any more
            return deltas
        if spent == "envelope.seconds" and not self.has_output():
            raise DeadlinePassed("The envelope's seconds passed before the first token.")
        return [*deltas, *self.end(spent)]

    def _count(self, deltas: list[Delta]) -> list[Delta]:
        """Count what arrived; what comes for a choice after its finish is wasted and dropped."""
        tally, finished = self.tally, self.finished
        if len(deltas) == 1:  # one more token, as almost always
            (delta,) = deltas
            if delta.wire and delta.finish_reason is None and not finished and 0 <= delta.index < self.choices:
                tally.add(delta)
                return deltas
        kept = []
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

    def _spent(self) -> str | None:
        """The bound that is met, or None."""
        if self.tally.output() > self.most_output + self._dropped():
            return "hold"
        used = self.used()
        try:
            self.envelope.check(tokens=used.tokens, nano_usd=used.nano_usd, now_s=self.clock())
        except EnvelopeSpent as exc:
            return f"envelope.{exc.part}"
        return None

    def end(self, why: str) -> list[Delta]:
        """The finish of every choice that has none yet: cut short."""
        self.ended_by, self.is_cut = why, True
        unfinished = [i for i in range(self.choices) if i not in self.finished]
        self.finished.update(unfinished)
        return [Delta(index=i, finish_reason="length") for i in unfinished]


async def flow(run: Run) -> AsyncGenerator[list[Delta], None]:
    """The call's deltas from the best backend, within every bound; another backend if one fails before.

    Raises: Overloaded when none can be reached, or too many calls wait; DeadlinePassed; UpstreamError when the backend
        says that it is done and a choice is not; whatever else the backend raises.
    """
    attempts = Attempts(run.model, run.call)
    await attempts.admit(run.tenant, run.deadline_s)
    is_done = has_begun = False
    while not is_done:
        slot = run.slot = attempts.next()
        hedge = None if run.model.hedging is None else Hedge(run, attempts, run.model.hedging, slot)
        place: AbstractContextManager[object] = hedge or slot
        with place:
            try:
                source: Batches | None = run.begin(slot) if hedge is None else hedge.deltas()
                while source is not None:
                    async with aclosing(source) as batches:
                        async for deltas in batches:
                            if not has_begun:
                                has_begun = True
                                slot = slot if hedge is None else hedge.slot
                                attempts.began(slot)
                            yield run.take(deltas)
                            if run.is_cut:
                                break
                    source = run.go_on(slot)
                is_done = True
            except (UpstreamError, DeadlinePassed) as exc:
                failed = slot if hedge is None else hedge.slot
                attempts.failed(failed, exc, has_begun=has_begun or run.has_output())
            finally:
                attempts.leave()
    attempts.ended(run.tally.usage, run.tally.output() - run.spent_before)
    if run.ended_by is None and len(run.finished) < run.choices:
        raise UpstreamError("The backend ended its stream before every choice was finished.")
