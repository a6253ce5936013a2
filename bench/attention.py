"""Decoding attention of many branches over one prompt: prefixes read once, beside two ways that do not share.

    python -m bench.attention [--quick] [--json]

One layer, one query per branch, in turns on one thread; processor time, the median of all turns:
`tree` is kernels/attention.py; `apart` the same code with a plan that shares nothing, which isolates the idea;
`sdpa` is torch's own attention over keys that were gathered for each branch beforehand, untimed: the
copying that it spares itself is what a paged cache exists to avoid. `unrelated` is the same for requests
that share nothing. Needs torch.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import result

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_TOKENS = 16
QUERY_HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64  # SmolLM2-135M
NEVER = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """A batch of branches.

    Attributes:
        rows: how many there are.
        prompt: tokens that all of them share.
        own: tokens after those, each branch's own.
        dtype: of queries, keys and values.
    """

    rows: int
    prompt: int
    own: int
    dtype: str

    @property
    def name(self) -> str:
        """How it is called in the result."""
        return f"{self.rows}x{self.prompt}+{self.own}_{self.dtype}"

    def tables(self) -> list[list[int]]:
        """Block tables: the prompt's blocks, then each branch's own."""
        shared, own = self.prompt // BLOCK_TOKENS, -(-self.own // BLOCK_TOKENS)
        return [[*range(shared), *range(shared + row * own, shared + (row + 1) * own)] for row in range(self.rows)]


SHAPES = tuple(Shape(32, prompt, 61, dtype) for dtype in ("float32", "bfloat16") for prompt in (1024, 4096))
UNRELATED = tuple(Shape(8, 0, 1021, dtype) for dtype in ("float32", "bfloat16"))


def measure(shape: Shape, turns: int) -> dict[str, Any]:
    """Milliseconds of each way on one core, and how much is read.

    Raises: ImportError, without torch.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from kernels.attention import attend_tree
    from kernels.plan import cost, make_plan

    torch.manual_seed(0)
    tables, length = shape.tables(), shape.prompt + shape.own
    blocks = 1 + max(block for table in tables for block in table)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    k, v = (torch.randn(blocks, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    q = torch.randn(shape.rows, QUERY_HEADS, HEAD_DIM).to(dtype)
    lengths = [length] * shape.rows
    started = time.thread_time()
    plan = make_plan(tables, lengths, block_tokens=BLOCK_TOKENS)
    plan_ms = (time.thread_time() - started) * 1e3
    apart = make_plan(tables, lengths, block_tokens=BLOCK_TOKENS, share_from=NEVER)
    dense_k, dense_v = (each[torch.tensor(tables)].flatten(1, 2)[:, :length].transpose(1, 2) for each in (k, v))
    dense_k, dense_v = dense_k.contiguous(), dense_v.contiguous()
    ways: dict[str, Callable[[], object]] = {
        "tree": lambda: attend_tree(q, k, v, plan),
        "apart": lambda: attend_tree(q, k, v, apart),
        "sdpa": lambda: scaled_dot_product_attention(q[:, :, None], dense_k, dense_v, enable_gqa=True),
    }
    heads = {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "value_bytes": dtype.itemsize}
    with torch.inference_mode():
        _check(attend_tree(q, k, v, plan)[0], attend_tree(q, k, v, apart)[0])
        took = _in_turns(ways, turns)
    return {
        **{f"{name}_ms": round(value, 3) for name, value in took.items()},
        "plan_ms": round(plan_ms, 3),
        "attention_ratio_vs_no_sharing": round(took["apart"] / took["tree"], 2),
        "attention_ratio_vs_sdpa": round(took["sdpa"] / took["tree"], 2),
        "bytes_ratio": round(cost(apart, **heads).kv_bytes / cost(plan, **heads).kv_bytes, 2),
    }


def _check(tree: Tensor, apart: Tensor) -> None:
    """What is compared is the same attention."""
    assert (tree.float() - apart.float()).abs().max() < 0.02, "the two ways differ"


def _in_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds, median of `turns` after one that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(turns + 1):
        for name, way in ways.items():
            # Of this thread, the only one: other work on the machine is not counted.
            started = time.thread_time()
            way()
            took[name].append((time.thread_time() - started) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in took.items()}


def main() -> None:
    """Measure and print."""
    import torch

    flags = result.parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    turns = 5 if flags.quick else 25
    print(f"{'rows x prompt + own':>24} {'tree ms':>9} {'apart':>7} {'sdpa':>7} {'bytes':>7}   (as multiples of tree)")
    found: dict[str, dict[str, dict[str, Any]]] = {"shared": {}, "unrelated": {}}
    for kind, shapes in (("shared", SHAPES), ("unrelated", UNRELATED)):
        for shape in shapes:
            one = found[kind][shape.name] = measure(shape, turns)
            ratios = (one["attention_ratio_vs_no_sharing"], one["attention_ratio_vs_sdpa"], one["bytes_ratio"])
            print(f"{shape.name:>24} {one['tree_ms']:9.2f} {ratios[0]:7.2f} {ratios[1]:7.2f} {ratios[2]:7.2f}")
    versions = {"torch": torch.__version__}
    result.emit({**result.envelope("attention", quick=flags.quick), **versions, **found}, as_json=flags.json)


if __name__ == "__main__":
    main()
