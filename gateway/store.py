"""The store that the configuration names, opened.

Owns: which implementation serves which `store.kind`. Does not own: what is kept there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from budget.records.memory import MemoryRecords
from budget.records.sqlite import SqliteRecords
from gateway.config_load import ConfigError

if TYPE_CHECKING:
    from budget.records.port import Records
    from gateway.config import StoreConfig


def open_records(store: StoreConfig, *, clock: Callable[[], float]) -> Records:
    """Records of that store; nothing is read or connected yet.

    Raises: ConfigError when a package is missing.
    """
    if store.kind == "sqlite":
        assert store.path is not None
        # A file of its own: who writes a key or an outcome does not wait for the ledger, nor the ledger for them.
        path = Path(store.path)
        return SqliteRecords(path.with_name(f"{path.stem}-records{path.suffix}"), clock=clock)
    if store.kind == "redis":
        assert store.url is not None
        try:
            from budget.records.redis import RedisRecords  # noqa: PLC0415  # a package that only this store needs
        except ImportError as exc:
            raise ConfigError(
                "store.kind: redis needs the package `redis`: install thinkgate with the extra `redis`"
            ) from exc
        try:
            return RedisRecords(store.url)
        except ValueError as exc:
            raise ConfigError(f"store.url: {exc}") from exc
    return MemoryRecords(clock=clock)
