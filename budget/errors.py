"""What can go wrong with a budget.

BudgetError
├── HoldRefused           a limit has no room for the hold; says which, and when to try again
├── StoreUnreachable      the ledger's store does not answer, so nothing can be held
│   └── HoldEnded         nothing more can be held under this hold: its lease was over
├── EnvelopeSpent         a request used up its own tokens, dollars or seconds
├── Conflict              a record is not at the version that the change was made for
└── RecordsUnreachable    the store of records cannot be reached, or failed
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from budget.ledger import Standing

Refusal = Literal["rate", "budget_spent", "budget_held"]


class BudgetError(Exception):
    """Root of this package's errors."""


class HoldRefused(BudgetError):
    """A limit has no room for the hold.

    Attributes:
        scope: the tightest scope that is short, e.g. `team:ml`.
        unit: what is short there.
        kind: `rate` for windows up to a minute and for concurrency; else `budget_spent` or `budget_held`.
        retry_after_s: when a retry may succeed; None if it never will.
        standings: of all limits of the hold, for the headers of the answer, where the ledger knows them.
    """

    standings: Sequence[Standing] = ()

    def __init__(self, message: str, *, scope: str, unit: str, kind: Refusal, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.scope = scope
        self.unit = unit
        self.kind = kind
        self.retry_after_s = retry_after_s


class StoreUnreachable(BudgetError):
    """The ledger's store does not answer, or not in time; nothing was held."""


class HoldEnded(StoreUnreachable):
    """The hold has ended in the store, its lease being over; a new attempt changes nothing."""


class EnvelopeSpent(BudgetError):
    """A request used up its own envelope.

    Attributes:
        part: `tokens`, `usd` or `seconds`.
    """

    def __init__(self, part: str) -> None:
        super().__init__(f"the envelope's {part} are spent")
        self.part = part


class Conflict(BudgetError):
    """A record is not at the version that the change was made for; nothing was written.

    Attributes:
        key: of the record.
        version: that it has; 0 for none.
    """

    def __init__(self, key: str, version: int) -> None:
        super().__init__(f"the record {key!r} is at version {version}")
        self.key = key
        self.version = version


class RecordsUnreachable(BudgetError):
    """The store of records cannot be reached, or failed; a change may have happened or not."""
