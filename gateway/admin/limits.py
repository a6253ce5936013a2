"""The limits in force: the file's and the store's, joined.

Owns: the rules by which the two agree, and limits made and removed through the admin API. Limits of the file are
read-only there. Of two on the same scope, unit and window the tighter one counts. Does not own: what a limit may be
(config/schema.py), nor counting (budget/ledger.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Literal

from budget.ledger import Limit
from budget.price import nano_usd
from budget.records.port import Note
from gateway.admin.admins import Actor
from gateway.admin.audit import audited
from gateway.admin.kept import LIMITS, KeptLimit, moment
from gateway.admin.stored import Stored, StoredLimit
from gateway.config.budgets import LimitConfig
from gateway.errors import ConflictingChange, EntryNotFound, InvalidRequest

if TYPE_CHECKING:
    from gateway.admin.keys import Keys
    from gateway.config.schema import Config

Identity = tuple[str, str, str | None]


class LimitEntry(LimitConfig):
    """A limit as it is shown.

    `is_counted` is false where another on the same scope, unit and window is tighter. `problem` says why a limit of the
    store would be refused now: the file has changed since.
    """

    source: Literal["file", "store"]
    is_counted: bool
    problem: str | None = None
    changed_at: datetime | None = None
    changed_by: str | None = None


def identity(limit: LimitConfig) -> Identity:
    """What there is one limit of in the file, and one in the store."""
    return limit.scope, limit.unit, limit.window


def tightest(limits: Iterable[LimitConfig]) -> dict[Identity, LimitConfig]:
    """Of several limits on the same scope, unit and window the tightest."""
    tightest: dict[Identity, LimitConfig] = {}
    for limit in limits:
        other = tightest.get(identity(limit))
        if other is None or limit.amount < other.amount:
            tightest[identity(limit)] = limit
    return tightest


def ledger_limits(limits: Iterable[LimitConfig]) -> list[Limit]:
    """Limits in the ledger's units: of several on the same scope, unit and window the tightest."""
    return [
        Limit(
            scope=limit.scope,
            unit=limit.unit,
            amount=nano_usd(limit.amount) if limit.unit == "usd" else int(limit.amount),
            window=limit.window,
        )
        for limit in tightest(limits).values()
    ]


class Limits:
    """The limits of file and store.

    Args:
        stored: the store's.
        config: what is in force.
        keys: which keys there are, and whose.
    """

    def __init__(self, stored: Stored, config: Callable[[], Config], keys: Keys) -> None:
        self._stored = stored
        self._config = config
        self._keys = keys

    def in_force(self, config: Config) -> list[Limit]:
        """Those of `config` joined with the store's, for the ledger."""
        return ledger_limits(self._joined(config))

    def soft_marks(self, config: Config) -> dict[Identity, float]:
        """The soft marks of the same, as fractions."""
        return {id: limit.soft for id, limit in tightest(self._joined(config)).items() if limit.soft is not None}

    def _joined(self, config: Config) -> list[LimitConfig]:
        return [*config.limits, *(stored.limit for stored in self._stored.limits.values())]

    def entries(self, actor: Actor, *, scope: str | None = None) -> list[LimitEntry]:
        """All that the actor may see, by scope; those on one scope only, if it is named."""
        file = {identity(limit): limit for limit in self._config().limits}
        stored = {identity(known.limit): known for known in self._stored.limits.values()}
        realm = actor.realm(self._keys.owners()) if actor.role == "scope-admin" else None

        def is_shown(id: Identity) -> bool:
            return scope in {None, id[0]} and (realm is None or id[0] in realm)

        entries = [
            LimitEntry(
                **limit.model_dump(),
                source="file",
                is_counted=id not in stored or limit.amount <= stored[id].limit.amount,
            )
            for id, limit in file.items()
            if is_shown(id)
        ]
        keys = self._keys.ids()
        entries += [
            self._shown(known, keys, is_counted=id not in file or known.limit.amount < file[id].amount)
            for id, known in stored.items()
            if is_shown(id)
        ]
        return sorted(entries, key=lambda e: (e.scope, e.unit, e.window or "", e.source))

    async def put(self, actor: Actor, limit: LimitConfig) -> LimitEntry:
        """Set the store's limit on a scope, unit and window.

        Raises: InvalidRequest, PermissionDenied, ConflictingChange when the file has one, RecordsUnreachable.
        """
        self._check_may(actor, limit.scope)
        self._refuse_file(identity(limit))
        for field, text in self._problems(limit, self._keys.ids()):
            raise InvalidRequest(f"`{field}`: {text}.", param=field)
        said = limit.model_dump(mode="json", include=set(LimitConfig.model_fields))
        kept = KeptLimit(limit=said, changed_at_s=self._stored.clock(), changed_by=actor.id)
        await self._write(actor, "limit.put", identity(limit), kept)
        return self._shown(StoredLimit(kept, limit), self._keys.ids(), is_counted=True)

    async def remove(self, actor: Actor, id: Identity) -> None:
        """Remove the store's limit, also one that stands beside the file's.

        Raises: PermissionDenied, EntryNotFound, ConflictingChange when only the file has one, RecordsUnreachable.
        """
        self._check_may(actor, id[0])
        known = self._stored.limits.get(_name(id))
        if known is None:
            self._refuse_file(id)
            raise EntryNotFound(f"There is no limit of {_said(id)}.", param="scope")
        kept = KeptLimit(
            limit=known.kept.limit, changed_at_s=self._stored.clock(), changed_by=actor.id, is_removed=True
        )
        await self._write(actor, "limit.remove", id, kept)

    async def _write(self, actor: Actor, action: str, id: Identity, kept: KeptLimit) -> None:
        def decide(old: KeptLimit | None) -> tuple[KeptLimit, Note]:
            before = None if old is None or old.is_removed else old.limit
            after = None if kept.is_removed else kept.limit
            return kept, audited(actor, action, _said(id), at_s=kept.changed_at_s, before=before, after=after)

        await self._stored.edit(_name(id), KeptLimit, decide)

    def _check_may(self, actor: Actor, scope: str) -> None:
        actor.require("admin", "scope-admin")
        if actor.role == "scope-admin" and scope not in actor.realm(self._keys.owners()):
            actor.check_sees(f"The scope {scope!r}", ())

    def _refuse_file(self, id: Identity) -> None:
        if any(identity(limit) == id for limit in self._config().limits):
            raise ConflictingChange(
                f"The limit of {_said(id)} stands in the configuration file: change it there.", param="scope"
            )

    def _problems(self, limit: LimitConfig, keys: Collection[str]) -> list[tuple[str, str]]:
        """Why a limit cannot be held, as (field, text)."""
        kind, _, name = limit.scope.partition(":")
        if kind == "key" and name not in keys:
            return [("scope", f"there is no key {name!r}")]
        return [(field.lstrip(".") or "unit", text) for field, text in self._config().problems_of(limit, keys)]

    def _shown(self, stored: StoredLimit, keys: Collection[str], *, is_counted: bool) -> LimitEntry:
        kept, limit = stored
        return LimitEntry(
            **limit.model_dump(),
            source="store",
            is_counted=is_counted,
            problem="; ".join(text for _, text in self._problems(limit, keys)) or None,
            changed_at=moment(kept.changed_at_s),
            changed_by=kept.changed_by,
        )


def _name(id: Identity) -> str:
    scope, unit, window = id
    return f"{LIMITS}{scope}|{unit}|{window or ''}"


def _said(id: Identity) -> str:
    scope, unit, window = id
    return f"{unit}{f' per {window}' if window else ''} on {scope}"
