"""Records in Redis 7 or Valkey, for any number of replicas.

Owns: the layout below and the scripts that change it in one step each. Time is the server's. All names share one hash
tag, so that a cluster keeps them in one slot. How durable they are is the server's setting: without `appendonly yes` a
restart of the server forgets keys and limits.

    PREFIX:record:KEY   hash of `value` and `version`; with a time to live, if it has one
    PREFIX:lasting      sorted set of the keys of lasting records, by version
    PREFIX:counters     hash of `sequence` (the last version) and `revision`
    PREFIX:log:LOG      list of entries
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from budget.errors import Conflict, RecordsUnreachable
from budget.records.port import Note, Record
from budget.redis_calls import cancellable

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

PREFIX = "{thinkgate}:records"
TIMEOUT_S = 2.0
MOST_CONNECTIONS = 32  # what comes beyond waits
READ_AT_ONCE = 500
FIELDS = ["value", "version"]
# KEYS: record, lasting, counters, log; ARGV: key, expected version or "", whether to note, the note.
CHECK = """
local version = tonumber(redis.call('HGET', KEYS[1], 'version') or '0')
if ARGV[2] ~= '' and tonumber(ARGV[2]) ~= version then return {0, version} end
local was_lasting = version > 0 and redis.call('PTTL', KEYS[1]) == -1
"""
NOTE = """
if ARGV[3] == '1' then redis.call('RPUSH', KEYS[4], ARGV[4]) end
"""
# As above, and ARGV: value, milliseconds to live or "".
PUT = f"""{CHECK}
version = redis.call('HINCRBY', KEYS[3], 'sequence', 1)
redis.call('HSET', KEYS[1], 'value', ARGV[5], 'version', version)
if ARGV[6] == '' then
  redis.call('PERSIST', KEYS[1])
  redis.call('ZADD', KEYS[2], version, ARGV[1])
else
  redis.call('PEXPIRE', KEYS[1], ARGV[6])
  redis.call('ZREM', KEYS[2], ARGV[1])
end
if was_lasting or ARGV[6] == '' then redis.call('HSET', KEYS[3], 'revision', version) end
{NOTE}
return {{1, version}}
"""
DELETE = f"""{CHECK}
if version == 0 then return {{1, 0}} end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
local sequence = redis.call('HINCRBY', KEYS[3], 'sequence', 1)
if was_lasting then redis.call('HSET', KEYS[3], 'revision', sequence) end
{NOTE}
return {{1, 1}}
"""


class RedisRecords:
    """See budget.records.port.Records.

    Args:
        url: `redis://`, `rediss://` or `unix://`.
        prefix: of every name; with a hash tag in braces.
    """

    def __init__(self, url: str, *, prefix: str = PREFIX) -> None:
        self._prefix = prefix
        # A repeated `put` would conflict with itself where only the answer was lost: whoever calls knows what to do.
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=MOST_CONNECTIONS,
            timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
        )
        self._redis: Redis = Redis.from_pool(pool)
        self._put = self._redis.register_script(PUT)
        self._delete = self._redis.register_script(DELETE)

    async def get(self, key: str) -> Record | None:
        """See the port. Raises: RecordsUnreachable."""
        with _mapped():
            return _record(await self._redis.hmget(self._record_name(key), FIELDS))

    async def put(
        self, key: str, value: bytes, *, expect: int | None = None, ttl_s: float | None = None, note: Note | None = None
    ) -> int:
        """See the port. Raises: Conflict, RecordsUnreachable."""
        ttl_ms = "" if ttl_s is None else max(1, math.ceil(ttl_s * 1000))
        return await self._change(self._put, key, expect, note, value, ttl_ms)

    async def delete(self, key: str, *, expect: int | None = None, note: Note | None = None) -> bool:
        """See the port. Raises: Conflict, RecordsUnreachable."""
        return bool(await self._change(self._delete, key, expect, note))

    async def scan(self, prefix: str, *, after: int = 0) -> list[tuple[str, Record]]:
        """See the port; each record is as it was at some moment of the scan. Raises: RecordsUnreachable."""
        with _mapped():
            names = cast("list[bytes]", await self._redis.zrangebyscore(self._name("lasting"), f"({after}", "+inf"))
            keys = sorted(key for name in names if (key := name.decode()).startswith(prefix))
            found: list[tuple[str, Record]] = []
            for i in range(0, len(keys), READ_AT_ONCE):
                some = keys[i : i + READ_AT_ONCE]
                pipeline = self._redis.pipeline(transaction=False)
                for key in some:
                    pipeline.hmget(self._record_name(key), FIELDS)
                for key, fields in zip(some, await pipeline.execute(), strict=True):
                    record = _record(fields)
                    if record is not None:
                        found.append((key, record))
            return found

    async def append(self, log: str, entry: bytes) -> int:
        """See the port. Raises: RecordsUnreachable."""
        with _mapped():
            return int(await self._redis.rpush(self._log_name(log), entry))

    async def read_log(self, log: str, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """See the port. Raises: RecordsUnreachable."""
        with _mapped():
            entries = await self._redis.lrange(self._log_name(log), after, after + limit - 1)
            return list(enumerate(cast("list[bytes]", entries), start=after + 1))

    async def log_size(self, log: str) -> int:
        """See the port. Raises: RecordsUnreachable."""
        with _mapped():
            return int(await self._redis.llen(self._log_name(log)))

    async def revision(self) -> int:
        """See the port. Raises: RecordsUnreachable."""
        with _mapped():
            return int(await self._redis.hget(self._name("counters"), "revision") or 0)

    async def purge(self) -> int:
        """The server frees what is over by itself."""
        return 0

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    async def _change(
        self, script: AsyncScript, key: str, expect: int | None, note: Note | None, *more: bytes | str | int
    ) -> int:
        names = [self._record_name(key), self._name("lasting"), self._name("counters"), self._log_name("")]
        noted: tuple[int, bytes] = (0, b"")
        if note is not None:
            names[3], noted = self._log_name(note.log), (1, note.entry)
        with _mapped():
            was_made, version = await script(names, [key, "" if expect is None else expect, *noted, *more])
        if not was_made:
            raise Conflict(key, version)
        return int(version)

    def _name(self, what: str) -> str:
        return f"{self._prefix}:{what}"

    def _record_name(self, key: str) -> str:
        return f"{self._prefix}:record:{key}"

    def _log_name(self, log: str) -> str:
        return f"{self._prefix}:log:{log}"


@contextmanager
def _mapped() -> Iterator[None]:
    """Raises: RecordsUnreachable for whatever the client raises."""
    try:
        with cancellable():
            yield
    except (RedisError, OSError, TimeoutError) as exc:
        raise RecordsUnreachable(str(exc).rstrip(".") or type(exc).__name__) from exc


def _record(fields: Sequence[bytes | str | None]) -> Record | None:
    value, version = fields
    return None if value is None or version is None else Record(cast("bytes", value), int(version))
