"""A simulated fleet of model servers and the calls that come to it. Discrete events, seeded, no clock.

Owns: `trace`, prompts that share beginnings with a skew, in sessions of several turns, with bursts of equal prompts;
`Replica`, a server with a prefix cache, a queue, one prefill at a time and a batch that decodes; `play`, which runs one
policy over one trace, with a replica that is lost and comes back cold. Does not own: policies (policies.py).

A block is 64 tokens. A server works through PREFILL tokens a second, less while it decodes; a step of decoding takes
STEP_S and a little more per running call; its cache evicts the block that was used longest ago and belongs to no
running call. The figures are those of a model of 8 billion parameters on one large GPU; only their ratios matter.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

BLOCK = 64
PREFILL_TOKENS_PER_S = 12_000.0
STEP_S, STEP_PER_CALL_S = 0.012, 0.0002
MOST_RUNNING = 64
CACHE_BLOCKS = 3_000
POLL_S = 1.0
GONE_S = 15.0


@dataclass(slots=True)
class Request:
    """One call.

    Attributes:
        number: in order of arrival.
        at_s: when it arrives.
        prompt: blocks, each named after everything up to its end.
        output: blocks of its answer.
        is_retried: the replica that it was placed on was lost; whoever tries again waits at no gateway.
    """

    number: int
    at_s: float
    prompt: list[int]
    output: list[int]
    first_token_s: float | None = None
    is_retried: bool = False


def trace(seed: int, requests: int, per_s: float, *, apps: int = 120) -> list[Request]:
    """Calls in order of arrival: sessions over skewed system prompts, one in twenty a burst of equal calls.

    Args:
        seed: equal seeds, equal traces.
        requests: how many.
        per_s: sessions' turns and bursts together, on average.
        apps: system prompts, of 1,000 to 6,000 tokens, used by Zipf's law.
    """
    chance = random.Random(seed)
    names = itertools.count(1)
    heads = [[next(names) for _ in range(chance.randint(16, 96))] for _ in range(apps)]
    weights = [1 / (rank + 1) ** 1.05 for rank in range(apps)]
    drawn: list[tuple[float, list[int], list[int]]] = []
    at_s = 0.0
    while len(drawn) < requests * 1.2:
        (head,) = chance.choices(heads, weights)
        if chance.random() < 0.02:
            prompt = [*head, next(names)]
            drawn += [(at_s + i * 0.002, prompt, [next(names)]) for i in range(8)]
            at_s += chance.expovariate(per_s) * 8
            continue
        turn_s, prompt = at_s, list(head)
        for _ in range(min(10, 1 + int(chance.expovariate(0.3)))):
            prompt = [*prompt, *(next(names) for _ in range(chance.randint(1, 8)))]
            output = [next(names) for _ in range(chance.randint(1, 8))]
            drawn.append((turn_s, prompt, output))
            prompt = [*prompt, *output]
            turn_s += 4 + chance.expovariate(0.12)
            at_s += chance.expovariate(per_s)
    drawn.sort(key=lambda each: each[0])
    return [Request(i, *each) for i, each in enumerate(drawn[:requests])]


class Cache:
    """A server's prefix cache: least recently used first, running calls keep theirs."""

    def __init__(self, blocks: int) -> None:
        self.most = blocks
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._busy: Counter[int] = Counter()

    def hit(self, prompt: list[int]) -> int:
        """Blocks of a prompt that are there, from its beginning."""
        for i, block in enumerate(prompt):
            if block not in self._idle and block not in self._busy:
                return i
        return len(prompt)

    def take(self, blocks: list[int]) -> bool:
        """Keep these while a call runs; False, and nothing done, where there is no room."""
        new = sum(block not in self._busy for block in blocks)
        if len(self._busy) + new > self.most:
            return False
        for block in blocks:
            self._busy[block] += 1
            self._idle.pop(block, None)
        while len(self._busy) + len(self._idle) > self.most:
            self._idle.popitem(last=False)
        return True

    def leave(self, blocks: list[int]) -> None:
        """The call has ended; the end of its text is forgotten first."""
        for block in reversed(blocks):
            self._busy[block] -= 1
            if not self._busy[block]:
                del self._busy[block]
                self._idle[block] = None

    def use(self) -> float:
        """The part that running calls need."""
        return len(self._busy) / self.most


