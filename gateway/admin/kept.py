"""The forms in which keys, limits and admin tokens are kept in the store.

Owns: their fields, their names there, and bytes to them and back. Times are in seconds since 1970. Nothing of these is
ever removed, only marked, so that replicas that read what changed miss nothing and an id is never another's.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, Literal, TypeVar, overload

import msgspec

ROOT = "admin/"
HASHER = f"{ROOT}hasher"  # before all others, in this order, too
KEYS, LIMITS, TOKENS = f"{ROOT}key/", f"{ROOT}limit/", f"{ROOT}token/"
AUDIT = "audit"
Role = Literal["admin", "viewer", "scope-admin"]


class KeptHasher(msgspec.Struct, frozen=True, kw_only=True):
    """How secrets in this store are hashed.

    Attributes:
        id: `Hasher.id` of what hashed last.
        secret: hex, of one that was made here, for those that were started without one; None where there is none.
    """

    id: str
    secret: str | None = None


class KeptSecret(msgspec.Struct, frozen=True, kw_only=True):
    """What is kept of a secret.

    Attributes:
        digest: hex.
        hashed_by: `Hasher.id` of the hasher that made it.
        valid_until_s: the end of its grace; None for the present one.
    """

    digest: str
    hashed_by: str
    made_at_s: float
    valid_until_s: float | None = None

    def is_valid(self, now_s: float) -> bool:
        """Whether its grace is not over."""
        return self.valid_until_s is None or now_s < self.valid_until_s


class KeptKey(msgspec.Struct, frozen=True, kw_only=True):
    """An API key; `traits` are a `KeyTraits`."""

    id: str
    traits: dict[str, Any]
    secrets: tuple[KeptSecret, ...]
    made_at_s: float
    made_by: str
    expires_at_s: float | None = None
    revoked_at_s: float | None = None


class KeptLimit(msgspec.Struct, frozen=True, kw_only=True):
    """A limit; `limit` is a `LimitConfig`."""

    limit: dict[str, Any]
    changed_at_s: float
    changed_by: str
    is_removed: bool = False


class KeptToken(msgspec.Struct, frozen=True, kw_only=True):
    """A token for the admin API.

    Attributes:
        scopes: what a scope-admin may see and change, as paths.
    """

    id: str
    role: Role
    scopes: tuple[str, ...]
    secret: KeptSecret
    made_at_s: float
    made_by: str
    expires_at_s: float | None = None
    revoked_at_s: float | None = None


Kept = TypeVar("Kept", KeptKey, KeptLimit, KeptToken, KeptHasher)
_encoder = msgspec.json.Encoder()


def encode(kept: KeptKey | KeptLimit | KeptToken | KeptHasher) -> bytes:
    """As it stands in the store."""
    return _encoder.encode(kept)


def decode(value: bytes, type_: type[Kept]) -> Kept:
    """What stands in the store. Raises: msgspec.MsgspecError."""
    return msgspec.json.decode(value, type=type_)


@overload
def moment(epoch_s: float) -> datetime: ...
@overload
def moment(epoch_s: float | None) -> datetime | None: ...
def moment(epoch_s: float | None) -> datetime | None:
    """A kept time as it is shown: in UTC, to the millisecond."""
    return None if epoch_s is None else datetime.fromtimestamp(round(epoch_s, 3), UTC)
