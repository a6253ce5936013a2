"""The ledger port: hold before a call, settle after it, exactly once.

Owns: the protocol and its words. Does not own: the rules of windows and rates (books.py), storage (ledgers/),
prices (price.py).
Invariant: for every scope and calendar window, settled + held <= limit + debt at every instant; when everything
has ended, held = 0 and settled = every token received from a backend.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
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

    def by_unit(self, *, requests: int = 1) -> dict[Unit, int]:
        """The amount in every unit a limit may have."""
        return {
            "tokens": self.tokens,
            "thinking_tokens": self.thinking_tokens,
            "usd": self.nano_usd,
            "requests": requests,
            "concurrency": requests,
        }

    def plus(self, more: Amounts) -> Amounts:
        """The sum."""
        return Amounts(
            tokens=self.tokens + more.tokens,
            thinking_tokens=self.thinking_tokens + more.thinking_tokens,
            nano_usd=self.nano_usd + more.nano_usd,
        )

    def exceeds(self, other: Amounts) -> bool:
        """Whether it is more in any unit."""
        return (
            self.tokens > other.tokens or self.thinking_tokens > other.thinking_tokens or self.nano_usd > other.nano_usd
        )

    def beyond(self, less: Amounts) -> Amounts:
        """What is more than in `less`, unit by unit."""
        return Amounts(
            tokens=max(0, self.tokens - less.tokens),
            thinking_tokens=max(0, self.thinking_tokens - less.thinking_tokens),
            nano_usd=max(0, self.nano_usd - less.nano_usd),
        )


class Remaining(msgspec.Struct, frozen=True, kw_only=True):
    """The tightest limit of one unit, for `x-ratelimit-*` and the budget header.

    Attributes:
        limit: amount of that limit.
        remaining: amount neither settled nor held, never below 0.
        reset_s: until its window rolls, or until a rate is back at its full burst.
    """

    limit: int
    remaining: int
    reset_s: float


class Standing(msgspec.Struct, frozen=True):
    """One limit as a hold found or left it.

    Attributes:
        limit: which.
        free: neither settled nor held; below 0 when the limit was lowered or overrun.
        settled: in its window; 0 for rates and concurrency.
        reset_s: until the window ends, or the bucket is full again.
        wait_s: of a rate that is short: until it admits the need.
    """

    limit: Limit
    free: int
    settled: int
    reset_s: float
    wait_s: float = 0.0

    def tightness(self) -> float:
        """The share that is left; the least of several short limits is the one to name."""
        return self.free / self.limit.amount

    def remaining(self) -> Remaining:
        """As the client is told."""
        return Remaining(limit=self.limit.amount, remaining=max(0, self.free), reset_s=self.reset_s)


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What was settled on one day for one combination of scopes and mode.

    Attributes:
        day: in UTC, of the hold.
        scopes: all that were charged; the model is the scope `model:NAME`.
        mode: as in the request's decision; empty where a request has none.
    """

    day: dt.date
    scopes: tuple[str, ...]
    mode: str
    requests: int
    tokens: int
    thinking_tokens: int
    nano_usd: int


class LedgerHealth(msgspec.Struct, frozen=True, kw_only=True):
    """How the store of a ledger is.

    Attributes:
        kind: `memory`, `sqlite` or `redis`.
        is_reachable: it answers.
        holds: open holds, those of other processes included where the store is shared and reachable.
        held: their sum.
        detail: for a person.
    """

    kind: str
    is_reachable: bool
    holds: int
    held: Amounts
    detail: str = ""


class Figures(msgspec.Struct, kw_only=True):
    """What this process knows of its ledger without asking the store; for metrics.

    Attributes:
        is_reachable: the store answered last.
        waiting: settlements that the store does not have yet.
        swept: holds whose lease was over, settled for a process that died or hung.
        debt: used beyond what was held, in total.
        offline: holds that were granted while the store was lost.
    """

    is_reachable: bool = True
    waiting: int = 0
    swept: int = 0
    debt: Amounts = Amounts()
    offline: int = 0


Used = Amounts | Callable[[], Amounts]


def told(used: Used) -> Amounts:
    """What was used, as a hold was told."""
    return used if isinstance(used, Amounts) else used()


class Hold(Protocol):
    """A reservation in every scope of a request, as an async context manager.

    Leaving the block settles what was last reported. A hold that reports nothing settles nothing and so
    releases all of it.

    Attributes:
        is_offline: it was granted out of what the process may spend while its store does not answer.
    """

    is_offline: bool

    @property
    def ceiling(self) -> Amounts:
        """What is held, extensions included."""

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused, StoreUnreachable; then nothing is held anywhere."""

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle exactly once, also when cancelled."""

    async def extend(self, more: Amounts) -> None:
        """Hold `more` besides, in the windows the hold was taken in.

        Raises: HoldRefused, StoreUnreachable; then the hold is as it was.
        """

    def report(self, used: Used) -> None:
        """Say what was used so far, or how to find out: a function is asked whenever it matters."""

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit` over the hold's scopes; None when nothing limits it."""

    def standings(self) -> Sequence[Standing]:
        """All limits over the hold's scopes, as far as they are known."""


class Ledger(Protocol):
    """Where budgets live."""

    def hold(self, scopes: Sequence[str], ceiling: Amounts, *, mode: str = "") -> Hold:
        """A hold of `ceiling` in every scope at once, to be entered with `async with`."""

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held stays."""

    def held(self) -> Amounts:
        """Everything this process holds now, counted once per hold."""

    def figures(self) -> Figures:
        """What is known without asking the store."""

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """What was settled on these days, both included. Raises: StoreUnreachable."""

    async def health(self) -> LedgerHealth:
        """How the store is; never raises for one that is down."""

    async def run(self) -> None:
        """Report, sweep and reconnect until cancelled; whoever serves with the ledger keeps this running."""

    async def close(self) -> None:
        """Write out what is pending."""
