"""The trie of KV blocks, played in any order against plain lists and a memory that remembers what was written.

THINKGATE_STEPS=10000 plays so many steps instead of two thousand.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kernels.errors import PoolExhausted
from kernels.trie import Branch, Trie

BLOCKS, SIZE = 12, 2
RUN_STEPS = 40
STEPS = int(os.environ.get("THINKGATE_STEPS", "0")) or 2000
IDS = st.lists(st.integers(0, 1), max_size=5)
pytestmark = pytest.mark.timeout(60 + STEPS // 20)
PICK = st.integers(0, 99)
Prefix = tuple[object, tuple[int, ...]]  # a space, and tokens in full blocks


@dataclass(eq=False)
class Mine:
    """A branch, and what the model knows of it.

    Attributes:
        tokens: all that were appended or matched.
        known: how many of them are committed, in full blocks.
        tail: the same object as that of the branches with which it shares its unfinished block.
        slots: where the tokens that are not written yet belong.
    """

    branch: Branch
    space: object
    tokens: list[int]
    known: int
    tail: object = field(default_factory=object)
    slots: list[int] = field(default_factory=list)

    def prefixes(self) -> set[Prefix]:
        """Every full block that it has in the trie."""
        return {(self.space, tuple(self.tokens[:end])) for end in range(SIZE, self.known + 1, SIZE)}

    def tail_blocks(self) -> int:
        return -(-(len(self.tokens) - self.known) // SIZE)


class Play(RuleBasedStateMachine):
    """Branches are opened, written, committed, forked and closed, and blocks evicted, in any order."""

    @initialize()
    def start(self):
        self.trie = Trie(blocks=BLOCKS, block_tokens=SIZE)
        self.open_branches: list[Mine] = []
        # Every prefix that must be found, with the step in which its last branch left it; None while it has one.
        self.kept: dict[Prefix, int | None] = {}
        # What was written into each slot: the space and all tokens up to its own.
        self.memory: dict[int, Prefix] = {}
        self.steps = 0

    def held(self) -> set[Prefix]:
        return set().union(*(mine.prefixes() for mine in self.open_branches))

    def room(self) -> int:
        tails = {mine.tail: mine.tail_blocks() for mine in self.open_branches}
        return BLOCKS - len(self.held()) - sum(tails.values())

    def settle(self):
        """What every change of branches does to the prefixes that are kept."""
        self.steps += 1
        held = self.held()
        for prefix, since in self.kept.items():
            if prefix in held:
                self.kept[prefix] = None
            elif since is None:
                self.kept[prefix] = self.steps

    def evict(self, count: int):
        """The model of eviction: longest unused first, of one branch the longest prefix first."""
        idle = [(since, -len(prefix[1]), prefix) for prefix, since in self.kept.items() if since is not None]
        for _, _, prefix in sorted(idle, key=lambda entry: entry[:2])[:count]:
            del self.kept[prefix]

    @rule(ids=IDS, space=st.sampled_from([None, "salt"]))
    def open(self, ids, space):
        known = 0
        while known + SIZE < len(ids) and (space, tuple(ids[: known + SIZE])) in self.kept:
            known += SIZE
        branch = self.trie.open(ids, space=space)
        assert len(branch) == known, "the longest known prefix in full blocks, the last token left out"
        self.open_branches.append(Mine(branch, space, ids[:known], known))
        self.settle()

    @precondition(lambda self: self.open_branches)
    @rule(pick=PICK, ids=IDS)
    def append(self, pick, ids):
        mine = self.open_branches[pick % len(self.open_branches)]
        sharers = [other for other in self.open_branches if other.tail is mine.tail]
        splits = len(sharers) > 1 and mine.tail_blocks() > 0 and bool(ids)
        wanted = -(-(len(mine.tokens) + len(ids) - mine.known) // SIZE) - mine.tail_blocks() + splits
        if wanted > self.room():
            before = (list(mine.branch.blocks), list(mine.branch.tail), self.trie.free, self.trie.idle)
            with pytest.raises(PoolExhausted) as raised:
                mine.branch.append(ids)
            assert (raised.value.wanted, raised.value.room) == (wanted, self.room())
            assert before == (mine.branch.blocks, mine.branch.tail, self.trie.free, self.trie.idle)
            return
        self.evict(max(0, wanted - self.trie.free))
        writes = mine.branch.append(ids)
        assert (writes.copy is not None) == splits
        if writes.copy is not None:
            for at in range(writes.copy.tokens):
                self.memory[writes.copy.target * SIZE + at] = self.memory[writes.copy.source * SIZE + at]
        if ids and len(sharers) > 1:
            mine.tail = object()
        mine.tokens += ids
        mine.slots += writes.slots

    @precondition(lambda self: self.open_branches)
    @rule(pick=PICK)
    def commit(self, pick):
        self.written(self.open_branches[pick % len(self.open_branches)])

    def written(self, mine: Mine):
        """Write what was appended, and commit it."""
        first = len(mine.tokens) - len(mine.slots)
        for at, slot in enumerate(mine.slots, first):
            self.memory[slot] = (mine.space, tuple(mine.tokens[: at + 1]))
        mine.slots = []
        mine.branch.commit()
        before = mine.known
        mine.known = len(mine.tokens) // SIZE * SIZE
        if mine.known != before:
            mine.tail = object()
        self.kept.update(dict.fromkeys(mine.prefixes()))
        self.settle()

    @precondition(lambda self: 0 < len(self.open_branches) < 6)
    @rule(pick=PICK)
    def fork(self, pick):
        mine = self.open_branches[pick % len(self.open_branches)]
        self.written(mine)
        free, idle = self.trie.free, self.trie.idle
        twin = mine.branch.fork()
        assert (self.trie.free, self.trie.idle) == (free, idle), "a fork allocates nothing"
        assert twin.blocks == mine.branch.blocks
        self.open_branches.append(Mine(twin, mine.space, list(mine.tokens), mine.known, mine.tail))

    @precondition(lambda self: self.open_branches)
    @rule(pick=PICK, drop=st.booleans())
    def close(self, pick, drop):
        mine = self.open_branches.pop(pick % len(self.open_branches))
        mine.branch.close(drop=drop)
        mine.branch.close()
        self.settle()
        if drop:
            for prefix in sorted(mine.prefixes(), key=lambda prefix: -len(prefix[1])):
                grows = any(space == prefix[0] and ids[:-SIZE] == prefix[1] for space, ids in self.kept)
                if self.kept[prefix] is None or grows:
                    break
                del self.kept[prefix]

    @rule(count=st.integers(0, 3))
    def evict_some(self, count):
        idle = self.trie.idle
        assert self.trie.evict(count) == min(count, idle)
        self.evict(count)

    @invariant()
    def every_branch_reads_what_was_written_for_its_tokens(self):
        for mine in self.open_branches:
            assert len(mine.branch) == len(mine.tokens)
            assert mine.branch.tail == mine.tokens[mine.known :]
            for at in range(len(mine.tokens) - len(mine.slots)):
                slot = mine.branch.blocks[at // SIZE] * SIZE + at % SIZE
                assert self.memory[slot] == (mine.space, tuple(mine.tokens[: at + 1]))

    @invariant()
    def equal_prefixes_share_a_block_and_others_do_not(self):
        owners: dict[int, set[object]] = {}
        for mine in self.open_branches:
            names: list[object] = [*sorted(mine.prefixes(), key=lambda prefix: len(prefix[1]))]
            names += [(id(mine.tail), number) for number in range(mine.tail_blocks())]
            assert len(mine.branch.blocks) == len(names)
            for block, name in zip(mine.branch.blocks, names, strict=True):
                owners.setdefault(block, set()).add(name)
        assert all(len(names) == 1 for names in owners.values())
        assert len(owners) == BLOCKS - self.room()

    @invariant()
    def no_block_is_lost_or_owned_twice(self):
        trie = self.trie
        nodes = [node for root in trie._roots.values() for node in nodes_below(root)]
        in_trie, in_tails = [node.block for node in nodes], list(trie._sharers)
        assert sorted(trie._free + in_trie + in_tails) == list(range(BLOCKS))
        for block, count in trie._sharers.items():
            assert count == sum(block in mine.branch.blocks for mine in self.open_branches)
        assert trie.room == self.room()
        assert len(nodes) == len(self.kept)

    @invariant()
    def references_are_those_of_live_branches(self):
        at = [mine.branch._node for mine in self.open_branches]
        for root in self.trie._roots.values():
            assert root.refs or root.children, "the root of a space that nobody uses"
            for node in (root, *nodes_below(root)):
                living = [child for child in node.children.values() if child.refs]
                assert node.refs == sum(end is node for end in at) + len(living)
        idle = [node for root in self.trie._roots.values() for node in nodes_below(root) if not node.refs]
        assert set(self.trie._idle) == set(idle)

    def teardown(self):
        for mine in self.open_branches:
            mine.branch.close()
        self.trie.evict(BLOCKS)
        assert (self.trie.free, self.trie.idle, self.trie._roots) == (BLOCKS, 0, {})


def nodes_below(node):
    """All nodes below a root or node."""
    return [each for child in node.children.values() for each in (child, *nodes_below(child))]


TestPlay = Play.TestCase
TestPlay.settings = settings(max_examples=max(1, STEPS // RUN_STEPS), stateful_step_count=RUN_STEPS, deadline=None)


def written(trie, ids, **space):
    """A branch whose tokens are all written."""
    branch = trie.open(ids, **space)
    branch.append(ids[len(branch) :])
    branch.commit()
    return branch


def test_a_prefix_is_found_in_full_blocks_and_leaves_a_token_to_compute():
    """What is known is matched in full blocks, and never the last token."""
    trie = Trie(blocks=8, block_tokens=4)
    written(trie, list(range(12))).close()
    assert [len(trie.open(list(range(n)))) for n in (12, 13, 11, 4, 5, 0)] == [8, 12, 8, 0, 4, 0]


def test_spaces_share_nothing():
    """The same tokens under another salt are unknown and get blocks of their own."""
    trie = Trie(blocks=8, block_tokens=4)
    ours = written(trie, list(range(9)), space="a")
    theirs = written(trie, list(range(9)), space="b")
    assert not set(ours.blocks) & set(theirs.blocks)


def test_the_first_to_write_into_a_shared_tail_copies_it():
    """A fork shares the unfinished block; one of two writers gets a copy of what is in it, the other none."""
    trie = Trie(blocks=4, block_tokens=4)
    branch = written(trie, [1, 2, 3, 4, 5, 6])
    twin = branch.fork()
    writes = twin.append([7])
    assert writes.copy is not None
    assert (writes.copy.source, writes.copy.target, writes.copy.tokens) == (branch.blocks[1], twin.blocks[1], 2)
    assert writes.slots == [twin.blocks[1] * 4 + 2]
    assert branch.append([8]).copy is None


def test_branches_that_say_the_same_share_it_afterwards():
    """Two branches that come to the same full block keep one copy of it and give the other back."""
    trie = Trie(blocks=6, block_tokens=2)
    branch = written(trie, [1, 2, 3])
    twin = branch.fork()
    for each in (branch, twin):
        each.append([4, 5])
        each.commit()
    assert branch.blocks[:2] == twin.blocks[:2]
    assert branch.blocks[2] != twin.blocks[2]
    assert trie.free == 2


def test_nothing_is_found_before_it_is_committed():
    """A block whose keys and values are not written yet is nobody else's."""
    trie = Trie(blocks=4, block_tokens=2)
    branch = trie.open([1, 2, 3])
    branch.append([1, 2, 3])
    assert len(trie.open([1, 2, 3])) == 0
    branch.close()
    assert trie.free == 4


def test_a_cache_needs_blocks():
    """A cache without blocks, or with blocks without tokens, is refused."""
    for wrong in ({"blocks": 0}, {"blocks": 1, "block_tokens": 0}):
        with pytest.raises(ValueError, match="no cache"):
            Trie(**wrong)
