"""Which backend serves a call: filter -> score -> pick. Pure; O(backends of the model).

Owns: one small class per idea. A filter says who may serve, a scorer what waiting there would cost; all costs are in
one unit, prompt tokens that a backend of weight 1 works through before our first token, so that they add up and none
needs a weight of its own. Among the near-cheapest chance decides, for a constant tie-break sends everything to one
backend. Does not own: what is known about a backend (gateway/models.py), nor how its cache is predicted (prefix.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

NEAR = 0.005
NEAR_TOKENS = 8.0


@dataclass(slots=True)
class Candidate:
    """One backend as placement sees it.

    Attributes:
        id: the backend.
        is_usable: up, probed, and let through by its breaker.
        in_flight: calls counted at decision time, not yet released.
        weight: capacity relative to the model's other backends.
        can_serve: it is able to do what the call needs.
        cached_tokens: of the prompt, expected in its prefix cache.
        pending_tokens: of other prompts, placed there and not worked through yet, without what it has cached.
        waiting: calls in its own queue, as it says.
        kv_use: part of its KV memory in use, 0 to 1, as it says.
        cost: of a call there, relative to the model's other backends; 0 is free.
        is_home: where calls that begin like this one go by themselves.
    """

    id: str
    is_usable: bool
    in_flight: int
    weight: float
    can_serve: bool = True
    cached_tokens: int = 0
    pending_tokens: int = 0
    waiting: int = 0
    kv_use: float = 0.0
    cost: float = 0.0
    is_home: bool = False


class Placement(NamedTuple):
    """The chosen backend's place in the sequence of candidates, and why."""

    position: int
    reason: str


class Filter(Protocol):
    """Who may serve a call."""

    def keep(self, candidates: Sequence[Candidate], positions: list[int]) -> list[int]:
        """Those of the positions that may; in order."""


class Scorer(Protocol):
    """What serving a call somewhere costs."""

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:
        """In prompt tokens of a backend of weight 1; the less the better."""


@dataclass(frozen=True, slots=True)
class Healthy:
    """Health: only backends that are up and that their breaker lets through."""

    def keep(self, candidates: Sequence[Candidate], positions: list[int]) -> list[int]:
        """See the protocol."""
        return [i for i in positions if candidates[i].is_usable]


@dataclass(frozen=True, slots=True)
class Capable:
    """Capability: only backends that can do what the call needs."""

    def keep(self, candidates: Sequence[Candidate], positions: list[int]) -> list[int]:
        """See the protocol."""
        return [i for i in positions if candidates[i].can_serve]


@dataclass(frozen=True, slots=True)
class Bounded:
    """Bounded load: calls <= max(side_by_side x weight, ceil(factor x mean x weight)), with this call counted.

    The mean is per weight, over those that are left; so somebody is always within the bound, and no cache hit, home or
    price makes a backend hotter than it. (Consistent hashing with bounded loads, Mirrokni et al., 2016.)

    Attributes:
        factor: of the mean.
        side_by_side: calls that a backend works on at hardly any loss, so that an idle fleet keeps its hits.
    """

    factor: float = 1.25
    side_by_side: int = 64

    def keep(self, candidates: Sequence[Candidate], positions: list[int]) -> list[int]:
        """See the protocol."""
        calls, weight = 1, 0.0
        for i in positions:
            calls += candidates[i].in_flight
            weight += candidates[i].weight
        mean = calls / weight
        kept = []
        for i in positions:
            own = candidates[i]
            bound = max(self.side_by_side * own.weight, math.ceil(self.factor * mean * own.weight))
            if own.in_flight + 1 <= bound:
                kept.append(i)
        return kept


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prefix overlap: factor x (prompt - cached) / weight, what of our own prompt is left to work through.

    Attributes:
        factor: more than 1, since whoever comes after us waits for it, too.
    """

    factor: float = 5.0

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:
        """See the protocol."""
        return self.factor * max(0, prompt_tokens - candidate.cached_tokens) / candidate.weight


@dataclass(frozen=True, slots=True)
class Pending:
    """Pending prefill: tokens of other prompts before ours / weight."""

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:  # noqa: ARG002  # the same for any prompt
        """See the protocol."""
        return candidate.pending_tokens / candidate.weight


@dataclass(frozen=True, slots=True)
class Queue:
    """Queue: (call_tokens x calls in flight + waiting_tokens x calls waiting there) / weight.

    A call in flight slows every step by a little; one that waits says that there is no room at all.
    """

    call_tokens: float = 256.0
    waiting_tokens: float = 1024.0

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:  # noqa: ARG002  # the same for any prompt
        """See the protocol."""
        calls = self.call_tokens * candidate.in_flight + self.waiting_tokens * candidate.waiting
        return calls / candidate.weight


@dataclass(frozen=True, slots=True)
class KvUse:
    """KV use: full_tokens x ((use - steep_from) / (1 - steep_from))^2 above `steep_from`, 0 below.

    A cache is there to be full; near the brim running calls are preempted and worked through again.
    """

    steep_from: float = 0.85
    full_tokens: float = 8192.0

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:  # noqa: ARG002  # the same for any prompt
        """See the protocol."""
        over = (candidate.kv_use - self.steep_from) / (1 - self.steep_from)
        return self.full_tokens * over * over if over > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost: cost x prompt, so that a backend of cost 0.5 is worth waiting there for half of the prompt."""

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:
        """See the protocol."""
        return candidate.cost * prompt_tokens


