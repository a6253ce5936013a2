"""What sharing prefixes gains on this machine: attention alone, and whole steps of the engine.

    python -m kernels.bench [MODEL] [--quick] [--json]

MODEL is a model folder; default .cache/models/smollm2-135m-instruct. One torch thread, processor time of that
thread, everything in turns, medians; ratios are of one run and say more than milliseconds.

Attention is one layer of SmolLM2's shape, one query per branch: `tree` reads a shared prefix once; `apart` is the same
code with a plan that shares nothing; `sdpa` is torch's own over keys that were gathered for each branch beforehand,
untimed: the copying that it spares itself is what a paged cache exists to avoid. A step of the engine is a token of
every branch, sampling included, greedily; without sharing it is the same engine with a plan that shares nothing, whose
memory is shared all the same. `unrelated` requests have nothing in common.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.model import LanguageModel
    from kernels.scheduler import Scheduler

MODEL = Path(".cache/models/smollm2-135m-instruct")
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
    """

    rows: int
    prompt: int
    own: int

    @property
    def name(self) -> str:
        """How it is called in the result."""
        return f"{self.rows}x{self.prompt}+{self.own}"

    def tables(self) -> list[list[int]]:
        """Block tables: the prompt's blocks, then each branch's own."""
        shared, own = self.prompt // BLOCK_TOKENS, -(-self.own // BLOCK_TOKENS)
        return [[*range(shared), *range(shared + row * own, shared + (row + 1) * own)] for row in range(self.rows)]


LONG, SHORT, UNRELATED = Shape(32, 4096, 61), Shape(32, 1024, 61), Shape(8, 0, 1021)


