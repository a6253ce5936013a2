"""What the admin API takes and gives, where that is more than an entry.

Owns: bodies and queries, their checks, and their place in the OpenAPI document. A number must be one here: JSON, unlike
the configuration file, has no other way to write it.
"""

from __future__ import annotations

import datetime as dt
from typing import Annotated, Literal, cast

from pydantic import AfterValidator, AwareDatetime, BeforeValidator, Field

from gateway.admin.audit import AuditEntry
from gateway.admin.kept import Role, moment
from gateway.admin.keys import GRACE_S, MOST_GRACE_S, KeyEntry
from gateway.admin.limits import LimitEntry
from gateway.admin.tokens import TokenEntry
from gateway.admin.usage import DIMENSIONS, Dimension, UsageEntry
from gateway.config.base import Section
from gateway.config.budgets import LimitConfig
from gateway.config.schema import KeyTraits

EARLIEST_YEAR = 2000


def _moment(said: object) -> object:
    try:
        return dt.datetime.fromisoformat(cast("str", said))
    except (TypeError, ValueError) as exc:
        raise ValueError("must be a time with its zone, such as 2027-01-31T12:00:00Z") from exc


def _day(said: object) -> object:
    try:
        day = dt.datetime.strptime(cast("str", said), "%Y-%m-%d").date()  # noqa: DTZ007  # a day has no zone
    except (TypeError, ValueError) as exc:
        raise ValueError("must be a day such as 2027-01-31") from exc
    if day.year < EARLIEST_YEAR:
        raise ValueError(f"must not be before {EARLIEST_YEAR}")
    return day


def _dimensions(said: str) -> str:
    strange = [name for name in said.split(",") if name not in DIMENSIONS]
    if strange:
        raise ValueError(f"{strange[0]!r} is not one of {', '.join(DIMENSIONS)}, which commas separate")
    return said


Id = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment)]
Day = Annotated[dt.date, BeforeValidator(_day)]


class KeyChange(KeyTraits):
    """What a key becomes; what is not named stays, null unsets what may be unset, [] empties a list."""

    max_thinking_tokens: Annotated[int, Field(ge=0, strict=True)] | None = None
    expires_at: Moment | None = None


class KeyCreate(KeyChange):
    """A new key. Its id stands in limits and logs, and is never used again."""

    id: Id

    def traits(self) -> KeyTraits:
        """What it is."""
        return KeyTraits.model_validate(self.model_dump(include=set(KeyTraits.model_fields)))


class KeyMade(KeyEntry):
    """A key with its new secret, which is told this once."""

    secret: str


class Rotation(Section):
    """How long the secrets that a key has stay valid beside the new one."""

    grace_s: Annotated[float, Field(ge=0, le=MOST_GRACE_S, strict=True)] = GRACE_S


class LimitBody(LimitConfig):
    """A limit, as in the configuration file."""

    amount: Annotated[float, Field(gt=0, strict=True)]
    soft: Annotated[float, Field(gt=0, lt=1, strict=True)] | None = None


class TokenCreate(Section):
    """A new admin token. A scope-admin has scopes: paths such as `team:ml` or `org:acme/team:ml`."""

    id: Id
    role: Role
    scopes: tuple[str, ...] = ()
    expires_at: Moment | None = None


class TokenMade(TokenEntry):
    """A token with its secret, which is told this once."""

    secret: str


class Page(Section):
    """Which part of a list: entries after this id, at most so many."""

    after: str = ""
    limit: int = Field(100, ge=1, le=1000)


class AuditPage(Section):
    """Which part of the log: entries after this number, at most so many; without one, the last."""

    after: int | None = Field(None, ge=0, le=2**53)
    limit: int = Field(100, ge=1, le=1000)


class LimitFilter(Section):
    """Limits on this scope only."""

    scope: str | None = None


class LimitName(Section):
    """Which limit: there is one on each scope, unit and window."""

    scope: str
    unit: Literal["tokens", "thinking_tokens", "usd", "requests", "concurrency"]
    window: Literal["second", "minute", "hour", "day", "month", "total"] | None = None


class UsageQuery(Section):
    """Days (UTC), both included; groups; one scope only; and in which form."""

    first: Day | None = Field(None, alias="from")
    last: Day | None = Field(None, alias="to")
    group_by: Annotated[str, AfterValidator(_dimensions)] = ",".join(DIMENSIONS)
    scope: str | None = None
    format: Literal["json", "csv"] = "json"

    def dimensions(self) -> tuple[Dimension, ...]:
        """What to group by."""
        return cast("tuple[Dimension, ...]", tuple(self.group_by.split(",")))


class KeyList(Section):
    """Keys by id."""

    object: Literal["list"] = "list"
    data: list[KeyEntry]
    has_more: bool


class LimitList(Section):
    """Limits by scope."""

    object: Literal["list"] = "list"
    data: list[LimitEntry]


class TokenList(Section):
    """Admin tokens by id."""

    object: Literal["list"] = "list"
    data: list[TokenEntry]


class AuditItem(Section):
    """A change: who made it, from where, and what it changed; `number` counts from 1 without a gap."""

    number: int
    at: dt.datetime
    actor: str
    address: str
    request_id: str
    action: str
    target: str
    before: dict[str, object] | None
    after: dict[str, object] | None

    @classmethod
    def of(cls, number: int, entry: AuditEntry) -> AuditItem:
        """As it is shown."""
        return cls(
            number=number,
            at=moment(entry.at_s),
            actor=entry.actor,
            address=entry.address,
            request_id=entry.request_id,
            action=entry.action,
            target=entry.target,
            before=entry.before,
            after=entry.after,
        )


class AuditList(Section):
    """Part of the audit log, ascending; `last` is the number of the newest entry there is."""

    object: Literal["list"] = "list"
    data: list[AuditItem]
    last: int


class UsageReport(Section):
    """What was used on these days."""

    object: Literal["usage"] = "usage"
    first: dt.date = Field(serialization_alias="from")
    last: dt.date = Field(serialization_alias="to")
    data: list[UsageEntry]


class LedgerReport(Section):
    """How the ledger's store is, and what is held."""

    kind: str
    is_reachable: bool
    holds: int
    held: dict[str, int]
    detail: str
