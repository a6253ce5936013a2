"""Routes of the admin API for its tokens and its audit log. What they do is in gateway/admin/tokens.py and audit.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.admin.audit import read_audit
from gateway.admin.tokens import TokenEntry
from gateway.api.admin_bodies import AuditItem, AuditList, AuditPage, TokenCreate, TokenList, TokenMade
from gateway.api.admin_door import AdminRoute, asked, errors

router = APIRouter(prefix="/admin/v1", route_class=AdminRoute)


@router.post("/tokens", status_code=201, operation_id="createToken", responses=errors(409))
async def create_token(request: Request, body: TokenCreate) -> TokenMade:
    """Make an admin token. Its secret is in this answer and nowhere else."""
    actor, admin = asked(request)
    entry, secret = await admin.tokens.create(actor, body.id, body.role, body.scopes, expires_at=body.expires_at)
    return TokenMade(**entry.model_dump(), secret=secret)


@router.get("/tokens", operation_id="listTokens")
async def list_tokens(request: Request) -> TokenList:
    """The admin tokens of the store."""
    actor, admin = asked(request)
    return TokenList(data=admin.tokens.entries(actor))


@router.delete("/tokens/{token_id}", operation_id="revokeToken", responses=errors(404, 409))
async def revoke_token(request: Request, token_id: str) -> TokenEntry:
    """End an admin token, for good."""
    actor, admin = asked(request)
    return await admin.tokens.revoke(actor, token_id)


@router.get("/audit", operation_id="readAudit")
async def audit(request: Request, page: Annotated[AuditPage, Query()]) -> AuditList:
    """What was changed, by whom and from where."""
    actor, admin = asked(request)
    actor.require("admin", "viewer")
    entries, last = await read_audit(admin.stored.records, after=page.after, limit=page.limit)
    return AuditList(data=[AuditItem.of(number, entry) for number, entry in entries], last=last)
