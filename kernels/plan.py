"""What tree attention reads: which rows of a batch share which blocks, found in their block tables alone.

Owns: the plan, and how many bytes and operations a plan costs. Does not own: tensors. Pure Python.

Equal block numbers in one column mean equal tokens at equal positions, so no trie is needed here: the plan
fits any paged cache, a server's own included. A row's last block is shared only if it is full: an
unfinished block may be in two tables for a moment, and the plan does not ask how far each row has written it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Partial outputs and their log-sum-exp are float32.
_PARTIAL_BYTES = 4


@dataclass(frozen=True, slots=True)
class Span:
    """Blocks that are read once, for all of some rows.

    Attributes:
        rows: numbers of the rows in the batch.
        blocks: the blocks, in order.
        tokens: how many slots of them count; only the last block may be unfinished.
    """

    rows: tuple[int, ...]
    blocks: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Spans that together give every row each of its tokens exactly once.

    Attributes:
        shared: spans of two rows or more.
        alone: spans of one row; at most one per row.
        lengths: tokens of each row.
        block_tokens: tokens per block.
    """

    shared: tuple[Span, ...]
    alone: tuple[Span, ...]
    lengths: tuple[int, ...]
    block_tokens: int

    @property
    def tokens_read(self) -> int:
        """Tokens whose keys and values are read; without sharing, it were the sum of `lengths`."""
        return sum(span.tokens for span in (*self.shared, *self.alone))


@dataclass(frozen=True, slots=True)
class Cost:
    """What one attention layer does for one plan.

    Attributes:
        kv_bytes: keys and values that are read.
        partial_bytes: partial outputs and log-sum-exps, written once and read once.
        flops: multiplications and additions of both products; the same however much is shared.
    """

    kv_bytes: int
    partial_bytes: int
    flops: int


def make_plan(
    tables: Sequence[Sequence[int]], lengths: Sequence[int], *, block_tokens: int, share_from: int = 1
) -> Plan:
    """The plan for a batch. O(rows * (blocks + depth of the tree)).

    Args:
        tables: per row its blocks, in order; those behind its last token are ignored.
        lengths: per row its tokens, at least one.
        block_tokens: tokens per block.
        share_from: the fewest tokens that rows must have in common beyond what more of them share for it to
            be worth a span of its own; above the longest length, nothing is shared.
    """
    full = [tuple(table[: length // block_tokens]) for table, length in zip(tables, lengths, strict=True)]
    # Rows with a common prefix lie side by side in this order, whatever the numbers mean.
    order = sorted(range(len(full)), key=full.__getitem__)
    shared: list[Span] = []
    alone: list[Span] = []
    groups = [(order, 0)] if order else []
    while groups:
        rows, start = groups.pop()
        if len(rows) > 1:
            end = _common(full[rows[0]], full[rows[-1]], start)
            if end > start and (end - start) * block_tokens >= share_from:
                shared.append(Span(tuple(rows), full[rows[0]][start:end], (end - start) * block_tokens))
                start = end
            # What is too short to be shared here is looked at again by the smaller groups.
            groups += [(group, start) for group in _split(rows, full, end)]
        elif tokens := lengths[rows[0]] - start * block_tokens:
            blocks = tables[rows[0]][start : start + -(-tokens // block_tokens)]
            alone.append(Span(tuple(rows), tuple(blocks), tokens))
    return Plan(tuple(shared), tuple(alone), tuple(lengths), block_tokens)


def cost(plan: Plan, *, query_heads: int, kv_heads: int, head_dim: int, value_bytes: int) -> Cost:
    """What one layer reads and computes for one query per row.

    Args:
        plan: from `make_plan`.
        query_heads: heads of the queries.
        kv_heads: heads of keys and values.
        head_dim: numbers per head.
        value_bytes: bytes of one number in the cache.
    """
    parts = sum(len(span.rows) for span in (*plan.shared, *plan.alone))
    return Cost(
        kv_bytes=2 * kv_heads * head_dim * value_bytes * plan.tokens_read,
        partial_bytes=2 * _PARTIAL_BYTES * query_heads * (head_dim + 1) * parts,
        flops=4 * query_heads * head_dim * sum(plan.lengths),
    )


def _common(first: Sequence[int], last: Sequence[int], start: int) -> int:
    """How many blocks two rows have in common, if they have `start`.

    Of rows in sorted order, all between the two have them, too.
    """
    end = start
    while end < min(len(first), len(last)) and first[end] == last[end]:
        end += 1
    return end


def _split(rows: list[int], full: Sequence[Sequence[int]], at: int) -> Iterator[list[int]]:
    """Sorted rows by their block in column `at`; a row that ends before it is a group of its own."""
    group: list[int] = []
    for row in rows:
        continues = group and len(full[group[-1]]) > at and len(full[row]) > at
        if group and not (continues and full[group[-1]][at] == full[row][at]):
            yield group
            group = []
        group.append(row)
    yield group