def attention(shape: Shape, dtype_name: str, turns: int) -> dict[str, float]:
    """Milliseconds of each way for one layer, and how much is read."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from kernels.attention import Reads
    from kernels.plan import cost, make_plan

    torch.manual_seed(0)
    dtype: torch.dtype = getattr(torch, dtype_name)
    tables, length = shape.tables(), shape.prompt + shape.own
    blocks = 1 + max(block for table in tables for block in table)
    k, v = (torch.randn(blocks, BLOCK_TOKENS, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2))
    q = torch.randn(shape.rows, QUERY_HEADS, HEAD_DIM).to(dtype)
    lengths = [length] * shape.rows
    started = time.thread_time()
    plan = make_plan(tables, lengths, block_tokens=BLOCK_TOKENS)
    tree = Reads(plan, q.device)
    plan_ms = (time.thread_time() - started) * 1e3
    without = make_plan(tables, lengths, block_tokens=BLOCK_TOKENS, share_from=NEVER)
    apart = Reads(without, q.device)
    dense_k, dense_v = (
        each[torch.tensor(tables)].flatten(1, 2)[:, :length].transpose(1, 2).contiguous() for each in (k, v)
    )
    ways: dict[str, Callable[[], object]] = {
        "tree": lambda: tree(q, k, v),
        "apart": lambda: apart(q, k, v),
        "sdpa": lambda: scaled_dot_product_attention(q[:, :, None], dense_k, dense_v, enable_gqa=True),
    }
    heads = {"query_heads": QUERY_HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "value_bytes": dtype.itemsize}
    with torch.inference_mode():
        assert (tree(q, k, v)[0].float() - apart(q, k, v)[0].float()).abs().max() < 0.02, "the two ways differ"
        took = in_turns(ways, turns)
    return {
        **{f"{name}_ms": round(value, 3) for name, value in took.items()},
        "plan_ms": round(plan_ms, 3),
        "ratio_vs_no_sharing": round(took["apart"] / took["tree"], 2),
        "ratio_vs_sdpa": round(took["sdpa"] / took["tree"], 2),
        "bytes_ratio": round(cost(without, **heads).kv_bytes / cost(plan, **heads).kv_bytes, 2),
    }


def steps(model: LanguageModel, shape: Shape, turns: int) -> dict[str, float]:
    """Milliseconds of a step of the engine with and without sharing, and what the cache holds."""
    shared, apart = (branches(model, shape, share_from) for share_from in (None, NEVER))
    took = in_turns({"tree": shared.step, "apart": apart.step}, turns)
    tokens = sum(len(each.ids) for each in shared.sequences)
    used = (model.kv_blocks - shared.trie.room) * model.block_tokens
    return {
        "tree_ms": round(took["tree"], 2),
        "apart_ms": round(took["apart"], 2),
        "tokens_per_s": round(shape.rows / took["tree"] * 1e3, 1),
        "ratio_vs_no_sharing": round(took["apart"] / took["tree"], 3),
        "kv_mib": round(used * model.network.token_bytes / 2**20, 1),
        "kv_ratio": round(tokens / used, 2),
    }


def branches(model: LanguageModel, shape: Shape, share_from: int | None) -> Scheduler:
    """A scheduler that has read what the shape asks for, and goes on for long enough."""
    from kernels.compose import compose
    from kernels.job import Job
    from kernels.params import CompletionInput, Options, Sampling, Stopping
    from kernels.scheduler import Scheduler

    how = {} if share_from is None else {"share_from": share_from}
    scheduler = Scheduler(model, max_running=shape.rows, step_tokens=1024, **how)
    size = model.tokens.size
    heard: list[object] = []
    for row in range(shape.rows):
        # Any tokens will do; the first of a branch's own is nobody else's.
        own = [(row * 31 + at * 17 + 5) % size for at in range(shape.own)]
        ids = (*((at * 7 + 3) % size for at in range(shape.prompt)), row % size, *own[1:])
        stopping = Stopping(max_tokens=min(256, model.max_len - len(ids)), ignore_eos=True)
        asked = Options(request_id="bench", sampling=Sampling(temperature=0), stopping=stopping)
        request = compose(model, CompletionInput(prompts=(ids,)), asked)
        scheduler.submit(Job(request, heard.append, row))
    while scheduler.running < shape.rows or any(each.pending > 1 for each in scheduler.sequences):
        scheduler.step()
    return scheduler


def in_turns(ways: dict[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Milliseconds, median of `turns` after one that is not counted; who begins changes from turn to turn."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for turn in range(turns + 1):
        for at in range(len(names)):
            name = names[(turn + at) % len(names)]
            # Of this thread, the only one: other work on the machine is not counted.
            started = time.thread_time()
            ways[name]()
            took[name].append((time.thread_time() - started) * 1e3)
    return {name: statistics.median(values[1:]) for name, values in took.items()}


def measure(model: LanguageModel, *, quick: bool) -> dict[str, Any]:
    """The whole result."""
    import torch
    import transformers

    dtype = str(model.network.module.dtype).removeprefix("torch.")
    turns = 3 if quick else 15
    layers = {
        kind: {shape.name: attention(shape, kind, 5 if quick else 25) for shape in (LONG, SHORT, UNRELATED)}
        for kind in ("float32", "bfloat16")
    }
    engine = {shape.name: steps(model, shape, turns) for shape in (LONG, SHORT, UNRELATED)}
    return {
        "bench": "kernels",
        "command": " ".join(["python", "-m", "kernels.bench", *sys.argv[1:]]),
        "quick": quick,
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": os.getloadavg()[0],
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": {"name": model.name, "dtype": dtype},
        "attention": layers,
        "engine": engine,
        "attention_ratio_vs_no_sharing": layers[dtype][LONG.name]["ratio_vs_no_sharing"],
        "attention_ratio_vs_sdpa": layers[dtype][LONG.name]["ratio_vs_sdpa"],
        "step_ratio_vs_no_sharing": engine[LONG.name]["ratio_vs_no_sharing"],
        "step_ratio_1024": engine[SHORT.name]["ratio_vs_no_sharing"],
        "ratio_unrelated": engine[UNRELATED.name]["ratio_vs_no_sharing"],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    import torch

    from kernels.model import load_model

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("model", nargs="?", type=Path, default=MODEL, help="model folder")
    flags.add_argument("--quick", action="store_true", help="about a minute, with less certainty")
    flags.add_argument("--json", action="store_true", help="end standard output with one JSON object")
    given = flags.parse_args(argv)
    torch.set_num_threads(1)
    model = load_model(str(given.model), say=_say_on_stderr, device="cpu")
    found = measure(model, quick=given.quick)
    for part, shapes in (*found["attention"].items(), ("engine", found["engine"])):
        for name, values in shapes.items():
            numbers = "  ".join(f"{key} {value}" for key, value in values.items())
            sys.stdout.write(f"{part:>9} {name:>12}  {numbers}\n")
    if given.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return 0


def _say_on_stderr(line: str) -> None:
    sys.stderr.write(f"bench: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
