"""The ledger in memory: the reference for the others. Budgets end with the process.

Every operation is synchronous and O(limits of the request's scopes), so holds of one event loop never
interleave. Windows are calendar windows in UTC; a hold and its settlement belong to the windows it was
taken in. Time comes from the `clock` passed in, as seconds since the epoch.
"""

from __future__ import annotations

import calendar
import datetime as dt
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from budget.errors import HoldRefused, Refusal
from budget.ledger import Amounts, Limit, Remaining, Unit, Window
from budget.price import NANO_PER_USD

_FIXED_S: dict[Window, int] = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
_RATE_WINDOWS = {"second", "minute"}
NOTHING = Amounts()


class _Account:
    """One limit, and what its present window has settled and holds."""

    __slots__ = ("debt", "held_in_window", "limit", "rolls_at", "settled", "unit", "window_id")

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.unit = limit.unit
        self.settled = self.held_in_window = self.debt = self.window_id = 0
        self.rolls_at = 0.0

    def roll(self, now: float) -> None:
        """Begin a new window if the present one is over; a clock that jumps back changes nothing."""
        if now >= self.rolls_at:
            self.rolls_at = window_end(self.limit.window, now)
            self.window_id += 1
            self.settled = self.held_in_window = self.debt = 0

    def free(self) -> int:
        """Room for another hold; debt gives none, so an overrun is paid back by later requests."""
        return self.limit.amount - self.settled - self.held_in_window


class MemoryHold:
    """See budget.ledger.Hold."""

    __slots__ = ("_accounts", "_is_open", "_ledger", "_scopes", "_used", "_windows", "ceiling")

    def __init__(self, ledger: MemoryLedger, scopes: Sequence[str], ceiling: Amounts) -> None:
        self._ledger = ledger
        self._scopes = scopes
        self._accounts: list[_Account] = []
        self._windows: list[int] = []
        self._used = NOTHING
        self._is_open = False
        self.ceiling = ceiling

    async def __aenter__(self) -> Self:
        """Take the hold. Raises: HoldRefused; then nothing is held anywhere."""
        try:
            self._accounts = self._ledger.take(self._scopes, self.ceiling)
        except HoldRefused:
            self._accounts = self._ledger.accounts(self._scopes)  # so that `remaining` can tell why
            raise
        self._windows = [account.window_id for account in self._accounts]
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle what was last reported, once."""
        if self._is_open:
            self._is_open = False
            self._ledger.settle(self._accounts, self._windows, self.ceiling, self._used)

    def report(self, used: Amounts) -> None:
        """Say what was used so far."""
        self._used = used

    def remaining(self, unit: Unit) -> Remaining | None:
        """The tightest limit of `unit` over the hold's scopes."""
        tightest: _Account | None = None
        least = 0
        for account in self._accounts:
            if account.unit == unit:
                free = account.limit.amount - account.settled - account.held_in_window
                if tightest is None or free < least:
                    tightest, least = account, free
        if tightest is None:
            return None
        reset_s = tightest.rolls_at - self._ledger.clock()
        return Remaining(
            limit=tightest.limit.amount, remaining=least if least > 0 else 0, reset_s=reset_s if reset_s > 0 else 0.0
        )


