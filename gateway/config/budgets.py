"""The sections on money: what a scope may spend, and the store that keeps count.

Owns: `limits` and `store` of the file, their defaults and what a wrong value should have been. Does not own: whether
they fit the rest of the file (schema.py), nor opening the store (admin/store.py).
"""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from gateway.config.base import Section

SMALLEST_USD = 1e-9
MOST = 2**53  # of a limit, in tokens or nano-USD: up to there every store counts exactly
SCOPE = re.compile(r"(org|team|user|key|model|tag):\S+")
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
    window: Literal["second", "minute", "hour", "day", "month", "total"] | None = None
    soft: float | None = Field(None, gt=0, lt=1)

    @model_validator(mode="after")
    def _window_fits_unit(self) -> Self:
        if not SCOPE.fullmatch(self.scope):
            raise ValueError("scope must be org:, team:, user:, key:, model: or tag: and a name")
        if (self.unit == "concurrency") != (self.window is None):
            raise ValueError("concurrency has no `window`; every other unit needs one")
        if self.soft is not None and self.window in {None, "second", "minute"}:
            raise ValueError("`soft` is for windows of an hour and longer: what is gone in a minute warns nobody")
        if self.unit != "usd" and self.amount != int(self.amount):
            raise ValueError(f"amount of {self.unit} must be a whole number, got {self.amount:g}")
        if self.unit == "usd" and self.amount < SMALLEST_USD:
            raise ValueError(f"amount of usd must be at least {SMALLEST_USD} (one nano-dollar), got {self.amount:g}")
        most = MOST // 10**9 if self.unit == "usd" else MOST
        if self.amount > most:
            raise ValueError(f"amount of {self.unit} must be at most {most}, got {self.amount:g}")
        return self


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
