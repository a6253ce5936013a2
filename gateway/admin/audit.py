"""The audit log: who changed what through the admin API or the shell, when and from where.

Owns: the form of an entry. Entries are appended in the same step as the change they tell of, and never changed.
No entry holds a secret: `before` and `after` are what the API shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from budget.records.port import Note, Records
from gateway.admin.kept import AUDIT

if TYPE_CHECKING:
    from gateway.admin.admins import Actor

Json = dict[str, Any]


class AuditEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One change.

    Attributes:
        at_s: seconds since 1970.
        actor: id of the admin token, `root` or `cli`.
        address: where the request came from; empty for the shell.
        request_id: of the request; empty for the shell.
        action: such as `key.create`.
        target: id of what was changed.
        before, after: as the API shows it; None where there was or is nothing.
    """

    at_s: float
    actor: str
    address: str
    request_id: str
    action: str
    target: str
    before: Json | None
    after: Json | None


def audited(actor: Actor, action: str, target: str, *, at_s: float, before: Json | None, after: Json | None) -> Note:
    """The entry for a change, to be appended with it."""
    entry = AuditEntry(
        at_s=at_s,
        actor=actor.id,
        address=actor.address,
        request_id=actor.request_id,
        action=action,
        target=target,
        before=before,
        after=after,
    )
    return Note(AUDIT, msgspec.json.encode(entry))


async def read_audit(records: Records, *, after: int | None, limit: int) -> tuple[list[tuple[int, AuditEntry]], int]:
    """Entries with their numbers, ascending, and the number of the last one there is.

    Args:
        records: where they are.
        after: only later ones than this number; None for the last `limit`.
        limit: at most so many.

    Raises: RecordsUnreachable.
    """
    size = await records.log_size(AUDIT)
    begin = max(0, size - limit) if after is None else after
    entries = await records.read_log(AUDIT, after=begin, limit=limit)
    return [(number, msgspec.json.decode(entry, type=AuditEntry)) for number, entry in entries], size