@dataclass(slots=True)
class Replica:
    """One server.

    Attributes:
        speed: relative to the others; nobody is told.
        waiting: calls that it has not begun, in order.
        running: calls whose answer is being decoded.
    """

    speed: float = 1.0
    cache: Cache = field(default_factory=lambda: Cache(CACHE_BLOCKS))
    waiting: list[Request] = field(default_factory=list)
    prefilling: Request | None = None
    running: set[int] = field(default_factory=set)
    life: int = 0
    hit_blocks: int = 0
    load_integral: float = 0.0
    most_load: int = 0

    def load(self) -> int:
        """Calls there, waiting ones included."""
        return len(self.waiting) + len(self.running) + (self.prefilling is not None)

    def begin(self) -> float | None:
        """Begin the next prefill, if it can; seconds until its first token."""
        if self.prefilling is not None or not self.waiting or len(self.running) >= MOST_RUNNING:
            return None
        request = self.waiting[0]
        hit = self.cache.hit(request.prompt)
        if not self.cache.take(request.prompt + request.output):
            return None
        self.waiting.pop(0)
        self.prefilling = request
        self.hit_blocks += hit
        tokens = (len(request.prompt) - hit) * BLOCK + BLOCK // 2
        return (STEP_S + tokens / PREFILL_TOKENS_PER_S * (1 + 0.01 * len(self.running))) / self.speed

    def decode_s(self, request: Request) -> float:
        """How long the rest of its answer takes."""
        return len(request.output) * BLOCK * (STEP_S + STEP_PER_CALL_S * len(self.running)) / self.speed

    def lose(self) -> list[Request]:
        """It dies; what was there and has to go elsewhere. It comes back with an empty cache."""
        orphans = [*self.waiting, *([self.prefilling] if self.prefilling is not None else [])]
        self.waiting, self.prefilling, self.cache, self.life = [], None, Cache(CACHE_BLOCKS), self.life + 1
        self.running = set()
        return orphans


class Policy(Protocol):
    """Who serves a call; told what a gateway would be told."""

    def choose(self, request: Request, up: list[int], now_s: float) -> int | None:
        """One of the replicas that are up; None: the call waits at the gateway, and is asked about again."""

    def began(self, request: Request, replica: int, now_s: float) -> None:
        """Its first token arrived."""

    def ended(self, request: Request, replica: int, now_s: float) -> None:
        """Its answer ended, or was lost with the replica."""

    def polled(self, replica: int, waiting: int, kv_use: float) -> None:
        """What the replica said of itself, once a second."""

    def lost(self, replica: int) -> None:
        """It does not answer any more."""


