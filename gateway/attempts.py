"""The tries of one call: another backend if one fails before its first byte, within the model's retry budget.

Owns: what counts as a backend's fault, what is tried again, and telling breakers and placement how a call went. After
the first byte nothing is tried again: the client has seen a part of one answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.backends.http import UpstreamUnreachable
from gateway.errors import DeadlinePassed, UpstreamError
from gateway.placing import eject_outliers

if TYPE_CHECKING:
    from gateway.backends.port import Call, Usage
    from gateway.models import Model
    from gateway.placing import Prompt
    from gateway.slots import Slot


class Attempts:
    """Over one call.

    Args:
        model: where it runs.
        call: what runs; None where placement knows nothing of its prompt.

    Attributes:
        prompt: as placement sees it, of the try that answers, or may; None with a single backend.
    """

    __slots__ = ("_call", "_charged", "_has_begun", "_model", "_placed_s", "_tenant", "_tried", "prompt")

    def __init__(self, model: Model, call: Call | None) -> None:
        self._model = model
        self.prompt: Prompt | None = model.prompt(call)
        self._tried: list[Slot] = []
        self._placed_s: dict[Slot, float] = {}  # when; of a model with several backends
        self._has_begun = False
        self._call = call
        self._charged: int | None = None
        self._tenant = ""

    async def admit(self, tenant: str, deadline_s: float | None) -> None:
        """Wait for a turn, where all backends are full. Raises: Overloaded, DeadlinePassed."""
        if self._model.prompt_ids is not None and self.prompt is not None and self._call is not None:
            self.prompt.read(await self._model.prompt_ids.of(self._call))
        if self._model.admission.is_open():
            return
        call = self._call
        prompt_bytes = 0 if call is None else sum(len(bytes(value)) for value in call.fields.values())
        tokens = prompt_bytes // 4 + (0 if call is None else call.max_tokens * call.n)
        priority = 0 if call is None else call.priority
        await self._model.admission.enter(tenant, priority=priority, tokens=tokens, deadline_s=deadline_s)
        self._tenant, self._charged = tenant, tokens

    def next(self) -> Slot:
        """The slot to try; it is counted by entering it. Raises: Overloaded when none is left."""
        if not self._tried:
            self._model.retries.tried()
        return self._placed(self._model.choose(self._tried, self.prompt))

    def has_other(self, slot: Slot) -> bool:
        """Whether a backend beside `slot` is well, and has room that nobody waits for."""
        return len(self._unfit(slot)) < len(self._model.slots) and self._model.admission.is_open()

    def beside(self, slot: Slot) -> tuple[Slot, Prompt | None]:
        """The backend to try beside `slot`, where there is one, and the prompt as it is counted there, too."""
        prompt = self._model.prompt(self._call)
        if prompt is not None and self.prompt is not None:
            prompt.read(self.prompt.ids)
        return self._placed(self._model.choose(self._unfit(slot), prompt)), prompt

    def _placed(self, slot: Slot) -> Slot:
        if self.prompt is not None:
            self._placed_s[slot] = self._model.clock()
        return slot

    def _unfit(self, slot: Slot) -> list[Slot]:
        now_s = self._model.clock()
        return [each for each in self._model.slots if each in (slot, *self._tried) or not _is_fit(each, now_s)]

    def lost(self, slot: Slot) -> None:
        """A try ends since another one answered first. That is no failure, but of the probe of an open breaker."""
        placed_s, now_s = self._placed_s.pop(slot), self._model.clock()
        if slot.breaker.state(now_s) == "half_open":  # else every call would begin there as the next probe, and be late
            slot.breaker.failed(now_s, placed_s)

    def began(self, slot: Slot) -> None:
        """The first byte came; any number of times."""
        if self._has_begun or self.prompt is None:
            return
        self._has_begun = True
        now_s = self._model.clock()
        self.prompt.began(now_s)
        slot.breaker.succeeded(now_s, self._placed_s[slot])

    def ended(self, usage: Usage | None, output_tokens: int = 0) -> None:
        """The answer is complete, and the backend counted it."""
        if self._charged is not None:
            used = output_tokens + (0 if usage is None else usage.prompt_tokens)
            self._model.admission.charge(self._tenant, used - self._charged)
        if self.prompt is not None and usage is not None:
            self.prompt.ended(usage.prompt_tokens, usage.cached_tokens)

    def leave(self) -> None:
        """Whatever became of the tries so far, their prompts wait no longer, nor does anybody wait for a probe."""
        if self.prompt is not None:
            self.prompt.leave()
            for slot, placed_s in self._placed_s.items():
                slot.breaker.left(placed_s)

    def faulted(self, slot: Slot, error: UpstreamError | DeadlinePassed) -> None:
        """A try failed by the backend's fault, which is not tried again."""
        self._tried.append(slot)
        if isinstance(error, UpstreamUnreachable):
            slot.mark_down(error.message)
            return
        now_s = self._model.clock()
        slot.breaker.failed(now_s, self._placed_s[slot])
        eject_outliers(self._model.slots, now_s)

    def failed(self, slot: Slot, error: UpstreamError | DeadlinePassed, *, has_begun: bool) -> None:
        """A try failed, and no other runs beside it. Raises: the error, unless another backend is to be tried."""
        if isinstance(error, UpstreamUnreachable):
            self.faulted(slot, error)
            if has_begun:  # another backend would begin the choices anew
                raise UpstreamError(error.message) from error
            return  # nothing was sent, so nothing is tried again
        if self.prompt is None or (has_begun and isinstance(error, DeadlinePassed)):
            raise error  # the only backend, or the envelope's own deadline
        self.faulted(slot, error)
        model = self._model
        others = any(other.is_up and other not in self._tried for other in model.slots)
        if has_begun or isinstance(error, DeadlinePassed) or not others or not model.retries.take(model.clock()):
            raise error
        model.retried += 1


def _is_fit(slot: Slot, now_s: float) -> bool:
    """Whether it is up, has not failed of late, and may have one more call."""
    limit = slot.standing.limit
    return slot.is_up and slot.breaker.state(now_s) == "closed" and (limit is None or slot.in_flight < limit)
