"""Who asks: a bearer secret to a key. Secrets are kept as SHA-256 digests only.

O(1): one digest, one look-up by it, one constant-time compare. A digest is not secret-dependent in its
timing, so the look-up tells an attacker nothing about a stored secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.config import Config, KeyConfig
from gateway.errors import PermissionDenied, Unauthenticated


@dataclass(frozen=True, slots=True)
class Key:
    """A key as requests need it.

    Attributes:
        id: for logs and scopes.
        scopes: ledger scopes, narrow to wide; the model's own is added per request.
        models: public names it may use; None for all.
        modes: modes it may use; None for all.
        max_thinking_tokens: its ceiling per choice; None for the model's.
        both_fields: thinking text goes out under both names.
    """

    id: str
    scopes: tuple[str, ...]
    models: frozenset[str] | None = None
    modes: frozenset[str] | None = None
    max_thinking_tokens: int | None = None
    both_fields: bool = False

    @classmethod
    def from_config(cls, config: KeyConfig) -> Key:
        """Build from an entry of `keys`."""
        owners = [("user", config.user), ("team", config.team), ("org", config.org)]
        scopes = [f"key:{config.id}", *(f"{kind}:{name}" for kind, name in owners if name)]
        return cls(
            id=config.id,
            scopes=tuple(dict.fromkeys((*scopes, *(f"tag:{tag}" for tag in config.tags)))),
            models=None if config.models is None else frozenset(config.models),
            modes=None if config.modes is None else frozenset(config.modes),
            max_thinking_tokens=config.max_thinking_tokens,
            both_fields=config.reasoning_field == "both",
        )


ANYONE = Key(id="anyone", scopes=("key:anyone",))


class Keyring:
    """All keys by digest of their secret.

    Args:
        config: the configuration; with no `keys` everybody is ANYONE.
        digests: key id -> hex SHA-256 of its secret.
    """

    def __init__(self, config: Config, digests: Mapping[str, str]) -> None:
        self._by_digest = {
            bytes.fromhex(digests[key.id]): (bytes.fromhex(digests[key.id]), Key.from_config(key))
            for key in config.keys
        }

    def identify(self, authorization: bytes | None) -> Key:
        """The key of an `Authorization` header. Raises: Unauthenticated."""
        if not self._by_digest:
            return ANYONE
        if authorization is None:
            raise Unauthenticated("No API key: send `Authorization: Bearer <key>`.")
        scheme, _, secret = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not secret:
            raise Unauthenticated("The Authorization header must be `Bearer <key>`.")
        digest = hashlib.sha256(secret.strip()).digest()
        stored = self._by_digest.get(digest)
        if stored is None or not hmac.compare_digest(stored[0], digest):
            raise Unauthenticated("The API key is not known, or was revoked.")
        return stored[1]


def check_model(key: Key, model: str) -> None:
    """Raises: PermissionDenied when the key may not use the model."""
    if key.models is not None and model not in key.models:
        raise PermissionDenied(f"This key may not use the model {model!r}.", param="model")
