"""The simulated fleet keeps its own books, equal seeds give equal figures, and the verdict reads them right."""

from __future__ import annotations

import pytest

from bench.fleet import Cache, Figures, Policy, play, trace
from bench.placement import POLICIES, beaten
from bench.policies import Ours, RoundRobin


def run(policy: Policy, replicas: int = 3) -> Figures:
    """A short run at a middling load."""
    return play(policy, trace(3, 250, 2.0 * replicas), replicas)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_serves_every_call(name: str) -> None:
    """Each call gets its first token, also those of the replica that is lost, and no count leaks."""
    policy, requests = POLICIES[name](3, 1), trace(3, 250, 6.0)
    play(policy, requests, 3)
    assert all(request.first_token_s is not None and request.first_token_s >= request.at_s for request in requests)
    assert policy.calls == [0, 0, 0]  # type: ignore[attr-defined]  # all of them derive from Counted


def test_calls_that_wait_at_the_gateway_go_to_whoever_comes_back() -> None:
    """With one of two lost at a load that is too much for the other, waiting at the gateway pays twice."""
    waited, placed = (play(Ours(2, 1, waits=waits), trace(3, 600, 10.0), 2) for waits in (True, False))
    assert waited.hit_rate > placed.hit_rate
    assert waited.p99_ttft_ms < placed.p99_ttft_ms


def test_equal_seeds_give_equal_figures() -> None:
    """Nothing but the seeds decides a run."""
    assert run(Ours(3, 1)) == run(Ours(3, 1))
    assert trace(1, 50, 3.0) != trace(2, 50, 3.0)


def test_knowing_the_caches_pays() -> None:
    """Placement by prefix finds clearly more than taking turns, in less time to the first token."""
    ours, turns = run(Ours(3, 1)), run(RoundRobin(3, 1))
    assert ours.hit_rate > turns.hit_rate + 0.05
    assert ours.p50_ttft_ms < turns.p50_ttft_ms


def test_a_cache_keeps_what_runs_and_forgets_what_is_oldest() -> None:
    """Blocks of running calls stay, the others go by age, of one prompt from its end."""
    cache = Cache(4)
    assert cache.take([1, 2])
    cache.leave([1, 2])
    assert cache.take([3, 4, 5])
    assert (cache.hit([1, 2]), cache.hit([3, 4, 5, 6])) == (1, 3)
    assert not cache.take([6, 7])
    assert cache.use() == 0.75


def test_the_verdict_names_who_is_better_on_both() -> None:
    """Better on one figure alone is no defeat; better on both at the same load is."""
    load = {"replicas": 2, "calls_per_s_per_replica": 1.0, "slow": False}
    ours = {"policy": "thinkgate", **load, "hit_rate": 0.8, "p99_ttft_ms": 100.0}
    half = {"policy": "half", **load, "hit_rate": 0.9, "p99_ttft_ms": 101.0}
    both = {"policy": "both", **load, "hit_rate": 0.9, "p99_ttft_ms": 99.0}
    elsewhere = {**both, "replicas": 8}
    assert beaten([ours, half, {**both, "policy": "thinkgate_unqueued"}]) == []
    assert beaten([ours, half, both, {**elsewhere}, {**ours, "replicas": 8, "hit_rate": 1.0}]) == [
        {"policy": "both", **load}
    ]
