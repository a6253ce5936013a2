"""The configuration of placement: which backend serves a call, and what happens when it fails.

Owns: the sections below `routing` that are about backends, their defaults and bounds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from gateway.config.base import NonNegativeInt, PositiveInt, Section

HOST = "{host}"


class KvEventsConfig(Section):
    """Where a vLLM server publishes what its prefix cache holds; `{host}` is the host of the backend's `url`."""

    endpoint: str = "tcp://{host}:5557"
    replay: str | None = None
    topic: str = ""

    @field_validator("endpoint", "replay")
    @classmethod
    def _is_an_address(cls, address: str | None) -> str | None:
        if address is None or address.startswith("ipc:///"):
            return address
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        is_port = port.isdigit() and 0 < int(port) < 65536
        if not address.startswith("tcp://") or not host or "*" in host or not is_port:
            raise ValueError("must look like tcp://{host}:5557, tcp://10.0.0.1:5557 or ipc:///run/vllm/events")
        return address

    def at(self, host: str) -> KvEventsConfig:
        """The same for one host."""
        place = f"[{host}]" if ":" in host else host
        found = {"endpoint": self.endpoint.replace(HOST, place)}
        if self.replay is not None:
            found["replay"] = self.replay.replace(HOST, place)
        return self.model_copy(update=found)


class PlacementConfig(Section):
    """How backends are compared."""

    index: Literal["exact", "predicted", "off"] = "predicted"
    tokens_wait_s: float = Field(0.05, gt=0, le=5)
    isolate: bool = True
    side_by_side: NonNegativeInt = 64
    ttl_s: float = Field(600, gt=0)
    cache_tokens: PositiveInt = 262144
    poll_s: float = Field(1, gt=0)
    dns_s: float = Field(10, gt=0)
    slow_start_s: float = Field(10, ge=0)


class QueueConfig(Section):
    """Where calls wait while the backends are full."""

    max_waiting: PositiveInt = 1000
    max_wait_s: float = Field(60, gt=0)
    backend_waiting: PositiveInt = 4
    degrade_at: float = Field(0.5, ge=0, le=1)


class RetriesConfig(Section):
    """How many calls may be tried again on another backend, before their first byte."""

    share: float = Field(0.2, ge=0, le=1)
    burst: float = Field(20, ge=0)


class HedgingConfig(Section):
    """How many calls may have a second try while the first has not answered."""

    share: float = Field(0, ge=0, le=1)
