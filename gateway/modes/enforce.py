"""Holding the cap of one call on the backend that serves it, and taking over where the backend does not.

Owns: which generator of deltas carries a call out, and what a lying backend's choices may keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.backends.port import Capabilities
from gateway.backends.segments import tool_plan
from gateway.enforcement import Needs, enforcement, instant_enforcement
from gateway.errors import InvalidRequest
from gateway.modes.chains import Chains
from gateway.modes.choice import TakeOver
from gateway.modes.guard import Guard
from gateway.modes.soft import soft_answers, with_effort

if TYPE_CHECKING:
    from gateway.backends.port import Call
    from gateway.models import Slot
    from gateway.modes.flow import Batches, Run

# Fields by which a client can make an honest backend think where it should not: what happens then proves nothing.
TAMPERING = frozenset(
    (
        "add_generation_prompt",
        "allowed_token_ids",
        "bad_words",
        "continue_final_message",
        "logit_bias",
        "response_format",
        "structured_outputs",
    )
)


class Enforcement:
    """How one request's cap is held, whichever slot it lands on.

    Args:
        needs: of the request.
    """

    __slots__ = ("_needs",)

    def __init__(self, needs: Needs) -> None:
        self._needs = needs

    def begin(self, run: Run, slot: Slot) -> Batches:
        """The call's deltas from `slot`. Raises: InvalidRequest for what it cannot serve under a cap."""
        call, found = run.call, slot.capabilities or Capabilities()
        run.guard = None  # of a backend that could not be reached
        if call.thinking.enabled:
            run.enforced.how, _ = enforcement(found, self._needs, run.model.thinking.enforce, slot.config.kind)
        else:
            run.enforced.how = instant_enforcement(found, self._needs)
        if run.enforced.how == "two_phase":
            return Chains(run, slot.backend, found).deltas()
        if run.enforced.how == "soft":
            run.guard = Guard(run.tally, run.finished, run.choices, keeps_text=True)
            return slot.backend.generate(with_effort(run, found))
        if call.thinking.cap is not None and self._needs.is_chat:
            run.guard = self._guard(run, found)
        return slot.backend.generate(call, run.express())

    def _guard(self, run: Run, found: Capabilities) -> Guard | None:
        """What remembers how to go on where thinking ends badly: by ids, else by the text of the thinking."""
        if found.forcing is not None and not self._needs.has_media and _can_chain(run.call, found):
            opener = found.tool_opener if self._needs.has_tools and found.tool_format is not None else None
            return Guard(run.tally, run.finished, run.choices, keeps_ids=True, opener=opener)
        if run.enforced.how == "native" and run.call.thinking.enabled:
            return Guard(run.tally, run.finished, run.choices, keeps_text=True)
        return None

    def take_over(self, run: Run, slot: Slot) -> Batches:
        """The lost choices, continued within the cap from what the client has seen of them."""
        guard, found = run.guard, slot.capabilities or Capabilities()
        assert guard is not None
        run.guard = None
        run.enforced.overrun += guard.overrun
        run.enforced.dropped += guard.dropped
        lost = sorted(guard.lost)
        thinking = {index: run.tally.thinking_by_choice.get(index, 0) for index in lost}
        is_lie = not guard.lost <= guard.calls | guard.ends.keys()
        if is_lie:
            run.tally.capped, run.enforced.ended_by = True, "cap"
        run.tally.most_thinking = max(run.tally.thinking_by_choice.values(), default=0)
        if is_lie and run.enforced.how != "soft" and TAMPERING.isdisjoint(run.call.fields):
            slot.distrust(instant=not run.call.thinking.enabled)
        if guard.keeps_text:
            run.enforced.how = "soft"
            thoughts = {index: "".join(guard.thoughts.get(index, ())) for index in lost}
            return soft_answers(run, slot.backend, found, thoughts, thinking)
        run.enforced.how = "two_phase"
        kept = [
            TakeOver(index, guard.ids.get(index, []), index in guard.calls, guard.ends.get(index)) for index in lost
        ]
        return Chains(run, slot.backend, found).deltas(kept)


def _can_chain(call: Call, found: Capabilities) -> bool:
    """Whether two-phase enforcement serves a call: what it cannot serve shows before the backend has thought for it."""
    try:
        tool_plan(call, found.tool_format)
    except InvalidRequest:
        return False
    return True
