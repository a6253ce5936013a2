"""The store that the configuration names, opened.

Owns: which implementation serves which `store.kind`, of budgets and of records. Does not own: what is kept there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from budget.errors import StoreUnreachable
from budget.ledgers.leased import LeasedLedger
from budget.ledgers.memory import MemoryLedger
from budget.ledgers.sqlite import SqliteStore
from budget.records.memory import MemoryRecords
from budget.records.sqlite import SqliteRecords
from gateway.config.load import ConfigError

if TYPE_CHECKING:
    from budget.ledger import Ledger, Limit
    from budget.ledgers.store import Store
    from budget.records.port import Records
    from gateway.config.budgets import StoreConfig

NO_REDIS = "store.kind: redis needs more packages: install thinkgate with the extra `redis`"
# Fixed, and raised without its cause: a parser's complaint quotes the URL, and that may be part of its password.
NO_URL = "store.url: is no URL: write redis://user:password@host:6379/0, and percent-encode what stands in the password"


def open_ledger(store: StoreConfig, limits: Sequence[Limit], *, clock: Callable[[], float]) -> Ledger:
    """The ledger over that store; a file is opened, nothing is connected yet.

    Raises: ConfigError when a package is missing, or the file or the URL cannot be used.
    """
    if store.kind == "memory":
        return MemoryLedger(limits, clock=clock)
    return LeasedLedger(
        _books(store, clock),
        limits,
        clock=clock,
        lease_s=store.lease_s,
        timeout_s=store.timeout_s,
        offline_share=store.offline_share,
    )


def _books(store: StoreConfig, clock: Callable[[], float]) -> Store:
    if store.kind == "sqlite":
        try:
            return SqliteStore(Path(store.path), clock=clock, synchronous=store.synchronous)
        except StoreUnreachable as exc:
            raise ConfigError(f"store.path: {exc}") from exc
    assert store.url is not None
    from budget.ledgers.redis import RedisStore  # noqa: PLC0415  # what only this store needs

    try:
        return RedisStore(store.url, timeout_s=store.timeout_s)
    except ImportError as exc:
        raise ConfigError(NO_REDIS) from exc
    except ValueError:
        raise ConfigError(NO_URL) from None


def open_records(store: StoreConfig, *, clock: Callable[[], float]) -> Records:
    """Records of that store; nothing is read or connected yet.

    Raises: ConfigError when a package is missing, or the URL cannot be used.
    """
    if store.kind == "sqlite":
        # A file of its own: who writes a key or an outcome does not wait for the ledger, nor the ledger for them.
        path = Path(store.path)
        return SqliteRecords(path.with_name(f"{path.stem}-records{path.suffix}"), clock=clock)
    if store.kind == "redis":
        assert store.url is not None
        try:
            from budget.records.redis import RedisRecords  # noqa: PLC0415  # a package that only this store needs
        except ImportError as exc:
            raise ConfigError(NO_REDIS) from exc
        try:
            return RedisRecords(store.url)
        except ValueError:
            raise ConfigError(NO_URL) from None
    return MemoryRecords(clock=clock)
