"""The rules every ledger keeps: calendar windows, rates, and what a refusal says.

Owns: which window a moment belongs to, what a rate (GCRA, ITU-T I.371) admits, which of several short limits is
named and when a retry may succeed. Pure: time is passed in. Does not own: who stores the counts (ledgers/).

A limit per second or minute is a *rate*: its bucket holds `amount` and refills continuously, so that
admitted(t) <= amount + amount / window * t. Its only state is the theoretical arrival time, in microseconds:
when the bucket will be full again. Every longer window is a *calendar window* in UTC with books of its own.
"""

from __future__ import annotations

import calendar
import datetime as dt
import math
from collections.abc import Sequence

from budget.errors import HoldRefused, Refusal
from budget.ledger import Limit, Standing, Unit, Window
from budget.price import NANO_PER_USD

FIXED_S: dict[Window, int] = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
RATES: frozenset[Window | None] = frozenset({"second", "minute"})
RETRY_S = 1.0  # for what others hold: nobody knows when they end
JUMP_BACK_S = 86400  # a clock set back by up to this frees nothing; one that was further ahead was wrong


def window_start(window: Window | None, now_s: float) -> int:
    """When the calendar window (UTC) that holds `now_s` began, in epoch seconds; 0 for total and concurrency."""
    if window is None or window == "total":
        return 0
    if window == "month":
        day = dt.datetime.fromtimestamp(now_s, tz=dt.UTC)
        return int(dt.datetime(day.year, day.month, 1, tzinfo=dt.UTC).timestamp())
    return int(now_s // FIXED_S[window] * FIXED_S[window])


def window_end(window: Window | None, start_s: int) -> float:
    """When the calendar window that began at `start_s` ends, in epoch seconds; never, for total."""
    if window is None or window == "total":
        return math.inf
    if window == "month":
        day = dt.datetime.fromtimestamp(start_s, tz=dt.UTC)
        return start_s + calendar.monthrange(day.year, day.month)[1] * 86400.0
    return float(start_s + FIXED_S[window])


def present_window(window: Window | None, now_s: float, newest_s: int) -> int:
    """The start of the window to book in, if the newest books so far began at `newest_s`.

    A clock that jumps back stays in the newest window, so that nothing spent is free again.
    """
    start = window_start(window, now_s)
    return newest_s if start < newest_s <= now_s + JUMP_BACK_S else start


def rate_us(amount: int, limit: Limit) -> int:
    """How far `amount` moves the arrival time of a rate, in microseconds."""
    assert limit.window is not None
    return -(-amount * FIXED_S[limit.window] * 1_000_000 // limit.amount)


def rate_standing(limit: Limit, arrival_us: int, now_us: int, need: int = 0) -> Standing:
    """What a rate has left; `wait_s` is until it admits `need`."""
    assert limit.window is not None
    period_us = FIXED_S[limit.window] * 1_000_000
    ahead_us = max(0, arrival_us - now_us)
    return Standing(
        limit,
        free=(period_us - ahead_us) * limit.amount // period_us,
        settled=0,
        reset_s=ahead_us / 1e6,
        wait_s=max(0, ahead_us + rate_us(need, limit) - period_us) / 1e6,
    )


def arrival_after_hold(limit: Limit, arrival_us: int, now_us: int, need: int) -> int:
    """The arrival time once `need` is held; one left behind by a clock that was ahead is brought back."""
    assert limit.window is not None
    ahead = max(arrival_us, now_us)
    return min(ahead, now_us + 2 * FIXED_S[limit.window] * 1_000_000) + rate_us(need, limit)


def arrival_after_settling(limit: Limit, arrival_us: int, now_us: int, held: int, used: int) -> int:
    """The arrival time once a hold is replaced by its use: moved back by what was not used, never before now."""
    moved_us = rate_us(used, limit) - rate_us(held, limit)
    if moved_us >= 0:
        return max(arrival_us, now_us) + moved_us
    return max(arrival_us + moved_us, min(arrival_us, now_us))


def refusal(short: Standing, need: int) -> HoldRefused:
    """What the client is told of the tightest limit that is short."""
    limit = short.limit
    kind: Refusal
    retry_after_s: float | None
    if need > limit.amount:
        kind, retry_after_s = "budget_spent", None  # no wait makes it fit
    elif limit.unit == "concurrency":
        kind, retry_after_s = "rate", RETRY_S
    elif limit.window in RATES:
        kind, retry_after_s = "rate", max(0.001, short.wait_s)
    elif limit.amount - short.settled >= need:
        kind, retry_after_s = "budget_held", RETRY_S
    else:
        kind, retry_after_s = "budget_spent", None
    per = f" per {limit.window}" if limit.window not in {None, "total"} else ""
    remedy = " Ask for fewer tokens." if need > limit.amount else ""
    return HoldRefused(
        f"{limit.scope} has {_shown(short.free, limit.unit)} of {_shown(limit.amount, limit.unit)} "
        f"{limit.unit}{per} left, and this request needs {_shown(need, limit.unit)}.{remedy}",
        scope=limit.scope,
        unit=limit.unit,
        kind=kind,
        retry_after_s=retry_after_s,
    )


def _shown(amount: int, unit: Unit) -> str:
    """An amount as a person reads it: dollars, not nano-USD; nothing is below 0."""
    amount = max(0, amount)
    return f"{amount / NANO_PER_USD:.9f}".rstrip("0").rstrip(".") if unit == "usd" else str(amount)


def tightest(limits: Sequence[Limit]) -> dict[tuple[str, Unit, Window | None], Limit]:
    """Limits by what they limit; of two on the same scope, unit and window the tighter one counts."""
    found: dict[tuple[str, Unit, Window | None], Limit] = {}
    for limit in limits:
        key = (limit.scope, limit.unit, limit.window)
        other = found.get(key)
        if other is None or limit.amount < other.amount:
            found[key] = limit
    return found
