"""Records in memory: the reference for the others. They end with the process and belong to it alone.

Owns: the dictionary, its versions and the times at which records end. Every operation is synchronous, so calls of
one event loop never interleave. O(1) but for `scan`, which is O(lasting records), and `purge`, which is O(the others).
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
        self._lasting: dict[str, Record] = {}
        self._ending: dict[str, tuple[Record, float]] = {}  # and when
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
        self._count(is_lasting=ttl_s is None or key in self._lasting)
        self._drop(key)
        record = Record(bytes(value), self._sequence)
        if ttl_s is None:
            self._lasting[key] = record
        else:
            self._ending[key] = record, self._clock() + ttl_s
        self._note(note)
        return self._sequence

    async def delete(self, key: str, *, expect: int | None = None, note: Note | None = None) -> bool:
        """See the port. Raises: Conflict."""
        self._check(key, expect)
        if self._present(key) is None:
            return False
        self._count(is_lasting=key in self._lasting)
        self._drop(key)
        self._note(note)
        return True

    async def scan(self, prefix: str, *, after: int = 0) -> list[tuple[str, Record]]:
        """See the port."""
        return sorted(
            (key, record) for key, record in self._lasting.items() if key.startswith(prefix) and record.version > after
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
        over = [key for key, (_, ends_at) in self._ending.items() if ends_at <= now]
        for key in over:
            del self._ending[key]
        return len(over)

    async def close(self) -> None:
        """Nothing is open."""

    def _present(self, key: str) -> Record | None:
        record, ends_at = self._ending.get(key, (None, 0.0))
        return self._lasting.get(key) if record is None else record if ends_at > self._clock() else None

    def _drop(self, key: str) -> None:
        self._lasting.pop(key, None)
        self._ending.pop(key, None)

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
