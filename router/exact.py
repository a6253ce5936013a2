"""What a backend's prefix cache holds, as the backend itself tells it block by block.

Owns: the blocks that are there now, found by the tokens in them. Pure. Does not own: events and whether one is missing
(gateway/kv_events.py), nor whether what was found came true (prefix.py).

The engine's own names of blocks are never computed here: they are mapped to ours, the chain of hashes over token ids.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence

from router.prefix import Chain, token_chain

MOST_BLOCKS = 262_144  # about 350 bytes each
Name = tuple[Hashable, Hashable]  # a group of layers or a tier of memory, and the engine's name of a block in it


class Exact:
    """What one backend's prefix cache holds, going by its KV events.

    Every physical copy of a block is stored and removed by an event of its own, so copies are counted, per group and
    engine's name. A block whose parent is unknown cannot be named, so it is left out: a hit is understated, never
    invented. So it is when there is more than may be remembered: what was used longest ago is forgotten.

    Args:
        most_blocks: that are remembered.

    Attributes:
        block_tokens: of a block; 0 until one was stored.
        orphans: blocks that could not be named.
        forgotten: blocks that are there, but did not fit in here.
    """

    def __init__(self, most_blocks: int = MOST_BLOCKS) -> None:
        self._most = most_blocks
        self._copies: dict[Name, list[int]] = {}  # [our name, copies]
        self._names: OrderedDict[int, tuple[Name, ...]] = OrderedDict()  # our name -> engine's; longest unused first
        self.block_tokens = 0
        self.orphans = 0
        self.forgotten = 0

    def __len__(self) -> int:
        """Blocks that are known."""
        return len(self._names)

    def stored(
        self, group: Hashable, hashes: Sequence[Hashable], parent: Hashable | None, ids: Sequence[int], root: int
    ) -> None:
        """Blocks were stored, one after the other, below `parent`, or at the root of a prompt. O(blocks).

        Args:
            group: of layers that share a cache.
            hashes: the engine's names, one per block.
            parent: the engine's name of the block before them; None at the beginning of a prompt.
            ids: the token ids of all of them.
            root: the seed of the chain they belong to; used where `parent` is None.
        """
        known = None if parent is None else self._copies.get((group, parent))
        size = len(ids) // len(hashes) if hashes else 0
        is_other_size = self.block_tokens not in {0, size}
        if not size or len(ids) != size * len(hashes) or is_other_size or (parent is not None and known is None):
            self.orphans += len(hashes)
            return
        self.block_tokens = size
        own_names = token_chain(root if known is None else known[0], ids, size)
        # From the end, so that a beginning is forgotten after what follows it.
        for name, own in zip(reversed(hashes), reversed(own_names), strict=True):
            self._store((group, name), own)
        if known is not None:
            self._names.move_to_end(known[0])
        while len(self._names) > self._most:
            _, names = self._names.popitem(last=False)
            self.forgotten += 1
            for lost in names:
                del self._copies[lost]

    def _store(self, name: Name, own: int) -> None:
        copies = self._copies.get(name)
        if copies is not None and copies[0] != own:  # the engine's names are hashes, too: two blocks may share one
            self._drop(name, copies[0])
            copies = None
        if copies is None:
            self._copies[name] = [own, 1]
            self._names[own] = (*self._names.get(own, ()), name)
        else:
            copies[1] += 1
        self._names.move_to_end(own)

    def removed(self, group: Hashable, hashes: Sequence[Hashable]) -> None:
        """One copy of each of these blocks is gone."""
        for name in hashes:
            copies = self._copies.get((group, name))
            if copies is None:
                continue
            copies[1] -= 1
            if not copies[1]:
                self._drop((group, name), copies[0])

    def _drop(self, name: Name, own: int) -> None:
        del self._copies[name]
        left = tuple(each for each in self._names[own] if each != name)
        if left:
            self._names[own] = left
        else:
            del self._names[own]

    def clear(self) -> None:
        """The cache was emptied, or the server restarted."""
        self._copies.clear()
        self._names.clear()
        self.block_tokens = 0

    def overlap(self, chain: Chain) -> int:
        """How many blocks of a prompt, from its beginning, it has. O(blocks of the hit)."""
        names = self._names
        for hit, block in enumerate(chain):
            if block not in names:
                return hit
        return len(chain)

    def used(self, chain: Chain) -> None:
        """A prompt that begins with these blocks went there: they are the last to be forgotten."""
        for block in reversed(chain[: self.overlap(chain)]):
            self._names.move_to_end(block)
