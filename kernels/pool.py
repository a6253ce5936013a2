"""The tensors behind the trie's block numbers: keys and values of every layer.

Owns: memory, writes and copies. Does not own: which block holds what (trie.py), and who reads it
(attention.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.trie import Copy


class Pool:
    """Blocks of keys and values.

    Args:
        layers: attention layers.
        blocks: blocks per layer; one number means the same block of every layer.
        block_tokens: tokens per block.
        kv_heads: heads of keys and values.
        head_dim: numbers per head.
        dtype: of keys and values.
        device: where they live.

    Attributes:
        k: [layers, blocks, block_tokens, kv_heads, head_dim].
        v: as `k`.
    """

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        block_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (layers, blocks, block_tokens, kv_heads, head_dim)
        # Zeros, and not whatever is there: on the CPU pages that nobody wrote take no memory this way.
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))

    @property
    def device(self) -> torch.device:
        """Where keys and values live."""
        return self.k.device

    @property
    def block_bytes(self) -> int:
        """What one block takes, keys and values of all layers."""
        return 2 * self.k[:, 0].nbytes

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put tokens where the trie said.

        Args:
            layer: number of the layer.
            slots: [tokens], from `Branch.append`.
            k: [tokens, kv_heads, head_dim].
            v: as `k`.
        """
        self.k[layer].flatten(0, 1).index_copy_(0, slots, k)
        self.v[layer].flatten(0, 1).index_copy_(0, slots, v)

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy the beginnings of blocks, all layers, one after the other: a target may be the next one's source."""
        for copy in copies:
            for each in (self.k, self.v):
                each[:, copy.target, : copy.tokens] = each[:, copy.source, : copy.tokens]
