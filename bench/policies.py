"""Who serves a call: round robin, least loaded, consistent hashing, a cache-aware tree, and ours.

Owns: the policies that `bench.placement` compares. The first four are written from their published descriptions; all of
them know, of what a gateway can know, what their authors' know.
"""

from __future__ import annotations

import bisect
import random
from collections import Counter
from hashlib import blake2b

from bench.fleet import BLOCK, CACHE_BLOCKS, Request
from gateway.config.placing import PlacementConfig
from gateway.load import Load
from gateway.placing import Standing
from router.placement import Candidate, home, place
from router.prefix import Predicted


class Counted:
    """What all policies share: calls in flight, counted when they are placed."""

    def __init__(self, replicas: int, seed: int) -> None:
        self.calls = [0] * replicas
        self.chance = random.Random(seed)

    def placed(self, replica: int) -> int:
        """Count a call."""
        self.calls[replica] += 1
        return replica

    def began(self, request: Request, replica: int, now_s: float) -> None:
        """See the protocol."""

    def ended(self, request: Request, replica: int, now_s: float) -> None:  # noqa: ARG002  # the protocol's
        """See the protocol."""
        self.calls[replica] -= 1

    def polled(self, replica: int, waiting: int, kv_use: float) -> None:
        """See the protocol."""

    def lost(self, replica: int) -> None:
        """See the protocol."""


class RoundRobin(Counted):
    """Each in its turn."""

    _turn = 0

    def choose(self, request: Request, up: list[int], now_s: float) -> int:  # noqa: ARG002  # the protocol's
        """See the protocol."""
        self._turn += 1
        return self.placed(up[self._turn % len(up)])


class LeastLoaded(Counted):
    """Fewest calls in flight; chance among equals."""

    def choose(self, request: Request, up: list[int], now_s: float) -> int:  # noqa: ARG002  # the protocol's
        """See the protocol."""
        least = min(self.calls[i] for i in up)
        return self.placed(self.chance.choice([i for i in up if self.calls[i] == least]))


class ConsistentHash(Counted):
    """A ring of 100 points per replica; a prompt's first block says where. With a `bound`, the next one within it.

    Args:
        bound: most calls of a replica, relative to the mean; None: unbounded.
    """

    def __init__(self, replicas: int, seed: int, bound: float | None = None) -> None:
        super().__init__(replicas, seed)
        self._bound = bound
        ring = [(_point(f"{i}/{n}"), i) for i in range(replicas) for n in range(100)]
        self._points, self._owners = zip(*sorted(ring), strict=True)

    def choose(self, request: Request, up: list[int], now_s: float) -> int:  # noqa: ARG002  # the protocol's
        """See the protocol."""
        alive, count = set(up), len(self._owners)
        begin = bisect.bisect(self._points, _point(str(request.prompt[0])))
        most = float("inf")
        if self._bound is not None:
            most = -(-self._bound * (sum(self.calls[i] for i in up) + 1) // len(up))
        for n in range(count):
            owner: int = self._owners[(begin + n) % count]
            if owner in alive and self.calls[owner] + 1 <= most:
                return self.placed(owner)
        return self.placed(up[0])


def _point(name: str) -> int:
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


class CacheAwareTree(Counted):
    """SGLang's approximate tree as published, with its defaults.

    Out of balance (most - least > 32 calls and most > 1.1 x least): fewest calls. Else, where more than half of the
    prompt was sent before, the replica it went to; else the replica with the smallest tree, or, with `mends`,
    the fewest calls (later versions). The tree sees no eviction but its own, at the size of the real cache.

    Args:
        mends: take the least loaded replica on a miss.
    """

    THRESHOLD, ABSOLUTE, RELATIVE = 0.5, 32, 1.1

    def __init__(self, replicas: int, seed: int, *, mends: bool = False) -> None:
        super().__init__(replicas, seed)
        self._mends = mends
        self._trees = [Predicted(CACHE_BLOCKS, ttl_s=1e9, unsure_s=1e9) for _ in range(replicas)]

    def choose(self, request: Request, up: list[int], now_s: float) -> int:
        """See the protocol."""
        found = self._found(request, up, now_s)
        self._trees[found].expect(request.prompt, now_s)
        return self.placed(found)

    def _found(self, request: Request, up: list[int], now_s: float) -> int:
        calls = [self.calls[i] for i in up]
        if max(calls) - min(calls) > self.ABSOLUTE and max(calls) > self.RELATIVE * min(calls):
            return min(up, key=lambda i: self.calls[i])
        best = max(up, key=lambda i: self._trees[i].overlap(request.prompt, now_s))
        if self._trees[best].overlap(request.prompt, now_s) > self.THRESHOLD * len(request.prompt):
            return best
        return min(up, key=lambda i: self.calls[i] if self._mends else len(self._trees[i]))

    def lost(self, replica: int) -> None:
        """See the protocol."""
        self._trees[replica].clear()


class Ours(Counted):
    """router/placement.py over router/prefix.py, with what the gateway tells them.

    Args:
        waits: calls wait at the gateway while every replica says that it is full (gateway/admission.py): what waits
            there can still go to one that comes back.
    """

    def __init__(self, replicas: int, seed: int, *, waits: bool = True) -> None:
        super().__init__(replicas, seed)
        self._waits = waits
        self._ids = [_point(str(i)) for i in range(replicas)]
        self._caches = [Predicted(CACHE_BLOCKS) for _ in range(replicas)]
        self._pending: Counter[int] = Counter()
        self._left: dict[int, int] = {}
        self._standings = [Standing(str(i), PlacementConfig()) for i in range(replicas)]

    def _has_room(self, up: list[int]) -> bool:
        limits = [(self._standings[i].limit, self.calls[i]) for i in up]
        return any(limit is None or calls < limit for limit, calls in limits)

    def choose(self, request: Request, up: list[int], now_s: float) -> int | None:
        """See the protocol."""
        if self._waits and not request.is_retried and not self._has_room(up):
            return None
        prompt = request.prompt
        at_home = up[home(prompt[0], [self._ids[i] for i in up])]
        candidates = [
            Candidate(
                "",
                True,
                self.calls[i],
                1.0,
                cached_tokens=self._caches[i].overlap(prompt, now_s) * BLOCK,
                pending_tokens=self._pending[i],
                waiting=0,
                kv_use=self._standings[i].kv_use,
                is_home=i == at_home,
            )
            for i in up
        ]
        placement = place(candidates, self.chance.choice, len(prompt) * BLOCK)
        assert placement is not None
        found = up[placement.position]
        left = self._left[request.number] = len(prompt) * BLOCK - candidates[placement.position].cached_tokens
        self._pending[found] += left
        self._caches[found].expect(prompt, now_s)
        return self.placed(found)

    def began(self, request: Request, replica: int, now_s: float) -> None:
        """See the protocol."""
        self._pending[replica] -= self._left.pop(request.number, 0)
        self._caches[replica].expect(request.prompt, now_s, is_sure=True)

    def ended(self, request: Request, replica: int, now_s: float) -> None:
        """See the protocol."""
        super().ended(request, replica, now_s)
        self._pending[replica] -= self._left.pop(request.number, 0)

    def polled(self, replica: int, waiting: int, kv_use: float) -> None:
        """See the protocol."""
        load = Load(running=0, waiting=waiting, kv_use=kv_use, cache_tokens=None)
        self._standings[replica].hear(load, 4.0, self.calls[replica])

    def lost(self, replica: int) -> None:
        """See the protocol."""
        self._caches[replica].clear()
        self._standings[replica].forget()