class Play:
    """One policy over one trace; `events` says what happens next.

    Attributes:
        held: calls that wait at the gateway, in order.
    """

    def __init__(self, policy: Policy, requests: list[Request], replicas: int, *, slow: int | None) -> None:
        self.policy = policy
        self.fleet = [Replica(0.5 if i == slow else 1.0) for i in range(replicas)]
        self.up = list(range(replicas))
        self.held: deque[Request] = deque()
        self._order = itertools.count()
        self._events: list[tuple[float, int, str, int, int, Request | None]] = []
        self._at: dict[int, int] = {}
        for request in requests:
            self._push(request.at_s, "arrive", 0, request)

    def _push(self, at_s: float, what: str, replica: int, request: Request | None = None) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), what, replica, self.fleet[replica].life, request))

    def plan_loss(self, replica: int, at_s: float) -> None:
        """A replica will be lost, and come back."""
        self._push(at_s, "lose", replica)

    def poll_until(self, end_s: float) -> None:
        """Every replica will be asked once a second."""
        for second in range(1, int(end_s / POLL_S) + 1):
            self._push(second * POLL_S, "poll", 0)

    def events(self) -> Iterator[tuple[float, str, int, Request | None]]:
        """What happens, in order; what a replica would have done in a life that is over does not."""
        while self._events:
            at_s, _, what, replica, life, request = heapq.heappop(self._events)
            if what in {"arrive", "poll", "lose", "back"} or life == self.fleet[replica].life:
                yield at_s, what, replica, request

    def place(self, request: Request, now_s: float) -> None:
        """Let the policy choose, and queue the call there, or behind those that wait at the gateway."""
        self.held.append(request)
        self.go_on(now_s)

    def go_on(self, now_s: float) -> None:
        """Place calls that wait at the gateway, as long as the policy lets them go."""
        while self.held:
            found = self.policy.choose(self.held[0], self.up, now_s)
            if found is None:
                return
            self._queue(self.held.popleft(), found, now_s)

    def _queue(self, request: Request, replica: int, now_s: float) -> None:
        self._at[request.number] = replica
        self.fleet[replica].waiting.append(request)
        self._next(replica, now_s)

    def _next(self, replica: int, now_s: float) -> None:
        first_s = self.fleet[replica].begin()
        if first_s is not None:
            self._push(now_s + first_s, "first", replica, self.fleet[replica].prefilling)

    def first(self, request: Request, replica: int, now_s: float) -> None:
        """A prefill is done: the first token goes out."""
        server = self.fleet[replica]
        server.prefilling = None
        server.running.add(request.number)
        if request.first_token_s is None:
            request.first_token_s = now_s
        self.policy.began(request, replica, now_s)
        self._push(now_s + server.decode_s(request), "end", replica, request)
        self._next(replica, now_s)

    def end(self, request: Request, replica: int, now_s: float) -> None:
        """An answer is complete."""
        server = self.fleet[replica]
        server.running.discard(request.number)
        server.cache.leave(request.prompt + request.output)
        self.policy.ended(request, replica, now_s)
        self._next(replica, now_s)
        self.go_on(now_s)

    def lose(self, replica: int, now_s: float, alive: dict[int, Request]) -> None:
        """A replica dies: calls without a first token go elsewhere, the others are lost to their clients."""
        server = self.fleet[replica]
        gone = [alive[number] for number in server.running]
        orphans = server.lose()
        self.up.remove(replica)
        for request in gone + orphans:
            self.policy.ended(request, replica, now_s)
        self.policy.lost(replica)
        for request in orphans:
            request.is_retried = True
            found = self.policy.choose(request, self.up, now_s)
            assert found is not None, "a call that is tried again does not wait"
            self._queue(request, found, now_s)
        self._push(now_s + GONE_S, "back", replica)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run measured."""

    hit_rate: float
    p50_ttft_ms: float
    p99_ttft_ms: float
    max_over_mean: float


def play(policy: Policy, requests: list[Request], replicas: int, *, loses: bool = True, slow: bool = False) -> Figures:
    """Run a policy over a trace: one replica is lost halfway, and one may be slow without anybody being told."""
    run = Play(policy, requests, replicas, slow=replicas - 1 if slow else None)
    by_number = {request.number: request for request in requests}
    end_s = requests[-1].at_s
    run.poll_until(end_s)
    if loses:
        run.plan_loss(0, end_s / 2)
    before_s, ratios = 0.0, []
    for now_s, what, replica, request in run.events():
        if what == "arrive" and request is not None:
            run.place(request, now_s)
        elif what == "first" and request is not None:
            run.first(request, replica, now_s)
        elif what == "end" and request is not None:
            run.end(request, replica, now_s)
        elif what == "lose":
            run.lose(replica, now_s, by_number)
        elif what == "back":
            run.up.append(replica)
            run.go_on(now_s)
        elif what == "poll" and now_s <= end_s:
            for i in run.up:
                server = run.fleet[i]
                policy.polled(i, len(server.waiting), server.cache.use())
                server.load_integral += server.load() * (now_s - before_s)
            loads = [run.fleet[i].load() for i in run.up]
            if sum(loads) >= len(loads):
                ratios.append(max(loads) * len(loads) / sum(loads))
            before_s = now_s
            run.go_on(now_s)
    waits_ms = sorted(1000 * (r.first_token_s - r.at_s) for r in requests if r.first_token_s is not None)
    blocks = sum(len(request.prompt) for request in requests)
    return Figures(
        hit_rate=round(min(1.0, sum(server.hit_blocks for server in run.fleet) / blocks), 4),
        p50_ttft_ms=round(waits_ms[len(waits_ms) // 2], 1),
        p99_ttft_ms=round(waits_ms[int(len(waits_ms) * 0.99)], 1),
        max_over_mean=round(sum(ratios) / len(ratios), 3) if ratios else 1.0,
    )
