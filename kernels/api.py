"""Tree attention for whoever has a paged cache: one call, and the implementation that fits the machine.

Owns: the choice between implementations. The log-sum-exp is the natural one; vLLM's option
`lse_base_on_e` means the same, FlashInfer's is to base 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from kernels.attention import attend_each, attend_tree

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.plan import Plan

Impl = Literal["auto", "reference", "torch", "triton"]


def trie_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Sequence[Sequence[int]],
    plan: Plan,
    *,
    scale: float | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of one query per row.

    Args:
        q: [rows, query_heads, dim].
        k: [blocks, block_tokens, kv_heads, dim], any strides.
        v: as k.
        tables: per row its blocks, in order; only the reference reads them.
        plan: from `make_plan`, of these tables.
        scale: of the scores; default: 1 / sqrt(dim).
        impl: `reference` is the definition, row by row; `torch` reads each span once; `triton` does so in kernels of
            its own, on a GPU; `auto` is `triton` where there are both, else `torch`.

    Returns: [rows, query_heads, dim], dtype of `q`, and [rows, query_heads], the natural log-sum-exp of the scores.
    """
    if impl == "reference":
        return attend_each(q, k, v, tables, plan.lengths, scale=scale)
    if impl == "triton" or (impl == "auto" and q.is_cuda and find_spec("triton") is not None):
        from kernels.triton_decode import attend_work, make_work

        return attend_work(q, k, v, make_work(plan, group=q.shape[1] // k.shape[2], device=q.device), scale)
    return attend_tree(q, k, v, plan, scale)
