"""Attention over a paged KV cache: the definition, and the way that reads a prefix once for all who share it.

Owns: both, and how partial results are merged. Does not own: which rows share what (plan.py), and the
blocks' numbers (trie.py).

Softmax over a union of disjoint keys is the mean of the softmaxes over its parts, weighted by the sums of
their exponentials. So a prefix that many branches share is attended once, as one matrix product with all their
queries, and merged with each branch's own part: the result is the same but for rounding, in another order
of summation (Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", arXiv 2402.05099).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from kernels.plan import Plan, Span

# A run of consecutive blocks of so many tokens is read where it lies; what is shorter is copied together.
_LONG_TOKENS = 256


def attend_each(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    counts: Sequence[int] | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition: every query for itself.

    Args:
        q: [queries, query_heads, dim], any float dtype; those of a row together, in order.
        k: [blocks, block_tokens, kv_heads, dim], any strides; query head h reads head h // (query_heads / kv_heads).
        v: as k.
        tables: per row its blocks, in order.
        lengths: per row its tokens, at least one.
        counts: per row its queries; they belong to its last tokens, and see nothing later. Default: one each.
        scale: of the scores; default: 1 / sqrt(dim).

    Returns: [queries, query_heads, dim], dtype of `q`, and [queries, query_heads], the natural logarithm of the
        sum of the exponentials of the scores, float32 or wider.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    counts = [1] * len(lengths) if counts is None else counts
    outs: list[Tensor] = []
    sums: list[Tensor] = []
    for table, length, count in zip(tables, lengths, counts, strict=True):
        keys, values = (
            _gather(each, table)[:length].repeat_interleave(q.shape[1] // each.shape[2], 1) for each in (k, v)
        )
        for seen in range(length - count + 1, length + 1):
            scores = torch.einsum("hd,thd->ht", q[len(outs)].to(keys.dtype), keys[:seen]) * scale
            outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values[:seen]))
            sums.append(scores.logsumexp(-1))
    return torch.stack(outs).to(q.dtype), torch.stack(sums)


def attend_tree(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """As `attend_each` with one query per row, but every span of the plan is read once, for all of its rows."""
    return Reads(plan, q.device)(q, k, v, scale)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Keys that some queries attend to.

    Attributes:
        queries: [spans, queries each], numbers of queries.
        slots: [spans, tokens], where the keys are; or a range, of one span.
        mask: [spans, 1, 1, tokens], minus infinity where a span is shorter than the longest; None: nowhere.
        is_causal: query i sees the first i + 1 keys only; one span, as many queries as keys.
        copies: of keys (0) and values (1) that do not lie together. Their memory serves every layer: to ask for it
            anew costs more than the copy.
    """

    queries: Tensor
    slots: Tensor | slice
    mask: Tensor | None = None
    is_causal: bool = False
    copies: dict[int, Tensor] = field(default_factory=dict)

    def read(self, cache: Tensor, which: int) -> Tensor:
        """Keys or values of the slots: [blocks, block_tokens, ...] -> [spans, tokens, heads, dim]."""
        size, slots = cache.shape[1], self.slots
        if cache.stride(0) != cache.stride(1) * size:
            if isinstance(slots, Tensor):
                return cache[slots // size, slots % size]
            blocks = cache[slots.start // size : -(-slots.stop // size)]
            return blocks.flatten(0, 1)[None, : slots.stop - slots.start]
        tokens = cache.view(-1, *cache.shape[2:])
        if isinstance(slots, slice):
            return tokens[None, slots]
        if which in self.copies:
            torch.index_select(tokens, 0, slots.flatten(), out=self.copies[which])
        else:
            self.copies[which] = tokens.index_select(0, slots.flatten())
        return self.copies[which].reshape(*slots.shape, *cache.shape[2:])


class Reads:
    """The attention of one step, prepared once and used by every layer, one after the other.

    Deterministic: pieces are merged in the order of the plan. Agrees with `attend_each` to rounding.

    Args:
        plan: what each row attends to: with one query, all of its tokens; with more, those before its queries.
        device: where queries, keys and values live.
        own: for rows of more than one query, in order, the slots of the queries' own keys; an empty one for rows
            of one query. Default: no row has more.
    """

    def __init__(self, plan: Plan, device: torch.device, own: Sequence[Sequence[int]] = ()) -> None:
        counts = [max(1, len(slots)) for slots in own] if own else [1] * len(plan.lengths)
        first = [sum(counts[:row]) for row in range(len(counts))]
        self._device = device
        self._queries = [range(start, start + count) for start, count in zip(first, counts, strict=True)]
        self._size = plan.block_tokens
        self._pieces = [*self._shared(plan), *self._alone(plan), *self._own(own)]
        self._are_first = list(_first(self._pieces))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """Attention of one layer; arguments and results as in `attend_each`."""
        queries, query_heads, dim = q.shape
        kv_heads = k.shape[2]
        scale = 1 / math.sqrt(dim) if scale is None else scale
        wide = torch.promote_types(q.dtype, torch.float32)
        grouped = q.reshape(queries, kv_heads, query_heads // kv_heads, dim)
        out = torch.zeros(grouped.shape, dtype=wide, device=q.device)
        lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=wide, device=q.device)
        for piece, is_first in zip(self._pieces, self._are_first, strict=True):
            # index_select and index_copy_: several times faster than indexing by a tensor.
            at = piece.queries.flatten()
            own = grouped.index_select(0, at).reshape(*piece.queries.shape, *grouped.shape[1:])
            parts = _attend(own, piece.read(k, 0), piece.read(v, 1), piece, scale)
            more = [part.flatten(0, 1).to(wide) for part in parts]
            if not is_first:
                more = list(merge(out.index_select(0, at), lse.index_select(0, at), *more))
            out.index_copy_(0, at, more[0])
            lse.index_copy_(0, at, more[1])
        return out.reshape(q.shape).to(q.dtype), lse.reshape(queries, query_heads)

    def _shared(self, plan: Plan) -> Iterator[_Piece]:
        """Spans of several rows, one by one."""
        for span in plan.shared:
            queries = self._numbers([[query for row in span.rows for query in self._queries[row]]])
            yield from self._long(span, queries)
            if rest := self._rest(span):
                yield _Piece(queries, self._numbers([rest]))

    def _alone(self, plan: Plan) -> Iterator[_Piece]:
        """Spans of one row: long runs one by one, the rest together, so that padding less than doubles them."""
        rests: list[tuple[int, int, list[int]]] = []
        for span in plan.alone:
            row = span.rows[0]
            yield from self._long(span, self._numbers([self._queries[row]]))
            if rest := self._rest(span):
                rests.append((len(self._queries[row]), row, rest))
        rests.sort(key=lambda each: (each[0], len(each[2])))
        for _, group in groupby(rests, key=lambda each: (each[0], len(each[2]).bit_length())):
            yield self._together([(row, rest) for _, row, rest in group])

    def _together(self, rests: Sequence[tuple[int, list[int]]]) -> _Piece:
        """The slots of several rows, padded with slots of their own: what was never written may hold anything."""
        longest = max(len(rest) for _, rest in rests)
        slots = self._numbers([rest + rest[:1] * (longest - len(rest)) for _, rest in rests])
        queries = self._numbers([self._queries[row] for row, _ in rests])
        if all(len(rest) == longest for _, rest in rests):
            return _Piece(queries, slots)
        lengths = self._numbers([[len(rest)] for _, rest in rests])
        is_padding = torch.arange(longest, device=self._device) >= lengths
        mask = torch.zeros(is_padding.shape, device=self._device).masked_fill_(is_padding, -torch.inf)
        return _Piece(queries, slots, mask[:, None, None])

    def _own(self, own: Sequence[Sequence[int]]) -> Iterator[_Piece]:
        """The triangles of rows that read several tokens at once."""
        for queries, slots in zip(self._queries, own, strict=False):
            if slots:
                yield _Piece(self._numbers([queries]), self._numbers([slots]), is_causal=True)

    def _long(self, span: Span, queries: Tensor) -> Iterator[_Piece]:
        """The long runs of a span, to be read where they lie."""
        for run in _runs(span, self._size):
            if len(run) >= _LONG_TOKENS:
                yield _Piece(queries, slice(run.start, run.stop))

    def _rest(self, span: Span) -> list[int]:
        """The slots of a span that are in no long run."""
        return [slot for run in _runs(span, self._size) if len(run) < _LONG_TOKENS for slot in run]

    def _numbers(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self._device)


def _first(pieces: Sequence[_Piece]) -> Iterator[bool]:
    """Whether none of a piece's queries was in a piece before it: then there is nothing to merge with."""
    seen: set[int] = set()
    for piece in pieces:
        queries = set(piece.queries.flatten().tolist())
        yield seen.isdisjoint(queries)
        seen |= queries


def merge(out: Tensor, lse: Tensor, more_out: Tensor, more_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Combine attention over two disjoint sets of keys.

    Args:
        out: [..., dim], over the first set.
        lse: [...], natural log-sum-exp of its scores; -inf if the set is empty.
        more_out: [..., dim], over the second set, which is not empty.
        more_lse: [...], as lse.
    """
    both = torch.logaddexp(lse, more_lse)
    merged = out * (lse - both).exp().unsqueeze(-1) + more_out * (more_lse - both).exp().unsqueeze(-1)
    return merged, both


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: _Piece, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of one piece.

    Args:
        q: [spans, queries each, kv_heads, group, dim].
        k: [spans, tokens, kv_heads, dim].
        v: as k.
        piece: whose mask counts, and whether it is a triangle.
        scale: of the scores.

    Returns: partial outputs, shaped as `q`, and their log-sum-exps, without the last dimension.
    """
    spans, each, kv_heads, group, dim = q.shape
    keys, values = k.transpose(1, 2), v.transpose(1, 2)
    kernel = _on_cpu if q.device.type == "cpu" else _on_any
    if piece.is_causal:
        # A triangle's rows must be single queries, so every head of a group has keys of its own.
        queries = q.permute(0, 2, 3, 1, 4).reshape(spans, kv_heads * group, each, dim)
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        out, lse = kernel(queries, keys, values, None, scale, is_causal=True)
        out = out.reshape(spans, kv_heads, group, each, dim).permute(0, 3, 1, 2, 4)
        return out, lse.reshape(spans, kv_heads, group, each).permute(0, 3, 1, 2)
    # [spans, kv_heads, queries * group, dim]: one product per span and head serves all queries and the whole group.
    queries = q.permute(0, 2, 1, 3, 4).reshape(spans, kv_heads, each * group, dim)
    out, lse = kernel(queries, keys, values, piece.mask, scale)
    out = out.reshape(spans, kv_heads, each, group, dim).permute(0, 2, 1, 3, 4)
    return out, lse.reshape(spans, kv_heads, each, group).permute(0, 2, 1, 3)


def _on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Flash attention as torch's SDPA has it, called directly, since only so does it say the log-sum-exp."""
    mask = mask if mask is None else mask.to(q.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = kernel(q, k, v, 0.0, is_causal, attn_mask=mask, scale=scale)
    return out, lse


def _on_any(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Plain products, float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-1, -2)
    if mask is not None:
        scores = scores + mask
    if is_causal:
        scores.masked_fill_(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    lse = scores.logsumexp(-1)
    return scores.sub_(lse.unsqueeze(-1)).exp_() @ v.to(wide), lse


def _runs(span: Span, block_tokens: int) -> Iterator[range]:
    """Slots of a span, those together that follow each other."""
    blocks, left = span.blocks, span.tokens
    start = 0
    for at in range(1, len(blocks) + 1):
        if at == len(blocks) or blocks[at] != blocks[at - 1] + 1:
            tokens = min(left, (at - start) * block_tokens)
            yield range(blocks[start] * block_tokens, blocks[start] * block_tokens + tokens)
            left -= tokens
            start = at


def _gather(cache: Tensor, blocks: Sequence[int]) -> Tensor:
    """The tokens of some blocks, float32 or wider: [blocks, block_tokens, ...] -> [tokens, heads, dim]."""
    tokens = cache[torch.tensor(list(blocks), dtype=torch.long, device=cache.device)].flatten(0, 1)
    return tokens.to(torch.promote_types(cache.dtype, torch.float32))
