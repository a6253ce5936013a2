"""Tokens of the admin API: the root token of the environment, and tokens of the store with a role each.

Owns: who a token is, and making, listing and revoking those of the store. While the root token is unset, nobody is let
in. Does not own: what a role may do (admins.py).
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from datetime import datetime
from typing import Literal

from msgspec.structs import replace

from budget.records.port import Note
from gateway.admin.admins import Actor, Path, parse_paths
from gateway.admin.audit import audited
from gateway.admin.kept import TOKENS, KeptToken, Role, moment
from gateway.admin.keys import check_end
from gateway.admin.secret import ADMIN_PREFIX
from gateway.admin.stored import Stored
from gateway.config.base import Section
from gateway.errors import ConflictingChange, EntryNotFound, PermissionDenied, Unauthenticated

ROOT_ID, SHELL_ID = "root", "cli"


class TokenEntry(Section):
    """An admin token as it is shown: everything but its secret."""

    id: str
    role: Role
    scopes: tuple[str, ...]
    status: Literal["active", "revoked", "expired", "unusable"]
    created_at: datetime
    created_by: str
    expires_at: datetime | None
    revoked_at: datetime | None


class AdminTokens:
    """Who is let in.

    Args:
        stored: the store's tokens.
        root: the root token's present value, empty for none, and the variable that holds it.
    """

    def __init__(self, stored: Stored, root: Callable[[], tuple[str, str]]) -> None:
        self._stored = stored
        self._root = root

    def identify(self, authorization: bytes | None, *, address: str = "", request_id: str = "") -> Actor:
        """Who asks. Raises: PermissionDenied while the root token is unset, Unauthenticated."""
        root, variable = self._root()
        if not root:
            raise PermissionDenied(f"The admin API is closed: start the gateway with {variable} set.")
        scheme, _, secret = (authorization or b"").partition(b" ")
        secret = secret.strip()
        if scheme.lower() != b"bearer" or not secret:
            raise Unauthenticated("No admin token: send `Authorization: Bearer <token>`.")
        if hmac.compare_digest(secret, root.encode()):
            return Actor(ROOT_ID, "admin", address=address, request_id=request_id)
        token = self._stored.token_of(secret) if secret.startswith(ADMIN_PREFIX.encode()) else None
        if token is None:
            raise Unauthenticated("The admin token is not known, was revoked, or has expired.")
        paths = tuple(map(Path.parse, token.scopes))
        return Actor(token.id, token.role, paths, address=address, request_id=request_id)

    def entries(self, actor: Actor) -> list[TokenEntry]:
        """All, by id. Raises: PermissionDenied."""
        actor.require("admin", "viewer")
        return [self._shown(token) for _, token in sorted(self._stored.tokens.items())]

    async def create(
        self, actor: Actor, id: str, role: Role, scopes: tuple[str, ...], *, expires_at: datetime | None = None
    ) -> tuple[TokenEntry, str]:
        """A new token and its secret.

        Raises: InvalidRequest, PermissionDenied, ConflictingChange when the id is taken, RecordsUnreachable.
        """
        actor.require("admin")
        parse_paths(scopes, role)
        check_end(expires_at, self._stored.clock())
        if id in {ROOT_ID, SHELL_ID}:
            raise ConflictingChange(f"{id!r} stands for somebody else in the audit log: choose another id.", param="id")
        secret, kept_secret = await self._stored.new_secret(ADMIN_PREFIX)
        kept = KeptToken(
            id=id,
            role=role,
            scopes=scopes,
            secret=kept_secret,
            made_at_s=kept_secret.made_at_s,
            made_by=actor.id,
            expires_at_s=None if expires_at is None else expires_at.timestamp(),
        )

        def decide(old: KeptToken | None) -> tuple[KeptToken, Note]:
            if old is not None:
                raise ConflictingChange(
                    f"There is a token {id!r} already, or was: an id is not used again. Choose another.", param="id"
                )
            return kept, self._note(actor, "token.create", None, kept)

        await self._stored.edit(f"{TOKENS}{id}", KeptToken, decide)
        return self._shown(kept), secret

    async def revoke(self, actor: Actor, id: str) -> TokenEntry:
        """End a token for good; once is enough.

        Raises: PermissionDenied, EntryNotFound, ConflictingChange, RecordsUnreachable.
        """
        actor.require("admin")

        def decide(old: KeptToken | None) -> tuple[KeptToken, Note | None]:
            if old is None:
                raise EntryNotFound(f"There is no token {id!r}.", param="id")
            if old.revoked_at_s is not None:
                return old, None
            new = replace(old, revoked_at_s=self._stored.clock())
            return new, self._note(actor, "token.revoke", old, new)

        return self._shown(await self._stored.edit(f"{TOKENS}{id}", KeptToken, decide))

    def _note(self, actor: Actor, action: str, before: KeptToken | None, after: KeptToken) -> Note:
        told = [None if kept is None else self._shown(kept).model_dump(mode="json") for kept in (before, after)]
        return audited(actor, action, after.id, at_s=self._stored.clock(), before=told[0], after=told[1])

    def _shown(self, kept: KeptToken) -> TokenEntry:
        status: Literal["active", "revoked", "expired", "unusable"] = "active"
        if kept.revoked_at_s is not None:
            status = "revoked"
        elif kept.expires_at_s is not None and kept.expires_at_s <= self._stored.clock():
            status = "expired"
        elif not self._stored.is_usable(kept.secret):
            status = "unusable"
        return TokenEntry(
            id=kept.id,
            role=kept.role,
            scopes=kept.scopes,
            status=status,
            created_at=moment(kept.made_at_s),
            created_by=kept.made_by,
            expires_at=moment(kept.expires_at_s),
            revoked_at=moment(kept.revoked_at_s),
        )
