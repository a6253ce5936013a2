"""The trie of KV blocks: which block of the cache holds which tokens, and who still needs it.

Owns: the numbers of all blocks; the trie of full blocks, one node each; branches with their unfinished
tails; copy-on-write; what is evicted, and when. Does not own: keys and values. It says which slots to
write and which block to copy, and whoever holds the tensors does so. Pure Python.

A full block belongs to the trie, an unfinished one to the branches that share it. Sharing costs nothing
but a count, so forking is cheap; the first branch to write into a shared tail gets a copy of it.

Invariants, played by tests/kernels/test_trie.py:
- every block is free, in one node, or in the tail of at least one branch, and in only one of these;
- a node's `refs` are the branches that end at it and its children that have `refs` themselves, so it has
  none exactly when no branch is at or below it: it is then idle;
- idle nodes are queued so that every node comes after its descendants: the head of the queue is a leaf,
  and nothing that a branch needs is ever in it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from kernels.errors import PoolExhausted

Tokens = tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Root:
    """Where the prefixes of one space begin."""

    space: Hashable
    refs: int = 0
    children: dict[Tokens, _Node] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Node:
    """One full block: the tokens of its path end with `tokens`."""

    parent: _Root | _Node
    tokens: Tokens
    block: int
    refs: int = 0
    children: dict[Tokens, _Node] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Copy:
    """Keys and values to copy before anything is written.

    Attributes:
        source: block to copy from.
        target: block to copy to.
        tokens: how many slots, from the first.
    """

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Writes:
    """What has to be written for tokens that were appended.

    Attributes:
        slots: one per token: block number times tokens per block, plus the place in the block.
        copy: to be done first; None if the tail was the branch's own.
    """

    slots: list[int]
    copy: Copy | None


class Trie:
    """All blocks of one KV cache.

    Args:
        blocks: how many there are; never exceeded.
        block_tokens: tokens per block.
    """

    def __init__(self, *, blocks: int, block_tokens: int = 16) -> None:
        if blocks < 1 or block_tokens < 1:
            raise ValueError(f"{blocks} blocks of {block_tokens} tokens are no cache")
        self.blocks = blocks
        self.block_tokens = block_tokens
        # Popped from the end: a fresh cache hands out block 0 first.
        self._free = list(range(blocks - 1, -1, -1))
        self._sharers: dict[int, int] = {}  # tail block -> branches that have it
        self._roots: dict[Hashable, _Root] = {}
        self._idle: OrderedDict[_Node, None] = OrderedDict()

    @property
    def free(self) -> int:
        """Blocks that hold nothing. O(1)."""
        return len(self._free)

    @property
    def idle(self) -> int:
        """Blocks that are kept for whoever comes with the same prefix, and given up when room is needed. O(1)."""
        return len(self._idle)

    @property
    def room(self) -> int:
        """Blocks that `append` could hand out now. O(1)."""
        return len(self._free) + len(self._idle)

    def open(self, ids: Sequence[int], *, space: Hashable = None) -> Branch:
        """A branch that holds as much of `ids` as the trie knows, in full blocks; O(len(ids)).

        At least the last token stays out, however much is known: whoever asks wants the logits after it.
        `append` the tokens from `len(branch)` on.

        Args:
            ids: the tokens that the branch is going to have.
            space: branches of different spaces share nothing: a tenant's salt, an adapter.
        """
        size = self.block_tokens
        root = self._roots.setdefault(space, _Root(space))
        node: _Root | _Node = root
        found: list[int] = []
        for start in range(0, (len(ids) - 1) // size * size, size):
            child = node.children.get(tuple(ids[start : start + size]))
            if child is None:
                break
            node = child
            found.append(child.block)
        self._hold(node)
        return Branch(self, node, found)

    def evict(self, blocks: int) -> int:
        """Give up idle blocks, least recently used first, leaves before what they grew on; O(blocks).

        Returns: how many it were: fewer only if no more were idle.
        """
        count = min(blocks, len(self._idle))
        for _ in range(count):
            self._forget(next(iter(self._idle)))
        return count

    def _take(self, count: int) -> list[int]:
        """Blocks to write, evicting if it must. Raises: PoolExhausted, with nothing changed."""
        if count > self.room:
            raise PoolExhausted(wanted=count, room=self.room)
        self.evict(count - len(self._free))
        taken = [self._free.pop() for _ in range(count)]
        self._sharers.update((block, 1) for block in taken)
        return taken

    def _leave(self, block: int) -> None:
        """One branch fewer has this tail block."""
        self._sharers[block] -= 1
        if not self._sharers[block]:
            del self._sharers[block]
            self._free.append(block)

    def _hold(self, node: _Root | _Node) -> None:
        """One reference more; what was idle up to the root is no longer."""
        node.refs += 1
        while isinstance(node, _Node) and node.refs == 1:
            # refs went from 0 to 1, so the node was queued, unless it is new.
            self._idle.pop(node, None)
            node = node.parent
            node.refs += 1

    def _let_go(self, node: _Root | _Node) -> None:
        """One reference fewer; what nobody needs any more is queued, leaves first."""
        node.refs -= 1
        while isinstance(node, _Node) and not node.refs:
            self._idle[node] = None
            node = node.parent
            node.refs -= 1
        if isinstance(node, _Root):
            self._tidy(node)

    def _forget(self, node: _Node) -> _Root | _Node:
        """Free the block of an idle leaf. Returns: its parent."""
        assert not node.children, "a node was evicted before what grew on it"
        del self._idle[node]
        del node.parent.children[node.tokens]
        self._free.append(node.block)
        if isinstance(node.parent, _Root):
            self._tidy(node.parent)
        return node.parent

    def _tidy(self, root: _Root) -> None:
        """Drop the root of a space that nobody uses: there may be one per tenant."""
        if not root.refs and not root.children:
            del self._roots[root.space]

    def _publish(self, node: _Root | _Node, tokens: Tokens, block: int) -> _Node:
        """Make a branch's full block part of the trie, or give it up for the equal one that is there.

        Returns: the node that holds the tokens; it has the branch's reference, `node` has it no more.
        """
        child = node.children.get(tokens)
        if child is None:
            child = node.children[tokens] = _Node(node, tokens, block)
            del self._sharers[block]
        else:
            self._leave(block)
        # In this order: the other way round the path would be idle for a moment, and lose its age.
        self._hold(child)
        self._let_go(node)
        return child


class Branch:
    """One sequence of tokens whose keys and values are in the cache. Made by `Trie.open` and `fork`.

    Attributes:
        blocks: the block table: numbers of the blocks that hold the tokens, in their order; to be read only.
        tail: the tokens after the last block that is in the trie; to be read only.
    """

    def __init__(self, trie: Trie, node: _Root | _Node, blocks: list[int]) -> None:
        self._trie = trie
        self._node = node
        self._known = len(blocks)
        self.blocks = blocks
        self.tail: list[int] = []
        self.is_closed = False

    def __len__(self) -> int:
        """Tokens in the branch. O(1)."""
        return self._known * self._trie.block_tokens + len(self.tail)

    def append(self, ids: Sequence[int]) -> Writes:
        """Room for tokens; whoever calls writes their keys and values, then calls `commit`.

        O(len(ids)) and the blocks that are evicted for it.

        Raises: PoolExhausted, with nothing changed.
        """
        assert not self.is_closed, "a closed branch was written to"
        size, start = self._trie.block_tokens, len(self)
        is_split = bool(ids) and self._shares_tail()
        wanted = -(-(start + len(ids)) // size) - len(self.blocks)
        taken = self._trie._take(wanted + is_split)
        copy = None
        if is_split:
            copy = Copy(self.blocks[-1], taken[0], start % size)
            self._trie._leave(copy.source)
            self.blocks[-1] = copy.target
        self.blocks += taken[is_split:]
        self.tail += ids
        slots = [self.blocks[at // size] * size + at % size for at in range(start, start + len(ids))]
        return Writes(slots, copy)

    def commit(self) -> None:
        """Say that everything appended is written: from now on others may share the blocks that are full.

        A block that the trie has already is given up for that one, so `blocks` may change. O(new blocks).
        """
        size = self._trie.block_tokens
        full = len(self.tail) // size * size
        for start in range(0, full, size):
            tokens = tuple(self.tail[start : start + size])
            self._node = self._trie._publish(self._node, tokens, self.blocks[self._known])
            self.blocks[self._known] = self._node.block
            self._known += 1
        del self.tail[:full]

    def fork(self) -> Branch:
        """A second branch with the same tokens. Allocates nothing; copies the block table, O(len(blocks)).

        `commit` first: blocks that are full must be the trie's.
        """
        assert not self.is_closed, "a closed branch was forked"
        assert len(self.tail) < self._trie.block_tokens, "a branch was forked before its commit"
        twin = Branch(self._trie, self._node, self.blocks.copy())
        twin._known, twin.tail = self._known, self.tail.copy()
        self._trie._hold(self._node)
        for block in self.blocks[self._known :]:
            self._trie._sharers[block] += 1
        return twin

    def close(self, *, drop: bool = False) -> None:
        """Give back what only this branch needs. May be repeated. O(blocks that nobody else needs).

        Args:
            drop: the branch was a dead end: free at once what nothing else grew on, in place of keeping
                it for whoever comes with the same tokens.
        """
        if self.is_closed:
            return
        self.is_closed = True
        for block in self.blocks[self._known :]:
            self._trie._leave(block)
        self._trie._let_go(self._node)
        node = self._node
        while drop and isinstance(node, _Node) and not node.refs and not node.children:
            node = self._trie._forget(node)

    def _shares_tail(self) -> bool:
        """Another branch has the unfinished block, too."""
        return len(self.blocks) > self._known and self._trie._sharers[self.blocks[-1]] > 1
