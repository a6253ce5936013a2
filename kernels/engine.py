"""The embedded engine: one model, one thread, all requests read together.

Owns: the worker thread, the bound on requests, cancellation. What is read when is the scheduler's business.
Everything a caller hears comes through the `deliver` function it passed, called on the worker thread; the
engine knows no event loop.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from kernels.compose import compose
from kernels.errors import EngineClosed, QueueFull, RequestRefused
from kernels.job import Deliver, Job
from kernels.model import load_model
from kernels.params import Output
from kernels.scheduler import Scheduler, Stats

if TYPE_CHECKING:
    from kernels.model import LanguageModel
    from kernels.params import ChatInput, CompletionInput, GenerationRequest, Json, Options


class Ticket:
    """One submitted request: the handle to fork and prune its choices, and to cancel it."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self._engine = engine
        self.job = job

    def cancel(self) -> None:
        """Stop at the next token, or leave the queue; nothing is delivered any more. May be repeated."""
        self._engine.cancel(self)

    def fork(self, choice: int) -> int:
        """Let a choice go on twice, from where it is at the next step; the two share all that is in the cache.

        If it has ended by then, the new one ends at once, with an output of no tokens and `stop`.

        Returns: the number of the new choice, which draws its own tokens: from seed + number, if there is a seed.
        Raises: RequestRefused if there is no such choice or the request is over.
        """
        return self._engine.fork(self, choice)

    def prune(self, choice: int) -> None:
        """End a choice at the next step, as a dead end; nothing more is delivered of it, and its blocks are free.

        The request is over when no choice is left. A choice that has ended stays as it is.

        Raises: RequestRefused if there never was such a choice.
        """
        self._engine.prune(self, choice)


class Engine:
    """Runs requests on a model.

    Args:
        model: what generates.
        max_waiting: requests that may wait while `max_running` run.
        max_running: sequences that are read in one step.
        step_tokens: tokens that are read in one step; a longer prompt is read in portions.
        threads: processor threads for tensors; default: all cores but one. The event loop shares the
            process, and waiting for a core that is taken costs a small model more than the core gives.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_waiting: int = 64,
        max_running: int = 64,
        step_tokens: int = 512,
        threads: int | None = None,
    ) -> None:
        self._model = model
        self._scheduler = Scheduler(model, max_running=max_running, step_tokens=step_tokens)
        self._threads = threads or max(1, _cores() - 1)
        self._max_waiting, self._max_running = max_waiting, max_running
        # Requests that are not over, and what the worker is asked to do before its next step.
        self._live: set[Job] = set()
        self._asked: deque[Callable[[], object]] = deque()
        self._submitted = 0
        self._is_working = False
        self._is_closing = False
        self._changed = threading.Condition()
        # A daemon, so that an engine nobody closed does not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="thinkgate-engine", daemon=True)
        self._thread.start()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        say: Callable[[str], None],
        device: str = "auto",
        max_len: int | None = None,
        max_waiting: int = 64,
    ) -> Engine:
        """An engine over a Hugging Face folder or id. Blocks. Raises: ModelUnusable."""
        return cls(load_model(path, say=say, device=device, max_len=max_len), max_waiting=max_waiting)

    @property
    def model(self) -> LanguageModel:
        """What generates."""
        return self._model

    @property
    def waiting(self) -> int:
        """Requests of which nothing was read yet."""
        with self._changed:
            return sum(not job.is_started for job in self._live)

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        with self._changed:
            return self._rests()

    @property
    def stats(self) -> Stats:
        """A copy of what was counted since the start."""
        return replace(self._scheduler.stats)

    @property
    def defaults(self) -> Json:
        """Sampling values for requests that do not set them."""
        return self._model.defaults

    def compose(self, given: ChatInput | CompletionInput, options: Options) -> GenerationRequest:
        """What `submit` takes. CPU-bound, any thread. Raises: RequestRefused."""
        return compose(self._model, given, options)

    def submit(self, request: GenerationRequest, deliver: Deliver) -> Ticket:
        """Queue a request.

        Args:
            request: from `compose`.
            deliver: called on the worker thread with every event; Finished or Failed is the last.

        Raises: QueueFull, EngineClosed.
        """
        with self._changed:
            if self._is_closing:
                raise EngineClosed
            if len(self._live) >= self._max_running + self._max_waiting:
                raise QueueFull(sum(not job.is_started for job in self._live))
            self._submitted += 1
            job = Job(request, deliver, self._submitted)
            self._live.add(job)
            self._ask(partial(self._scheduler.submit, job))
        return Ticket(self, job)

    def cancel(self, ticket: Ticket) -> None:
        """As Ticket.cancel."""
        with self._changed:
            ticket.job.is_cancelled = True
            if not ticket.job.is_started:
                self._live.discard(ticket.job)
            self._changed.notify_all()

    def fork(self, ticket: Ticket, choice: int) -> int:
        """As Ticket.fork."""
        job = ticket.job
        with self._changed:
            if job.is_over or job not in self._live:
                raise RequestRefused("The request is over: nothing is left to fork.", param=None)
            _check(job, choice)
            number = job.choices
            job.choices += 1
            self._ask(partial(self._fork, job, choice, number))
        return number

    def prune(self, ticket: Ticket, choice: int) -> None:
        """As Ticket.prune."""
        with self._changed:
            _check(ticket.job, choice)
            self._ask(partial(self._scheduler.prune, ticket.job, choice))

    def wait_until_idle(self, timeout_s: float | None = None) -> bool:
        """Block until nothing runs and nothing waits; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(self._rests, timeout_s)

    def close(self) -> None:
        """Abort what runs and what waits, and end the thread. Blocks for at most one step."""
        with self._changed:
            self._is_closing = True
            waiting = [job for job in self._live if not job.is_started]
            self._changed.notify_all()
        for job in waiting:
            job.refuse(EngineClosed())
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _rests(self) -> bool:
        """Nothing is left to do, blocks to free included; the lock is held."""
        return not (self._live or self._asked or self._is_working or self._scheduler.has_work)

    def _ask(self, what: Callable[[], object]) -> None:
        """Have the worker do something before its next step; the lock is held."""
        self._asked.append(what)
        self._changed.notify_all()

    def _fork(self, job: Job, choice: int, number: int) -> None:
        """On the worker thread."""
        if not job.is_over and not self._scheduler.fork(job, choice, number):
            job.tell([Output(index=number, finish_reason="stop")])

    def _work(self) -> None:
        """The worker thread."""
        self._model.network.limit_threads(self._threads)
        while True:
            with self._changed:
                self._live = {job for job in self._live if not job.is_over and not job.is_cancelled}
                self._is_working = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._asked or self._scheduler.has_work or self._is_closing)
                self._is_working = True
                asked, self._asked = self._asked, deque()
                is_closing, left = self._is_closing, tuple(self._live)
            if is_closing:
                break
            try:
                for what in asked:
                    what()
                self._scheduler.step()
            except Exception as error:  # noqa: BLE001 - the boundary: the thread has to serve whoever comes next
                # What one request breaks is dealt with below; this is our own bug, and nobody's state can be trusted.
                for job in left:
                    self._scheduler.abort(job, error)
        for job in left:
            self._scheduler.abort(job, EngineClosed())


def _check(job: Job, choice: int) -> None:
    """Raises: RequestRefused if there never was such a choice."""
    if not 0 <= choice < job.choices:
        raise RequestRefused(f"There is no choice {choice}.", param=None)


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
