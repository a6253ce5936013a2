"""Tokens by kind: disjoint, and summed as the documentation says."""

from __future__ import annotations

from budget.tokens import TokenCounts

KINDS = ("prompt", "cached", "thinking", "answer", "planner", "probe", "injected", "wasted")


def test_the_kinds_are_the_documented_ones() -> None:
    """Responses, ledgers and metrics share one list of kinds."""
    assert TokenCounts.__struct_fields__ == KINDS


def test_total_takes_every_kind_once() -> None:
    """The ledger's unit `tokens` is all kinds together: distinct powers of two show each exactly once."""
    counts = TokenCounts(**{kind: 2**i for i, kind in enumerate(KINDS)})
    assert counts.total() == 2 ** len(KINDS) - 1


def test_completion_is_what_the_delivered_choices_hold() -> None:
    """`usage.completion_tokens` is thinking, answer and injected; calls behind the scenes are not in it."""
    counts = TokenCounts(thinking=1, answer=10, injected=100, prompt=1000, cached=1000, planner=7, probe=7, wasted=7)
    assert counts.completion() == 111


def test_nothing_counted_is_nothing() -> None:
    """A request that reached no backend counts zero everywhere."""
    assert (TokenCounts().total(), TokenCounts().completion()) == (0, 0)
