"""The part of a model's configuration that says when enough was thought.

Owns: the keys of `models.NAME.stop` (docs/config.md). Does not own: the rules (budget/stopping.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.base import PositiveInt, Section


class StopConfig(Section):
    """When thinking of this model is ended before its cap."""

    rule: Literal["off", "stable"] = "off"
    every: PositiveInt = 64
    agree: PositiveInt = 3
    probe_tokens: PositiveInt = 20
    most_probes: PositiveInt = 16
    ask: Annotated[str, Field(max_length=200)] = "The final answer is \\boxed{"
