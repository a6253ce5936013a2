"""What the configuration says of placement: where backends tell what they have cached, and what makes no sense."""

from __future__ import annotations

import pytest

from gateway.config.placing import KvEventsConfig
from tests.gateway.test_config import config, problems


@pytest.mark.parametrize("address", ["tcp://*:5557", "tcp://h", "tcp://h:0", "udp://h:1", "ipc://events", "tcp://:1"])
def test_kv_events_come_from_one_server(address: str) -> None:
    """An address that nobody can connect to is refused, also one that the server itself would bind."""
    (line,) = problems(("models.qwen3.backends.0.kv_events", {"endpoint": address}))
    assert line.startswith("models.qwen3.backends[0].kv_events.endpoint: must look like tcp://{host}:5557")


def test_an_exact_index_needs_events() -> None:
    """`exact` without any backend that tells is refused, events that nobody follows are said, and only vLLM has any."""
    assert problems(("routing.placement.index", "exact")) == [
        "routing.placement.index: exact needs `kv_events` of at least one backend"
    ]
    events: tuple[str, object] = ("models.qwen3.backends.0.kv_events", {})
    assert config(events, ("routing.placement.index", "exact")).not_built_yet() == []
    assert config(events).not_built_yet() == ["models.qwen3.backends[a].kv_events (placement.index is not exact)"]
    (line,) = problems(events, ("models.qwen3.backends.0.kind", "openai"))
    assert "only a vllm backend publishes `kv_events`" in line


def test_a_backends_host_is_filled_in() -> None:
    """Every address of a name publishes at its own host; IPv6 addresses stand in brackets."""
    events = KvEventsConfig(replay="tcp://{host}:5558")
    assert events.at("10.0.0.1").endpoint == "tcp://10.0.0.1:5557"
    assert events.at("::1").replay == "tcp://[::1]:5558"
    assert KvEventsConfig(endpoint="ipc:///run/a").at("h") == KvEventsConfig(endpoint="ipc:///run/a")
