"""The rules every ledger keeps: calendar windows, rates, and what a refusal says.

Owns: which window a moment belongs to, what a rate admits, which of several short limits is named and when a retry
may succeed. Pure: time is passed in. Does not own: who stores the counts (ledgers/).

A limit per second or minute is a *rate*: admitted(t) <= amount + amount / window * t. It is the generic cell rate
algorithm (GCRA, ITU-T I.371) in its form as a continuous-state leaky bucket: the state is a level, in units of the
limit, and when it was seen; it runs out continuously. (The form with an arrival time would have to round a unit to
time, and would refuse everything for an hour after a clock that was an hour ahead is set right.) Every longer window
is a *calendar window* in UTC with books of its own.
"""

from __future__ import annotations

import calendar
import datetime as dt
import math
from collections.abc import Iterable, Mapping, Sequence

from budget.errors import HoldRefused, Refusal
from budget.ledger import Limit, Standing, Unit, Window
from budget.price import NANO_PER_USD

FIXED_S: dict[Window | None, int] = {"second": 1, "minute": 60, "hour": 3600, "day": 86400}
RATES: frozenset[Window | None] = frozenset({"second", "minute"})
RETRY_S = 1.0  # for what others hold: nobody knows when they end
JUMP_BACK_S = 86400  # a clock set back by up to this frees nothing; one that was further ahead was wrong
KEPT_WINDOWS = 3  # of one limit: the present one, and those that late holds may still settle in
KEPT_DAYS = 400  # of usage
ROUNDING = 1e-6  # of a unit: levels are floats


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


def present_window(window: Window | None, now_s: float, starts: Iterable[int]) -> int:
    """The start of the window to book in, if there are books that began at `starts`.

    A clock that jumps back stays in the newest window, so that nothing spent is free again.
    """
    return max([window_start(window, now_s), *(start for start in starts if start <= now_s + JUMP_BACK_S)])


def level_now(limit: Limit, level: float, seen_s: float, now_s: float) -> float:
    """What of a rate's `level`, as of `seen_s`, has not run out; all of it if the clock was set back since then."""
    if now_s > seen_s:
        level -= (now_s - seen_s) * limit.amount / FIXED_S[limit.window]
        return level if level > 0.0 else 0.0
    return level


def rate_free(limit: Limit, level: float) -> int:
    """What fits into the bucket of a rate."""
    return math.floor(limit.amount - level + ROUNDING)


def rate_standing(limit: Limit, level: float, need: int = 0) -> Standing:
    """What a rate has left at a present `level`; `wait_s` is until it admits `need`."""
    return Standing(
        limit,
        free=rate_free(limit, level),
        settled=0,
        reset_s=rate_reset_s(limit, level),
        wait_s=max(0.0, rate_reset_s(limit, level + need - limit.amount)),
    )


def rate_reset_s(limit: Limit, level: float) -> float:
    """Seconds that a level takes to run out."""
    return level * FIXED_S[limit.window] / limit.amount


def level_after_settling(level: float, held: int, used: int) -> float:
    """The present level once a hold is replaced by its use: at least empty, so that nothing is saved up.

    What was held and not used comes back also if it has run out meanwhile: admitted(t) counts from the beginning, and
    a hold that took others' room for a while gives it to them later.
    """
    level += used - held
    return level if level > 0.0 else 0.0


def refusal(standings: Iterable[Standing], needs: Mapping[Unit, int]) -> HoldRefused:
    """What the client is told of the tightest of those limits that are short; one of them is."""
    short = min((s for s in standings if needs[s.limit.unit] > max(0, s.free)), key=Standing.tightness)
    limit, need = short.limit, needs[short.limit.unit]
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
