"""The Triton kernels: by the interpreter against the definition, and compiled for a GPU that is not there."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from kernels.api import trie_decode
from kernels.attention import attend_each
from tests.kernels.test_attention import Forest

# Triton decides what a kernel is when the kernel, or one of its own functions, is defined.
with pytest.MonkeyPatch.context() as patched:
    patched.setenv("TRITON_INTERPRET", "1")
    pytest.importorskip("triton")
    kernels = importlib.import_module("kernels.triton_decode")

STEPS = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 9)), max_size=8)
HEADS = st.sampled_from([(1, 1), (4, 2), (3, 1), (4, 1), (5, 1), (6, 1), (14, 2), (8, 1)])
COMPILE = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kernels import triton_decode as kernels

def source(kernel, pointers, constants):
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    # As a launch would find them: pointers and strides are multiples of 16, but for the last stride, which is 1.
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n not in constants and n != "scale"}
    return ASTSource(kernel, signature, {(names.index(n),): value for n, value in constants.items()}, attrs)

half, single, index = "*bf16", "*fp32", "*i32"
ones = {name: 1 for name in ("q_dim", "k_dim", "v_dim")}
tile = {"DIM": 128, "WIDE": 128, "GROUP": 4, "SIZE": 16, "TILE": 64, "STEP": 64, **ones}
partial = source(kernels.partial_kernel, {"q": half, "k": half, "v": half, "partial": single, "sums": single,
    "blocks": index, "rows": index, "pieces": index, "scale": "fp32"}, tile)
merge = source(kernels.merge_kernel, {"partial": single, "sums": single, "out": half, "lse": single,
    "parts": index, "ends": index}, {"DIM": 128, "WIDE": 128, "out_dim": 1})
found = {}
for name, each in (("partial", partial), ("merge", merge)):
    built = triton.compile(each, target=GPUTarget("cuda", 90, 32))
    ptx = built.asm["ptx"]
    found[name] = {"target": "sm_90" in ptx, "wgmma": ptx.count("wgmma.mma_async"), "shared": built.metadata.shared}
print(json.dumps(found))
"""


@pytest.fixture(autouse=True)
def interpret(monkeypatch):
    """Kernels are run by the interpreter, and what they import while they run is, too."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(steps=STEPS, heads=HEADS, dim=st.sampled_from([64, 96, 128, 256]), seed=st.randoms(use_true_random=False))
def test_the_kernels_are_the_definition(steps, heads, dim, seed):
    """Over any tree, unfinished blocks and rows in any order included, both kernels give what the definition gives."""
    forest = Forest(steps, heads=heads, dim=dim)
    order = list(range(len(forest.q)))
    seed.shuffle(order)
    forest.tables, forest.lengths = [forest.tables[row] for row in order], [forest.lengths[row] for row in order]
    forest.q = forest.q[order]
    wanted = attend_each(forest.q, forest.k, forest.v, forest.tables, forest.lengths)
    found = trie_decode(forest.q, forest.k, forest.v, forest.tables, forest.plan(), impl="triton")
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, wanted, strict=True))


def test_long_spans_are_cut_and_wide_ones_tiled(monkeypatch):
    """A span of more tokens and rows than one program takes is the work of several, with the same result."""
    forest = Forest([(0, True, 40), (0, True, 3), (1, True, 9), (2, False, 30)], prompt=60)
    wanted = attend_each(forest.q, forest.k, forest.v, forest.tables, forest.lengths)
    monkeypatch.setattr(kernels, "SPLIT_TOKENS", 8)
    monkeypatch.setattr(kernels, "TILE_ROWS", 4)
    work = kernels.make_work(forest.plan(), group=2, device="cpu")
    assert int(work.pieces[:, 1].max()) <= 8
    assert int(work.pieces[:, 3].max()) <= 2
    found = kernels.attend_work(forest.q, forest.k, forest.v, work)
    again = kernels.attend_work(forest.q, forest.k, forest.v, work)
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


def test_half_precision_is_as_good_as_torch():
    """The error is at most twice that of torch's attention over gathered keys; the interpreter has no bfloat16."""
    forest = Forest([(0, True, 9), (1, True, 9), (0, False, 5)], dtype=torch.float16, dim=64)
    wanted, _ = forest.expected()
    found, _ = trie_decode(forest.q, forest.k, forest.v, forest.tables, forest.plan(), impl="triton")
    theirs = [
        scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]
        for q, dense in zip(forest.q, forest.dense, strict=True)
        for k, v in [(dense[:, 0].transpose(0, 1), dense[:, 1].transpose(0, 1))]
    ]
    rounding = torch.finfo(torch.float16).eps * wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= 2 * (torch.stack(theirs).double() - wanted).abs().max() + rounding


def test_any_strides_are_read_as_they_lie():
    """Keys and values that are views of one interleaved tensor, as servers have them, are not copied."""
    forest = Forest([(0, True, 3), (1, False, 6)])
    both = torch.stack([forest.k, forest.v], dim=2).permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 1, 3, 4)
    k, v = both[:, :, :, 0], both[:, :, :, 1]
    wanted, _ = trie_decode(forest.q, forest.k, forest.v, forest.tables, forest.plan(), impl="triton")
    found, _ = trie_decode(forest.q, k, v, forest.tables, forest.plan(), impl="triton")
    assert torch.equal(wanted, found)


def test_the_kernels_compile_for_hopper():
    """Without any GPU here, both compile for sm_90, use its tensor cores and fit its shared memory."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["partial"]["target"]
    assert found["merge"]["target"]
    assert found["partial"]["wgmma"] > 0
    assert found["partial"]["shared"] <= 227 * 1024
