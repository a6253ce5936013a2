"""Prefix caches as the router predicts them: chains agree as prompts do; the expected is forgotten as vLLM does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.prefix import BLOCK_BYTES, Predicted, byte_chain, seed

FEW = settings(max_examples=150, deadline=None)
PROMPTS = st.lists(st.integers(0, 2), max_size=9)  # of few blocks, so that they share beginnings
SEED = seed("qwen")


def chain_of(blocks: Sequence[int]) -> list[int]:
    """The chain of a prompt whose blocks are these."""
    return byte_chain(SEED, b"".join(bytes([block]) * BLOCK_BYTES for block in blocks))


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many items two sequences share from their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@FEW
@given(a=st.binary(max_size=1500), b=st.binary(max_size=1500), shared=st.binary(max_size=1500))
def test_chains_agree_exactly_as_far_as_their_prompts(a: bytes, b: bytes, shared: bytes) -> None:
    """Two chains have the same numbers for the whole blocks that their prompts share, and no other."""
    one, other = shared + a, shared + b
    same = common(one, other) // BLOCK_BYTES
    assert common(byte_chain(SEED, one), byte_chain(SEED, other)) == same


@pytest.mark.parametrize("other", [("llama", "", ""), ("qwen", "lora", ""), ("qwen", "", "ada"), ("qwe", "n", "")])
def test_models_adapters_and_tenants_share_nothing(other: tuple[str, str, str]) -> None:
    """The same prompt of another model, adapter or tenant has no number in common."""
    prompt = b"x" * 4 * BLOCK_BYTES
    assert not set(byte_chain(SEED, prompt)) & set(byte_chain(seed(*other), prompt))


def test_a_chain_is_no_longer_than_it_may_be() -> None:
    """However long the prompt, the chain ends at `most` blocks; what is left over of a block has no number."""
    assert len(byte_chain(SEED, b"x" * 100 * BLOCK_BYTES, most=7)) == 7
    assert len(byte_chain(SEED, b"x" * (3 * BLOCK_BYTES - 1))) == 2


def test_what_was_placed_is_found_at_once_and_lapses_if_nobody_confirms_it() -> None:
    """A prompt placed a moment ago is expected there, for a short time; once it was worked on, for long."""
    cache, chain = Predicted(ttl_s=600, unsure_s=30), chain_of([1, 2, 0])
    cache.expect(chain, 0.0)
    assert (cache.overlap(chain, 0.0), cache.overlap(chain, 29.9), cache.overlap(chain, 30.0)) == (3, 3, 0)
    cache.expect(chain[:2], 10.0, is_sure=True)
    assert (cache.overlap(chain, 29.9), cache.overlap(chain, 609.9), cache.overlap(chain, 610.0)) == (3, 2, 0)


def test_the_end_of_a_prompt_is_forgotten_before_its_beginning() -> None:
    """In a full cache the oldest prompt loses blocks from its end, as in vLLM's free queue."""
    cache = Predicted(5)
    old, new = chain_of([0, 1, 2]), chain_of([1, 1, 1])
    cache.expect(old, 0.0)
    cache.expect(new, 1.0)
    assert (cache.overlap(old, 1.0), cache.overlap(new, 1.0), len(cache)) == (2, 3, 5)


def test_a_restarted_backend_has_nothing() -> None:
    """After `clear` nothing is expected; a smaller capacity drops what no longer fits."""
    cache = Predicted()
    cache.expect(chain_of([0, 1, 2]), 0.0)
    cache.resize(2)
    assert (cache.overlap(chain_of([0, 1, 2]), 0.0), len(cache)) == (2, 2)
    cache.clear()
    assert (cache.overlap(chain_of([0, 1, 2]), 0.0), len(cache)) == (0, 0)


class PredictedMachine(RuleBasedStateMachine):
    """Any order of calls: the cache stays bounded, closed under beginnings, and its search finds what a scan finds."""

    def __init__(self) -> None:
        super().__init__()
        self.most, self.now_s = 8, 0.0
        self.cache = Predicted(self.most, ttl_s=20.0, unsure_s=3.0)
        self.seen: list[list[int]] = []

    @rule(prompt=PROMPTS, is_sure=st.booleans())
    def expect(self, prompt: list[int], is_sure: bool) -> None:
        """A call was placed or worked on."""
        chain = chain_of(prompt)
        self.cache.expect(chain, self.now_s, is_sure=is_sure)
        self.seen.append(chain)
        assert self.cache.overlap(chain, self.now_s) == min(len(chain), self.most)

    @rule(seconds=st.floats(0, 9))
    def wait(self, seconds: float) -> None:
        """Time passes."""
        self.now_s += seconds

    @rule(most=st.integers(1, 12))
    def resize(self, most: int) -> None:
        """The capacity changes."""
        self.most = most
        self.cache.resize(most)

    @invariant()
    def is_bounded(self) -> None:
        """Never more blocks than it may have."""
        assert len(self.cache) <= self.most

    @invariant()
    def search_finds_what_a_scan_finds(self) -> None:
        """No block is trusted without those before it, so that halving finds the whole hit."""
        trusted = {block for block, until_s in self.cache._until_s.items() if until_s > self.now_s}
        for chain in self.seen[-20:]:
            hits = [block in trusted for block in chain]
            assert hits == sorted(hits, reverse=True)
            assert self.cache.overlap(chain, self.now_s) == sum(hits)


TestPredictedMachine = PredictedMachine.TestCase
TestPredictedMachine.settings = settings(max_examples=60, deadline=None, stateful_step_count=30)


class CountedReads(list[int]):
    """A chain that counts how many of its blocks are looked at."""

    reads = 0

    def __getitem__(self, at):
        CountedReads.reads += 1
        return super().__getitem__(at)


def test_asking_a_long_prompt_looks_at_few_of_its_blocks() -> None:
    """The hit of 1,000 blocks is found in about ten looks."""
    cache, chain = Predicted(), CountedReads(range(1, 1001))
    cache.expect(list(chain), 0.0)
    CountedReads.reads = 0
    assert cache.overlap(chain, 0.0) == 1000
    assert CountedReads.reads <= 11
