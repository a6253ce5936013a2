"""How much of a prompt a backend's prefix cache holds: predicted from our own calls, or told by the backend itself.

Owns: chains of block hashes, the cache that is modelled for a backend (`Predicted`) and the one that follows its KV
events (`Exact`). Pure: time is passed in, nothing is shared between two of them. Does not own: where events come
from (gateway/kv_events.py), nor what a hit is worth (placement.py).

A chain names every prefix of a prompt by one number: h(i) = blake2b-8(h(i-1) || block i), beginning with a seed made of
model, adapter and the tenant's salt, so that nobody finds what another tenant has cached. Everything is O(blocks of
the prompt) or better, and memory is bounded by the blocks each cache may hold.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Hashable, Sequence
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


class Exact:
    """What one backend's prefix cache holds, going by its KV events.

    Every physical copy of a block is stored and removed by an event of its own, so copies are counted, per group of
    layers and engine hash. A block whose parent is unknown cannot be named, so it is left out: a hit is understated,
    never invented.

    Args:
        most_blocks: beyond which it is `is_overfull`, and must not be asked any more.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._copies: dict[tuple[int, Hashable], list[int]] = {}  # engine's name -> [our name, copies]
        self._have: Counter[int] = Counter()  # our name -> engine's names of it
        self.orphans = 0
        self.block_tokens = 0

    def __len__(self) -> int:
        """Blocks that are known, by the engine's names."""
        return len(self._copies)

    @property
    def is_overfull(self) -> bool:
        """Whether there was more than may be remembered."""
        return len(self._copies) > self._most

    def stored(
        self, group: int, hashes: Sequence[Hashable], parent: Hashable | None, ids: Sequence[int], root: int
    ) -> None:
        """Blocks were stored, one after the other, below `parent`, or at the root of a prompt.

        Args:
            group: of layers that share a cache.
            hashes: the engine's names, one per block.
            parent: the engine's name of the block before them; None at the beginning of a prompt.
            ids: the token ids of all of them.
            root: the seed of the chain they belong to; used where `parent` is None.
        """
        if not hashes or len(ids) % len(hashes):
            return
        begin: int | None = root
        if parent is not None:
            known = self._copies.get((group, parent))
            begin = None if known is None else known[0]
        if begin is None:
            self.orphans += len(hashes)
            return
        self.block_tokens = len(ids) // len(hashes)
        for name, own in zip(hashes, token_chain(begin, ids, self.block_tokens), strict=True):
            copies = self._copies.get((group, name))
            if copies is None:
                self._copies[group, name] = [own, 1]
                self._have[own] += 1
            else:
                copies[1] += 1

    def removed(self, group: int, hashes: Sequence[Hashable]) -> None:
        """One copy of each of these blocks is gone."""
        for name in hashes:
            copies = self._copies.get((group, name))
            if copies is None:
                continue
            copies[1] -= 1
            if not copies[1]:
                del self._copies[group, name]
                self._have[copies[0]] -= 1
                if not self._have[copies[0]]:
                    del self._have[copies[0]]

    def clear(self) -> None:
        """The cache was emptied, or the server restarted."""
        self._copies.clear()
        self._have.clear()

    def overlap(self, chain: Chain) -> int:
        """How many blocks of a prompt, from its beginning, it has. O(blocks of the hit)."""
        have = self._have
        for hit, block in enumerate(chain):
            if block not in have:
                return hit
        return len(chain)


class Agreement:
    """Whether a prediction is trusted: by how far the hits predicted of late were from those that were.

    Trust is lost when, over at least `enough` calls, more than `most` of the prompt tokens were predicted
    wrongly, and comes back below half of that: the prediction goes on being compared.
    """

    def __init__(self, *, enough: int = 20, most: float = 0.3, memory: float = 0.95) -> None:
        self._enough, self._most, self._memory = enough, most, memory
        self._calls = 0
        self._wrong = self._all = 0.0
        self.is_trusted = True

    def add(self, predicted: int, actual: int, prompt_tokens: int) -> None:
        """A call ended."""
        self._calls += 1
        self._wrong = self._wrong * self._memory + abs(predicted - actual)
        self._all = self._all * self._memory + prompt_tokens
        if self._calls >= self._enough and self._all:
            share = self._wrong / self._all
            self.is_trusted = share <= (self._most if self.is_trusted else self._most / 2)
