"""The configuration of placement: which backend serves a call, and what happens when it fails.

Owns: the sections below `routing` that are about backends, their defaults and bounds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gateway.config.base import NonNegativeInt, PositiveInt, Section


class PlacementConfig(Section):
    """How backends are compared."""

    index: Literal["predicted", "off"] = "predicted"
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


class RetriesConfig(Section):
    """How many calls may be tried again on another backend, before their first byte."""

    share: float = Field(0.2, ge=0, le=1)
    burst: float = Field(20, ge=0)


class HedgingConfig(Section):
    """How many calls may have a second try while the first has not answered."""

    share: float = Field(0, ge=0, le=1)
