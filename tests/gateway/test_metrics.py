"""Metrics: what is counted comes out in Prometheus' own format, under labels that clients cannot multiply."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from budget.ledger import Amounts, Figures
from budget.tokens import TokenCounts
from gateway.metrics import KINDS, SECONDS, HistogramCells, Metrics
from gateway.models import Model
from gateway.modes.flow import Enforced
from tests.gateway.asgi import ask, gateway_of
from tests.gateway.still import CHAT, config_of, models_of

LABELS = {"route", "model", "mode", "status", "code", "backend", "index", "kind", "outcome", "le", "how", "cached"}


def metrics(models: dict[str, Model] | None = None) -> Metrics:
    """Metrics of a gateway that holds something and serves three requests."""
    return Metrics(lambda: Amounts(tokens=5, nano_usd=7), lambda: 3, lambda: models or {})


def test_what_the_ledger_knows_is_told() -> None:
    """Whether the store answers, what waits for it, what was swept and what was overrun have a series each."""
    debt = Amounts(tokens=30, thinking_tokens=9, nano_usd=800)
    figures = Figures(is_reachable=False, waiting=4, swept=2, debt=debt)
    told = Metrics(Amounts, lambda: 0, dict, figures=lambda: figures)
    assert value(told, "thinkgate_store_reachable") == 0
    assert value(told, "thinkgate_settlements_waiting") == 4
    assert value(told, "thinkgate_swept_holds_total") == 2
    assert value(told, "thinkgate_debt_tokens_total") == 30
    assert value(told, "thinkgate_debt_nano_usd_total") == 800
    assert value(metrics(), "thinkgate_store_reachable") == 1


def families(of: Metrics) -> dict[str, Metric]:
    """The exposition as Prometheus reads it."""
    return {family.name: family for family in text_string_to_metric_families(of.render().decode())}


def samples(of: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every series and its value."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families(of).values()
        for sample in family.samples
    }


def value(of: Metrics, name: str, **labels: str) -> float:
    """One series."""
    return samples(of)[name, tuple(sorted(labels.items()))]


def full() -> Metrics:
    """Metrics after one of everything."""
    backends = [{"id": name, "url": f"http://{name}:1", "kv_events": {}} for name in "ab"]
    counted = metrics(models_of(config_of({"backends": backends}, routing={"placement": {"index": "exact"}})))
    counted.request("/v1/chat/completions", "qwen", "reasoning", 200, 0.3)
    counted.began("qwen", "reasoning", first_byte_s=0.02, overhead_s=0.0002)
    counted.used("qwen", "reasoning", TokenCounts(**{kind: 2**i for i, kind in enumerate(KINDS)}), 99)
    counted.capped("qwen")
    counted.overrun("qwen", "a")
    counted.enforced("qwen", Enforced("two_phase", resent_tokens=70, resent_cached_tokens=64, switches_s=[0.0002]))
    counted.degraded.add("cap", "qwen")
    counted.cascades.add("qwen", "accepted")
    counted.webhook_calls.add("sent")
    counted.refusals.add("rate")
    counted.disconnects.add("/v1/chat/completions")
    counted.unreported.add("qwen")
    counted.reloads.add("accepted")
    counted.idempotency.add("replayed")
    return counted


def test_a_new_gateway_has_metrics_that_parse() -> None:
    """Before any request the exposition is valid, gauges included."""
    fresh = metrics()
    assert value(fresh, "thinkgate_held_tokens") == 5
    assert value(fresh, "thinkgate_held_nano_usd") == 7
    assert value(fresh, "thinkgate_inflight_requests") == 3
    assert value(fresh, "thinkgate_config_reload_failed") == 0


def test_everything_that_is_counted_is_exposed_with_type_and_help() -> None:
    """Every family has our prefix, a help text and a type, and at least one series once it was used."""
    exposed = families(full())
    assert all(name.startswith("thinkgate_") for name in exposed)
    assert all(family.documentation for family in exposed.values())
    assert {family.type for family in exposed.values()} == {"counter", "gauge", "histogram"}
    assert [name for name, family in exposed.items() if not family.samples] == []


def test_counters_count() -> None:
    """Each call adds one, or what it is given, to the series it names."""
    counted = full()
    counted.request("/v1/chat/completions", "qwen", "reasoning", 200, 0.3)
    chat = {"route": "/v1/chat/completions", "model": "qwen", "mode": "reasoning"}
    assert value(counted, "thinkgate_requests_total", **chat, status="200") == 2
    assert value(counted, "thinkgate_cost_nano_usd_total", model="qwen") == 99
    assert value(counted, "thinkgate_capped_total", model="qwen") == 1
    assert value(counted, "thinkgate_enforced_total", model="qwen", how="two_phase") == 1
    assert value(counted, "thinkgate_resent_tokens_total", model="qwen", cached="yes") == 64
    assert value(counted, "thinkgate_resent_tokens_total", model="qwen", cached="no") == 6
    assert value(counted, "thinkgate_cap_overruns_total", model="qwen", backend="a") == 1
    assert value(counted, "thinkgate_refusals_total", code="rate") == 1
    assert value(counted, "thinkgate_config_reloads_total", outcome="accepted") == 1


def test_tokens_are_exposed_by_kind() -> None:
    """Every kind has its own series, and none is mixed up with another."""
    counted = full()
    assert {
        kind: value(counted, "thinkgate_tokens_total", model="qwen", mode="reasoning", kind=kind) for kind in KINDS
    } == {kind: 2**i for i, kind in enumerate(KINDS)}
    assert TokenCounts.__struct_fields__ == KINDS


def test_backends_are_exposed_as_they_are_now() -> None:
    """Up and calls in flight are read when scraped, also after a reload changed the models."""
    models = models_of(config_of())
    counted = metrics(models)
    slot = models["qwen"].slots[0]
    with slot:
        assert value(counted, "thinkgate_backend_calls", model="qwen", backend="a") == 1
    assert value(counted, "thinkgate_backend_up", model="qwen", backend="a") == 1
    slot.capabilities = None
    assert value(counted, "thinkgate_backend_up", model="qwen", backend="a") == 0
    models.clear()
    assert not families(counted)["thinkgate_backend_up"].samples


def test_a_failed_reload_shows_until_one_succeeds() -> None:
    """The gauge is what alerts watch."""
    counted = metrics()
    counted.reload_failed = True
    assert value(counted, "thinkgate_config_reload_failed") == 1


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(0, 1000), max_size=20))
def test_histograms_are_cumulative_and_complete(values: list[float]) -> None:
    """Each bucket counts what is at most its bound, the last one everything, and the sum is the sum."""
    cells = HistogramCells("x", "text", ("model",), SECONDS)
    for each in values:
        cells.observe(("qwen",), each)
    by_name: dict[str, list[tuple[float, float]]] = {}
    for sample in cells.collect().samples:
        by_name.setdefault(sample.name, []).append((float(sample.labels.get("le", "nan")), sample.value))
    if not values:
        assert by_name == {}
        return
    assert by_name["x_bucket"] == [
        (bound, sum(each <= bound for each in values)) for bound in (*map(float, SECONDS), math.inf)
    ]
    assert by_name["x_count"][0][1] == len(values)
    assert by_name["x_sum"][0][1] == pytest.approx(sum(values))


def series(of: Metrics) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    """Which series there are."""
    return set(samples(of))


def attempts(i: int) -> Iterator[tuple[object, dict[str, str]]]:
    """Requests that a client can vary without end."""
    secret = {"authorization": "Bearer sk-ada", "x-request-id": f"req-{i}", "user-agent": f"agent-{i}"}
    yield {**CHAT, "model": f"model-{i}"}, secret
    yield {**CHAT, "model": f"qwen:{i}"}, secret
    yield {**CHAT, "user": f"user-{i}", "messages": [{"role": "user", "content": f"prompt {i}"}]}, secret
    yield {**CHAT, f"field-{i}": i}, secret
    yield {**CHAT, "thinkgate": {f"field-{i}": i}}, secret
    yield {**CHAT, "service_tier": f"tier-{i}"}, secret
    yield CHAT, {"authorization": f"Bearer sk-{i}"}
    yield b"%d" % i, secret


async def test_no_client_can_multiply_the_series() -> None:
    """Models, keys, users, fields, prompts and ids of a client's invention add no series after the first round."""
    keys = [{"id": "ada", "secret_sha256": hashlib.sha256(b"sk-ada").hexdigest()}]
    gateway, _ = gateway_of(config_of(keys=keys))
    try:
        seen = []
        for i in range(4):
            for body, headers in attempts(i):
                await ask(gateway, body, headers=headers)  # type: ignore[arg-type]  # bytes or fields
            seen.append(series(gateway.metrics))
    finally:
        gateway.lines.close()
    assert seen[0] == seen[-1]
    labels = {label for _, pairs in seen[-1] for label in pairs}
    assert {name for name, _ in labels} <= LABELS
    assert not [text for _, text in labels if "ada" in text or "sk-" in text or "req-" in text]
