"""One step of the network, in numbers: which sequences read which tokens, and what their attention shares.

Owns: the vocabulary between the scheduler and the network. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.plan import Plan, make_plan


@dataclass(frozen=True, slots=True)
class Feed:
    """What one sequence reads in one step.

    Attributes:
        ids: the tokens, at least one.
        start: how many the sequence has before them.
        table: its blocks, those for `ids` included.
        slots: where keys and values of `ids` belong.
        keep: logits are wanted after so many of the last tokens.
        prompt: how many tokens of the sequence are its prompt.
    """

    ids: Sequence[int]
    start: int
    table: Sequence[int]
    slots: Sequence[int]
    keep: int
    prompt: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step reads.

    Attributes:
        feeds: one per sequence.
        plan: which cached tokens the feeds attend to. A single token's own key and value are in the cache by
            then and count as cached; of more tokens, those before the feed, which all of it attends to.
    """

    feeds: tuple[Feed, ...]
    plan: Plan

    @classmethod
    def of(cls, feeds: Sequence[Feed], *, block_tokens: int, share_from: int) -> Batch:
        """A batch with its plan; the last two arguments are those of `make_plan`."""
        lengths = [feed.start + (len(feed.ids) == 1) for feed in feeds]
        tables = [feed.table for feed in feeds]
        plan = make_plan(tables, lengths, block_tokens=block_tokens, share_from=share_from)
        return cls(tuple(feeds), plan)

    @property
    def tokens(self) -> int:
        """Tokens that the network reads."""
        return sum(len(feed.ids) for feed in self.feeds)
