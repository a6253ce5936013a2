"""Routes of the admin API for what was used and how the ledger is. Grouping is in gateway/admin/usage.py."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse

from gateway.admin.usage import group_usage, usage_csv
from gateway.api.admin_bodies import LedgerReport, UsageQuery, UsageReport
from gateway.api.admin_door import AdminRoute, asked
from gateway.errors import InvalidRequest

router = APIRouter(prefix="/admin/v1", route_class=AdminRoute)
DAYS = 30  # without `from`: today and the days before it
MOST_DAYS = 366
CSV = {"content": {"text/csv": {"schema": {"type": "string"}}}}


@router.get("/usage", operation_id="readUsage", response_model=UsageReport, responses={200: CSV})
async def usage(request: Request, query: Annotated[UsageQuery, Query()]) -> Response:
    """What was used, by day, scope, model and mode."""
    actor, admin = asked(request)
    first, last = _days(query, dt.datetime.fromtimestamp(admin.stored.clock(), dt.UTC).date())
    rows = await admin.ledger().usage(first, last)
    by = query.dimensions()
    # In a thread: there may be many rows.
    entries = await asyncio.to_thread(group_usage, rows, by, sees=actor.sees, scope=query.scope)
    if query.format == "csv":
        return Response(usage_csv(entries, by), media_type="text/csv; charset=utf-8")
    report = UsageReport(first=first, last=last, data=entries)
    return JSONResponse(report.model_dump(mode="json", by_alias=True, exclude_none=True))


@router.get("/ledger", operation_id="readLedger")
async def ledger(request: Request) -> LedgerReport:
    """Whether the ledger's store can be reached, and what is held."""
    actor, admin = asked(request)
    actor.require("admin", "viewer")
    health = await admin.ledger().health()
    held = health.held
    return LedgerReport(
        kind=health.kind,
        is_reachable=health.is_reachable,
        holds=health.holds,
        held={"tokens": held.tokens, "thinking_tokens": held.thinking_tokens, "nano_usd": held.nano_usd},
        detail=health.detail,
    )


def _days(query: UsageQuery, today: dt.date) -> tuple[dt.date, dt.date]:
    """First and last. Raises: InvalidRequest."""
    last = query.last or today
    first = query.first or last - dt.timedelta(days=DAYS - 1)
    if first > last:
        raise InvalidRequest(f"`from`: {first} is after `to`, {last}.", param="from")
    if (last - first).days >= MOST_DAYS:
        raise InvalidRequest(f"`from`: at most {MOST_DAYS} days can be asked for at once.", param="from")
    return first, last
