"""Metrics of several processes: added up from files, whoever of them is still there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from budget.ledger import Amounts, Figures
from budget.tokens import TokenCounts
from gateway.metrics import Metrics
from gateway.metrics_files import MERGED, MetricFiles, forget_gauges, registry_of

NAMES = ("ada", 'b"o\\b\n', "ç")
Event = tuple[int, str, float, int]  # whose, which model, seconds (their sums are exact), tokens
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(NAMES),
        st.integers(0, 3000).map(lambda quarters: quarters / 4),
        st.integers(0, 10**9),
    ),
    max_size=20,
)


def metrics(held: int = 0, *, is_reachable: bool = True) -> Metrics:
    """Those of one process."""
    return Metrics(lambda: Amounts(tokens=held), lambda: 0, dict, figures=lambda: Figures(is_reachable=is_reachable))


def count(of: Metrics, event: Event) -> None:
    """What one request leaves behind."""
    _, model, seconds, tokens = event
    of.request("/v1/chat/completions", model, "instant", 200, seconds)
    of.used(model, "instant", TokenCounts(prompt=tokens, answer=7), tokens)


@contextmanager
def folder() -> Iterator[Path]:
    """Empty."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def series(registry: Collector, kinds: Sequence[str] = ("counter", "histogram")) -> dict[tuple[str, str], float]:
    """All samples of these kinds."""
    return {
        (sample.name, str(sorted(sample.labels.items()))): sample.value
        for family in registry.collect()
        if family.type in kinds
        for sample in family.samples
    }


@settings(max_examples=25, deadline=None)
@given(events=EVENTS)
def test_processes_together_say_what_one_would(events: list[Event]) -> None:
    """However requests are spread over three processes, and however often they write, the sums are those of one."""
    with folder() as place:
        one, several = metrics(), [metrics() for _ in range(3)]
        files = [MetricFiles(each, place, number) for number, each in enumerate(several)]
        for event in events:
            count(one, event)
            count(several[event[0]], event)
            files[event[0]].write()
        for each in files:
            each.close()
        assert series(registry_of(place)) == series(one)


@settings(max_examples=25, deadline=None)
@given(before=EVENTS, after=EVENTS)
def test_a_successor_counts_on(before: list[Event], after: list[Event]) -> None:
    """A process with the number of a dead one adds to what that one wrote."""
    with folder() as place:
        one = metrics()
        for events in (before, after):
            worker = metrics()
            files = MetricFiles(worker, place, 0)
            for event in events:
                count(one, event)
                count(worker, event)
            files.close()
        assert series(registry_of(place)) == series(one)


def test_gauges_are_those_of_the_living(tmp_path: Path) -> None:
    """What is held adds up; a store is reachable if all reach it; the dead count for nothing."""
    MetricFiles(metrics(5), tmp_path, 0).close()
    MetricFiles(metrics(7, is_reachable=False), tmp_path, 1).close()
    registry = registry_of(tmp_path)
    assert registry.get_sample_value("thinkgate_held_tokens") == 12
    assert registry.get_sample_value("thinkgate_store_reachable") == 0
    forget_gauges(tmp_path, 1)
    assert registry.get_sample_value("thinkgate_held_tokens") == 5
    assert registry.get_sample_value("thinkgate_store_reachable") == 1


def test_a_gauge_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    """A backend that a reload removed is in the files no longer."""

    class Backends(Collector):
        names: tuple[str, ...] = ("a", "b")

        def collect(self) -> Iterator[Metric]:
            family = GaugeMetricFamily("thinkgate_backend_up", "Up.", labels=("backend",))
            for name in self.names:
                family.add_metric((name,), 1.0)
            yield family

    backends = Backends()
    files = MetricFiles(backends, tmp_path, 0)
    files.write()
    backends.names = ("b",)
    files.close()
    assert [labels for _, labels in series(registry_of(tmp_path), ("gauge",))] == ["[('backend', 'b')]"]


def test_every_gauge_has_a_rule() -> None:
    """How a gauge is merged is stated for each, and for no other metric."""
    assert {family.name for family in metrics().collect() if family.type == "gauge"} == set(MERGED)
