"""Keys, limits and admin tokens without HTTP: one store, any number of replicas, time that a test moves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import msgspec

from budget.errors import RecordsUnreachable
from budget.records.memory import MemoryRecords
from gateway.admin.admins import Actor, Path
from gateway.admin.keys import Keys
from gateway.admin.limits import Limits
from gateway.admin.stored import Stored
from gateway.admin.tokens import AdminTokens
from gateway.auth import Key, Keyring
from gateway.config.schema import Config, KeyTraits
from gateway.errors import Unauthenticated
from tests.gateway.still import config_of

ROOT = Actor("root", "admin", address="192.0.2.1", request_id="req-1")
VIEWER = Actor("grafana", "viewer")
NOON = 1_800_000_000.0


def scoped(*paths: str) -> Actor:
    """A scope-admin."""
    return Actor("lead", "scope-admin", tuple(map(Path.parse, paths)))


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        """Seconds since 1970."""
        return self.now


class BreakableRecords(MemoryRecords):
    """Records that can be away, and that count how often they were scanned."""

    is_away = False
    scans = 0

    def __getattribute__(self, name: str) -> Any:
        """Every operation but closing fails while they are away."""
        if name in {"get", "put", "delete", "scan", "append", "read_log", "log_size", "revision", "purge"}:
            if object.__getattribute__(self, "is_away"):
                raise RecordsUnreachable("nobody answers")
            if name == "scan":
                self.scans += 1
        return super().__getattribute__(name)


@dataclass
class Replica:
    """One process over a store that it may share.

    Attributes:
        told: whether reading the store succeeded, each time.
        limit_changes: how often limits have changed.
    """

    records: BreakableRecords
    clock: Clock
    config: Config
    hash_secret: str | None = None
    told: list[bool] = field(default_factory=list)
    limit_changes: int = 0
    stored: Stored = field(init=False)
    keys: Keys = field(init=False)
    limits: Limits = field(init=False)
    tokens: AdminTokens = field(init=False)
    root: str = "root-secret"

    def __post_init__(self) -> None:
        self.stored = Stored(
            self.records,
            clock=self.clock,
            hash_secret=self.hash_secret,
            on_limits=self._count,
            on_read=self.told.append,
        )
        self.keys = Keys(self.stored, lambda: self.config)
        self.limits = Limits(self.stored, lambda: self.config, self.keys)
        self.tokens = AdminTokens(self.stored, lambda: (self.root, "THINKGATE_ADMIN_TOKEN"))

    def _count(self) -> None:
        self.limit_changes += 1

    def keyring(self) -> Keyring:
        """Of its present configuration."""
        return Keyring(self.config, {key.id: key.secret_sha256 or "" for key in self.config.keys}, self.stored)

    def identify(self, secret: str) -> Key:
        """The key with this secret."""
        return self.keyring().identify(b"Bearer " + secret.encode())

    async def make(self, id: str = "ada", actor: Actor = ROOT, **traits: Any) -> str:
        """A key; its secret."""
        _, secret = await self.keys.create(actor, id, KeyTraits.model_validate(traits))
        return secret

    async def audit(self) -> list[dict[str, Any]]:
        """Every entry of the audit log."""
        return [msgspec.json.decode(entry) for _, entry in await self.records.read_log("audit", after=0, limit=999)]


def replicas(count: int = 1, config: Config | None = None, **more: Any) -> list[Replica]:
    """Processes that share a store, and time."""
    clock = Clock()
    records = BreakableRecords(clock=clock)
    return [Replica(records, clock, config or config_of(), **more) for _ in range(count)]


def replica(config: Config | None = None, **more: Any) -> Replica:
    """One process with a store of its own."""
    return replicas(1, config, **more)[0]


def with_file_key(id: str = "file") -> Config:
    """A configuration with one key, whose secret is `file-secret`."""
    digest = hashlib.sha256(b"file-secret").hexdigest()
    return config_of(keys=[{"id": id, "secret_sha256": digest, "team": "ml"}])


def is_refused(one: Replica, secret: str) -> bool:
    """Whether a secret is a 401."""
    try:
        one.identify(secret)
    except Unauthenticated:
        return True
    return False
