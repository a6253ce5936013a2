"""How much of a prompt a backend's prefix cache holds, predicted from our own calls.

Owns: chains of block hashes, the cache that is modelled for a backend (`Predicted`), and whether what was predicted
came true (`Agreement`). Pure: time is passed in, nothing is shared between two of them. Does not own: the cache as a
backend itself tells it (exact.py), nor what a hit is worth (placement.py).

A chain names every prefix of a prompt by one number: h(i) = blake2b-8(h(i-1) || block i), beginning with a seed made of
model, adapter and the tenant's salt, so that nobody finds what another tenant has cached. Everything is O(blocks of
the prompt) or better, and memory is bounded by the blocks each cache may hold.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

BLOCK_BYTES = 256  # about 64 tokens: what a smaller block would find is not worth its place in memory
MOST_CHAIN = 1024
MOST_BLOCKS = 65536
Chain = Sequence[int]


def seed(model: str, adapter: str = "", salt: str = "") -> int:
    """Where the chains of a model, an adapter and a tenant begin."""
    parts = b"".join(b"%d:%b" % (len(part), part) for part in (model.encode(), adapter.encode(), salt.encode()))
    return int.from_bytes(blake2b(parts, digest_size=8).digest(), "big")


def byte_chain(begin: int, prompt: bytes, block_bytes: int = BLOCK_BYTES, most: int = MOST_CHAIN) -> list[int]:
    """One number per whole block of a prompt, `most` at most: equal numbers, equal prompts up to there."""
    before, chain = begin.to_bytes(8, "big"), []
    for at in range(0, min(len(prompt) // block_bytes, most) * block_bytes, block_bytes):
        before = blake2b(before + prompt[at : at + block_bytes], digest_size=8).digest()
        chain.append(int.from_bytes(before, "big"))
    return chain


def token_chain(begin: int, ids: Sequence[int], block_tokens: int) -> list[int]:
    """The same over token ids."""
    data = array("I", ids).tobytes()
    size = block_tokens * array("I").itemsize
    return byte_chain(begin, data, size, most=len(ids) // block_tokens)


class Predicted:
    """What one backend's prefix cache should hold, going by what was sent there.

    It forgets as vLLM does: the block used longest ago first, and of one prompt the end before the beginning. So a
    block is never without those before it, nor kept or trusted longer than they, and a search by halves finds the hit.

    Args:
        most_blocks: the backend's capacity, as modelled.
        ttl_s: for how long a block is believed after it was last seen to be used.
        unsure_s: the same where a call was only placed, and nobody knows yet whether it will be worked on.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS, *, ttl_s: float = 600.0, unsure_s: float = 30.0) -> None:
        self._most = most_blocks
        self._ttl_s, self._unsure_s = ttl_s, unsure_s
        self._until_s: OrderedDict[int, float] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that are remembered."""
        return len(self._until_s)

    def overlap(self, chain: Chain, now_s: float) -> int:
        """How many blocks of a prompt, from its beginning, it should have. O(log blocks)."""
        low, high, until_s = 0, min(len(chain), self._most), self._until_s
        while low < high:
            middle = (low + high) // 2
            if until_s.get(chain[middle], 0.0) > now_s:
                low = middle + 1
            else:
                high = middle
        return low

    def expect(self, chain: Chain, now_s: float, *, is_sure: bool = False) -> None:
        """A prompt was placed there, so that the next alike follows it; or was worked on, too: `is_sure`."""
        until_s, end_s = self._until_s, now_s + (self._ttl_s if is_sure else self._unsure_s)
        for block in reversed(chain[: self._most]):
            until_s[block] = max(until_s.get(block, 0.0), end_s)
            until_s.move_to_end(block)
        while len(until_s) > self._most:
            until_s.popitem(last=False)

    def resize(self, most_blocks: int) -> None:
        """The capacity is known better now."""
        self._most = most_blocks
        while len(self._until_s) > most_blocks:
            self._until_s.popitem(last=False)

    def clear(self) -> None:
        """It was restarted, or proved to hold something else."""
        self._until_s.clear()


class Agreement:
    """Whether a prediction is trusted: by how far the hits predicted of late were from those that were.

    Trust is lost when, over at least `enough` calls, more than `most` of the prompt tokens were predicted
    wrongly, and comes back below half of that: the prediction goes on being compared. One that begins without trust
    earns it in the same way.
    """

    def __init__(self, *, enough: int = 20, most: float = 0.3, memory: float = 0.95, is_trusted: bool = True) -> None:
        self._enough, self._most, self._memory = enough, most, memory
        self._calls = 0
        self._wrong = self._all = 0.0
        self.is_trusted = is_trusted

    def add(self, predicted: int, actual: int, prompt_tokens: int) -> None:
        """A call ended."""
        self._calls += 1
        self._wrong = self._wrong * self._memory + abs(predicted - actual)
        self._all = self._all * self._memory + prompt_tokens
        if self._calls >= self._enough and self._all:
            share = self._wrong / self._all
            self.is_trusted = share <= (self._most if self.is_trusted else self._most / 2)
