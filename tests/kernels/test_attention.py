"""Tree attention against dense attention in float64, over caches that a trie laid out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels import attention
from kernels.attention import Reads, attend_each, attend_tree, merge
from kernels.plan import make_plan
from kernels.trie import Branch, Trie

torch.set_num_threads(1)  # two threads on tensors this small only wait for each other

BLOCKS, SIZE = 64, 4
STEPS = st.lists(st.tuples(st.integers(0, 9), st.booleans(), st.integers(0, 9)), max_size=8)
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (7, 1), (6, 2), (8, 1)])
ERROR = {torch.float64: 1e-12, torch.float32: 1e-5}


class Forest:
    """Branches of a trie, the cache they are in, and the keys and values of each as one dense list.

    Args:
        steps: which branch, whether it is forked first, and how many tokens it gets.
        heads: of queries, and of keys and values.
        dim: numbers per head.
        dtype: of the cache and the queries.
    """

    def __init__(self, steps, *, heads=(4, 2), dim=8, dtype=torch.float32, prompt=9):
        torch.manual_seed(7)
        self.trie = Trie(blocks=BLOCKS, block_tokens=SIZE)
        # A slot that nobody wrote must not be seen.
        self.k, self.v = (torch.full((BLOCKS, SIZE, heads[1], dim), torch.nan, dtype=dtype) for _ in range(2))
        self.dense: list[Tensor] = []
        self.branches: list[Branch] = []
        self._said = 0
        self._add(self.trie.open([]), torch.empty(0, 2, heads[1], dim, dtype=dtype))
        self.write(0, prompt)
        for which, forks, count in steps:
            at = which % len(self.branches)
            if forks and len(self.branches) < 6:
                self._add(self.branches[at].fork(), self.dense[at])
            self.write(at, count)
        self.q = torch.randn(len(self.branches), heads[0], dim).to(dtype)
        self.tables = [branch.blocks for branch in self.branches]
        self.lengths = [len(branch) for branch in self.branches]

    def _add(self, branch, dense):
        self.branches.append(branch)
        self.dense.append(dense)

    def write(self, at, count):
        """Append tokens that nobody else says, with random keys and values."""
        new = torch.randn(count, *self.dense[at].shape[1:]).to(self.k.dtype)
        writes = self.branches[at].append(range(self._said, self._said + count))
        self._said += count
        for cache, part in ((self.k, new[:, 0]), (self.v, new[:, 1])):
            if writes.copy is not None:
                cache[writes.copy.target, : writes.copy.tokens] = cache[writes.copy.source, : writes.copy.tokens]
            cache.view(-1, *cache.shape[2:])[writes.slots] = part
        self.branches[at].commit()
        self.dense[at] = torch.cat([self.dense[at], new])

    def expected(self):
        """Dense attention of every branch in float64, by another implementation, and the log-sum-exps."""
        outs, sums = [], []
        for q, dense in zip(self.q.double(), self.dense, strict=True):
            k, v = (
                dense[:, i].double().repeat_interleave(q.shape[0] // dense.shape[2], 1).transpose(0, 1) for i in (0, 1)
            )
            outs.append(scaled_dot_product_attention(q[:, None], k, v)[:, 0])
            sums.append((q[:, None] @ k.transpose(1, 2) / q.shape[-1] ** 0.5)[:, 0].logsumexp(-1))
        return torch.stack(outs), torch.stack(sums)

    def plan(self, **how):
        return make_plan(self.tables, self.lengths, block_tokens=SIZE, **how)


@settings(max_examples=40, deadline=None)
@given(
    steps=STEPS,
    heads=HEADS,
    dim=st.sampled_from([4, 64, 96]),
    dtype=st.sampled_from(list(ERROR)),
    share_from=st.sampled_from([1, 9, 1000]),
)
def test_both_ways_are_dense_attention(steps, heads, dim, dtype, share_from):
    """Over any tree, group size and head size, both give what attention over each branch's own list gives."""
    forest = Forest(steps, heads=heads, dim=dim, dtype=dtype)
    expected = forest.expected()
    ways = (
        attend_each(forest.q, forest.k, forest.v, forest.tables, forest.lengths),
        attend_tree(forest.q, forest.k, forest.v, forest.plan(share_from=share_from)),
    )
    for way in ways:
        for found, wanted in zip(way, expected, strict=True):
            assert found.dtype == dtype
            assert (found.double() - wanted).abs().max() <= ERROR[dtype]


