"""Routes of the admin API for keys. What they do is in gateway/admin/keys.py."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from gateway.admin.keys import KeyEntry
from gateway.api.admin_bodies import KeyChange, KeyCreate, KeyList, KeyMade, Page, Rotation
from gateway.api.admin_door import AdminRoute, asked, errors

router = APIRouter(prefix="/admin/v1/keys", route_class=AdminRoute)


@router.post("", status_code=201, operation_id="createKey", responses=errors(409))
async def create_key(request: Request, body: KeyCreate) -> KeyMade:
    """Make a key. Its secret is in this answer and nowhere else."""
    actor, admin = asked(request)
    entry, secret = await admin.keys.create(actor, body.id, body.traits(), expires_at=body.expires_at)
    return KeyMade(**entry.model_dump(), secret=secret)


@router.get("", operation_id="listKeys")
async def list_keys(request: Request, page: Annotated[Page, Query()]) -> KeyList:
    """The keys of file and store."""
    actor, admin = asked(request)
    entries, has_more = admin.keys.entries(actor, after=page.after, limit=page.limit)
    return KeyList(data=entries, has_more=has_more)


@router.get("/{key_id}", operation_id="getKey", responses=errors(404))
async def get_key(request: Request, key_id: str) -> KeyEntry:
    """One key."""
    actor, admin = asked(request)
    return admin.keys.entry(actor, key_id)


@router.patch("/{key_id}", operation_id="changeKey", responses=errors(404, 409))
async def change_key(request: Request, key_id: str, body: KeyChange) -> KeyEntry:
    """Change what a key is. What is not named stays."""
    actor, admin = asked(request)
    changes = {name: getattr(body, name) for name in body.model_fields_set}
    return await admin.keys.change(actor, key_id, changes)


@router.post("/{key_id}/rotate", operation_id="rotateKey", responses=errors(404, 409))
async def rotate_key(request: Request, key_id: str, body: Rotation | None = None) -> KeyMade:
    """Another secret for a key; those that it has stay valid for a grace period."""
    actor, admin = asked(request)
    entry, secret = await admin.keys.rotate(actor, key_id, grace_s=(body or Rotation()).grace_s)
    return KeyMade(**entry.model_dump(), secret=secret)


@router.delete("/{key_id}", operation_id="revokeKey", responses=errors(404, 409))
async def revoke_key(request: Request, key_id: str) -> KeyEntry:
    """End a key, for good."""
    actor, admin = asked(request)
    return await admin.keys.revoke(actor, key_id)