class MemoryLedger:
    """See budget.ledger.Ledger."""

    def __init__(self, limits: Sequence[Limit] = (), *, clock: Callable[[], float]) -> None:
        self.clock = clock
        self._accounts: dict[str, list[_Account]] = {}
        self._held_tokens = self._held_thinking = self._held_nano_usd = 0
        self.set_limits(limits)

    def set_limits(self, limits: Sequence[Limit]) -> None:
        """Replace the limits; what is settled and held under an unchanged scope, unit and window stays.

        Of two limits on the same scope, unit and window the tighter one counts.
        """
        known = {self._key(a.limit): a for accounts in self._accounts.values() for a in accounts}
        tightest: dict[tuple[str, Unit, Window | None], Limit] = {}
        for limit in limits:
            other = tightest.get(self._key(limit))
            if other is None or limit.amount < other.amount:
                tightest[self._key(limit)] = limit
        self._accounts = {}
        for key, limit in tightest.items():
            account = known.get(key) or _Account(limit)
            account.limit = limit
            self._accounts.setdefault(limit.scope, []).append(account)

    def hold(self, scopes: Sequence[str], ceiling: Amounts) -> MemoryHold:
        """A hold to be entered with `async with`."""
        return MemoryHold(self, scopes, ceiling)

    def held(self) -> Amounts:
        """Everything held now."""
        return Amounts(tokens=self._held_tokens, thinking_tokens=self._held_thinking, nano_usd=self._held_nano_usd)

    async def close(self) -> None:
        """Nothing is pending in memory."""

    def accounts(self, scopes: Sequence[str]) -> list[_Account]:
        """The accounts of `scopes`."""
        return [account for scope in scopes for account in self._accounts.get(scope, ())]

    def take(self, scopes: Sequence[str], ceiling: Amounts) -> list[_Account]:
        """Hold `ceiling` in every account of `scopes`, or raise HoldRefused for the tightest and hold nothing."""
        accounts: list[_Account] = []
        if self._accounts:
            now = self.clock()
            need = ceiling.by_unit()
            short: _Account | None = None
            for scope in scopes:
                for account in self._accounts.get(scope, ()):
                    if now >= account.rolls_at:
                        account.roll(now)
                    accounts.append(account)
                    if need[account.unit] > account.free() and (
                        short is None or _tightness(account) < _tightness(short)
                    ):
                        short = account
            if short is not None:
                raise self._refusal(short, need[short.unit], now)
            for account in accounts:
                account.held_in_window += need[account.unit]
        self._count(ceiling, 1)
        return accounts

    def settle(self, accounts: Sequence[_Account], windows: Sequence[int], ceiling: Amounts, used: Amounts) -> None:
        """Replace the hold by actual use in the windows it was taken in; overrun becomes debt."""
        self._count(ceiling, -1)
        if not accounts:
            return
        held, spent = ceiling.by_unit(), used.by_unit()
        for account, window_id in zip(accounts, windows, strict=True):
            if account.window_id != window_id:
                continue  # that window is over: its books are closed, nothing of it burdens the next
            unit = account.unit
            account.held_in_window -= held[unit]
            if unit == "concurrency":
                continue
            account.settled += spent[unit]
            if spent[unit] > held[unit]:
                account.debt += spent[unit] - held[unit]

    def _count(self, ceiling: Amounts, sign: int) -> None:
        self._held_tokens += sign * ceiling.tokens
        self._held_thinking += sign * ceiling.thinking_tokens
        self._held_nano_usd += sign * ceiling.nano_usd

    @staticmethod
    def _key(limit: Limit) -> tuple[str, Unit, Window | None]:
        return limit.scope, limit.unit, limit.window

    @staticmethod
    def _refusal(account: _Account, need: int, now: float) -> HoldRefused:
        limit = account.limit
        kind: Refusal
        retry_after_s: float | None = max(0.001, account.rolls_at - now)
        if need > limit.amount:
            kind, retry_after_s = "budget_spent", None  # no wait makes it fit
        elif limit.unit == "concurrency":
            kind, retry_after_s = "rate", 1.0
        elif limit.window in _RATE_WINDOWS:
            kind = "rate"
        elif limit.amount - account.settled >= need:
            kind, retry_after_s = "budget_held", 1.0
        else:
            kind, retry_after_s = "budget_spent", None
        per = f" per {limit.window}" if limit.window not in {None, "total"} else ""
        remedy = " Ask for fewer tokens." if need > limit.amount else ""
        return HoldRefused(
            f"{limit.scope} has {_shown(account.free(), limit.unit)} of {_shown(limit.amount, limit.unit)} "
            f"{limit.unit}{per} left, and this request needs {_shown(need, limit.unit)}.{remedy}",
            scope=limit.scope,
            unit=limit.unit,
            kind=kind,
            retry_after_s=retry_after_s,
        )


def _tightness(account: _Account) -> float:
    return account.free() / account.limit.amount


def _shown(amount: int, unit: Unit) -> str:
    """An amount as a person reads it: dollars, not nano-USD; nothing is below 0."""
    amount = max(0, amount)
    return f"{amount / NANO_PER_USD:.9f}".rstrip("0").rstrip(".") if unit == "usd" else str(amount)


def window_end(window: Window | None, now: float) -> float:
    """When the calendar window (UTC) that holds `now` ends, in epoch seconds; never, for total."""
    if window is None or window == "total":
        return float("inf")
    if window == "month":
        day = dt.datetime.fromtimestamp(now, tz=dt.UTC)
        first = dt.datetime(day.year, day.month, 1, tzinfo=dt.UTC)
        return first.timestamp() + calendar.monthrange(day.year, day.month)[1] * 86400.0
    length = _FIXED_S[window]
    return (now // length + 1) * length
