"""`routing`: which mode a request gets that names none, and which backend serves it.

Owns: its keys, their defaults and what a wrong value should have been. Does not own: those about backends (placing.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from gateway.config.base import PositiveInt, Section
from gateway.config.placing import HedgingConfig, PlacementConfig, QueueConfig, RetriesConfig

Share = Annotated[float, Field(ge=0, le=1)]
Tokens = Annotated[float, Field(gt=0)]
ByLevel = Annotated[tuple[Tokens, ...], Field(min_length=5, max_length=5)]
SharesByLevel = Annotated[tuple[Share, ...], Field(min_length=5, max_length=5)]


class ModePrior(Section):
    """What is believed of a mode before anything was seen, by difficulty 1 to 5."""

    success: SharesByLevel
    tokens: ByLevel


class Priors(Section):
    """Of both modes."""

    instant: ModePrior = ModePrior(success=(0.97, 0.92, 0.78, 0.55, 0.35), tokens=(120, 250, 350, 450, 550))
    reasoning: ModePrior = ModePrior(success=(0.97, 0.94, 0.9, 0.83, 0.7), tokens=(500, 900, 1500, 2500, 4000))


class CascadeConfig(Section):
    """An instant draft first, and thinking where the model was not sure of it."""

    when: Literal["off", "uncertain", "always"] = "off"
    confidence: float = Field(0.6, gt=0, lt=1)
    window_tokens: PositiveInt = 16


class Routing(Section):
    """Which mode a request gets that names none, and which backend serves it."""

    default_mode: Literal["auto", "instant", "reasoning"] = "auto"
    on_uncertain: Literal["instant", "reasoning"] = "reasoning"
    uncertain_thinking_tokens: PositiveInt = 512
    scorer: str = Field("builtin", min_length=1)
    explore: bool = False
    busy_at: PositiveInt = 32
    priors: Priors = Priors()
    cascade: CascadeConfig = CascadeConfig()
    placement: PlacementConfig = PlacementConfig()
    retries: RetriesConfig = RetriesConfig()
    hedging: HedgingConfig = HedgingConfig()
    queue: QueueConfig = QueueConfig()
