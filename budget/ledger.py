"""The ledger port: hold before a call, settle after it, exactly once.

Owns: the protocol and its words. Does not own: storage (memory.py), prices (price.py).
Invariant: for every scope and window, settled + held <= limit + debt at every instant; when everything
has ended, held = 0 and settled = every token received from a backend.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, Protocol, Self

import msgspec

Unit = Literal["tokens", "thinking_tokens", "usd", "requests", "concurrency"]
Window = Literal["second", "minute", "hour", "day", "month", "total"]


class Limit(msgspec.Struct, frozen=True, kw_only=True):
    """What a scope may spend per window.

    Attributes:
        scope: e.g. `team:ml`.
        unit: `usd` amounts are integer nano-USD.
        amount: in the unit.
        window: None for concurrency.
    """

    scope: str
    unit: Unit
    amount: int
    window: Window | None = None


class Amounts(msgspec.Struct, frozen=True, kw_only=True):
    """What is held or was used. `requests` and `concurrency` are 1 per hold, always."""

    tokens: int = 0
    thinking_tokens: int = 0
    nano_usd: int = 0

    def by_unit(self) -> dict[Unit, int]:
        """The amount in every unit a limit may have."""
        return {
            "tokens": self.tokens,
            "thinking_tokens": self.thinking_tokens,
            "usd": self.nano_usd,
            "requests": 1,
            "concurrency": 1,
        }


class Remaining(msgspec.Struct, frozen=True, kw_only=True):
    """The tightest limit of one unit, for `x-ratelimit-*` and the budget header.

    Attributes:
        limit: amount of that limit.
        remaining: amount neither settled nor held, never below 0.
        reset_s: until its window rolls.
    """

    limit: int
    remaining: int
    reset_s: float


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was settled on one day for one combination of scopes and mode.

    Attributes:
        day: in UTC.
        scopes: that paid, the model's own included.
    """

    day: dt.date
    scopes: tuple[str, ...]
    mode: str
    requests: int
    tokens: int
    thinking_tokens: int
    nano_usd: int


class LedgerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How the ledger's store is.

    Attributes:
        kind: `memory`, `sqlite` or `redis`.
        is_reachable: it answers.
        holds: open now.
        held: by them.
        detail: for humans.
    """

    kind: str
    is_reachable: bool
    holds: int
    held: Amounts
    detail: str


class Hold(Protocol):
    """A reservation in every scope of a request, as an async context manager.

    Leaving the block settles what was last reported. A hold that reports nothing settles nothing and so
    releases all of it.
    """

    ceiling: Amounts

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused; then nothing is held anywhere."""

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle exactly once, also when cancelled."""

    def report(self, used: Amounts) -> None:
        """Say what was used so far; cheap, called while streaming."""

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit` over the hold's scopes; None when nothing limits it."""


class Ledger(Protocol):
    """Where budgets live."""

    def hold(self, scopes: Sequence[str], ceiling: Amounts) -> Hold:
        """A hold of `ceiling` in every scope at once, to be entered with `async with`."""

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held stays."""

    def held(self) -> Amounts:
        """Everything held now, counted once per hold."""

    async def close(self) -> None:
        """Write out what is pending."""
