"""Children of a request spend from one envelope, and never more than it holds."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from budget.errors import EnvelopeSpent
from budget.share import Share


def test_what_is_split_off_is_gone_until_it_comes_back() -> None:
    """Two children cannot both have what only one can spend; the rest of an ended one may be split again."""
    tree = Share(tokens=100, nano_usd=50)
    with tree.split(tokens=60, nano_usd=10) as step:
        with pytest.raises(EnvelopeSpent, match="tokens"):
            tree.split(tokens=41)
        step.spend(tokens=15, nano_usd=4)
        assert (tree.tokens, tree.nano_usd) == (40, 40)
    assert (tree.tokens, tree.nano_usd) == (85, 46)
    assert (tree.spent_tokens, tree.spent_nano_usd) == (15, 4)


def test_spending_more_than_is_left_spends_nothing() -> None:
    """The part that is short is named, and neither part changes."""
    share = Share(tokens=10, nano_usd=10)
    for tokens, nano_usd, part in ((11, 0, "tokens"), (1, 11, "usd")):
        with pytest.raises(EnvelopeSpent) as spent:
            share.spend(tokens=tokens, nano_usd=nano_usd)
        assert spent.value.part == part
    assert (share.tokens, share.nano_usd, share.spent_tokens, share.spent_nano_usd) == (10, 10, 0, 0)


def test_less_than_nothing_is_neither_split_nor_spent() -> None:
    """A negative amount would make what there is not: it is a bug of the caller, and changes nothing."""
    tree = Share(tokens=10, nano_usd=10)
    for take in (tree.split, tree.spend):
        for wanted in ({"tokens": -1}, {"nano_usd": -1}):
            with pytest.raises(AssertionError):
                take(**wanted)
    assert (tree.tokens, tree.nano_usd, tree.spent_tokens, tree.spent_nano_usd) == (10, 10, 0, 0)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_a_failing_child_gives_back_its_rest(failure: type[BaseException]) -> None:
    """However a block ends, what was not spent is there for the others."""
    tree = Share(tokens=10)

    def fail() -> None:
        with tree.split(tokens=8) as branch:
            branch.spend(tokens=3)
            raise failure

    with pytest.raises(failure):
        fail()
    assert (tree.tokens, tree.spent_tokens) == (7, 3)


def test_a_share_is_given_back_once() -> None:
    """Giving back again adds nothing, and a share that was given back cannot be spent any more."""
    tree = Share(tokens=10)
    branch = tree.split(tokens=4)
    for _ in range(3):
        branch.refund()
    assert tree.tokens == 10
    for use in (lambda: branch.spend(tokens=0), branch.split, branch.grow):
        with pytest.raises(AssertionError):
            use()


def test_a_child_that_outlives_its_parent_gives_back_to_the_tree() -> None:
    """A hedge that ends after its step hands its rest and its spending to the step's own parent."""
    tree = Share(tokens=10)
    step = tree.split(tokens=8)
    hedge = step.split(tokens=5)
    step.spend(tokens=1)
    step.refund()
    assert (tree.tokens, tree.spent_tokens) == (4, 1)
    hedge.spend(tokens=2)
    hedge.refund()
    assert (tree.tokens, tree.spent_tokens) == (7, 3)


@pytest.mark.parametrize(
    ("parent", "child", "ends"), [(10.0, None, 10.0), (10.0, 5.0, 5.0), (5.0, 10.0, 5.0), (None, 5.0, 5.0), (None,) * 3]
)
def test_no_child_may_run_longer_than_its_parent(parent: Any, child: Any, ends: Any) -> None:
    """A child's deadline is its own or its parent's, whichever is earlier."""
    share = Share(deadline_s=parent).split(deadline_s=child)
    assert share.deadline_s == ends
    assert share.is_over(10.0) == (ends is not None)
    assert not share.is_over(4.0)


def test_without_bounds_everything_is_counted_and_nothing_refused() -> None:
    """An envelope that bounds nothing still knows what its children spent; a child may have a bound of its own."""
    tree = Share()
    with tree.split() as free, tree.split(tokens=5) as bounded:
        free.spend(tokens=10**9, nano_usd=10**12)
        with pytest.raises(EnvelopeSpent):
            bounded.spend(tokens=6)
    assert (tree.tokens, tree.spent_tokens, tree.spent_nano_usd) == (None, 10**9, 10**12)


AMOUNT = st.integers(0, 40)


class Tree(RuleBasedStateMachine):
    """Children split, spend, grow and end in any order."""

    @initialize(tokens=AMOUNT, nano_usd=AMOUNT)
    def begin(self, tokens: int, nano_usd: int) -> None:
        """The request's envelope."""
        self.most = [tokens, nano_usd]
        self.spent = [0, 0]
        self.root = Share(tokens=tokens, nano_usd=nano_usd)
        self.open = [self.root]

    @rule(pick=st.integers(0, 99), tokens=st.none() | AMOUNT, nano_usd=st.none() | AMOUNT)
    def split(self, pick: int, tokens: int | None, nano_usd: int | None) -> None:
        """A child begins, if there is enough."""
        try:
            self.open.append(self.open[pick % len(self.open)].split(tokens=tokens, nano_usd=nano_usd))
        except EnvelopeSpent:
            return

    @rule(pick=st.integers(0, 99), tokens=AMOUNT, nano_usd=AMOUNT)
    def spend(self, pick: int, tokens: int, nano_usd: int) -> None:
        """A child uses some."""
        try:
            self.open[pick % len(self.open)].spend(tokens=tokens, nano_usd=nano_usd)
        except EnvelopeSpent:
            return
        self.spent = [self.spent[0] + tokens, self.spent[1] + nano_usd]

    @rule(pick=st.integers(0, 99), tokens=AMOUNT, nano_usd=AMOUNT)
    def grow(self, pick: int, tokens: int, nano_usd: int) -> None:
        """The hold was extended."""
        self.open[pick % len(self.open)].grow(tokens=tokens, nano_usd=nano_usd)
        self.most = [self.most[0] + tokens, self.most[1] + nano_usd]

    @precondition(lambda self: len(self.open) > 1)
    @rule(pick=st.integers(0, 99))
    def end(self, pick: int) -> None:
        """Any child but the root, also one whose own children still run."""
        self.open.pop(1 + pick % (len(self.open) - 1)).refund()

    @invariant()
    def nothing_is_lost_or_made(self) -> None:
        """What is left everywhere and what was spent are the envelope, and no more was spent than that."""
        left = [sum(share.tokens or 0 for share in self.open), sum(share.nano_usd or 0 for share in self.open)]
        assert [rest + spent for rest, spent in zip(left, self.spent, strict=True)] == self.most
        assert all(spent <= most for spent, most in zip(self.spent, self.most, strict=True))

    def teardown(self) -> None:
        """When all children have ended the root knows all that was spent."""
        while len(self.open) > 1:
            self.end(0)
        assert [self.root.spent_tokens, self.root.spent_nano_usd] == self.spent


def test_a_tree_never_spends_more_than_its_envelope() -> None:
    """Splitting, spending, growing and ending in any order neither lose nor make a token or a dollar."""
    run_state_machine_as_test(Tree, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))
