"""Who asks: a bearer secret to a key. Secrets are kept as digests only.

Keys of the file come with the SHA-256 of their secret, keys of the store with a keyed hash. The latter are known by the
form of their secret, so that a valid secret is digested once, whichever it is.

O(1): one digest, one look-up by it, one constant-time compare. A digest is not secret-dependent in its
timing, so the look-up tells an attacker nothing about a stored secret.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from budget.degrade import STEPS, Step
from gateway.admin.secret import KEY_BYTES, KEY_START
from gateway.config.schema import Config, KeyConfig, KeyTraits
from gateway.errors import PermissionDenied, StoreUnavailable, Unauthenticated

if TYPE_CHECKING:
    from gateway.admin.stored import Stored
    from router.mode import When


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
        degrade: steps down the ladder that its requests may take, in order.
        salt: keeps its tenant's prompts in backends' caches apart from others'; None: nobody is told from anybody.
        lambda_per_usd: quality that it gives up for one US dollar, where the text decides.
        quality_floor: least expected quality of what it takes for that.
        cascade: for which of its requests a draft is judged; None: as `routing.cascade.when` says.
    """

    id: str
    scopes: tuple[str, ...]
    models: frozenset[str] | None = None
    modes: frozenset[str] | None = None
    max_thinking_tokens: int | None = None
    both_fields: bool = False
    degrade: tuple[Step, ...] = ()
    salt: str | None = None
    lambda_per_usd: float = 0.0
    quality_floor: float = 0.0
    cascade: When | None = None

    @classmethod
    def from_config(cls, config: KeyConfig) -> Key:
        """Build from an entry of `keys`."""
        return cls.from_traits(config.id, config)

    @classmethod
    def from_traits(cls, id: str, traits: KeyTraits) -> Key:
        """Build from what a key is, wherever it is kept."""
        owners = [("user", traits.user), ("team", traits.team), ("org", traits.org)]
        scopes = [f"key:{id}", *(f"{kind}:{name}" for kind, name in owners if name)]
        return cls(
            id=id,
            scopes=tuple(dict.fromkeys((*scopes, *(f"tag:{tag}" for tag in traits.tags)))),
            models=None if traits.models is None else frozenset(traits.models),
            modes=None if traits.modes is None else frozenset(traits.modes),
            max_thinking_tokens=traits.max_thinking_tokens,
            both_fields=traits.reasoning_field == "both",
            degrade=tuple(step for step in STEPS if step in traits.degrade),
            salt=hashlib.blake2b(scopes[-1].encode(), digest_size=16).hexdigest(),  # of the widest owner
            lambda_per_usd=traits.lambda_per_usd,
            quality_floor=traits.quality_floor,
            cascade=traits.cascade,
        )


ANYONE = Key(id="anyone", scopes=("key:anyone",))


class Keyring:
    """All keys by digest of their secret.

    Args:
        config: the configuration; with no key at all, and on loopback, everybody is ANYONE.
        digests: key id -> hex SHA-256 of its secret.
        stored: the keys of the store; None where there is none. One whose id the file has is shadowed by it.
    """

    def __init__(self, config: Config, digests: Mapping[str, str], stored: Stored | None = None) -> None:
        self._by_digest = {
            bytes.fromhex(digests[key.id]): (bytes.fromhex(digests[key.id]), Key.from_config(key))
            for key in config.keys
        }
        self._ids = frozenset(digests)
        self._may_be_open = config.may_be_open()
        self._stored = stored

    @property
    def is_open(self) -> bool:
        """Whether anybody is served, since there is no key."""
        return self._may_be_open and (self._stored is None or self._stored.never_had_a_key)

    def identify(self, authorization: bytes | None) -> Key:
        """The key of an `Authorization` header.

        Raises: Unauthenticated; StoreUnavailable where the store was never read yet: it may know the key, or limit it.
        """
        if self._stored is not None and not self._stored.is_loaded:
            raise StoreUnavailable("The store of keys and limits cannot be read yet: try again in a moment.")
        if self._may_be_open and self.is_open:
            return ANYONE
        if authorization is None:
            raise Unauthenticated("No API key: send `Authorization: Bearer <key>`.")
        scheme, _, secret = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not secret:
            raise Unauthenticated("The Authorization header must be `Bearer <key>`.")
        secret = secret.strip()
        if self._stored is not None and len(secret) == KEY_BYTES and secret.startswith(KEY_START):
            key = self._stored.key_of(secret)
            if key is not None and key.id not in self._ids:
                return key
        digest = hashlib.sha256(secret).digest()
        found = self._by_digest.get(digest)
        if found is not None and hmac.compare_digest(found[0], digest):
            return found[1]
        raise Unauthenticated("The API key is not known, was revoked, or has expired.")


def check_model(key: Key, model: str) -> None:
    """Raises: PermissionDenied when the key may not use the model."""
    if key.models is not None and model not in key.models:
        raise PermissionDenied(f"This key may not use the model {model!r}.", param="model")


def degrade_steps(key: Key, asked: tuple[Step, ...] | None) -> tuple[Step, ...]:
    """The steps that a request may take: the key's, or those of them it names itself.

    Raises: PermissionDenied when it names another one.
    """
    if asked is None:
        return key.degrade
    for step in asked:
        if step not in key.degrade:
            allowed = ", ".join(key.degrade) or "none"
            raise PermissionDenied(
                f"This key does not allow the step {step!r} (allowed: {allowed}).", param="thinkgate.degrade"
            )
    return tuple(step for step in key.degrade if step in asked)
