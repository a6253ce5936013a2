"""One call for tree attention: every implementation gives the same, and the machine decides which one runs."""

import importlib.util

import pytest
import torch

from kernels.api import trie_decode
from tests.kernels.test_attention import Forest

STEPS = [(0, True, 9), (1, False, 6), (1, True, 9)]


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_implementations_agree(scale):
    """The definition and the way that reads spans once give the same, and without a GPU the latter is chosen."""
    forest = Forest(STEPS)
    ways = [
        trie_decode(forest.q, forest.k, forest.v, forest.tables, forest.plan(), scale=scale, impl=impl)
        for impl in ("reference", "torch", "auto")
    ]
    assert all(torch.equal(*pair) for pair in zip(ways[1], ways[2], strict=True))
    assert all((a - b).abs().max() <= 1e-5 for a, b in zip(ways[0], ways[1], strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
def test_the_kernels_agree_on_a_gpu(dtype, most):
    """On a GPU the Triton kernels are chosen, and give what dense attention in float64 gives."""
    assert importlib.util.find_spec("triton") is not None
    forest = Forest(STEPS, dtype=dtype, dim=64, prompt=50)
    wanted, _ = forest.expected()
    found, _ = trie_decode(forest.q.cuda(), forest.k.cuda(), forest.v.cuda(), forest.tables, forest.plan())
    assert (found.cpu().double() - wanted).abs().max() <= most
