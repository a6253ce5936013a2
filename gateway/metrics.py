"""Prometheus metrics, kept so that a request pays about a microsecond for all of them.

Owns: plain Python cells that the hot path adds to, and the collector that turns them into Prometheus
families when scraped. Labels are public model names, modes, routes, statuses, backend ids and token
kinds: never a key, a tenant or a prompt. O(1) per request.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from budget.ledger import Figures
from gateway.kv_events import KINDS as KV_KINDS

if TYPE_CHECKING:
    from budget.ledger import Amounts
    from budget.tokens import TokenCounts
    from gateway.models import Model
    from gateway.modes.flow import Enforced

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1)
KINDS = ("prompt", "cached", "thinking", "answer", "planner", "probe", "injected", "wasted")
Labels = tuple[str, ...]


class CounterCells:
    """One counter family: a number per label values."""

    def __init__(self, name: str, text: str, labels: Labels) -> None:
        self.family = (name, text, labels)
        self.cells: defaultdict[Labels, float] = defaultdict(float)

    def add(self, *labels: str, by: float = 1) -> None:
        """Add to one cell."""
        self.cells[labels] += by

    def collect(self) -> CounterMetricFamily:
        """As Prometheus sees it."""
        name, text, names = self.family
        family = CounterMetricFamily(name, text, labels=names)
        for labels, value in list(self.cells.items()):
            family.add_metric(labels, value)
        return family


class HistogramCells:
    """One histogram family: bucket counts and a sum per label values."""

    def __init__(self, name: str, text: str, labels: Labels, buckets: tuple[float, ...]) -> None:
        self.family = (name, text, labels)
        self._buckets = buckets
        self.cells: dict[Labels, list[float]] = {}

    def observe(self, labels: Labels, value: float) -> None:
        """Count one value."""
        cell = self.cells.get(labels)
        if cell is None:
            cell = self.cells[labels] = [0.0] * (len(self._buckets) + 2)
        cell[bisect_left(self._buckets, value)] += 1
        cell[-1] += value

    def collect(self) -> HistogramMetricFamily:
        """As Prometheus sees it."""
        name, text, names = self.family
        family = HistogramMetricFamily(name, text, labels=names)
        bounds = [floatToGoString(bound) for bound in (*self._buckets, math.inf)]
        for labels, cell in list(self.cells.items()):
            running, buckets = 0.0, []
            for bound, count in zip(bounds, cell[:-1], strict=True):
                running += count
                buckets.append((bound, running))
            family.add_metric(labels, buckets, cell[-1])
        return family


class Metrics(Collector):
    """All metrics of one gateway, in a registry of its own.

    Args:
        held: amounts held now.
        in_flight: requests being served.
        models: the models served now.
        figures: what the ledger knows without asking its store.
        before_scrape: publishes requests that have ended but are not counted yet.
    """

    def __init__(
        self,
        held: Callable[[], Amounts],
        in_flight: Callable[[], int],
        models: Callable[[], dict[str, Model]],
        figures: Callable[[], Figures] = Figures,
        before_scrape: Callable[[], None] = lambda: None,
    ) -> None:
        self._before_scrape = before_scrape
        self._figures = figures
        self._held, self._in_flight, self._models = held, in_flight, models
        self._requests = CounterCells("thinkgate_requests", "Requests answered.", ("route", "model", "mode", "status"))
        self._tokens: dict[Labels, list[int]] = {}
        self._cost = CounterCells("thinkgate_cost_nano_usd", "Money settled.", ("model",))
        self._capped = CounterCells("thinkgate_capped", "Requests whose thinking was ended by the cap.", ("model",))
        self._overruns = CounterCells(
            "thinkgate_cap_overruns", "Calls whose backend ignored the cap.", ("model", "backend")
        )
        self._enforced = CounterCells("thinkgate_enforced", "Requests by how their cap was held.", ("model", "how"))
        self._resent = CounterCells(
            "thinkgate_resent_tokens", "Prompt tokens of a choice's later segments.", ("model", "cached")
        )
        self.degraded = CounterCells("thinkgate_degraded", "Steps down the degrade ladder.", ("step", "model"))
        self.cascades = CounterCells(
            "thinkgate_cascades", "Requests by what became of their draft.", ("model", "outcome")
        )
        self.refusals = CounterCells("thinkgate_refusals", "Requests refused.", ("code",))
        self.disconnects = CounterCells("thinkgate_disconnects", "Clients that left early.", ("route",))
        self.unreported = CounterCells(
            "thinkgate_unreported_calls", "Calls closed before the backend reported any token.", ("model",)
        )
        self.webhook_calls = CounterCells("thinkgate_webhook_calls", "Messages to the webhook.", ("outcome",))
        self.reloads = CounterCells("thinkgate_config_reloads", "Configuration reloads.", ("outcome",))
        self.reload_failed = False
        self.idempotency = CounterCells(
            "thinkgate_idempotency", "Requests with an Idempotency-Key, by what became of them.", ("outcome",)
        )
        self.store_failures = CounterCells("thinkgate_store_failures", "Failed readings of stored keys and limits.", ())
        self.store_failures.add(by=0)
        self.store_stale = False
        mode = ("model", "mode")
        self._seconds = HistogramCells("thinkgate_request_seconds", "Arrival to end of answer.", mode, SECONDS)
        self._first = HistogramCells("thinkgate_first_byte_seconds", "Arrival to first byte.", mode, SECONDS)
        self._overhead = HistogramCells(
            "thinkgate_overhead_seconds", "What the gateway itself added before the first byte.", mode, OVERHEAD
        )
        self._switches = HistogramCells(
            "thinkgate_switch_seconds", "What the gateway added between two segments.", ("model",), OVERHEAD
        )
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def request(self, route: str, model: str, mode: str, status: int, seconds: float) -> None:
        """One request ended."""
        self._requests.cells[route, model, mode, str(status)] += 1
        self._seconds.observe((model, mode), seconds)

    def began(self, model: str, mode: str, *, first_byte_s: float, overhead_s: float) -> None:
        """The first byte of a response is on its way."""
        labels = (model, mode)
        self._first.observe(labels, first_byte_s)
        self._overhead.observe(labels, overhead_s)

    def used(self, model: str, mode: str, counts: TokenCounts, nano_usd: int) -> None:
        """What a request used."""
        cell = self._tokens.get((model, mode))
        if cell is None:
            cell = self._tokens[model, mode] = [0] * len(KINDS)
        cell[0] += counts.prompt
        cell[1] += counts.cached
        cell[2] += counts.thinking
        cell[3] += counts.answer
        cell[4] += counts.planner
        cell[5] += counts.probe
        cell[6] += counts.injected
        cell[7] += counts.wasted
        if nano_usd:
            self._cost.cells[model,] += nano_usd

    def capped(self, model: str) -> None:
        """A cap ended some thinking."""
        self._capped.add(model)

    def overrun(self, model: str, backend: str) -> None:
        """A backend thought beyond its cap."""
        self._overruns.add(model, backend)

    def enforced(self, model: str, enforced: Enforced) -> None:
        """How the cap of a request was held."""
        self._enforced.cells[model, enforced.how] += 1
        if enforced.resent_tokens:
            self._resent.add(model, "yes", by=enforced.resent_cached_tokens)
            self._resent.add(model, "no", by=enforced.resent_tokens - enforced.resent_cached_tokens)
        for switch_s in enforced.switches_s:
            self._switches.observe((model,), switch_s)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[CounterMetricFamily | HistogramMetricFamily | GaugeMetricFamily]:
        """Everything, as Prometheus sees it."""
        self._before_scrape()
        yield from (
            cells.collect() for cells in vars(self).values() if isinstance(cells, CounterCells | HistogramCells)
        )
        tokens = CounterMetricFamily("thinkgate_tokens", "Tokens by kind.", labels=("model", "mode", "kind"))
        for (model, mode), cell in list(self._tokens.items()):
            for kind, count in zip(KINDS, cell, strict=True):
                tokens.add_metric((model, mode, kind), count)
        yield tokens
        yield from self._ledger()
        yield GaugeMetricFamily("thinkgate_inflight_requests", "Requests being served.", value=self._in_flight())
        yield GaugeMetricFamily(
            "thinkgate_config_reload_failed", "1 while the newest configuration was refused.", value=self.reload_failed
        )
        yield GaugeMetricFamily(
            "thinkgate_store_stale",
            "1 while stored keys and limits are the last that were read.",
            value=self.store_stale,
        )
        yield from self._backends()
        yield from self._kv_indexes()

    def _ledger(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        held, figures = self._held(), self._figures()
        yield GaugeMetricFamily("thinkgate_held_tokens", "Tokens held and not settled.", value=held.tokens)
        yield GaugeMetricFamily("thinkgate_held_nano_usd", "Money held and not settled.", value=held.nano_usd)
        yield GaugeMetricFamily(
            "thinkgate_store_reachable", "1 while the budget store answers.", value=figures.is_reachable
        )
        yield GaugeMetricFamily(
            "thinkgate_settlements_waiting", "Settlements the store does not have yet.", value=figures.waiting
        )
        yield CounterMetricFamily("thinkgate_swept_holds", "Holds settled for dead processes.", value=figures.swept)
        yield CounterMetricFamily(
            "thinkgate_offline_holds", "Holds granted while the budget store did not answer.", value=figures.offline
        )
        debt = figures.debt
        yield CounterMetricFamily("thinkgate_debt_tokens", "Tokens used beyond their hold.", value=debt.tokens)
        yield CounterMetricFamily("thinkgate_debt_nano_usd", "Money used beyond its hold.", value=debt.nano_usd)

    def _backends(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        up = GaugeMetricFamily("thinkgate_backend_up", "1 if the backend is up.", labels=("model", "backend"))
        calls = GaugeMetricFamily("thinkgate_backend_calls", "Calls in flight.", labels=("model", "backend"))
        holds = GaugeMetricFamily(
            "thinkgate_backend_cap_binds", "1 if its own cap is trusted to bind.", labels=("model", "backend")
        )
        breaker = GaugeMetricFamily(
            "thinkgate_backend_breaker_open", "1 while its breaker lets nothing through.", labels=("model", "backend")
        )
        trusted = GaugeMetricFamily(
            "thinkgate_prefix_trusted", "1 while its prefix index is trusted.", labels=("model", "backend")
        )
        prefix = CounterMetricFamily(
            "thinkgate_prefix_tokens",
            "Prompt tokens, predicted and cached.",
            labels=("model", "backend", "index", "kind"),
        )
        waits = GaugeMetricFamily("thinkgate_queue_calls", "Calls that wait for a backend.", labels=("model",))
        waited = CounterMetricFamily("thinkgate_queue_seconds", "Time calls waited for a backend.", labels=("model",))
        shed = CounterMetricFamily("thinkgate_queue_shed", "Calls refused: too many waited.", labels=("model",))
        retried = CounterMetricFamily("thinkgate_retries", "Calls tried again elsewhere.", labels=("model",))
        hedged = CounterMetricFamily(
            "thinkgate_hedges", "Second tries: those that answered first, and others.", labels=("model", "outcome")
        )
        for model in self._models().values():
            won, begun = (0, 0) if model.hedging is None else (model.hedging.won, model.hedging.begun)
            hedged.add_metric((model.name, "won"), won)
            hedged.add_metric((model.name, "lost"), begun - won)
            retried.add_metric((model.name,), model.retried)
            waits.add_metric((model.name,), len(model.admission))
            waited.add_metric((model.name,), model.admission.waited_s)
            shed.add_metric((model.name,), model.admission.shed)
            for slot in model.slots:
                labels = (model.name, slot.config.id)
                breaker.add_metric(labels, float(slot.breaker.state(slot.clock()) == "open"))
                trusted.add_metric(labels, float(slot.standing.agreement.is_trusted))
                for index, told in slot.standing.told.items():
                    for kind, tokens in zip(("prompt", "predicted", "cached"), told, strict=True):
                        prefix.add_metric((*labels, index, kind), tokens)
                up.add_metric((model.name, slot.config.id), float(slot.is_up))
                calls.add_metric((model.name, slot.config.id), slot.in_flight)
                binds = slot.capabilities is not None and bool(slot.capabilities.cap_binds)
                holds.add_metric((model.name, slot.config.id), float(binds))
        yield from (up, calls, holds, breaker, trusted, prefix, retried, hedged, waits, waited, shed)

    def _kv_indexes(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Of backends whose KV events are followed."""
        live = GaugeMetricFamily(
            "thinkgate_kv_live", "1 while its KV events are followed and believed.", labels=("model", "backend")
        )
        blocks = GaugeMetricFamily("thinkgate_kv_blocks", "Blocks known to be cached.", labels=("model", "backend"))
        events = CounterMetricFamily("thinkgate_kv_events", "KV events.", labels=("model", "backend", "kind"))
        asked = CounterMetricFamily("thinkgate_prompt_ids", "Prompts tokenised.", labels=("model", "outcome"))
        for model in self._models().values():
            if model.prompt_ids is not None:
                asked.add_metric((model.name, "asked"), model.prompt_ids.asked)
                asked.add_metric((model.name, "late"), model.prompt_ids.late)
            for slot in model.slots:
                index, labels = slot.standing.kv, (model.name, slot.config.id)
                if index is not None:
                    live.add_metric(labels, float(index.is_believed))
                    blocks.add_metric(labels, len(index.exact))
                    for kind in KV_KINDS:
                        events.add_metric((*labels, kind), index.counts[kind])
        yield from (live, blocks, events, asked)
