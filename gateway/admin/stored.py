"""Keys, limits and admin tokens of the store, as this process last read them.

Owns: following changes, also those that other replicas make; finding the owner of a secret; the hash that secrets are
kept by. Does not own: who may change what (keys.py, limits.py, admins.py), nor storage (budget/records).

Finding is O(1), following O(what changed). While the store is away the last that was read goes on, and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import secrets
from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

import msgspec
from pydantic import ValidationError

from budget.errors import Conflict, RecordsUnreachable
from budget.records.port import Note, Record, Records
from gateway.admin.kept import (
    HASHER,
    KEYS,
    LIMITS,
    ROOT,
    TOKENS,
    Kept,
    KeptHasher,
    KeptKey,
    KeptLimit,
    KeptSecret,
    KeptToken,
    decode,
    encode,
)
from gateway.admin.secret import RANDOM_BYTES, Hasher, new_secret
from gateway.auth import Key
from gateway.config.budgets import LimitConfig
from gateway.config.schema import KeyTraits
from gateway.errors import ConflictingChange

log = logging.getLogger("thinkgate.stored")
POLL_S = 0.5  # so that a change is known everywhere within a second
WHOLE_EVERY = 600  # polls: mends what a store that lost writes, and went on, no longer tells
PURGE_EVERY = 120  # polls
ATTEMPTS = 8  # of one change, where others change the same
TAKEN_AT_ONCE = 100  # so that reading many keys never holds up requests for long

Owner = TypeVar("Owner")


class StoredKey(NamedTuple):
    """A key of the store: as kept, and as requests need it."""

    kept: KeptKey
    traits: KeyTraits
    key: Key


class StoredLimit(NamedTuple):
    """A limit of the store."""

    kept: KeptLimit
    limit: LimitConfig


class _Secrets(Generic[Owner]):
    """Owners by digest of their secret."""

    def __init__(self) -> None:
        self._by_digest: dict[bytes, tuple[bytes, Owner, float | None]] = {}

    def add(self, secret: KeptSecret, owner: Owner, ends_at_s: float | None) -> None:
        """A secret, until its grace or its owner ends."""
        ends = [end for end in (secret.valid_until_s, ends_at_s) if end is not None]
        digest = bytes.fromhex(secret.digest)
        self._by_digest[digest] = (digest, owner, min(ends, default=None))

    def remove(self, secret: KeptSecret) -> None:
        """Forget a secret, if it was known."""
        self._by_digest.pop(bytes.fromhex(secret.digest), None)

    def owner(self, digest: bytes, clock: Callable[[], float]) -> Owner | None:
        """Whose it is now."""
        found = self._by_digest.get(digest)
        if found is None or not hmac.compare_digest(found[0], digest):
            return None
        return found[1] if found[2] is None or clock() < found[2] else None


class Stored:
    """What the store holds beside budgets.

    Args:
        records: where it is kept.
        clock: seconds since 1970.
        hash_secret: keys the hash of secrets; None for one that is made once and kept in the store itself.
        must_match: make no secret that is hashed otherwise than those that were made last.
        is_new: nothing can be in the records yet, so there is nothing to wait for.
        on_limits: called when limits have changed.
        on_read: called with whether reading the store succeeded.

    Attributes:
        keys, limits, tokens: by id; limits by the name they are kept under.
        is_loaded: it was read at least once.
        never_had_a_key: it was read, and there was no key, not even a revoked one.
    """

    def __init__(
        self,
        records: Records,
        *,
        clock: Callable[[], float],
        hash_secret: str | None = None,
        must_match: bool = False,
        is_new: bool = False,
        on_limits: Callable[[], None] = lambda: None,
        on_read: Callable[[bool], None] = lambda _: None,
    ) -> None:
        self.records = records
        self.clock = clock
        self.keys: dict[str, StoredKey] = {}
        self.limits: dict[str, StoredLimit] = {}
        self.tokens: dict[str, KeptToken] = {}
        self.is_loaded = self.never_had_a_key = is_new
        self._hasher = None if hash_secret is None else Hasher(hash_secret.encode())
        self._has_own_secret, self._must_match = hash_secret is not None, must_match
        self._on_limits, self._on_read = on_limits, on_read
        self._key_secrets: _Secrets[Key] = _Secrets()
        self._token_secrets: _Secrets[KeptToken] = _Secrets()
        self._known: dict[str, tuple[int, int]] = {}  # what an entry was read from, by its name
        self._revision = 0
        self._noted: str | None = None  # id of the hasher that hashed last
        self._is_away = self._had_a_key = False
        self._are_limits_told = True
        self._reading = asyncio.Lock()

    def key_of(self, secret: bytes) -> Key | None:
        """The key with this secret, if it may be used now."""
        return None if self._hasher is None else self._key_secrets.owner(self._hasher.digest(secret), self.clock)

    def token_of(self, secret: bytes) -> KeptToken | None:
        """The admin token with this secret, if it may be used now."""
        return None if self._hasher is None else self._token_secrets.owner(self._hasher.digest(secret), self.clock)

    async def hasher(self) -> Hasher:
        """What hashes new secrets; which it is, is noted in the store.

        Raises: ConflictingChange where it is hashed there with what this process was not told, RecordsUnreachable.
        """
        if self._hasher is None or self._noted != self._hasher.id:
            await self._note_hasher()
        if self._hasher is None or self._noted != self._hasher.id:
            raise ConflictingChange(
                "Secrets in this store are hashed with one that this process was not started with: set the variable "
                "that server.key_hash_env names to what it is where they were made. If it was changed on purpose, make "
                "or rotate a key with the admin API first."
            )
        return self._hasher

    async def _note_hasher(self) -> None:
        made = None if self._has_own_secret else secrets.token_hex(RANDOM_BYTES)
        mine = self._hasher or Hasher(bytes.fromhex(made or ""))
        with contextlib.suppress(Conflict):  # somebody was faster, or it was noted long ago
            await self.records.put(HASHER, encode(KeptHasher(id=mine.id, secret=made)), expect=0)
        record = await self.records.get(HASHER)
        assert record is not None, "nothing removes it"
        kept = decode(record.value, KeptHasher)
        if self._hasher is not None and kept.id != self._hasher.id and not self._must_match:
            kept = msgspec.structs.replace(kept, id=self._hasher.id)  # what was made there serves who knows no other
            with contextlib.suppress(Conflict):
                await self.records.put(HASHER, encode(kept), expect=record.version)
        self._know_hasher(kept)

    def is_usable(self, secret: KeptSecret) -> bool:
        """Whether it was hashed as secrets are hashed now; else nothing matches it."""
        return self._hasher is not None and secret.hashed_by == self._hasher.id

    async def new_secret(self, prefix: str) -> tuple[str, KeptSecret]:
        """A secret, and what is kept of it. Raises: RecordsUnreachable."""
        hasher = await self.hasher()
        secret = new_secret(prefix)
        digest = hasher.digest(secret.encode()).hex()
        return secret, KeptSecret(digest=digest, hashed_by=hasher.id, made_at_s=self.clock())

    async def edit(
        self, name: str, type_: type[Kept], decide: Callable[[Kept | None], tuple[Kept, Note | None]]
    ) -> Kept:
        """Write what is decided on an entry as it stands, and return it; it is known here at once.

        Args:
            name: where it is kept.
            type_: what it is.
            decide: given what is kept, or None; returns what to keep and its note, or no note to leave it. Asked again
                where somebody else was faster.

        Raises: what `decide` raises, ConflictingChange, RecordsUnreachable.
        """
        for _ in range(ATTEMPTS):
            record = await self.records.get(name)
            try:
                kept, note = decide(None if record is None else decode(record.value, type_))
            except (msgspec.MsgspecError, ValidationError) as exc:
                raise ConflictingChange("Another version of thinkgate wrote this entry: change it with that.") from exc
            if note is None:
                return kept
            try:
                await self.records.put(name, encode(kept), expect=0 if record is None else record.version, note=note)
            except Conflict:
                continue
            await self.follow()
            return kept
        raise ConflictingChange("Others keep changing the same entry: try again.")

    async def follow(self) -> None:
        """As `refresh`, but a store that is away is only told of."""
        with contextlib.suppress(RecordsUnreachable):  # said by `refresh`
            await self.refresh()

    async def keep_up(self) -> None:
        """Follow changes and free what is over, until cancelled."""
        polls = 0
        while True:
            await asyncio.sleep(POLL_S)
            polls += 1
            try:
                await self.refresh(whole=polls % WHOLE_EVERY == 0)
                if polls % PURGE_EVERY == 0:
                    await self.records.purge()
            except RecordsUnreachable:
                continue  # said by `refresh`, or purged the next time
            except Exception:  # a bug here must not end the requests that run
                log.exception("following the store failed")

    async def refresh(self, *, whole: bool = False) -> None:
        """Read what has changed.

        Args:
            whole: read everything, whatever the store says has changed.

        Raises: RecordsUnreachable; then the last that was read stands.
        """
        async with self._reading:
            try:
                revision = await self.records.revision()
                # After a failure, or if it went back: the store may have lost writes.
                whole = whole or not self.is_loaded or self._is_away or revision < self._revision
                rows: list[tuple[str, Record]] = []
                if whole or revision != self._revision:
                    rows = await self.records.scan(ROOT, after=0 if whole else self._revision)
            except RecordsUnreachable as exc:
                if not self._is_away:
                    log.warning("store cannot be read, what is known goes on", extra={"reason": str(exc)})
                self._is_away = True
                self._on_read(False)
                raise
            await self._take(rows, whole=whole)
            if self._is_away:
                log.info("store can be read again")
            self._revision, self._is_away, self.is_loaded = revision, False, True
            self.never_had_a_key = not self._had_a_key
            self._on_read(True)

    async def _take(self, rows: list[tuple[str, Record]], *, whole: bool) -> None:
        """Know what was read; rows come by name, so how secrets are hashed is known before any of them."""
        if whole:
            for name in self._known.keys() - {name for name, _ in rows}:
                self._forget(name)
        for i, (name, record) in enumerate(rows):
            if i % TAKEN_AT_ONCE == TAKEN_AT_ONCE - 1:
                await asyncio.sleep(0)
            read = record.version, hash(record.value)
            if self._known.get(name) == read:
                continue
            self._forget(name)
            self._known[name] = read
            try:
                self._know(name, record.value)
            except (msgspec.MsgspecError, ValueError) as exc:
                # Of a newer version, perhaps: what is not understood restricts, so it is not used in part.
                log.error("entry of the store cannot be used", extra={"entry": name, "reason": str(exc)})  # noqa: TRY400
        if not self._are_limits_told:
            self._on_limits()
            self._are_limits_told = True

    def _know(self, name: str, value: bytes) -> None:
        """Raises: MsgspecError, ValueError for what is not understood."""
        if name.startswith(KEYS):
            self._had_a_key = True
            self._know_key(decode(value, KeptKey))
        elif name.startswith(LIMITS):
            limit = decode(value, KeptLimit)
            if not limit.is_removed:
                # What a newer version says besides may only have narrowed it: without that it is too strict, not gone.
                known = {field: said for field, said in limit.limit.items() if field in LimitConfig.model_fields}
                self.limits[name] = StoredLimit(limit, LimitConfig.model_validate(known))
        elif name.startswith(TOKENS):
            self._know_token(decode(value, KeptToken))
        elif name == HASHER:
            self._know_hasher(decode(value, KeptHasher))

    def _know_hasher(self, kept: KeptHasher) -> None:
        self._noted = kept.id
        if not self._has_own_secret:
            self._hasher = None if kept.secret is None else Hasher(bytes.fromhex(kept.secret))
        if self._hasher is not None and kept.id != self._hasher.id:
            log.warning("secrets in the store were hashed with another hash secret", extra={"hashed_by": kept.id})

    def _know_key(self, kept: KeptKey) -> None:
        traits = KeyTraits.model_validate(kept.traits)
        stored = StoredKey(kept, traits, Key.from_traits(kept.id, traits))
        self.keys[kept.id] = stored
        if kept.revoked_at_s is None:
            for secret in filter(self.is_usable, kept.secrets):
                self._key_secrets.add(secret, stored.key, kept.expires_at_s)

    def _know_token(self, token: KeptToken) -> None:
        self.tokens[token.id] = token
        if token.revoked_at_s is None and self.is_usable(token.secret):
            self._token_secrets.add(token.secret, token, token.expires_at_s)

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        if name == HASHER:
            self._noted = None
            self._hasher = self._hasher if self._has_own_secret else None
        elif name.startswith(KEYS):
            stored = self.keys.pop(name.removeprefix(KEYS), None)
            for secret in stored.kept.secrets if stored else ():
                self._key_secrets.remove(secret)
        elif name.startswith(LIMITS):
            self._are_limits_told = False
            self.limits.pop(name, None)
        elif name.startswith(TOKENS):
            token = self.tokens.pop(name.removeprefix(TOKENS), None)
            if token is not None:
                self._token_secrets.remove(token.secret)
