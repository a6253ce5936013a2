"""Records in memory: the reference for the others. They end with the process and belong to it alone.

Owns: the dictionary, its versions and the times at which records end. Every operation is synchronous, so calls of
one event loop never interleave. O(1) but for `scan` and `purge`, which are O(records).
"""

from __future__ import annotations

from collections.abc import Callable

from budget.errors import Conflict
from budget.records.port import Note, Record


class MemoryRecords:
    """See budget.records.port.Records.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: dict[str, Record] = {}
        self._ends_at: dict[str, float] = {}
        self._logs: dict[str, list[bytes]] = {}
        self._sequence = self._revision = 0

    async def get(self, key: str) -> Record | None:
        """See the port."""
        return self._present(key)

    async def put(
        self, key: str, value: bytes, *, expect: int | None = None, ttl_s: float | None = None, note: Note | None = None
    ) -> int:
        """See the port. Raises: Conflict."""
        self._check(key, expect)
        self._count(is_lasting=ttl_s is None or self._is_lasting(key))
        self._records[key] = Record(bytes(value), self._sequence)
        if ttl_s is None:
            self._ends_at.pop(key, None)
        else:
            self._ends_at[key] = self._clock() + ttl_s
        self._note(note)
        return self._sequence

    async def delete(self, key: str, *, expect: int | None = None, note: Note | None = None) -> bool:
        """See the port. Raises: Conflict."""
        self._check(key, expect)
        if self._present(key) is None:
            return False
        self._count(is_lasting=self._is_lasting(key))
        del self._records[key]
        self._ends_at.pop(key, None)
        self._note(note)
        return True

    async def scan(self, prefix: str, *, after: int = 0) -> list[tuple[str, Record]]:
        """See the port."""
        return sorted(
            (key, record)
            for key, record in self._records.items()
            if key.startswith(prefix) and record.version > after and key not in self._ends_at
        )

    async def append(self, log: str, entry: bytes) -> int:
        """See the port."""
        self._note(Note(log, entry))
        return len(self._logs.get(log, ()))

    async def read_log(self, log: str, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """See the port."""
        return list(enumerate(self._logs.get(log, [])[after : after + limit], start=after + 1))

    async def log_size(self, log: str) -> int:
        """See the port."""
        return len(self._logs.get(log, ()))

    async def revision(self) -> int:
        """See the port."""
        return self._revision

    async def purge(self) -> int:
        """See the port."""
        now = self._clock()
        over = [key for key, ends_at in self._ends_at.items() if ends_at <= now]
        for key in over:
            del self._records[key], self._ends_at[key]
        return len(over)

    async def close(self) -> None:
        """Nothing is open."""

    def _present(self, key: str) -> Record | None:
        ends_at = self._ends_at.get(key)
        return self._records.get(key) if ends_at is None or ends_at > self._clock() else None

    def _is_lasting(self, key: str) -> bool:
        return key in self._records and key not in self._ends_at

    def _check(self, key: str, expect: int | None) -> None:
        record = self._present(key)
        version = 0 if record is None else record.version
        if expect is not None and expect != version:
            raise Conflict(key, version)

    def _count(self, *, is_lasting: bool) -> None:
        self._sequence += 1
        if is_lasting:
            self._revision = self._sequence

    def _note(self, note: Note | None) -> None:
        if note is not None:
            self._logs.setdefault(note.log, []).append(bytes(note.entry))
