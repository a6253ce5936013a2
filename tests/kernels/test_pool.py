"""The tensors of the KV cache: writes go where the trie says, copies in the order they were asked for."""

import torch

from kernels.pool import Pool
from kernels.trie import Copy


def small():
    return Pool(layers=2, blocks=4, block_tokens=4, kv_heads=1, head_dim=2)


def test_tokens_lie_in_their_slots():
    """What is written to a slot of a layer is found in that block, at that place, and nowhere else."""
    pool = small()
    k = torch.arange(1.0, 7.0).reshape(3, 1, 2)
    pool.write(1, torch.tensor([3, 4, 12]), k, -k)
    assert torch.equal(pool.k[1, 0, 3], k[0])
    assert torch.equal(pool.k[1, 1, 0], k[1])
    assert torch.equal(pool.v[1, 3, 0], -k[2])
    assert not pool.k[0].any()
    assert int((pool.k != 0).sum()) == 6


def test_copies_take_the_beginning_of_a_block_in_every_layer():
    """As many tokens as asked are copied in all layers, and what is behind them stays."""
    pool = small()
    pool.k[:, 0], pool.v[:, 0], pool.k[:, 2] = 1, 2, 9
    pool.copy([Copy(0, 2, 3)])
    assert pool.k[:, 2, :, 0, 0].tolist() == [[1, 1, 1, 9]] * 2
    assert pool.v[:, 2, :, 0, 0].tolist() == [[2, 2, 2, 0]] * 2


def test_copies_follow_each_other():
    """A block that is copied away and then copied over keeps what it had for the first of the two."""
    pool = small()
    pool.k[:, 0], pool.k[:, 1] = 1, 2
    pool.copy([Copy(0, 3, 4), Copy(1, 0, 4)])
    assert pool.k[0, 3, 0, 0, 0] == 1
    assert pool.k[0, 0, 0, 0, 0] == 2


def test_a_block_knows_its_size():
    """Keys and values of all layers in bytes: what a budget in bytes is divided by."""
    assert small().block_bytes == 2 * 2 * 4 * 1 * 2 * 4
