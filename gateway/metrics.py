"""Prometheus metrics: bounded labels, children looked up once.

Labels are public model names, modes, routes, statuses, backend ids and token kinds: never a key, a
tenant or a prompt. O(1) per request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from budget.ledger import Amounts
    from budget.tokens import TokenCounts
    from gateway.models import Model

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1)


class State(Collector):
    """What is held, in flight and up, read when scraped."""

    def __init__(
        self, held: Callable[[], Amounts], in_flight: Callable[[], int], models: Callable[[], dict[str, Model]]
    ) -> None:
        self._held = held
        self._in_flight = in_flight
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The gauges."""
        held = self._held()
        yield GaugeMetricFamily("thinkgate_held_tokens", "Tokens held and not settled.", value=held.tokens)
        yield GaugeMetricFamily("thinkgate_held_nano_usd", "Money held and not settled.", value=held.nano_usd)
        yield GaugeMetricFamily("thinkgate_inflight_requests", "Requests being served.", value=self._in_flight())
        up = GaugeMetricFamily("thinkgate_backend_up", "1 if the backend is up.", labels=["model", "backend"])
        calls = GaugeMetricFamily("thinkgate_backend_calls", "Calls in flight.", labels=["model", "backend"])
        for model in self._models().values():
            for slot in model.slots:
                up.add_metric([model.name, slot.config.id], float(slot.is_up))
                calls.add_metric([model.name, slot.config.id], slot.in_flight)
        yield up
        yield calls


class Metrics:
    """All metrics of one gateway, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "thinkgate_requests", "Requests answered.", ["route", "model", "mode", "status"], registry=registry
        )
        self._seconds = Histogram(
            "thinkgate_request_seconds",
            "From the request's arrival to the end of its answer.",
            ["model", "mode"],
            buckets=SECONDS,
            registry=registry,
        )
        self._first_byte = Histogram(
            "thinkgate_first_byte_seconds",
            "From the request's arrival to the first byte of a stream.",
            ["model", "mode"],
            buckets=SECONDS,
            registry=registry,
        )
        self._overhead = Histogram(
            "thinkgate_overhead_seconds",
            "Time the gateway itself added before the first byte.",
            ["model"],
            buckets=OVERHEAD,
            registry=registry,
        )
        self._tokens = Counter(
            "thinkgate_tokens", "Tokens by kind.", ["model", "mode", "kind"], registry=registry
        )
        self._cost = Counter("thinkgate_cost_nano_usd", "Money settled.", ["model"], registry=registry)
        self._capped = Counter(
            "thinkgate_capped", "Requests whose thinking was ended by the cap.", ["model"], registry=registry
        )
        self._overruns = Counter(
            "thinkgate_cap_overruns", "Calls whose backend ignored the cap.", ["model", "backend"], registry=registry
        )
        self.refusals = Counter("thinkgate_refusals", "Requests refused.", ["code"], registry=registry)
        self.disconnects = Counter("thinkgate_disconnects", "Clients that left early.", ["route"], registry=registry)
        self.unreported = Counter(
            "thinkgate_unreported_calls",
            "Calls closed before the backend reported any token of them.",
            ["model"],
            registry=registry,
        )
        self.reloads = Counter("thinkgate_config_reloads", "Configuration reloads.", ["outcome"], registry=registry)
        self.reload_failed = Gauge(
            "thinkgate_config_reload_failed", "1 while the newest configuration was refused.", registry=registry
        )
        self._child = lru_cache(maxsize=4096)(self._make_child)

    def _make_child(self, metric: Counter | Histogram, *labels: str) -> Counter | Histogram:
        return metric.labels(*labels)

    def _inc(self, metric: Counter, *labels: str, by: float = 1) -> None:
        self._child(metric, *labels).inc(by)  # type: ignore[union-attr]  # a Counter gives Counters

    def _observe(self, metric: Histogram, *labels: str, value: float) -> None:
        self._child(metric, *labels).observe(value)  # type: ignore[union-attr]  # a Histogram gives Histograms

    def request(self, route: str, model: str, mode: str, status: int, seconds: float) -> None:
        """One request ended."""
        self._inc(self._requests, route, model, mode, str(status))
        self._observe(self._seconds, model, mode, value=seconds)

    def began(self, model: str, mode: str, *, first_byte_s: float, overhead_s: float) -> None:
        """The first byte of a response is on its way."""
        self._observe(self._first_byte, model, mode, value=first_byte_s)
        self._observe(self._overhead, model, value=overhead_s)

    def used(self, model: str, mode: str, counts: TokenCounts, nano_usd: int) -> None:
        """What a request used."""
        for kind in counts.__struct_fields__:
            amount = getattr(counts, kind)
            if amount:
                self._inc(self._tokens, model, mode, kind, by=amount)
        if nano_usd:
            self._inc(self._cost, model, by=nano_usd)

    def capped(self, model: str) -> None:
        """A cap ended some thinking."""
        self._inc(self._capped, model)

    def overrun(self, model: str, backend: str) -> None:
        """A backend thought beyond its cap."""
        self._inc(self._overruns, model, backend)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)
