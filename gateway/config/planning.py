"""The part of a model's configuration that says how its thinking is planned.

Owns: the keys of `models.NAME.plan` (docs/config.md). Does not own: which model plans,
`models.NAME.planner` (schema.py).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from budget.allocate import Schedule
from budget.steps import BORROWS
from gateway.config.base import PositiveInt, Section

Level = Annotated[int, Field(ge=1, le=5)]


class PlanConfig(Section):
    """How a request to this model is planned."""

    default: Literal["off", "auto"] = "off"
    schedule: Schedule = "polynomial"
    keeps_trend: bool = False
    carry_out: Literal["steps", "single"] = "steps"
    level_tokens: dict[Level, PositiveInt] = Field(default_factory=dict)
    borrows: float = Field(BORROWS, ge=0, le=1)
    planner_tokens: PositiveInt = 400
    timeout_s: float = Field(20, gt=0)
