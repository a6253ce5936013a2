"""Which window a moment belongs to, and what a rate admits."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget.books import level_after_settling, level_now, present_window, rate_standing, window_end, window_start
from budget.ledger import Window
from tests.budget.clocks import tokens, utc


@pytest.mark.parametrize(
    ("window", "now", "end"),
    [
        ("second", utc(2024, 5, 17, 12, 0, 0) + 0.5, utc(2024, 5, 17, 12, 0, 1)),
        ("minute", utc(2024, 5, 17, 12, 0, 59), utc(2024, 5, 17, 12, 1)),
        ("minute", utc(2024, 5, 17, 12, 1), utc(2024, 5, 17, 12, 2)),
        ("hour", utc(2024, 12, 31, 23, 30), utc(2025, 1, 1)),
        ("day", utc(2024, 2, 28, 23, 59, 59), utc(2024, 2, 29)),
        ("day", utc(2023, 2, 28, 1), utc(2023, 3, 1)),
        ("month", utc(2024, 2, 29, 23, 59, 59), utc(2024, 3, 1)),
        ("month", utc(2023, 2, 1), utc(2023, 3, 1)),
        ("month", utc(2100, 2, 15), utc(2100, 3, 1)),
        ("month", utc(2024, 12, 31, 23, 59, 59), utc(2025, 1, 1)),
        ("month", utc(2024, 4, 30), utc(2024, 5, 1)),
        ("total", utc(2024, 1, 1), float("inf")),
        (None, utc(2024, 1, 1), float("inf")),
    ],
)
def test_windows_end_where_the_calendar_says(window: Window | None, now: float, end: float) -> None:
    """Windows are calendar windows in UTC: months have their own lengths, leap years included."""
    assert window_end(window, window_start(window, now)) == end


@pytest.mark.parametrize("window", ["hour", "day", "month"])
def test_a_clock_set_back_stays_in_the_newest_window(window: Window) -> None:
    """Up to a day back the newest books stay in use; books from further ahead were opened by a wrong clock."""
    now = utc(2024, 5, 1, 0, 30)
    start = window_start(window, now)
    assert present_window(window, now, []) == start
    assert present_window(window, now - 3600, [start]) == start
    assert present_window(window, now - 86_400, [start - 7, start]) == start
    assert present_window(window, now, [start, int(now) + 86_401]) == start


@pytest.mark.parametrize("zone", ["Europe/Vienna", "America/St_Johns", "UTC"])
def test_daylight_saving_changes_no_window(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine's own clock has days of 23 and 25 hours, every budget's day has 24, from midnight UTC."""
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        for first in (utc(2024, 3, 10), utc(2024, 3, 31), utc(2024, 10, 27), utc(2024, 11, 3)):
            for hour in range(49):
                start = window_start("day", first + hour * 3600)
                assert start == first + hour // 24 * 86_400
                assert window_end("day", start) == start + 86_400
        assert window_end("month", window_start("month", utc(2024, 3, 31, 23))) == utc(2024, 4, 1)
    finally:
        monkeypatch.undo()
        time.tzset()


@given(
    amount=st.integers(1, 10**12),
    grants=st.lists(st.tuples(st.floats(0, 100), st.integers(0, 10**9), st.floats(0, 1)), max_size=30),
)
def test_a_rate_never_admits_more_than_burst_and_rate(amount: int, grants: list[tuple[float, int, float]]) -> None:
    """However requests come and settle, what is used up to any time is at most amount + amount / window * t."""
    limit = tokens(amount, "minute")
    level = now = used = 0.0
    for wait_s, need, share in grants:
        level, now = level_now(limit, level, now, now + wait_s), now + wait_s
        if need <= rate_standing(limit, level, need).free:
            spent = int(need * share)
            level = level_after_settling(level + need, need, spent)
            used += spent
        assert used <= amount + amount / 60 * now + 1e-3


@given(amount=st.integers(1, 10**9), level=st.floats(0, 2e9), need=st.integers(1, 10**9))
def test_a_rate_says_when_it_will_fit(amount: int, level: float, need: int) -> None:
    """A millisecond after the wait that is named, what was refused fits, if it fits at all."""
    limit = tokens(amount, "second")
    standing = rate_standing(limit, level, need)
    assert standing.wait_s > 0 or need <= standing.free
    later = level_now(limit, level, 0.0, standing.wait_s + 0.001)
    assert need > amount or need <= rate_standing(limit, later, need).free
