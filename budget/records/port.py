"""The records port: what the store keeps that is not money, such as keys, limits and the audit log.

Owns: the protocol and its words. Does not own: what records mean, nor storage (memory.py, sqlite.py, redis.py).
Values are bytes under a key. A record either lasts or has a time to live. Several processes may work on the
same records; each call happens for all of them at once, or not at all.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Record(NamedTuple):
    """A value, and the version that `expect` compares; versions grow over all records and are never given twice."""

    value: bytes
    version: int


class Note(NamedTuple):
    """An entry for a log, to be appended in the same step as a change."""

    log: str
    entry: bytes


class Records(Protocol):
    """Where records live.

    Every method may raise RecordsUnreachable; a change may then have happened or not.
    """

    async def get(self, key: str) -> Record | None:
        """The record under `key`; None if there is none or its time is over."""

    async def put(
        self, key: str, value: bytes, *, expect: int | None = None, ttl_s: float | None = None, note: Note | None = None
    ) -> int:
        """Write a record and return its version.

        Args:
            key: not empty.
            value: any bytes.
            expect: the version it must have now, 0 for none; None writes whatever is there.
            ttl_s: seconds until it is gone; None lasts. A second `put` says it anew.
            note: appended to its log if, and only if, the record was written.

        Raises: Conflict when the version is another.
        """

    async def delete(self, key: str, *, expect: int | None = None, note: Note | None = None) -> bool:
        """Remove a record; False if there was none.

        Args:
            key: not empty.
            expect: as in `put`.
            note: appended to its log if, and only if, a record was removed.

        Raises: Conflict when the version is another.
        """

    async def scan(self, prefix: str, *, after: int = 0) -> list[tuple[str, Record]]:
        """The lasting records whose key begins with `prefix` and whose version is above `after`, ordered by key."""

    async def append(self, log: str, entry: bytes) -> int:
        """Add an entry to the end of a log and return its number, which is one more than the last, from 1."""

    async def read_log(self, log: str, *, after: int, limit: int) -> list[tuple[int, bytes]]:
        """At most `limit` entries with numbers above `after`, ascending."""

    async def log_size(self, log: str) -> int:
        """The number of the last entry; 0 for an empty log."""

    async def revision(self) -> int:
        """Grows with every change of a lasting record, and is at least the version of each: cheap enough to poll."""

    async def purge(self) -> int:
        """Free the room of records whose time is over, and return how many; they are gone without it, too."""

    async def close(self) -> None:
        """Let go of connections and files."""
