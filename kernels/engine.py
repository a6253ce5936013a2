"""The embedded engine: one model, one thread, one request at a time, the rest in a bounded queue.

Owns: the worker thread, the order of requests (lower priority value first, first come first served
within), cancellation, and keeping one request's failure its own. Everything a caller hears comes through
the `deliver` function it passed, called on the worker thread; the engine knows no event loop.
"""

from __future__ import annotations

import heapq
import logging
import os
import threading
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from kernels.compose import compose
from kernels.errors import EngineClosed, GenerationFailed, KernelError, QueueFull
from kernels.generate import generate
from kernels.model import Stopped, load_model
from kernels.params import Event, Failed

if TYPE_CHECKING:
    from kernels.model import LanguageModel
    from kernels.params import ChatInput, CompletionInput, GenerationRequest, Json, Options

logger = logging.getLogger("thinkgate.engine")

Deliver = Callable[[Event], None]


class Ticket:
    """One submitted request; the handle to cancel it."""

    def __init__(self, engine: Engine, request: GenerationRequest, deliver: Deliver, number: int) -> None:
        self._engine = engine
        self.request = request
        self.deliver = deliver
        self.order = (request.options.priority, number)
        self.is_cancelled = False

    def __lt__(self, other: Ticket) -> bool:
        return self.order < other.order

    def cancel(self) -> None:
        """Stop at the next token, or leave the queue; nothing is delivered any more. May be repeated."""
        self._engine.cancel(self)


class Engine:
    """Runs requests on a model.

    Args:
        model: what generates.
        max_waiting: requests that may wait for the one that runs.
        threads: processor threads for tensors; default: all cores but one. The event loop shares the
            process, and waiting for a core that is taken costs a small model more than the core gives.
    """

    def __init__(self, model: LanguageModel, *, max_waiting: int = 64, threads: int | None = None) -> None:
        self._model = model
        self._threads = threads or max(1, _cores() - 1)
        self._max_waiting = max_waiting
        self._waiting: list[Ticket] = []
        self._running: Ticket | None = None
        self._submitted = 0
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
        """Requests in the queue."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing waits."""
        with self._changed:
            return self._running is None and not self._waiting

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
            if len(self._waiting) >= self._max_waiting:
                raise QueueFull(len(self._waiting))
            self._submitted += 1
            ticket = Ticket(self, request, deliver, self._submitted)
            heapq.heappush(self._waiting, ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """As Ticket.cancel."""
        with self._changed:
            ticket.is_cancelled = True
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                heapq.heapify(self._waiting)
            self._changed.notify_all()

    def wait_until_idle(self, timeout_s: float | None = None) -> bool:
        """Block until nothing runs and nothing waits; False if that took longer than `timeout_s`."""
        with self._changed:
            return self._changed.wait_for(lambda: self._running is None and not self._waiting, timeout_s)

    def close(self) -> None:
        """Abort what runs and what waits, and end the thread. Blocks for at most one token."""
        with self._changed:
            self._is_closing = True
            abandoned, self._waiting = self._waiting, []
            self._changed.notify_all()
        for ticket in abandoned:
            _tell(ticket, Failed(EngineClosed()))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _work(self) -> None:
        """The worker thread."""
        self._model.network.limit_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closing)
                if self._is_closing:
                    return
                ticket = self._running = heapq.heappop(self._waiting)
            self._run(ticket)
            with self._changed:
                self._running = None
                self._changed.notify_all()

    def _run(self, ticket: Ticket) -> None:
        """One request from its first to its last event; never raises."""

        def is_stopped() -> bool:
            return ticket.is_cancelled or self._is_closing

        try:
            # Closed here and now: left to the collector, it would leave inference mode amid the next one.
            with closing(generate(self._model, ticket.request, is_stopped)) as events:
                for event in events:
                    _tell(ticket, event)
        except Stopped:
            _tell(ticket, Failed(EngineClosed()))
        except KernelError as error:
            _tell(ticket, Failed(error))
        except Exception as error:
            # The boundary: whatever one request breaks, the thread has to serve the next.
            logger.exception("generation_failed", extra={"request_id": ticket.request.options.request_id})
            _tell(ticket, Failed(GenerationFailed(f"generation failed: {type(error).__name__}")))


def _tell(ticket: Ticket, event: Event) -> None:
    """Deliver an event, unless the caller is gone or goes now: its event loop may be closed."""
    if ticket.is_cancelled:
        return
    try:
        ticket.deliver(event)
    except RuntimeError:
        ticket.is_cancelled = True
        logger.info("delivery_failed", extra={"request_id": ticket.request.options.request_id})


def _cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
