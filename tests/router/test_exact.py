"""Prefix caches as backends tell them: events are followed copy by copy, and a hit is understated, never invented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.exact import Exact
from router.prefix import seed, token_chain

SEED = seed("qwen")
SIZE = 4  # tokens of a block


def ids_of(blocks: Sequence[int]) -> list[int]:
    """Token ids of a prompt whose blocks are these."""
    return [block for block in blocks for _ in range(SIZE)]


def test_events_name_what_a_prompt_finds() -> None:
    """Stored blocks are found by the tokens' own chain, also those that came later below a known parent."""
    cache, chain = Exact(), token_chain(SEED, ids_of([1, 2, 3]), SIZE)
    cache.stored(0, ["a", "b"], None, ids_of([1, 2]), SEED)
    assert cache.overlap(chain) == 2
    cache.stored(0, ["c"], "b", ids_of([3]), SEED)
    assert (cache.overlap(chain), cache.block_tokens) == (3, SIZE)
    cache.removed(0, ["b"])
    assert cache.overlap(chain) == 1


def test_blocks_without_a_known_parent_are_left_out() -> None:
    """What nobody can name is counted as orphaned and never taken for a hit."""
    cache = Exact()
    cache.stored(0, ["x"], "never seen", ids_of([1]), SEED)
    cache.stored(0, ["x", "y"], None, [1, 2, 3], SEED)
    cache.removed(0, ["never seen"])
    assert (len(cache), cache.orphans, cache.overlap(token_chain(SEED, ids_of([1]), SIZE))) == (0, 3, 0)


def test_groups_of_a_hybrid_model_are_counted_apart() -> None:
    """A block that two groups of layers hold stays found until both have removed it."""
    cache, chain = Exact(), token_chain(SEED, ids_of([1]), SIZE)
    for group in (0, 1):
        cache.stored(group, ["a"], None, ids_of([1]), SEED)
    cache.removed(0, ["a"])
    assert cache.overlap(chain) == 1
    cache.removed(1, ["a"])
    assert cache.overlap(chain) == 0


def test_what_was_used_longest_ago_is_forgotten_first() -> None:
    """A full cache forgets the prompt nobody asked for, from its end, and never takes what is gone for a hit."""
    cache = Exact(most_blocks=4)
    cache.stored(0, ["a", "b"], None, ids_of([1, 2]), SEED)
    cache.stored(0, ["c", "d"], None, ids_of([3, 4]), SEED)
    first, second, third = (token_chain(SEED, ids_of(blocks), SIZE) for blocks in ([1, 2], [3, 4], [5]))
    cache.used(first)
    cache.stored(0, ["e"], None, ids_of([5]), SEED)
    assert [cache.overlap(chain) for chain in (first, second, third)] == [2, 1, 1]
    assert (len(cache), cache.forgotten) == (4, 1)
    cache.removed(0, ["d", "a"])
    assert (cache.overlap(first), len(cache)) == (0, 3)


def test_a_block_that_goes_on_stays_before_what_follows_it() -> None:
    """A parent below which blocks are stored later is forgotten after them."""
    cache = Exact(most_blocks=3)
    cache.stored(0, ["a"], None, ids_of([1]), SEED)
    cache.stored(0, ["x"], None, ids_of([9]), SEED)
    cache.stored(0, ["b"], "a", ids_of([2]), SEED)
    cache.stored(0, ["y"], None, ids_of([8]), SEED)
    assert cache.overlap(token_chain(SEED, ids_of([1, 2]), SIZE)) == 2
    assert cache.overlap(token_chain(SEED, ids_of([9]), SIZE)) == 0


def test_blocks_of_another_size_are_left_out() -> None:
    """What an engine stores in smaller pieces beside its blocks is nothing a chain could find."""
    cache = Exact()
    cache.stored(0, ["a"], None, ids_of([1]), SEED)
    cache.stored(1, ["p"], None, [1, 1], SEED)
    assert (cache.block_tokens, cache.orphans, len(cache)) == (SIZE, 1, 1)


def test_one_name_for_two_blocks_is_the_newer_one() -> None:
    """Where an engine's name stands for other tokens than before, the older block is no longer found."""
    cache = Exact()
    cache.stored(0, ["a"], None, ids_of([1]), SEED)
    cache.stored(0, ["a"], None, ids_of([2]), SEED)
    assert [cache.overlap(token_chain(SEED, ids_of([block]), SIZE)) for block in (1, 2)] == [0, 1]


class ExactMachine(RuleBasedStateMachine):
    """Copies come and go in any order: a prompt finds exactly the blocks of which a copy is left."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Exact(most_blocks=1000)
        self.copies: Counter[tuple[int, ...]] = Counter()

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def store(self, prompt: list[int]) -> None:
        """One more copy of a whole prompt, as an engine without sharing would keep it."""
        names = [tuple(prompt[: i + 1]) for i in range(len(prompt))]
        self.cache.stored(0, names, None, ids_of(prompt), SEED)
        self.copies.update(names)

    @rule(prompt=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def remove(self, prompt: list[int]) -> None:
        """One copy of one block goes, if there is one."""
        name = tuple(prompt)
        if self.copies[name]:
            self.copies[name] -= 1
            self.cache.removed(0, [name])

    @rule()
    def clear(self) -> None:
        """All of it goes."""
        self.cache.clear()
        self.copies.clear()

    @invariant()
    def finds_what_is_left(self) -> None:
        """The hit ends at the first block without a copy; nothing is kept of blocks that are gone."""
        assert len(self.cache) == sum(count > 0 for count in self.copies.values())
        for prompt in ([0, 0, 1], [1, 1], [0, 1, 0, 1]):
            held = [self.copies[tuple(prompt[: i + 1])] > 0 for i in range(len(prompt))]
            hit = held.index(False) if False in held else len(held)
            assert self.cache.overlap(token_chain(SEED, ids_of(prompt), SIZE)) == hit


TestExactMachine = ExactMachine.TestCase
TestExactMachine.settings = settings(max_examples=60, deadline=None, stateful_step_count=30)
