"""Usage: the ledger's rows in the groups that somebody asks for."""

from __future__ import annotations

import csv
import datetime as dt
import io
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget.ledger import UsageRow
from gateway.admin.usage import DIMENSIONS, MOST_GROUPS, SUMS, Dimension, group_usage, usage_csv
from gateway.errors import InvalidRequest

MONDAY, TUESDAY = dt.date(2026, 11, 23), dt.date(2026, 11, 24)


def row(day: dt.date, scopes: str, mode: str = "instant", tokens: int = 10) -> UsageRow:
    """One row of the ledger."""
    return UsageRow(
        day=day,
        scopes=tuple(scopes.split()),
        mode=mode,
        requests=1,
        tokens=tokens,
        thinking_tokens=tokens // 2,
        nano_usd=tokens * 1000,
    )


ROWS = [
    row(MONDAY, "key:a team:ml model:qwen"),
    row(MONDAY, "key:b team:ml model:qwen", "reasoning", 100),
    row(TUESDAY, "key:a team:ml model:phi", tokens=1000),
]


def grouped(*by: Dimension, scope: str | None = None, rows: list[UsageRow] | None = None) -> list[dict[str, object]]:
    """The groups, as they are answered."""
    entries = group_usage(ROWS if rows is None else rows, by, sees=lambda _: True, scope=scope)
    return [entry.model_dump(mode="json", exclude_none=True) for entry in entries]


def test_groups_have_sums() -> None:
    """Each group has its dimensions, in a fixed order, and the sums of its rows, money also in dollars."""
    assert grouped("mode", "day") == [
        {
            "day": "2026-11-23",
            "mode": "instant",
            "requests": 1,
            "tokens": 10,
            "thinking_tokens": 5,
            "nano_usd": 10_000,
            "cost_usd": 0.00001,
        },
        {
            "day": "2026-11-23",
            "mode": "reasoning",
            "requests": 1,
            "tokens": 100,
            "thinking_tokens": 50,
            "nano_usd": 100_000,
            "cost_usd": 0.0001,
        },
        {
            "day": "2026-11-24",
            "mode": "instant",
            "requests": 1,
            "tokens": 1000,
            "thinking_tokens": 500,
            "nano_usd": 1_000_000,
            "cost_usd": 0.001,
        },
    ]


def test_model_is_a_dimension_and_no_scope() -> None:
    """A row counts in each of its scopes, of which its model is none."""
    assert [(g["scope"], g["tokens"]) for g in grouped("scope")] == [("key:a", 1010), ("key:b", 100), ("team:ml", 1110)]
    assert [(g["model"], g["tokens"]) for g in grouped("model")] == [("phi", 1000), ("qwen", 110)]


def test_one_scope_may_be_asked_for() -> None:
    """Only rows that have it count, the model's own included."""
    assert [(g["day"], g["tokens"]) for g in grouped("day", scope="key:a")] == [
        ("2026-11-23", 10),
        ("2026-11-24", 1000),
    ]
    assert [g["tokens"] for g in grouped("mode", scope="model:phi")] == [1000]
    assert grouped("day", scope="key:z") == []


def test_rows_that_are_not_seen_do_not_count() -> None:
    """What lies outside a token's scopes is not in any sum."""
    seen = group_usage(ROWS, ["model"], sees=lambda scopes: "key:b" in scopes, scope=None)
    assert [(entry.model, entry.tokens) for entry in seen] == [("qwen", 100)]


def test_too_many_groups_are_refused() -> None:
    """An answer of more than ten thousand rows is a 400 that says how to ask for less."""
    rows = [row(MONDAY, f"key:{i}") for i in range(MOST_GROUPS + 1)]
    assert len(grouped("scope", rows=rows[:-1])) == MOST_GROUPS
    with pytest.raises(InvalidRequest, match="fewer days") as refused:
        grouped("scope", rows=rows)
    assert refused.value.param == "group_by"


@given(
    by=st.sets(st.sampled_from([d for d in DIMENSIONS if d != "scope"]), min_size=1),
    rows=st.lists(
        st.builds(
            row,
            st.sampled_from([MONDAY, TUESDAY]),
            st.sampled_from(["key:a model:m", "key:b model:n"]),
            st.sampled_from(["instant", "reasoning"]),
            st.integers(0, 10**12),
        )
    ),
)
def test_grouping_loses_nothing(by: set[Dimension], rows: list[UsageRow]) -> None:
    """Whatever it is grouped by, scopes aside, the sums of all groups are the sums of all rows."""
    groups = grouped(*by, rows=rows)
    for name in SUMS:
        assert sum(group[name] for group in groups) == sum(getattr(r, name) for r in rows)  # type: ignore[misc]


def test_csv_has_the_same_groups() -> None:
    """A head, a line per group, and only the dimensions that were asked for."""
    entries = group_usage(ROWS, ["model", "day"], sees=lambda _: True, scope=None)
    lines = list(csv.reader(io.StringIO(usage_csv(entries, ["model", "day"]))))
    assert lines[0] == ["day", "model", *SUMS, "cost_usd"]
    assert lines[1] == ["2026-11-23", "qwen", "2", "110", "55", "110000", "0.00011"]
    assert len(lines) == 3


def test_dimensions_are_what_can_be_asked_for() -> None:
    """The order of groups has every dimension."""
    assert set(DIMENSIONS) == set(get_args(Dimension))