@dataclass(frozen=True, slots=True)
class Affinity:
    """Affinity: away_tokens anywhere but at home.

    Home follows from the prompt's beginning alone, so gateways that know nothing of each other's calls agree on it.
    Worth less than a single cached block, it decides where nothing is known.
    """

    away_tokens: float = 160.0

    def cost(self, candidate: Candidate, prompt_tokens: int) -> float:  # noqa: ARG002  # the same for any prompt
        """See the protocol."""
        return 0.0 if candidate.is_home else self.away_tokens


FILTERS: tuple[Filter, ...] = (Healthy(), Capable(), Bounded())
SCORERS: tuple[Scorer, ...] = (Prefill(), Pending(), Queue(), KvUse(), Cost(), Affinity())


def place(
    candidates: Sequence[Candidate],
    choose: Callable[[Sequence[int]], int],
    prompt_tokens: int = 0,
    *,
    filters: Sequence[Filter] = FILTERS,
    scorers: Sequence[Scorer] = SCORERS,
) -> Placement | None:
    """The cheapest backend that may serve; None when there is none.

    Args:
        candidates: the model's backends.
        choose: picks one of several positions, e.g. `random.choice`.
        prompt_tokens: of the call; 0 where nobody counted.
        filters: who may.
        scorers: what it costs.
    """
    positions = list(range(len(candidates)))
    for each in filters:
        positions = each.keep(candidates, positions)
        if not positions:
            return None
    if len(positions) == 1:
        return Placement(positions[0], "the only usable backend")
    costs = {i: sum(scorer.cost(candidates[i], prompt_tokens) for scorer in scorers) for i in positions}
    least = min(costs.values())
    near = least + max(NEAR_TOKENS, NEAR * least)
    found = choose([i for i in positions if costs[i] <= near])
    cached = candidates[found].cached_tokens
    if cached:
        return Placement(found, f"shortest expected wait, with {cached} of {prompt_tokens} prompt tokens cached")
    return Placement(found, "shortest expected wait")


def home(first_block: int, ids: Sequence[int]) -> int:
    """The position at home of calls that begin with this block; O(backends).

    Rendezvous hashing: when a backend comes or goes, only the calls at home there move (Thaler and Ravishankar, 1998).

    Args:
        first_block: the first number of the prompt's chain.
        ids: one number per backend, the same on every gateway.
    """
    return max(range(len(ids)), key=lambda i: _mixed(first_block ^ ids[i]))


def _mixed(number: int) -> int:
    """Splitmix64's finaliser: every bit of the number changes about half of the bits."""
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return number ^ (number >> 31)
