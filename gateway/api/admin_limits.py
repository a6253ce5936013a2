"""Routes of the admin API for limits. What they do is in gateway/admin/limits.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.admin.limits import LimitEntry
from gateway.api.admin_bodies import LimitBody, LimitFilter, LimitList, LimitName
from gateway.api.admin_door import AdminRoute, asked, errors

router = APIRouter(prefix="/admin/v1/limits", route_class=AdminRoute)


@router.get("", operation_id="listLimits")
async def list_limits(request: Request, only: Annotated[LimitFilter, Query()]) -> LimitList:
    """The limits of file and store."""
    actor, admin = asked(request)
    return LimitList(data=admin.limits.entries(actor, scope=only.scope))


@router.put("", operation_id="putLimit", responses=errors(409))
async def put_limit(request: Request, body: LimitBody) -> LimitEntry:
    """Set the limit on a scope, unit and window."""
    actor, admin = asked(request)
    return await admin.limits.put(actor, body)


@router.delete("", status_code=204, operation_id="removeLimit", responses=errors(404, 409))
async def remove_limit(request: Request, name: Annotated[LimitName, Query()]) -> None:
    """Remove the limit on a scope, unit and window."""
    actor, admin = asked(request)
    await admin.limits.remove(actor, (name.scope, name.unit, name.window))
