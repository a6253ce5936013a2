"""The queue of a full model: classes, fairness by tokens, a bound that drops whoever takes most of it."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.queue import FEW, MOST_IDLE, FairQueue, QueueFull, Ticket


def pushed(queue: FairQueue[str], item: str, tenant: str = "a", *, priority: int = 0, tokens: int = 1) -> Ticket[str]:
    """A call that waits."""
    return queue.push(item, tenant, priority=priority, tokens=tokens, now_s=0.0)[0]


def order(queue: FairQueue[str]) -> list[str]:
    """Everybody, as they would be served."""
    served = []
    while (ticket := queue.pop()) is not None:
        served.append(ticket.item)
    return served


def test_one_tenants_calls_go_in_order() -> None:
    """First come, first served, where nobody else is there; who left is skipped."""
    queue: FairQueue[str] = FairQueue(9)
    tickets = [pushed(queue, name) for name in "xyz"]
    queue.cancel(tickets[1])
    queue.cancel(tickets[1])
    assert (len(queue), order(queue), len(queue)) == (2, ["x", "z"], 0)


def test_classes_go_first() -> None:
    """A call of a better class overtakes all others of its tenant, however late it came."""
    queue: FairQueue[str] = FairQueue(9)
    for name, priority in (("flex", 1), ("default", 0), ("priority", -1)):
        pushed(queue, name, priority=priority)
    assert order(queue) == ["priority", "default", "flex"]


def test_nobody_overtakes_other_tenants_by_a_class() -> None:
    """A tenant whose calls are all `priority` keeps others waiting no longer than with ordinary ones."""
    queue: FairQueue[str] = FairQueue(99)
    pushed(queue, "b0", "b")
    for i in range(50):
        pushed(queue, f"a{i}", "a", priority=-1)
    assert "b0" in order(queue)[:2]


def test_who_gives_way_waits_for_everybody() -> None:
    """`flex` goes after the ordinary calls of all tenants, whoever was served less."""
    queue: FairQueue[str] = FairQueue(99)
    pushed(queue, "b0", "b", priority=1)
    for i in range(5):
        pushed(queue, f"a{i}", "a", tokens=100)
    assert order(queue)[-1] == "b0"


@pytest.mark.parametrize("tenants", [1, 5000])
def test_who_left_takes_no_room(tenants: int) -> None:
    """However many come and leave while nobody is served, memory is bounded by who waits."""
    queue: FairQueue[str] = FairQueue(9)
    stays = pushed(queue, "stays", "0")
    for i in range(20_000):
        queue.cancel(pushed(queue, "leaves", str(i % tenants)))
    (lines,) = queue._classes.values()
    held = len(lines.order) + len(lines.lines) + sum(len(line.calls) for line in lines.lines.values())
    assert held + len(queue._newest["0"]) <= 4 * FEW + 9
    assert len(queue._served) <= 2 * MOST_IDLE + 2
    assert queue.pop() is stays


def test_tenants_take_turns_by_tokens() -> None:
    """Who sends calls of half the size has twice as many of them served."""
    queue: FairQueue[str] = FairQueue(99)
    for i in range(12):
        pushed(queue, f"big{i}", "a", tokens=200)
        pushed(queue, f"small{i}", "b", tokens=100)
    first = Counter(item[:3] for item in order(queue)[:12])
    assert first == {"big": 4, "sma": 8}


def test_idling_saves_nothing_up() -> None:
    """A tenant that was away is not served alone until it has caught up."""
    queue: FairQueue[str] = FairQueue(999)
    for i in range(100):
        pushed(queue, f"a{i}", "a", tokens=10)
    for _ in range(50):
        queue.pop()
    for i in range(10):
        pushed(queue, f"b{i}", "b", tokens=10)
    assert [item[0] for item in order(queue)[:8]] in (list("babababa"), list("abababab"))


def test_what_was_not_used_is_given_back() -> None:
    """A tenant that was charged for more than its call used goes earlier next time."""
    queue: FairQueue[str] = FairQueue(9)
    pushed(queue, "a0", "a", tokens=100)
    queue.pop()
    pushed(queue, "b0", "b", tokens=50)
    queue.pop()
    queue.charge("a", -90)
    pushed(queue, "b1", "b")
    pushed(queue, "a1", "a")
    assert order(queue) == ["a1", "b1"]


def test_a_full_queue_has_room_for_who_has_less_of_it() -> None:
    """The newest call of the largest tenant goes; who has most of it, or as much, is refused."""
    queue: FairQueue[str] = FairQueue(4)
    for i in range(4):
        pushed(queue, f"a{i}", "a")
    with pytest.raises(QueueFull):
        pushed(queue, "a4", "a")
    assert queue.push("b0", "b", priority=0, tokens=1, now_s=0.0)[1] == "a3"
    assert queue.push("b1", "b", priority=0, tokens=1, now_s=0.0)[1] == "a2"
    with pytest.raises(QueueFull):
        pushed(queue, "b2", "b")
    assert sorted(order(queue)) == ["a0", "a1", "b0", "b1"]


def waits_s(loads_per_s: dict[str, float], *, capacity_per_s: float, seconds: float) -> dict[str, float]:
    """Mean queue wait per tenant at one server that serves in turns, arrivals and sizes by chance."""
    chance, queue, now_s = random.Random(3), FairQueue[float](200), 0.0
    waited: dict[str, list[float]] = defaultdict(list)
    arrivals = sorted(
        (at_s, tenant) for tenant, per_s in loads_per_s.items() for at_s in poisson(chance, per_s, seconds)
    )
    free_s = 0.0
    for at_s, tenant in [*arrivals, (math.inf, "")]:
        while len(queue) and free_s <= at_s:
            ticket = queue.pop()
            assert ticket is not None
            now_s = max(free_s, ticket.item)
            waited[ticket.tenant].append(now_s - ticket.item)
            free_s = now_s + ticket.tokens / 100 / capacity_per_s
        if tenant:
            free_s = max(free_s, at_s) if not len(queue) else free_s
            try:
                queue.push(at_s, tenant, priority=0, tokens=chance.randint(50, 150), now_s=at_s)
            except QueueFull:
                continue
    return {tenant: sum(each) / len(each) for tenant, each in waited.items()}


def poisson(chance: random.Random, per_s: float, seconds: float) -> list[float]:
    """Times at which calls come."""
    times, at_s = [], chance.expovariate(per_s)
    while at_s < seconds:
        times.append(at_s)
        at_s += chance.expovariate(per_s)
    return times


def test_fifty_times_the_load_of_another_does_not_delay_it() -> None:
    """Beside a tenant of its own size or of 50 times its load, a tenant waits no more than twice as long."""
    beside_equal = waits_s({"small": 6.0, "other": 6.0}, capacity_per_s=10.0, seconds=300)["small"]
    beside_large = waits_s({"small": 2.0, "other": 100.0}, capacity_per_s=10.0, seconds=300)
    alone_at_a_busy_server = waits_s({"small": 2.0, "other": 7.5}, capacity_per_s=10.0, seconds=300)["small"]
    assert beside_large["small"] <= 2 * alone_at_a_busy_server
    assert beside_large["small"] <= beside_equal
    assert beside_large["other"] > 20 * beside_large["small"]


class QueueMachine(RuleBasedStateMachine):
    """Any order of calls: everybody is served or dropped once, the bound holds, lines keep their order."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: FairQueue[int] = FairQueue(6)
        self.waiting: dict[int, Ticket[int]] = {}
        self.number = 0

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-1, 1), tokens=st.integers(1, 50))
    def push(self, tenant: str, priority: int, tokens: int) -> None:
        """A call comes."""
        self.number += 1
        counts = Counter(ticket.tenant for ticket in self.waiting.values())
        try:
            ticket, dropped = self.queue.push(self.number, tenant, priority=priority, tokens=tokens, now_s=0.0)
        except QueueFull:
            assert len(self.waiting) == 6
            assert counts[tenant] + 1 >= max(counts.values())
            return
        if dropped is not None:
            gone = self.waiting.pop(dropped)
            assert counts[gone.tenant] == max(counts.values())
        self.waiting[self.number] = ticket

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        """A call leaves."""
        self.queue.cancel(self.waiting.pop(data.draw(st.sampled_from(sorted(self.waiting)))))

    @rule()
    def pop(self) -> None:
        """The next is served: one that need not give way, and of its tenant's best class the oldest."""
        ticket = self.queue.pop()
        if ticket is None:
            assert not self.waiting
            return
        assert self.waiting.pop(ticket.item) is ticket
        assert all(max(0, other.priority) >= max(0, ticket.priority) for other in self.waiting.values())
        own = [other for other in self.waiting.values() if other.tenant == ticket.tenant]
        assert all(other.priority >= ticket.priority for other in own)
        line = [n for n, t in self.waiting.items() if (t.tenant, t.priority) == (ticket.tenant, ticket.priority)]
        assert all(ticket.item < n for n in line)

    @invariant()
    def counts(self) -> None:
        """It knows how many wait, and they fit."""
        assert len(self.queue) == len(self.waiting) <= 6
        assert self.queue.ahead("new", 2) == len(self.waiting)


