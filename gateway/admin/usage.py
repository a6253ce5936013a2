"""What was used, grouped as somebody wants to see it.

Owns: turning the ledger's rows into groups, and groups into CSV. Does not own: counting (budget/ledger.py).
"""

from __future__ import annotations

import csv
import datetime as dt
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

from budget.ledger import UsageRow
from budget.price import NANO_PER_USD
from gateway.config.base import Section
from gateway.errors import InvalidRequest

Dimension = Literal["scope", "model", "mode", "day"]
DIMENSIONS: tuple[Dimension, ...] = ("day", "scope", "model", "mode")
SUMS = ("requests", "tokens", "thinking_tokens", "nano_usd")
MOST_GROUPS = 10_000
MODEL = "model:"


class UsageEntry(Section):
    """One group: what it is grouped by, and its sums. Dimensions that were not asked for are left out."""

    day: dt.date | None = None
    scope: str | None = None
    model: str | None = None
    mode: str | None = None
    requests: int
    tokens: int
    thinking_tokens: int
    nano_usd: int
    cost_usd: float


def group_usage(
    rows: Iterable[UsageRow], by: Sequence[Dimension], *, sees: Callable[[tuple[str, ...]], bool], scope: str | None
) -> list[UsageEntry]:
    """Sums by group, ordered by day, scope, model, mode.

    Args:
        rows: of the ledger.
        by: what to group by. A row counts once for each of its scopes if `scope` is among them, so those sums overlap.
        sees: which rows count, by their scopes.
        scope: only rows that have it; None for all.

    Raises: InvalidRequest for more than MOST_GROUPS.
    """
    order = [dimension for dimension in DIMENSIONS if dimension in by]
    sums: dict[tuple[str, ...], list[int]] = {}
    for row in rows:
        if (scope is not None and scope not in row.scopes) or not sees(row.scopes):
            continue
        owners = [s for s in row.scopes if not s.startswith(MODEL)] if "scope" in by else [""]
        model = next((s.removeprefix(MODEL) for s in row.scopes if s.startswith(MODEL)), "")
        for owner in owners:
            at = {"day": row.day.isoformat(), "scope": owner, "model": model, "mode": row.mode}
            total = sums.setdefault(tuple(at[dimension] for dimension in order), [0] * len(SUMS))
            for i, name in enumerate(SUMS):
                total[i] += getattr(row, name)
            if len(sums) > MOST_GROUPS:
                raise InvalidRequest(
                    f"`group_by`: more than {MOST_GROUPS} rows: ask for fewer days, one `scope`, or fewer groups.",
                    param="group_by",
                )
    return [
        UsageEntry.model_validate(
            {
                **dict(zip(order, group, strict=True)),
                **dict(zip(SUMS, total, strict=True)),
                "cost_usd": total[-1] / NANO_PER_USD,
            }
        )
        for group, total in sorted(sums.items())
    ]


def usage_csv(entries: Sequence[UsageEntry], by: Sequence[Dimension]) -> str:
    """The same as CSV, with a head."""
    columns = [*(dimension for dimension in DIMENSIONS if dimension in by), *SUMS, "cost_usd"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\r\n")
    writer.writerow(columns)
    writer.writerows([getattr(entry, column) for column in columns] for entry in entries)
    return out.getvalue()
