"""What a scripted upstream remembers between calls: conversations, the chain of each choice, a prefix cache.

A conversation is one rendered prompt (by /tokenize or by a chat call) and everything that was generated from
it; one answer of the queue, or the default, serves all of it. A chain is one choice of it, which may take
several calls: a completions call whose prompt ids begin with the rendered prompt belongs to the conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

from tests.scripted_model import Model
from tests.scripted_script import Exchange, Script
from tests.scripted_tokens import starts_with

BLOCK = 32


@dataclass(slots=True, eq=False)
class Chain:
    """One choice of a conversation.

    Attributes:
        index: the choice: `Script.say[index]` is what it says.
        seed: of its calls, if they have one.
        calls: the exchanges that generated it, in order.
        forced: the ids behind the rendered prompt that its last call came with.
        sampled: the ids that its last call generated; all of them, sent or not.
    """

    index: int
    seed: int | None
    calls: list[Exchange] = field(default_factory=list)
    forced: list[int] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)

    def ids(self) -> list[int]:
        """Everything behind the rendered prompt."""
        return [*self.forced, *self.sampled]

    def goes_on_in(self, tail: Sequence[int]) -> int | None:
        """How many ids a prompt shares with it; None where it repeats nothing that this chain sampled.

        The last sampled token may be missing: a stop token or an end of sequence that was dropped.
        """
        pairs = zip(self.ids(), tail, strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        is_enough = shared >= len(self.forced) + (len(self.sampled) > 1)
        return shared if is_enough and len(tail) > len(self.forced) else None


@dataclass(slots=True, eq=False)
class Conversation:
    """One rendered prompt and its chains.

    Attributes:
        base: ids of the rendered prompt.
        rendered_by: where the prompt was first seen; `prompt`: it came as ids and was never rendered here.
        script: what serves it, once a call was answered by a script.
    """

    base: list[int]
    rendered_by: str
    script: Script | None = None
    chains: list[Chain] = field(default_factory=list)

    def chain(self, tail: Sequence[int], seed: int | None) -> Chain | None:
        """The chain that a prompt repeats and goes on from; of several that of its seed, or the least continued."""
        strange = seed is not None and self.rendered_by != "chat"  # a chat's seeds are the server's own
        able = [
            (one.seed != seed, -shared, len(one.calls), one.index, one)
            for one in self.chains
            if (shared := one.goes_on_in(tail)) is not None and not (strange and one.seed not in {seed, None})
        ]
        return min(able, key=lambda entry: entry[:4])[-1] if able else None

    def cut_chain(self) -> Chain | None:
        """The next choice of a chat call that was cut and not continued yet, be it before its first token."""
        cut = [one for one in self.chains if len(one.calls) == 1 and not one.calls[0].done.is_set()]
        return cut[0] if cut and self.rendered_by == "chat" else None

    def new_chain(self, seed: int | None) -> Chain:
        """The next choice: by the distance of its seed from the first one, else in order of arrival."""
        first = next((one.seed for one in self.chains if one.seed is not None), seed)
        if self.script is not None and self.script.seed is not None:
            first = self.script.seed
        index = len(self.chains)
        if seed is not None and first is not None and seed >= first:
            index = seed - first
        self.chains.append(Chain(index, seed))
        return self.chains[-1]


class Conversations:
    """All of them, oldest first."""

    def __init__(self) -> None:
        self._all: list[Conversation] = []

    def clear(self) -> None:
        """Forget them all."""
        self._all.clear()

    def chains(self) -> list[Chain]:
        """Every chain, in the order of the conversations."""
        return [chain for conversation in self._all for chain in conversation.chains]

    def begin(self, base: Sequence[int], rendered_by: str) -> Conversation:
        """A new one."""
        self._all.append(Conversation(list(base), rendered_by))
        return self._all[-1]

    def find(self, prompt: Sequence[int], seed: int | None, model: Model) -> tuple[Conversation, Chain | None]:
        """The conversation that a prompt of ids belongs to, and the chain that it continues; None: a new one."""
        begun = [one for one in reversed(self._all) if list(prompt[: len(one.base)]) == one.base]
        begun.sort(key=lambda one: -len(one.base))
        for one in begun:
            chain = one.chain(prompt[len(one.base) :], seed)
            if chain is not None:
                return one, chain
        for one in begun:
            chain = one.cut_chain() if len(prompt) > len(one.base) else None
            if chain is not None:
                return one, chain
        tokenized = next((one for one in begun if one.rendered_by == "/tokenize"), None)
        if tokenized is None:
            return self.begin(_base_of(prompt, model), "prompt"), None
        has_seed = [one for one in tokenized.chains if seed is not None and one.seed == seed]
        return tokenized, has_seed[0] if has_seed and len(prompt) > len(tokenized.base) else None


def _base_of(prompt: Sequence[int], model: Model) -> Sequence[int]:
    """Of a prompt that was never rendered here: up to its first start marker, else all of it."""
    opened = (at for at in range(len(prompt)) if starts_with(prompt, at, model.opening))
    at = next(opened, None)
    return prompt if at is None else prompt[: at + len(model.opening)]


class PrefixCache:
    """The full blocks of tokens that a prefix cache would hold: those of all prompts and outputs so far."""

    def __init__(self) -> None:
        self._blocks: set[int] = set()

    def hits(self, prompt: Sequence[int]) -> int:
        """Tokens of a prompt that are in it: whole blocks, and never the last token, which must be computed."""
        known = above = 0
        for start in range(0, (len(prompt) - 1) // BLOCK * BLOCK, BLOCK):
            above = hash((above, tuple(prompt[start : start + BLOCK])))
            if above not in self._blocks:
                break
            known = start + BLOCK
        return known

    def fill(self, prompt: Iterable[int]) -> Filling:
        """Put a prompt into it. Returns: what takes the output."""
        filling = Filling(self._blocks)
        for token in prompt:
            filling.add(token)
        filling.flush()
        return filling


@dataclass(slots=True)
class Filling:
    """One sequence on its way into the cache; its last sampled token is never in it: nobody computed its keys."""

    blocks: set[int]
    above: int = 0
    block: list[int] = field(default_factory=list)

    def add(self, token: int) -> None:
        """The next token; those before it are computed now."""
        self.flush()
        self.block.append(token)

    def flush(self) -> None:
        """Keep the block if it is full."""
        if len(self.block) == BLOCK:
            self.above = hash((self.above, tuple(self.block)))
            self.blocks.add(self.above)
            self.block = []