TestQueueMachine = QueueMachine.TestCase
TestQueueMachine.settings = settings(max_examples=80, deadline=None, stateful_step_count=40)


@settings(max_examples=60, deadline=None)
@given(calls=st.lists(st.tuples(st.sampled_from("abc"), st.integers(-1, 1)), max_size=40))
def test_no_more_calls_go_first_than_were_foreseen(calls: list[tuple[str, int]]) -> None:
    """Of calls of one size, no more than foreseen are served before one; beside one long line of another, few."""
    queue: FairQueue[str] = FairQueue(10_000)
    for tenant, priority in calls:
        pushed(queue, "other", tenant, priority=priority)
    ahead = queue.ahead("b", 0)
    pushed(queue, "own", "b")
    assert order(queue).index("own") <= ahead <= len(calls)
    assert ahead <= sum(priority < 0 for _, priority in calls) + 3 * (1 + sum(tenant == "b" for tenant, _ in calls))


@settings(max_examples=30, deadline=None)
@given(loads=st.lists(st.integers(1, 30), min_size=2, max_size=5))
def test_busy_tenants_are_served_alike(loads: list[int]) -> None:
    """As long as all tenants wait, no two differ by more than the size of two calls in what they were served."""
    queue: FairQueue[str] = FairQueue(10_000)
    for tenant, tokens in enumerate(loads):
        for _ in range(200):
            pushed(queue, str(tenant), str(tenant), tokens=tokens)
    served: Counter[str] = Counter()
    for _ in range(200):
        ticket = queue.pop()
        assert ticket is not None
        served[ticket.tenant] += ticket.tokens
    assert max(served.values()) - min(served[str(tenant)] for tenant in range(len(loads))) <= 2 * max(loads)
