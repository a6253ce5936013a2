"""The sections on money: what a scope may spend, and the store that keeps count.

Owns: `limits` and `store` of the file, their defaults and what a wrong value should have been. Does not own: whether
they fit the rest of the file (schema.py), nor opening the store (admin/store.py).
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from gateway.config.base import NAME, Section

SMALLEST_USD = 1e-9
MOST = 2**53 - 1  # of a limit, in tokens or nano-USD: up to there every store counts exactly, and no number is rounded
SCOPE = re.compile(rf"(org|team|user|key|model|tag):{NAME}")
STORE_KEYS: dict[str, tuple[str, ...]] = {
    "memory": (),
    "sqlite": ("path", "synchronous", "lease_s", "timeout_s"),
    "redis": ("url", "lease_s", "timeout_s", "offline_share"),
}
REDIS_URLS = ("redis://", "rediss://", "unix://")


class LimitConfig(Section):
    """What a scope may spend per window."""

    scope: str
    unit: Literal["tokens", "thinking_tokens", "usd", "requests", "concurrency"]
    amount: float = Field(gt=0)
    window: Literal["second", "minute", "hour", "day", "month", "total"] | None = Field(None, validate_default=True)
    soft: float | None = Field(None, gt=0, lt=1)

    # Fields are checked in their order, so that an error names the field; what was wrong itself is not in `info.data`.
    @field_validator("scope")
    @classmethod
    def _scope_names_somebody(cls, scope: str) -> str:
        if not SCOPE.fullmatch(scope):
            raise ValueError("must be org:, team:, user:, key:, model: or tag: and a name")
        return scope

    @field_validator("amount")
    @classmethod
    def _amount_can_be_counted(cls, amount: float, info: ValidationInfo) -> float:
        unit = info.data.get("unit")
        if unit != "usd" and amount != int(amount):
            raise ValueError(f"must be a whole number of {unit}")
        if unit == "usd" and amount < SMALLEST_USD:
            raise ValueError(f"must be at least {SMALLEST_USD} (one nano-dollar)")
        most = MOST // 10**9 if unit == "usd" else MOST
        if amount > most:
            raise ValueError(f"must be at most {most} in {unit}")
        return amount

    @field_validator("window")
    @classmethod
    def _window_fits_unit(cls, window: str | None, info: ValidationInfo) -> str | None:
        if "unit" in info.data and (info.data["unit"] == "concurrency") != (window is None):
            raise ValueError("concurrency has none; every other unit needs one")
        return window

    @field_validator("soft")
    @classmethod
    def _soft_warns_somebody(cls, soft: float | None, info: ValidationInfo) -> float | None:
        if soft is not None and info.data.get("window") in {None, "second", "minute"}:
            raise ValueError("is for windows of an hour and longer: what is gone in a minute warns nobody")
        return soft


class StoreConfig(Section):
    """Where budgets live, and the keys and limits made through the admin API."""

    kind: Literal["memory", "sqlite", "redis"] = "memory"
    path: str = Field("thinkgate.db", min_length=1)
    synchronous: Literal["normal", "full"] = "normal"
    url: str | None = None
    lease_s: float = Field(10, ge=2, le=3600)
    timeout_s: float = Field(1, gt=0, le=60)
    offline_share: float = Field(0, ge=0, le=1)

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Self:
        wrong = sorted(self.model_fields_set - {"kind", *STORE_KEYS[self.kind]})
        if wrong:
            takes = ", ".join(f"`{name}`" for name in STORE_KEYS[self.kind]) or "no other key"
            raise ValueError(f"the {self.kind} store has no `{wrong[0]}`: it takes {takes}")
        if self.kind == "redis" and not (self.url or "").startswith(REDIS_URLS):
            raise ValueError("the redis store needs `url`, such as redis://127.0.0.1:6379/0")
        return self
