"""What a request or a strategy cost: tokens by kind, money, eFLOPs and seconds, and what a right answer cost.

Owns: the eFLOPs of attention and weights with their memory term, sums over calls, running cost-of-pass and E3. Pure:
time is passed in. O(1) per call. Does not own: counting (tokens.py, gateway/tally.py), prices (price.py).

Sources: Kinetics (arXiv 2506.05333), its cost model, with the sign of the top-k saving as its block variant has it (the
plain variant's code adds what it should subtract); cost-of-pass (2504.13359); E3 (2505.16122).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import msgspec

from budget.tokens import TokenCounts

B200_FLOP_PER_BYTE = 562.5  # 4,500 TFLOPS in FP8, 8 TB/s; an H200 in bf16 has about 206, an H100 295
BF16_BYTES = 2


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What the cost of a model depends on.

    Attributes:
        parameters: active ones.
        layers, query_heads, kv_heads, head_dim: of its attention.
        value_bytes: of one number in the KV cache, and of one weight.
    """

    parameters: float
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    value_bytes: int = BF16_BYTES


class Work(msgspec.Struct, frozen=True):
    """What some calls take, in FLOP and bytes.

    Attributes:
        flop: of weights and attention.
        read_bytes: from memory: keys and values, and weights where few requests share them.
    """

    flop: float = 0.0
    read_bytes: float = 0.0

    def plus(self, other: Work) -> Work:
        """Both together."""
        return Work(self.flop + other.flop, self.read_bytes + other.read_bytes)

    def eflops(self, flop_per_byte: float = B200_FLOP_PER_BYTE) -> float:
        """Equivalent FLOP: a byte that is read keeps the hardware from `flop_per_byte` of them."""
        return self.flop + flop_per_byte * self.read_bytes


def generation(
    shape: Shape,
    *,
    prompt: float,
    output: float,
    siblings: int = 1,
    top_k: int | None = None,
    batch: float | None = None,
) -> Work:
    """What generating costs, after the prompt was computed.

    Args:
        shape: of the model.
        prompt: tokens in the cache before; their keys and values are read once for all siblings.
        output: tokens that each sibling generates.
        siblings: generated together over the same prompt.
        top_k: keys and values that each token attends to at most; None for all.
        batch: requests that share one read of the weights; None for so many that it does not count.
    """
    shared, own = (prompt * output, output * output / 2) if top_k is None else _sparse(prompt, output, top_k)
    attended = siblings * (shared + own)
    weights = 2 * shape.parameters * output
    flop = siblings * weights + 4 * shape.query_heads * shape.head_dim * shape.layers * attended
    per_token = 2 * shape.value_bytes * shape.kv_heads * shape.head_dim * shape.layers
    read = per_token * (shared + siblings * own)
    if batch is not None:
        read += shape.value_bytes * shape.parameters * output * siblings / batch
    return Work(flop, read)


def prefill(shape: Shape, *, computed: float, cached: float = 0.0) -> Work:
    """What computing a prompt costs, part of which was in the cache; all of it is read once."""
    attended = computed * cached + computed * computed / 2
    flop = 2 * shape.parameters * computed + 4 * shape.query_heads * shape.head_dim * shape.layers * attended
    return Work(flop, 2 * shape.value_bytes * shape.kv_heads * shape.head_dim * shape.layers * (computed + cached))


def _sparse(prompt: float, output: float, top_k: int) -> tuple[float, float]:
    """Keys that are attended to with a budget of them: prompt and output together, none of it shared.

    A token attends to no more than there are, so what the first ones lack of `top_k` is taken off.
    """
    lacking = max(0.0, top_k - prompt)
    reached = min(lacking, output)  # tokens until there are as many keys as the budget
    return 0.0, top_k * output - (lacking * reached - reached * reached / 2)


@dataclass(slots=True)
class Meter:
    """What one request took, or all requests of one strategy.

    Attributes:
        tokens: by kind.
        nano_usd: of all of them.
        work: of all calls, where the model's shape is known.
        seconds: from the first call to the last token; for several requests, their sum.
        requests: how many.
    """

    tokens: TokenCounts = field(default_factory=TokenCounts)
    nano_usd: int = 0
    work: Work = field(default_factory=Work)
    seconds: float = 0.0
    requests: int = 0

    def add(self, tokens: TokenCounts, *, nano_usd: int, work: Work, seconds: float) -> None:
        """Take one request in."""
        kinds = TokenCounts.__struct_fields__
        self.tokens = TokenCounts(**{kind: getattr(self.tokens, kind) + getattr(tokens, kind) for kind in kinds})
        self.nano_usd += nano_usd
        self.work = self.work.plus(work)
        self.seconds += seconds
        self.requests += 1


@dataclass(slots=True)
class Passes:
    """Right answers and what they cost, running, of one model in one mode.

    Unscored answers are not in it: feed it with those only whose worth is known.

    Attributes:
        scored: answers.
        right: the sum of their scores, each 0 to 1.
        nano_usd: what all of them cost, wrong ones too.
        decoded: tokens that were generated for all of them, planner and probes too.
    """

    scored: int = 0
    right: float = 0.0
    nano_usd: int = 0
    decoded: int = 0

    def add(self, score: float, *, nano_usd: int, decoded: int) -> None:
        """Take one scored answer in."""
        self.scored += 1
        self.right += min(1.0, max(0.0, score))
        self.nano_usd += nano_usd
        self.decoded += decoded

    def accuracy(self) -> float:
        """The mean score, 0 to 1."""
        return self.right / self.scored if self.scored else 0.0

    def cost_of_pass_usd(self) -> float:
        """US dollars per right answer: a ratio of sums; infinite where none is right."""
        return self.nano_usd / 1e9 / self.right if self.right else math.inf

    def e3(self) -> float:
        """The accuracy in percent, squared, per mean decoded tokens; alone it favours short and wrong answers."""
        return (100 * self.accuracy()) ** 2 * self.scored / self.decoded if self.decoded else 0.0
