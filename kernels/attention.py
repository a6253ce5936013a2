"""Attention of one query per branch over a paged KV cache: the definition, and the way that reads a prefix once.

Owns: both functions and how partial results are merged. Does not own: which rows share what (plan.py), and
the blocks' numbers (trie.py).

Softmax over a union of disjoint keys is the mean of the softmaxes over its parts, weighted by the sums of
their exponentials. So a prefix that many branches share is attended once, as one matrix product with all their
queries, and merged with each branch's own part: the result is the same but for rounding, in another order
of summation (Juravsky et al., "Hydragen: High-Throughput LLM Inference with Shared Prefixes", arXiv 2402.05099).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from kernels.plan import Plan, Span


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, tables: Sequence[Sequence[int]], lengths: Sequence[int], scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """The definition: every row for itself.

    Args:
        q: [rows, query_heads, dim], any float dtype.
        k: [blocks, block_tokens, kv_heads, dim], any strides; query head h reads head h // (query_heads / kv_heads).
        v: as k.
        tables: per row its blocks, in order.
        lengths: per row its tokens, at least one.
        scale: of the scores; default: 1 / sqrt(dim).

    Returns: [rows, query_heads, dim], dtype of `q`, and [rows, query_heads], the natural logarithm of the
        sum of the exponentials of the scores, float32 or wider.
    """
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    outs, sums = [], []
    for row, (table, length) in enumerate(zip(tables, lengths, strict=True)):
        keys, values = (
            _gather(each, table)[:length].repeat_interleave(q.shape[1] // each.shape[2], 1) for each in (k, v)
        )
        scores = torch.einsum("hd,thd->ht", q[row].to(keys.dtype), keys) * scale
        outs.append(torch.einsum("ht,thd->hd", scores.softmax(-1), values))
        sums.append(scores.logsumexp(-1))
    return torch.stack(outs).to(q.dtype), torch.stack(sums)


def attend_tree(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """As `attend_each`, but every span of the plan is read once, for all of its rows.

    Deterministic: rows are merged in the order of the plan. Agrees with `attend_each` to rounding.
    """
    rows, query_heads, dim = q.shape
    kv_heads = k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).reshape(rows, kv_heads, query_heads // kv_heads, dim) * scale
    out = torch.zeros_like(grouped)
    lse = torch.full(grouped.shape[:-1], -torch.inf, dtype=wide, device=q.device)
    for spans in _batches(plan):
        # [spans, rows each]; a batch has one span of many rows, or many of one.
        at = torch.tensor([span.rows for span in spans], device=q.device)
        own_out, own_lse = _attend_spans(grouped[at], k, v, spans)
        at = at.flatten()
        out[at], lse[at] = merge(out[at], lse[at], own_out.flatten(0, 1), own_lse.flatten(0, 1))
    return out.reshape(q.shape).to(q.dtype), lse.reshape(rows, query_heads)


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


def _batches(plan: Plan) -> Iterator[Sequence[Span]]:
    """Shared spans one by one; lone ones together, of like lengths, so that padding less than doubles them."""
    for span in plan.shared:
        yield (span,)
    alone = sorted(plan.alone, key=lambda span: span.tokens)
    for _, spans in groupby(alone, key=lambda span: span.tokens.bit_length()):
        yield list(spans)


def _attend_spans(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[Span]) -> tuple[Tensor, Tensor]:
    """Attention over spans of like lengths, each for its own rows.

    Args:
        q: [spans, rows each, kv_heads, group, dim], scaled.
        k: [blocks, block_tokens, kv_heads, dim].
        v: as k.
        spans: all with the same number of rows.

    Returns: partial outputs, shaped as `q`, and their log-sum-exps, without the last dimension.
    """
    count, rows, kv_heads, group, dim = q.shape
    longest = max(len(span.blocks) for span in spans)
    padded = [[*span.blocks, *span.blocks[:1] * (longest - len(span.blocks))] for span in spans]
    lengths = torch.tensor([span.tokens for span in spans], device=q.device)
    # [spans, kv_heads, tokens, dim]: one product per span and head serves all rows and the whole group.
    keys, values = (_gather(each, padded).to(q.dtype).transpose(1, 2) for each in (k, v))
    queries = q.permute(0, 2, 1, 3, 4).reshape(count, kv_heads, rows * group, dim)
    scores = queries @ keys.transpose(-1, -2)
    if any(span.tokens < scores.shape[-1] for span in spans):
        is_padding = torch.arange(scores.shape[-1], device=q.device) >= lengths[:, None]
        scores = scores.masked_fill(is_padding[:, None, None], -torch.inf)
        # A slot that was never written may hold anything, and 0 * NaN is NaN.
        values = values.masked_fill(is_padding[:, None, :, None], 0)
    lse = scores.logsumexp(-1)
    out = scores.sub_(lse.unsqueeze(-1)).exp_() @ values
    back = out.reshape(count, kv_heads, rows, group, dim).permute(0, 2, 1, 3, 4)
    return back, lse.reshape(count, kv_heads, rows, group).permute(0, 2, 1, 3)


def _gather(cache: Tensor, blocks: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """The tokens of some blocks, float32 or wider. [blocks, block_tokens, ...] -> [..., tokens, heads, dim]."""
    at = torch.tensor(blocks, dtype=torch.long, device=cache.device)
    tokens = cache[at].flatten(at.dim() - 1, at.dim())
    return tokens.to(torch.promote_types(cache.dtype, torch.float32))