@settings(max_examples=40, deadline=None)
@given(
    steps=STEPS,
    heads=HEADS,
    counts=st.lists(st.integers(1, 9), min_size=6, max_size=6),
    long_tokens=st.sampled_from([4, 12, 1000]),
    share_from=st.sampled_from([1, 9, 1000]),
)
def test_rows_may_read_several_tokens_at_once(steps, heads, counts, long_tokens, share_from):
    """Rows of one and of several queries in one batch see what the definition lets each query see, and no more."""
    forest = Forest(steps, heads=heads)
    rows = list(zip(forest.tables, forest.lengths, counts, strict=False))
    counts = [min(count, length) for _, length, count in rows]
    q = torch.randn(sum(counts), heads[0], 8)
    own = [
        [table[at // SIZE] * SIZE + at % SIZE for at in range(length - count, length)] if count > 1 else []
        for (table, length, _), count in zip(rows, counts, strict=True)
    ]
    lengths = [length - len(slots) for length, slots in zip(forest.lengths, own, strict=True)]
    plan = make_plan(forest.tables, lengths, block_tokens=SIZE, share_from=share_from)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "_LONG_TOKENS", long_tokens)
        found = Reads(plan, q.device, own)(q, forest.k, forest.v)
        patched.setattr(attention, "_on_cpu", attention._on_any)
        plain = Reads(plan, q.device, own)(q, forest.k, forest.v)
    wanted = attend_each(q, forest.k, forest.v, forest.tables, forest.lengths, counts=counts)
    for way in (found, plain):
        assert all((a - b).abs().max() <= 1e-5 for a, b in zip(way, wanted, strict=True))


@settings(max_examples=15, deadline=None)
@given(steps=STEPS, dtype=st.sampled_from([torch.bfloat16, torch.float16]))
def test_half_precision_is_as_good_as_torch(steps, dtype):
    """In half precision the error is at most twice that of torch's attention over gathered keys."""
    forest = Forest(steps, dtype=dtype, dim=64)
    wanted, _ = forest.expected()
    found, _ = attend_tree(forest.q, forest.k, forest.v, forest.plan())
    theirs = [
        scaled_dot_product_attention(q[None, :, None], k[None], v[None], enable_gqa=True)[0, :, 0]
        for q, dense in zip(forest.q, forest.dense, strict=True)
        for k, v in [(dense[:, 0].transpose(0, 1), dense[:, 1].transpose(0, 1))]
    ]
    rounding = torch.finfo(dtype).eps * wanted.abs().max()
    assert (found.double() - wanted).abs().max() <= 2 * (torch.stack(theirs).double() - wanted).abs().max() + rounding


@settings(max_examples=15, deadline=None)
@given(steps=STEPS, seed=st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(steps, seed):
    """A batch in another order gives the same rows, and the same batch the same bits."""
    forest = Forest(steps)
    out, lse = attend_tree(forest.q, forest.k, forest.v, forest.plan())
    again, _ = attend_tree(forest.q, forest.k, forest.v, forest.plan())
    assert torch.equal(out, again)
    order = list(range(len(forest.q)))
    seed.shuffle(order)
    tables, lengths = [forest.tables[row] for row in order], [forest.lengths[row] for row in order]
    plan = make_plan(tables, lengths, block_tokens=SIZE)
    shuffled, sums = attend_tree(forest.q[order], forest.k, forest.v, plan)
    assert torch.allclose(shuffled, out[order], atol=1e-5)
    assert torch.allclose(sums, lse[order], atol=1e-5)


def test_a_cache_may_have_any_strides():
    """Keys and values are views of one interleaved tensor in some servers, and read as they lie."""
    forest = Forest([(0, True, 3), (1, False, 6)])
    both = torch.stack([forest.k, forest.v], dim=2).permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 1, 3, 4)
    k, v = both[:, :, :, 0], both[:, :, :, 1]
    assert not k.is_contiguous()
    expected = attend_tree(forest.q, forest.k, forest.v, forest.plan())
    assert all(torch.equal(*pair) for pair in zip(attend_tree(forest.q, k, v, forest.plan()), expected, strict=True))


def test_a_scale_may_be_given():
    """A model with its own scale of scores gets it from both ways."""
    forest = Forest([(0, True, 3)])
    each, _ = attend_each(forest.q, forest.k, forest.v, forest.tables, forest.lengths, scale=0.5)
    tree, _ = attend_tree(forest.q, forest.k, forest.v, forest.plan(), scale=0.5)
    assert torch.allclose(each, tree, atol=1e-5)
    assert not torch.allclose(each, attend_tree(forest.q, forest.k, forest.v, forest.plan())[0], atol=1e-3)


def test_merging_with_nothing_changes_nothing():
    """The empty set has the log-sum-exp of minus infinity and no weight."""
    out, lse = torch.randn(3, 4), torch.randn(3)
    merged = merge(torch.zeros(3, 4), torch.full((3,), -torch.inf), out, lse)
    assert all(torch.equal(*pair) for pair in zip(merged, (out, lse), strict=True))


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    """The same tree on a GPU gives the same attention."""
    forest = Forest([(0, True, 3), (1, False, 6), (1, True, 9)])
    expected, _ = forest.expected()
    found, _ = attend_tree(forest.q.cuda(), forest.k.cuda(), forest.v.cuda(), forest.plan())
    assert (found.cpu().double() - expected).abs().max() <= 1e-4
