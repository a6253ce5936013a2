"""Tree attention on a GPU: two Triton kernels, one for partial results and one that merges them.

Owns: the kernels and the lists of work that they read. Does not own: which rows share what (plan.py). Needs
triton; api.py decides whether there is any. Decoding only: one query per row.

A span is cut into pieces of tokens and of rows, each the work of one program per head of keys and values. Every
(piece, row) has a place of its own for its partial result, and a row's places are merged in the order of the plan:
no atomics, so the same batch gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.plan import Plan

# Of one program: tokens that it reads at most, queries of its tile, tokens per product.
SPLIT_TOKENS = 512
TILE_ROWS = 64
TILE_TOKENS = 64
# What tensor cores multiply at least.
_LEAST = 16


@dataclass(frozen=True, slots=True)
class Work:
    """A plan as the kernels read it; all int32, on the device.

    Attributes:
        blocks: the blocks of all pieces, one after the other.
        rows: the rows of all pieces, one after the other; the place of a partial result is the place in here.
        pieces: [pieces, 4], first block, tokens, first row, rows.
        parts: places of the partial results, by row.
        ends: [rows + 1], where each row's begin in `parts`.
    """

    blocks: Tensor
    rows: Tensor
    pieces: Tensor
    parts: Tensor
    ends: Tensor


def make_work(plan: Plan, *, group: int, device: torch.device | str) -> Work:
    """A plan cut into pieces.

    Args:
        plan: from `make_plan`.
        group: query heads per head of keys and values.
        device: where queries, keys and values live.
    """
    size = plan.block_tokens
    split = max(1, SPLIT_TOKENS // size)
    tile = _tile_rows(group)
    blocks: list[int] = []
    rows: list[int] = []
    pieces: list[tuple[int, int, int, int]] = []
    parts: list[list[int]] = [[] for _ in plan.lengths]
    for span in (*plan.shared, *plan.alone):
        for at in range(0, len(span.blocks), split):
            part = span.blocks[at : at + split]
            tokens = min(len(part) * size, span.tokens - at * size)
            for first in range(0, len(span.rows), tile):
                some = span.rows[first : first + tile]
                pieces.append((len(blocks), tokens, len(rows), len(some)))
                for row in some:
                    parts[row].append(len(rows))
                    rows.append(row)
            blocks += part
    ends = [sum(map(len, parts[:row])) for row in range(len(parts) + 1)]
    lists = (blocks, rows, pieces, [place for row in parts for place in row], ends)
    return Work(*(torch.tensor(each, dtype=torch.int32, device=device) for each in lists))


def _tile_rows(group: int) -> int:
    """Rows whose queries of one group fit a tile."""
    return max(1, TILE_ROWS // group)


def attend_work(q: Tensor, k: Tensor, v: Tensor, work: Work, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of one layer; arguments and results as of `attention.attend_tree`, with the plan as `work`."""
    rows, query_heads, dim = q.shape
    _, size, kv_heads, _ = k.shape
    group = query_heads // kv_heads
    scale = 1 / math.sqrt(dim) if scale is None else scale
    partial = torch.empty(len(work.rows), query_heads, dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(len(work.rows), query_heads, dtype=torch.float32, device=q.device)
    tile = max(_LEAST, triton.next_power_of_2(_tile_rows(group) * group))
    wide = max(_LEAST, triton.next_power_of_2(dim))
    partial_kernel[(len(work.pieces), kv_heads)](
        q, k, v, partial, sums, work.blocks, work.rows, work.pieces, scale,
        *q.stride(), *k.stride(), *v.stride(),
        *partial.stride()[:2], sums.stride(0),
        DIM=dim, WIDE=wide, GROUP=group, SIZE=size, TILE=tile, STEP=TILE_TOKENS,
    )  # fmt: skip
    out, lse = torch.empty_like(q), torch.empty(rows, query_heads, dtype=torch.float32, device=q.device)
    merge_kernel[(rows, query_heads)](
        partial, sums, out, lse, work.parts, work.ends,
        *partial.stride()[:2], sums.stride(0), *out.stride(), lse.stride(0),
        DIM=dim, WIDE=wide,
    )  # fmt: skip
    return out, lse


@triton.jit
def partial_kernel(
    q, k, v, partial, sums, blocks, rows, pieces, scale,
    q_row, q_head, q_dim, k_block, k_token, k_head, k_dim, v_block, v_token, v_head, v_dim,
    partial_place, partial_head, sums_place,
    DIM: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, SIZE: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One piece and one head of keys and values: all rows' queries of the group in one product."""
    piece = tl.program_id(0)
    head = tl.program_id(1)
    first_block = tl.load(pieces + piece * 4)
    tokens = tl.load(pieces + piece * 4 + 1)
    first_row = tl.load(pieces + piece * 4 + 2)
    count = tl.load(pieces + piece * 4 + 3)
    tile = tl.arange(0, TILE)
    dims = tl.arange(0, WIDE)
    is_query = tile < count * GROUP
    is_dim = dims < DIM
    place = first_row + tile // GROUP
    query_head = head * GROUP + tile % GROUP
    row = tl.load(rows + place, mask=is_query, other=0).to(tl.int64)
    seen = is_query[:, None] & is_dim[None, :]
    queries = tl.load(q + (row * q_row + query_head * q_head)[:, None] + dims[None, :] * q_dim, mask=seen, other=0.0)
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    found = tl.zeros([TILE, WIDE], tl.float32)
    for start in range(0, tokens, STEP):
        at = start + tl.arange(0, STEP)
        is_token = at < tokens
        block = tl.load(blocks + first_block + at // SIZE, mask=is_token, other=0).to(tl.int64)
        both = is_token[:, None] & is_dim[None, :]
        k_at = (block * k_block + (at % SIZE) * k_token + head * k_head)[:, None] + dims[None, :] * k_dim
        keys = tl.load(k + k_at, mask=both, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        scores = tl.where(is_token[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, 1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(most - higher)
        v_at = (block * v_block + (at % SIZE) * v_token + head * v_head)[:, None] + dims[None, :] * v_dim
        values = tl.load(v + v_at, mask=both, other=0.0)
        found = found * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        total = total * shrink + tl.sum(weights, 1)
        most = higher
    to = (place.to(tl.int64) * partial_place + query_head * partial_head)[:, None] + dims[None, :]
    tl.store(partial + to, found / total[:, None], mask=seen)
    tl.store(sums + place * sums_place + query_head, most + tl.log(total), mask=is_query)


@triton.jit
def merge_kernel(
    partial, sums, out, lse, parts, ends,
    partial_place, partial_head, sums_place, out_row, out_head, out_dim, lse_row,
    DIM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One row and one head of queries: its partial results, weighted by the sums of their exponentials."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    dims = tl.arange(0, WIDE)
    is_dim = dims < DIM
    first = tl.load(ends + row)
    last = tl.load(ends + row + 1)
    most = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    found = tl.zeros([WIDE], tl.float32)
    for at in range(first, last):
        place = tl.load(parts + at).to(tl.int64)
        part_sum = tl.load(sums + place * sums_place + head)
        part = tl.load(partial + place * partial_place + head * partial_head + dims, mask=is_dim, other=0.0)
        higher = tl.maximum(most, part_sum)
        weight = tl.exp(part_sum - higher)
        shrink = tl.exp(most - higher)
        found = found * shrink + part * weight
        total = total * shrink + weight
        most = higher
    to = out + row * out_row + head * out_head + dims * out_dim
    tl.store(to, (found / total).to(out.dtype.element_ty), mask=is_dim)
    tl.store(lse + row * lse_row + head + tl.arange(0, 1), most + tl.log(total))
