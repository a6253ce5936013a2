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
    """

    __slots__ = ("_call", "_charged", "_has_begun", "_model", "_placed_s", "_prompt", "_slot", "_tenant", "_tried")

    def __init__(self, model: Model, call: Call | None) -> None:
        self._model = model
        self._prompt: Prompt | None = model.prompt(call)
        self._tried: list[Slot] = []
        self._slot: Slot | None = None
        self._placed_s = 0.0
        self._has_begun = False
        self._call = call
        self._charged: int | None = None
        self._tenant = ""

    async def admit(self, tenant: str, deadline_s: float | None) -> None:
        """Wait for a turn, where all backends are full. Raises: Overloaded, DeadlinePassed."""
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
        self._slot = self._model.choose(self._tried, self._prompt)
        self._placed_s = self._model.clock()
        return self._slot

    def began(self, slot: Slot) -> None:
        """The first byte came; any number of times."""
        if self._has_begun or self._prompt is None:
            return
        self._has_begun = True
        now_s = self._model.clock()
        self._prompt.began(now_s)
        slot.breaker.succeeded(now_s, self._placed_s)

    def ended(self, usage: Usage | None, output_tokens: int = 0) -> None:
        """The answer is complete, and the backend counted it."""
        if self._charged is not None:
            used = output_tokens + (0 if usage is None else usage.prompt_tokens)
            self._model.admission.charge(self._tenant, used - self._charged)
        if self._prompt is not None and usage is not None:
            self._prompt.ended(usage.prompt_tokens, usage.cached_tokens)

    def leave(self) -> None:
        """Whatever became of this try, its prompt waits no longer, nor does anybody wait for it as a probe."""
        if self._prompt is not None:
            self._prompt.leave()
            if self._slot is not None:
                self._slot.breaker.left(self._placed_s)

    def failed(self, slot: Slot, error: UpstreamError | DeadlinePassed, *, has_begun: bool) -> None:
        """A try failed by the backend's fault. Raises: the error, unless another backend is to be tried."""
        if isinstance(error, UpstreamUnreachable):
            slot.mark_down(error.message)
            self._tried.append(slot)
            if has_begun:  # another backend would begin the choices anew
                raise UpstreamError(error.message) from error
            return  # nothing was sent, so nothing is tried again
        if self._prompt is None or (has_begun and isinstance(error, DeadlinePassed)):
            raise error  # the only backend, or the envelope's own deadline
        now_s = self._model.clock()
        slot.breaker.failed(now_s, self._placed_s)
        eject_outliers(self._model.slots, now_s)
        self._tried.append(slot)
        others = any(other.is_up and other not in self._tried for other in self._model.slots)
        if has_begun or isinstance(error, DeadlinePassed) or not others or not self._model.retries.take(now_s):
            raise error
        self._model.retried += 1
