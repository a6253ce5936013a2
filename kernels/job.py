"""A request and its sequences while they run: plain state that the scheduler moves.

Owns: who hears what, and when a request is over. Does not own: when anything is read (scheduler.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kernels.errors import GenerationFailed, KernelError
from kernels.params import Event, Failed, Finished

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.params import GenerationRequest, Output
    from kernels.run import Run
    from kernels.trie import Branch

logger = logging.getLogger("thinkgate.engine")

Deliver = Callable[[Event], None]


class Job:
    """One request.

    Args:
        request: from `compose`.
        deliver: called with every event; Finished or Failed is the last.
        number: counts requests in order of arrival.

    Attributes:
        request, deliver: as given.
        order: lower ones go first.
        is_cancelled: nobody listens any more.
        is_started: it left the queue.
        is_over: its last event was delivered, or would have been.
        choices: how many there ever were; the next one's number.
        cached: tokens of its prompts that did not have to be read.
    """

    def __init__(self, request: GenerationRequest, deliver: Deliver, number: int) -> None:
        self.request = request
        self.deliver = deliver
        self.order = (request.options.priority, number)
        self.is_cancelled = self.is_started = self.is_over = False
        self.choices = len(request.prompts) * request.options.n
        self.cached = 0
        self._running = self.choices
        self._completion = self._thinking = 0

    def begin(self) -> None:
        """One choice more."""
        self._running += 1

    def tell(self, outputs: list[Output]) -> None:
        """Deliver and count."""
        for output in outputs:
            self._completion += len(output.tokens)
            self._thinking += output.thinking
            self._deliver(output)

    def end(self) -> None:
        """One choice fewer; the last one ends the request."""
        self._running -= 1
        if not self._running and not self.is_over:
            self.is_over = True
            self._deliver(
                Finished(
                    prompt_tokens=sum(len(prompt.token_ids) for prompt in self.request.prompts),
                    completion_tokens=self._completion,
                    reasoning_tokens=self._thinking,
                    cached_tokens=self.cached,
                )
            )

    def fail(self, error: Exception) -> None:
        """Deliver the failure as the last event."""
        if self.is_over:
            return
        self.is_over = True
        if not isinstance(error, KernelError):
            request_id = self.request.options.request_id
            logger.error("generation_failed", exc_info=error, extra={"request_id": request_id})
            error = GenerationFailed(f"generation failed: {type(error).__name__}")
        self._deliver(Failed(error))

    def refuse(self, error: KernelError) -> None:
        """As `fail`, on another thread than the worker's, which delivers nothing from here on."""
        self.is_cancelled = self.is_over = True
        with suppress(RuntimeError):  # as in _deliver
            self.deliver(Failed(error))

    def _deliver(self, event: Event) -> None:
        """Deliver an event, unless the caller is gone or goes now: its event loop may be closed."""
        if self.is_cancelled:
            return
        try:
            self.deliver(event)
        except RuntimeError:
            self.is_cancelled = True
            logger.info("delivery_failed", extra={"request_id": self.request.options.request_id})


@dataclass(eq=False, slots=True)
class Sequence:
    """Tokens that the cache has or is to have.

    Attributes:
        job: whose.
        runs: its choice; before the prompt is read, all choices of the prompt.
        ids: all tokens that have to be read, those that were included.
        prompt: how many of `ids` are the prompt.
        branch: what is in the cache; None while it waits.
        keep: after how many of the last ids logits are wanted.
        rows: those logits, as far as they came.
        is_new: it never had a branch.
    """

    job: Job
    runs: list[Run]
    ids: list[int]
    prompt: int
    branch: Branch | None = None
    keep: int = 1
    rows: list[Tensor] = field(default_factory=list)
    is_new: bool = True

    @property
    def order(self) -> tuple[int, int, int]:
        """Lower ones go first."""
        return (*self.job.order, self.runs[0].index)

    @property
    def done(self) -> int:
        """Tokens in the cache."""
        return 0 if self.branch is None else len(self.branch)

    @property
    def pending(self) -> int:
        """Tokens to read."""
        return len(self.ids) - self.done

    def fork(self, runs: list[Run]) -> Sequence:
        """A second sequence of the same tokens."""
        branch = self.branch.fork() if self.branch is not None else None
        return Sequence(self.job, runs, self.ids.copy(), self.prompt, branch, self.keep, self.rows.copy(), is_new=False)

    def leave(self, *, drop: bool = False) -> None:
        """Give its blocks back; as `Branch.close`."""
        if self.branch is not None:
            self.branch.close(drop=drop)
        self.branch = None
        self.rows = []
