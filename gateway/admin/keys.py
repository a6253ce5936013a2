"""API keys: made, changed, rotated, revoked and listed, from the admin API and from the shell alike.

Owns: the life of a key of the store, and how it stands beside the file's: keys of the file are read-only here, their
ids cannot be taken, and where the file has an id, the file wins. A secret is told once, by the call that made it.
Does not own: reading the store (stored.py), permissions (admins.py), HTTP (api/admin_keys.py).
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import Any, Literal

from msgspec.structs import replace
from pydantic import ValidationError

from budget.records.port import Note
from gateway.admin.admins import Actor
from gateway.admin.audit import audited
from gateway.admin.kept import KEYS, KeptKey, KeptSecret, moment
from gateway.admin.secret import KEY_PREFIX
from gateway.admin.stored import Stored
from gateway.ask.complaint import invalid_model
from gateway.auth import ANYONE, Key
from gateway.config.base import Section
from gateway.config.schema import Config, KeyConfig, KeyTraits
from gateway.errors import ConflictingChange, EntryNotFound, InvalidRequest

GRACE_S = 86_400.0
MOST_GRACE_S = 30 * 86_400.0
MOST_SECRETS = 8
MOST_LIFE_S = 100 * 365 * 86_400.0
TRAITS = frozenset(KeyTraits.model_fields)


class SecretEntry(Section):
    """When a secret was made, and until when it is valid after a rotation; null for the present one."""

    made_at: datetime
    valid_until: datetime | None


class Named(Section):
    """What has an id; a base of its own, so that the id is shown first."""

    id: str


class KeyEntry(KeyTraits, Named):
    """A key as it is shown: everything but its secrets.

    `status`: `shadowed`, the file has a key of the same id, which wins; `unusable`, its secrets were hashed with
    another hash secret, so rotate it.
    """

    source: Literal["file", "store"]
    status: Literal["active", "revoked", "expired", "shadowed", "unusable"]
    created_at: datetime | None = None
    created_by: str | None = None
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    secrets: tuple[SecretEntry, ...] = ()

    def scopes(self) -> tuple[str, ...]:
        """What it pays from."""
        return Key.from_traits(self.id, self).scopes


class Keys:
    """The keys of file and store.

    Args:
        stored: the store's.
        config: what is in force.
    """

    def __init__(self, stored: Stored, config: Callable[[], Config]) -> None:
        self._stored = stored
        self._config = config

    def entries(self, actor: Actor, *, after: str = "", limit: int) -> tuple[list[KeyEntry], bool]:
        """Those that the actor may see, by id; where file and store have the same, the file's comes first.

        Args:
            actor: who asks.
            after: only later ids.
            limit: at most so many ids.

        Returns: the entries, and whether there are more.
        """
        file, stored = {key.id: key for key in self._config().keys}, self._stored.keys
        entries: list[KeyEntry] = []
        shown = 0
        # The store's ids are nearly in order, so that sorting them is little more than a look at each.
        for id in sorted(id for id in (*stored, *(file.keys() - stored.keys())) if id > after):
            if not actor.sees(Key.from_config(file[id]).scopes if id in file else stored[id].key.scopes):
                continue
            if shown == limit:
                return entries, True
            shown += 1
            entries += [_of_file(file[id])] if id in file else []
            entries += [self._shown(stored[id].kept, id in file)] if id in stored else []
        return entries, False

    def entry(self, actor: Actor, id: str) -> KeyEntry:
        """One; the file's, where the store has the same. Raises: EntryNotFound, PermissionDenied."""
        of_file = self._of_file(id)
        if of_file is None and id not in self._stored.keys:
            raise EntryNotFound(f"There is no key {id!r}.", param="id")
        found = _of_file(of_file) if of_file else self._shown(self._stored.keys[id].kept, is_shadowed=False)
        actor.check_sees(f"The key {id!r}", found.scopes())
        return found

    def owners(self) -> list[tuple[str, ...]]:
        """The scopes of every key that is not revoked."""
        stored = [known.key.scopes for known in self._stored.keys.values() if known.kept.revoked_at_s is None]
        return [*(Key.from_config(key).scopes for key in self._config().keys), *stored]

    def ids(self) -> Collection[str]:
        """Of all keys; `anyone` where there is none. O(keys of the file)."""
        return ChainMap[str, Any]({key.id: key for key in self._config().keys}, self._stored.keys) or {ANYONE.id}

    async def create(
        self, actor: Actor, id: str, traits: KeyTraits, *, expires_at: datetime | None = None
    ) -> tuple[KeyEntry, str]:
        """A new key and its secret.

        Raises: InvalidRequest, PermissionDenied, ConflictingChange when the id is taken, RecordsUnreachable.
        """
        actor.check_key(id, before=None, after=Key.from_traits(id, traits).scopes, keys=self.owners)
        self._refuse_file(id, "choose another id")
        if id == ANYONE.id:
            raise ConflictingChange(f"{id!r} is who asks without a key: choose another id.", param="id")
        self._check_models(traits.models)
        check_end(expires_at, self._stored.clock())
        secret, kept_secret = await self._stored.new_secret(KEY_PREFIX)
        kept = KeptKey(
            id=id,
            traits=_kept_traits(traits),
            secrets=(kept_secret,),
            made_at_s=kept_secret.made_at_s,
            made_by=actor.id,
            expires_at_s=None if expires_at is None else expires_at.timestamp(),
        )

        def decide(old: KeptKey | None) -> tuple[KeptKey, Note]:
            if old is not None:
                raise ConflictingChange(
                    f"There is a key {id!r} already, or was: an id is not used again. Choose another.", param="id"
                )
            return kept, self._note(actor, "key.create", None, kept)

        await self._stored.edit(f"{KEYS}{id}", KeptKey, decide)
        return self._shown(kept), secret

    async def change(self, actor: Actor, id: str, changes: Mapping[str, Any]) -> KeyEntry:
        """Set traits or `expires_at` of a key; None unsets what may be unset.

        Raises: InvalidRequest, PermissionDenied, EntryNotFound, ConflictingChange, RecordsUnreachable.
        """

        def edit(kept: KeptKey) -> KeptKey:
            given = {name: value for name, value in changes.items() if name in TRAITS}
            traits = _valid_traits({**kept.traits, **given})
            actor.check_key(id, before=_scopes(kept), after=Key.from_traits(id, traits).scopes, keys=self.owners)
            expires_at = changes.get("expires_at")
            self._check_models(traits.models if "models" in given else None)
            check_end(expires_at, self._stored.clock())
            ends = kept.expires_at_s if "expires_at" not in changes else expires_at and expires_at.timestamp()
            return replace(kept, traits=_kept_traits(traits), expires_at_s=ends)

        return await self._edit(actor, id, "key.change", edit)

    async def rotate(self, actor: Actor, id: str, *, grace_s: float = GRACE_S) -> tuple[KeyEntry, str]:
        """Another secret for a key; those that it has stay valid for `grace_s` seconds at most.

        Raises: PermissionDenied, EntryNotFound, ConflictingChange, RecordsUnreachable.
        """
        actor.require("admin", "scope-admin")
        secret, kept_secret = await self._stored.new_secret(KEY_PREFIX)
        now = self._stored.clock()

        def edit(kept: KeptKey) -> KeptKey:
            if kept.expires_at_s is not None and kept.expires_at_s <= now:
                raise ConflictingChange(f"The key {id!r} has expired: set another `expires_at` first.", param="id")
            olds = [_ending(old, now + grace_s) for old in kept.secrets if old.is_valid(now)] if grace_s > 0 else []
            if len(olds) >= MOST_SECRETS:
                raise ConflictingChange(
                    f"The key {id!r} has {MOST_SECRETS} valid secrets: wait for one to end, or rotate with "
                    "`grace_s` 0, which ends them.",
                    param="grace_s",
                )
            return replace(kept, secrets=(kept_secret, *olds))

        return await self._edit(actor, id, "key.rotate", edit), secret

    async def revoke(self, actor: Actor, id: str) -> KeyEntry:
        """End a key for good; once is enough.

        Raises: PermissionDenied, EntryNotFound, ConflictingChange, RecordsUnreachable.
        """
        now = self._stored.clock()

        def edit(kept: KeptKey) -> KeptKey:
            return kept if kept.revoked_at_s is not None else replace(kept, secrets=(), revoked_at_s=now)

        return await self._edit(actor, id, "key.revoke", edit)

    async def _edit(self, actor: Actor, id: str, action: str, edit: Callable[[KeptKey], KeptKey]) -> KeyEntry:
        """Change a key as it stands; a key that is revoked can only be revoked again, and so can a shadowed one."""
        is_end = action == "key.revoke"

        def decide(old: KeptKey | None) -> tuple[KeptKey, Note | None]:
            if old is None or not is_end:
                self._refuse_file(id, "change it in the file")
            if old is None:
                raise EntryNotFound(f"There is no key {id!r}.", param="id")
            actor.check_key(id, before=_scopes(old), after=_scopes(old), keys=self.owners)
            if old.revoked_at_s is not None and not is_end:
                raise ConflictingChange(f"The key {id!r} is revoked, for good: create another.", param="id")
            new = edit(old)
            return new, None if new == old else self._note(actor, action, old, new)

        return self._shown(await self._stored.edit(f"{KEYS}{id}", KeptKey, decide))

    def _note(self, actor: Actor, action: str, before: KeptKey | None, after: KeptKey) -> Note:
        told = [None if kept is None else self._shown(kept).model_dump(mode="json") for kept in (before, after)]
        return audited(actor, action, after.id, at_s=self._stored.clock(), before=told[0], after=told[1])

    def _of_file(self, id: str) -> KeyConfig | None:
        return next((key for key in self._config().keys if key.id == id), None)

    def _refuse_file(self, id: str, remedy: str) -> None:
        if self._of_file(id):
            raise ConflictingChange(f"The key {id!r} stands in the configuration file: {remedy}.", param="id")

    def _check_models(self, names: Iterable[str] | None) -> None:
        models = self._config().models
        for name in names or ():
            if name not in models:
                raise InvalidRequest(f"`models`: {name!r} is not one of {', '.join(models)}.", param="models")

    def _shown(self, kept: KeptKey, is_shadowed: bool | None = None) -> KeyEntry:
        now = self._stored.clock()
        is_shadowed = bool(self._of_file(kept.id)) if is_shadowed is None else is_shadowed
        valid = [secret for secret in kept.secrets if secret.is_valid(now)]
        traits = KeyTraits.model_validate(kept.traits)
        return KeyEntry(
            **traits.model_dump(),
            id=kept.id,
            source="store",
            status="shadowed" if is_shadowed and kept.revoked_at_s is None else self._status(kept, now),
            created_at=moment(kept.made_at_s),
            created_by=kept.made_by,
            expires_at=moment(kept.expires_at_s),
            revoked_at=moment(kept.revoked_at_s),
            secrets=tuple(SecretEntry(made_at=moment(s.made_at_s), valid_until=moment(s.valid_until_s)) for s in valid),
        )

    def _status(self, kept: KeptKey, now: float) -> Literal["active", "revoked", "expired", "unusable"]:
        if kept.revoked_at_s is not None:
            return "revoked"
        if kept.expires_at_s is not None and kept.expires_at_s <= now:
            return "expired"
        return "active" if any(map(self._stored.is_usable, kept.secrets)) else "unusable"


def check_end(expires_at: datetime | None, now_s: float) -> None:
    """Raises: InvalidRequest for a time that is over or absurd."""
    if expires_at is not None and not now_s < expires_at.timestamp() < now_s + MOST_LIFE_S:
        raise InvalidRequest("`expires_at`: must be in the future, within a hundred years.", param="expires_at")


def _of_file(key: KeyConfig) -> KeyEntry:
    said = {name: getattr(key, name) for name in TRAITS}
    return KeyEntry(**said, id=key.id, source="file", status="active")


def _kept_traits(traits: KeyTraits) -> dict[str, Any]:
    return {name: value for name, value in traits.model_dump(mode="json").items() if name in TRAITS}


def _valid_traits(said: dict[str, Any]) -> KeyTraits:
    try:
        return KeyTraits.model_validate(said)
    except ValidationError as exc:
        raise invalid_model(exc.errors(include_url=False)) from exc


def _scopes(kept: KeptKey) -> tuple[str, ...]:
    return Key.from_traits(kept.id, KeyTraits.model_validate(kept.traits)).scopes


def _ending(secret: KeptSecret, at_s: float) -> KeptSecret:
    return replace(secret, valid_until_s=min(at_s, secret.valid_until_s or at_s))
