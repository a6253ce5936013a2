"""A call whose first byte is late is tried on a second backend, and whichever answers first goes on.

Owns: the two tries until one of them answers: each counted at its backend, the hold made large enough for both, the
other one closed at once and charged as wasted. Does not own: when, and how often (router/hedging.py); which backend
(gateway/attempts.py). Not hedged are calls whose hold or envelope does not cover two, those of the class that can wait
(`flex`), and chains of segments (`two_phase`): these go on from what one backend sampled.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

from budget.errors import EnvelopeSpent, HoldRefused, StoreUnreachable
from budget.share import Share
from gateway.errors import DeadlinePassed, GatewayError, InvalidRequest, UpstreamError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from budget.ledger import Amounts
    from gateway.attempts import Attempts
    from gateway.backends.port import Delta
    from gateway.modes.flow import Batches, Run
    from gateway.modes.guard import Guard
    from gateway.placing import Prompt
    from gateway.slots import Slot
    from router.hedging import Hedging

FAULTS = (UpstreamError, DeadlinePassed)
Outcome = list["Delta"] | GatewayError


@dataclass(slots=True, eq=False)
class Try:
    """One of the two.

    Attributes:
        slot: where, and counted there.
        prompt: as placement counts it there.
        began_s: when, on the run's clock.
        source: its deltas.
        how: how the cap is held there, and
        guard: what watches that it is, if it answers.
    """

    slot: Slot
    prompt: Prompt | None
    began_s: float
    source: Batches
    how: str
    guard: Guard | None


class Hedge:
    """The tries of one call that may overlap. A context manager: no slot stays counted after it.

    Args:
        run: the request; its slot and guard become those of the try that answers.
        attempts: told how each try went.
        hedging: how many calls may be hedged.
        slot: where the first try goes.

    Attributes:
        slot: where the answer comes from, or the last failure.
    """

    __slots__ = ("_attempts", "_deliver", "_hedging", "_placed", "_run", "slot")

    def __init__(self, run: Run, attempts: Attempts, hedging: Hedging, slot: Slot) -> None:
        self._run, self._attempts, self._hedging, self.slot = run, attempts, hedging, slot
        self._deliver = run.deliver
        self._placed: list[Slot] = []

    def __enter__(self) -> Self:
        """Count the first try."""
        self._place(self.slot)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Count what is left no longer."""
        while self._placed:
            self._leave(self._placed[-1])

    def _place(self, slot: Slot) -> None:
        slot.__enter__()
        self._placed.append(slot)

    def _leave(self, slot: Slot) -> None:
        self._placed.remove(slot)
        slot.__exit__()

    async def deltas(self) -> AsyncGenerator[list[Delta], None]:
        """Those of the try that answers first. Raises: as `Run.begin`; of two that fail, the last error."""
        run, first = self._run, self._begin(self.slot, self._attempts.prompt)
        self._hedging.called()
        if first.how == "two_phase":
            run.deliver = self._deliver
            source = first.source
        else:
            try:
                source, batch = await self._first_of(first)
            finally:
                run.deliver = self._deliver
            yield batch
        async with aclosing(source) as batches:
            async for deltas in batches:
                yield deltas

    def _begin(self, slot: Slot, prompt: Prompt | None) -> Try:
        """A try, which delivers nothing by the short way until it is known to be the one."""
        run = self._run
        run.deliver = self._deliver  # it is asked now whether there is a short way
        source = run.begin(slot)
        run.deliver = None
        return Try(slot, prompt, run.clock(), source, run.enforced.how, run.guard)

    async def _first_of(self, first: Try) -> tuple[Batches, list[Delta]]:
        """The deltas of the try that answered, after the first of them. Raises: the last failure."""
        tries, winner = [first], None
        try:
            one, outcome = await self._tried(tries)
            if isinstance(outcome, GatewayError):
                raise outcome
            winner = one
        finally:
            for one in tries:
                if one is not winner:
                    if one.prompt is not None:
                        one.prompt.leave()
                    await one.source.aclose()
        run = self._run
        winner.slot.first_bytes.add(run.clock() - winner.began_s)
        run.guard, run.enforced.how = winner.guard, winner.how
        return winner.source, outcome

    async def _tried(self, tries: list[Try]) -> tuple[Try, Outcome]:
        """The try that answered, or failed last, and how."""
        (first,) = tries
        usual_s = first.slot.first_bytes.usual_s()
        if usual_s is None or self._run.call.priority > 0:
            return first, await _outcome(first)
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(_outcome(first))
            running = {task: first}
            await asyncio.wait(running, timeout=usual_s)
            second = None if task.done() else await self._second(first, task)
            if second is not None:
                tries.append(second)
                running[tasks.create_task(_outcome(second))] = second
            return await self._race(running)

    async def _race(self, running: dict[asyncio.Task[Outcome], Try]) -> tuple[Try, Outcome]:
        """Wait until one answers, or all have failed; whatever still runs then is cancelled."""
        while True:
            done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in running if task in done]:
                one, outcome = running.pop(task), task.result()
                if not running or not isinstance(outcome, FAULTS):
                    for other_task, other in running.items():
                        self._lose(other_task, other)
                    self._hedging.won += one.slot is not self.slot
                    self.slot = self._run.slot = one.slot
                    self._attempts.prompt = one.prompt
                    return one, outcome
                self._attempts.faulted(one.slot, outcome)
                self._end(one)

    def _lose(self, task: asyncio.Task[Outcome], one: Try) -> None:
        """Another try has answered: cancel this one, and charge it unless it had failed by itself."""
        run = self._run
        outcome = task.result() if task.done() else []
        task.cancel()
        self._end(one)
        if isinstance(outcome, FAULTS):
            self._attempts.faulted(one.slot, outcome)
            return
        self._attempts.lost(one.slot)
        one.slot.first_bytes.gave_up(run.clock() - one.began_s)
        if isinstance(outcome, list):
            run.tally.lost_tries += 1
            run.tally.lost_output += sum(delta.thinking + delta.answer + delta.injected for delta in outcome)

    def _end(self, one: Try) -> None:
        """It counts at its backend no longer."""
        if one.prompt is not None:
            one.prompt.leave()
        self._leave(one.slot)

    async def _second(self, first: Try, task: asyncio.Task[Outcome]) -> Try | None:
        """The other try, if one is possible, allowed and paid for, and the first has not answered meanwhile."""
        run, attempts = self._run, self._attempts
        most = run.hold.ceiling
        if not (attempts.has_other(first.slot) and self._covers_two(most) and self._hedging.take(run.clock())):
            return None
        try:
            await run.hold.extend(most)
        except (HoldRefused, StoreUnreachable):
            return None
        if task.done() or not attempts.has_other(first.slot):
            return None
        slot, prompt = attempts.beside(first.slot)
        self._place(slot)
        try:
            second = self._begin(slot, prompt)
        except InvalidRequest:  # it can do less than the first one, and will not be asked
            second = None
        if second is None or second.how == "two_phase":
            if prompt is not None:
                prompt.leave()
            self._leave(slot)
            return None
        self._hedging.begun += 1
        return second

    def _covers_two(self, most: Amounts) -> bool:
        """Whether the envelope has room for two calls that cost as much as is held for one."""
        envelope = Share(self._run.envelope.tokens, self._run.envelope.nano_usd)
        try:
            for _ in range(2):
                envelope.split(tokens=most.tokens, nano_usd=most.nano_usd)
        except EnvelopeSpent:
            return False
        return True


async def _outcome(one: Try) -> Outcome:
    """The first deltas of a try, none where it has none; or why there are none."""
    try:
        return await anext(one.source, [])
    except GatewayError as exc:
        return exc
