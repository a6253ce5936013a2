"""Soft limits: say that a limit is nearly used up, before it refuses anything.

Owns: what is past its mark, the header that says so, and telling it once per window. Does not own: what a limit has
left (budget/ledger.py), calling anybody (webhook.py). O(limits of a request's scopes).

"Once" is per process and kept in memory: several replicas may each tell it once, and so may a process that starts anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec

from budget.price import NANO_PER_USD

if TYPE_CHECKING:
    from budget.ledger import Hold, Limit, Standing
    from gateway.admin.limits import Identity
    from gateway.errors import Headers

SAME_WINDOW_S = 60.0  # ends of one window differ by less: a store's clock is not the gateway's


class SoftLimitPassed(msgspec.Struct, frozen=True, kw_only=True):
    """What the webhook is told; amounts as in the configuration, so US dollars for `usd`.

    Attributes:
        used: settled and held.
        window_ends_at: None for a window without an end.
    """

    scope: str
    unit: str
    window: str | None
    amount: float
    used: float
    soft: float
    window_ends_at: datetime | None


class SoftLimits:
    """The marks in force, and which of them were passed.

    Args:
        tell: what to do when one is passed.
        clock: epoch seconds.
    """

    def __init__(self, tell: Callable[[SoftLimitPassed], None], *, clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self.marks: Mapping[Identity, float] = {}
        self._told: dict[tuple[Limit, float], float] = {}

    def set_marks(self, marks: Mapping[Identity, float]) -> None:
        """Put other marks in force; what was told under one that stays is not told again."""
        self.marks = marks
        self._told = {
            (limit, soft): ends_s
            for (limit, soft), ends_s in self._told.items()
            if marks.get((limit.scope, limit.unit, limit.window)) == soft
        }

    def headers(self, hold: Hold) -> Headers:
        """`x-thinkgate-soft-limit` for the limits over a hold that are past their mark; tells what is new of it."""
        past = []
        for standing in hold.standings():
            limit = standing.limit
            soft = self.marks.get((limit.scope, limit.unit, limit.window))
            if soft is None:
                continue
            used = limit.amount - standing.free
            if used < soft * limit.amount:
                continue
            share = math.floor(1000 * used / limit.amount) / 1000
            past.append(f"{quote(limit.scope, safe=':')};{limit.unit};{share:g}")
            self._note(standing, soft)
        return [(b"x-thinkgate-soft-limit", ", ".join(past).encode())] if past else []

    def _note(self, standing: Standing, soft: float) -> None:
        limit = standing.limit
        ends_s = self._clock() + standing.reset_s
        told_s = self._told.get((limit, soft))
        if told_s is not None and not ends_s - told_s > SAME_WINDOW_S:  # also without an end: inf - inf is no number
            return
        self._told[limit, soft] = ends_s
        per_unit = NANO_PER_USD if limit.unit == "usd" else 1
        self._tell(
            SoftLimitPassed(
                scope=limit.scope,
                unit=limit.unit,
                window=limit.window,
                amount=limit.amount / per_unit,
                used=(limit.amount - standing.free) / per_unit,
                soft=soft,
                window_ends_at=None if math.isinf(ends_s) else datetime.fromtimestamp(round(ends_s), UTC),
            )
        )
