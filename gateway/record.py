"""What is remembered of one request for its log line and its metrics.

Owns: collecting the facts along the eight steps, so that every outcome, also a failed one, has its line.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from budget.tokens import TokenCounts
from gateway.edge.extension import DecisionReport
from gateway.log import RequestLine

if TYPE_CHECKING:
    from gateway.edge.exchange import Exchange
    from gateway.edge.extension import CascadeReport
    from gateway.metrics import Metrics
    from gateway.modes.flow import Run
    from gateway.prepare import Prepared


class Record:
    """Facts of one request; what a completion does not tell through `begin` and `finish` is set as it is learned."""

    __slots__ = (
        "_before",
        "_ended_at_s",
        "_exchange",
        "_metrics",
        "_prepared",
        "_run",
        "_seconds",
        "backend",
        "cascade",
        "counts",
        "ended_by",
        "error",
        "first_byte_s",
        "is_offline",
        "key",
        "model",
        "nano_usd",
        "overhead_s",
        "replayed",
        "route",
    )

    def __init__(self, exchange: Exchange, route: str, metrics: Metrics) -> None:
        self._exchange = exchange
        self._metrics = metrics
        self._seconds = self._ended_at_s = 0.0
        self.route = route
        self._prepared: Prepared | None = None
        self._run: Run | None = None
        self._before: tuple[TokenCounts, int] | None = None
        self.key = self.model = self.backend = ""
        self.cascade: CascadeReport | None = None
        self.counts = TokenCounts()
        self.nano_usd = 0
        self.error: str | None = None
        self.ended_by: str | None = None
        self.first_byte_s: float | None = None
        self.is_offline = False
        self.overhead_s = 0.0
        self.replayed = False

    def begin(self, prepared: Prepared) -> None:
        """Model and mode are known. What was used on a model before, which could not serve, is counted at once."""
        if self._run is not None and self._prepared is not None:
            self._metrics.used(self.model, self._prepared.decision.mode, self.counts, self.nano_usd)
            self._before = self._spent()
            self._run, self.backend, self.counts, self.nano_usd = None, "", TokenCounts(), 0
        self._prepared = prepared
        self.model = prepared.model.name

    def _spent(self) -> tuple[TokenCounts, int]:
        """Tokens and nano-USD of everything that was tried."""
        if self._before is None:
            return self.counts, self.nano_usd
        return self.counts.plus(self._before[0]), self.nano_usd + self._before[1]

    def first_byte(self, first_byte_s: float, overhead_s: float) -> None:
        """The response begins."""
        self.first_byte_s, self.overhead_s = first_byte_s, overhead_s

    def finish(self, run: Run) -> None:
        """The call is over; counting is done."""
        self._run = run
        self.counts, settled = run.close_books()
        self.nano_usd = settled.nano_usd
        self.backend = run.slot.config.id if run.slot is not None else ""
        self.ended_by = run.ended_by or self.ended_by

    def close(self, now_s: float) -> None:
        """The request is over, whatever became of it; `now_s` is in seconds since 1970."""
        self._seconds = time.perf_counter() - self._exchange.began_s
        self._ended_at_s = now_s

    def publish(self) -> RequestLine:
        """Count the request in the metrics, and give its line; later, and for many requests in a row."""
        exchange, prepared, run, metrics = self._exchange, self._prepared, self._run, self._metrics
        seconds = self._seconds
        model, mode, reason = self.model, "", ""
        if prepared is not None:
            mode, reason = prepared.decision.mode, prepared.decision.reason
        metrics.request(self.route, model, mode, exchange.status, seconds)
        if self.first_byte_s is not None:
            metrics.began(model, mode, first_byte_s=self.first_byte_s, overhead_s=self.overhead_s)
        if self.backend:
            metrics.used(model, mode, self.counts, self.nano_usd)
        cap, capped = None, False
        if run is not None and prepared is not None:
            cap, capped = prepared.cap.tokens, run.tally.capped
            self._publish_thinking(prepared, run)
        tokens, nano_usd = self._spent()
        return RequestLine(
            event="request",
            time=self._ended_at_s,
            request_id=exchange.request_id,
            route=self.route,
            status=exchange.status,
            key=self.key,
            model=model,
            mode=mode,
            mode_reason=reason,
            backend=self.backend,
            stream=prepared is not None and prepared.ask.stream,
            seconds=round(seconds, 6),
            overhead_ms=round(self.overhead_s * 1000, 3),
            tokens=tokens,
            cap=cap,
            capped=capped,
            ended_by=self.ended_by,
            cost_nano_usd=nano_usd,
            offline=self.is_offline,
            error=self.error,
            degraded=() if prepared is None else prepared.degraded,
            replayed=self.replayed,
            decision=self._decision(),
            cascade=self.cascade,
            target=None if prepared is None else prepared.target,
        )

    def _decision(self) -> DecisionReport | None:
        verdict = None if self._prepared is None else self._prepared.decision.verdict
        return None if verdict is None else DecisionReport.of(verdict)

    def _publish_thinking(self, prepared: Prepared, run: Run) -> None:
        """Count how its thinking was bounded."""
        metrics, model = self._metrics, self.model
        if run.tally.capped:
            metrics.capped(model)
        for taken in prepared.degraded:
            metrics.degraded.add(taken.step, model)
        if self.cascade is not None:
            metrics.cascades.add(model, self.cascade.outcome)
        if run.overrun:
            metrics.overrun(model, self.backend)
        if not prepared.is_plain():
            metrics.enforced(model, run.enforced)
