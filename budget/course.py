"""What the thinking of one chain goes along, beside its bounds: the steps of a plan, and pauses for probes.

Owns: how far the thinking may go before something is to happen, and what that is: the next step's heading, tokens
borrowed from later steps, or a pause. A course only ever makes thinking shorter: the chain's own bounds hold whatever
it says. Pure; O(1) per token. Does not own: what steps may spend (steps.py), whether a probe stops the thinking
(stopping.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from budget.steps import Steps

ENDLESS = 2**62


class Told(msgspec.Struct, frozen=True):
    """A text that is put before the model in its thinking, and its tokens; both may be empty."""

    ids: tuple[int, ...] = ()
    text: str = ""


class Course:
    """The course of one chain.

    Args:
        steps: of the plan; None: there is none.
        headings: what is put before each step, as many as there are steps.
        every: thinking tokens between two pauses; None: it does not pause.

    Attributes:
        steps: those that were given, once they have begun; None where there was no room for the first heading.
        is_due: the thinking pauses: a probe may be made now.
        begun: steps whose time has come, those that had no tokens included.
    """

    __slots__ = ("_every", "_headings", "_pause_at", "_seen", "begun", "is_due", "steps")

    def __init__(self, steps: Steps | None = None, headings: Sequence[Told] = (), *, every: int | None = None) -> None:
        self.steps = steps
        self._headings = headings
        self._every = every
        self._pause_at = ENDLESS if every is None else every
        self._seen = self.begun = 0
        self.is_due = False

    def begin(self, room: int) -> Told | None:
        """The heading of the first step that has any tokens; None where none has, or `room` is too small for it."""
        told = None if self.steps is None else self._heading(self.steps, room)
        if told is None:
            self.steps = None
        return told

    def room(self, thinking: int) -> int:
        """Most tokens that may be thought before `turn` is asked, after so many in all."""
        left = self._pause_at - thinking
        if self.steps is not None:
            self._see(self.steps, thinking)
            left = min(left, self.steps.room())
        return max(0, left)

    def turn(self, thinking: int, *, has_ended: bool, room: int) -> Told | None:
        """What comes next after a stretch of thinking; None: nothing, it is to end.

        Args:
            thinking: tokens so far.
            has_ended: the model itself ended it; else it met a bound, maybe this one.
            room: most tokens that could still be thought under the chain's own bounds.
        """
        steps = self.steps
        if steps is not None:
            self._see(steps, thinking)
            if has_ended or steps.room() <= 0:
                return self._step(steps, room, has_ended=has_ended)
        if has_ended or room <= 0 or thinking < self._pause_at:
            return None
        self._pause_at = thinking + (self._every or ENDLESS)
        self.is_due = True
        return Told()

    def stop_pausing(self) -> None:
        """No probe will be made any more."""
        self._pause_at = ENDLESS

    def _step(self, steps: Steps, room: int, *, has_ended: bool) -> Told | None:
        """The step after the one that is over; or, where that was cut, itself for a little longer."""
        if not has_ended and room > 0 and steps.borrow():
            return Told()
        if not steps.next():
            return None
        return self._heading(steps, room)

    def _heading(self, steps: Steps, room: int) -> Told | None:
        """The heading of the step that runs, or of the first one after it that may think at all."""
        while steps.room() <= 0:
            if not steps.next():
                return None
        told = self._headings[steps.at]
        if room <= len(told.ids):
            return None
        self.begun = steps.at + 1
        return told

    def _see(self, steps: Steps, thinking: int) -> None:
        steps.think(thinking - self._seen)
        self._seen = thinking
