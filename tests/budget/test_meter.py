"""What thinking costs: the published ratios, the shared prefix, and the price of a right answer."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget.meter import B200_FLOP_PER_BYTE, Meter, Passes, Shape, Work, generation, prefill
from budget.tokens import TokenCounts


def shape(parameters: float, layers: int, query_heads: int, kv_heads: int = 8) -> Shape:
    """A model of the Qwen3 family."""
    return Shape(parameters=parameters, layers=layers, query_heads=query_heads, kv_heads=kv_heads, head_dim=128)


SMALL, MIDDLE = shape(0.6e9, 28, 16), shape(14.8e9, 40, 40)
FAMILY = {
    "1.7B": (shape(1.7e9, 28, 16), 1.00),
    "4B": (shape(4.0e9, 36, 32), 1.30),
    "8B": (shape(8.2e9, 36, 32), 1.32),
    "14B": (MIDDLE, 1.49),
    "32B": (shape(32.8e9, 64, 64), 2.42),
}


@pytest.mark.parametrize("size", FAMILY)
def test_long_chains_cost_nearly_the_same_at_every_size(size: str) -> None:
    """At 16k tokens even 14B costs only half as much again as 0.6B, since keys and values dominate."""
    larger, ratio = FAMILY[size]
    costs = [generation(one, prompt=200, output=16_000).eflops() for one in (SMALL, larger)]
    assert costs[1] / costs[0] == pytest.approx(ratio, abs=0.015)


@pytest.mark.parametrize(("model", "part"), [(SMALL, 0.99), (MIDDLE, 0.96)])
def test_reading_the_cache_dominates_long_chains(model: Shape, part: float) -> None:
    """Of 16k tokens, 99 % of the cost at 0.6B and 96 % at 14B is reading keys and values."""
    work = generation(model, prompt=200, output=16_000)
    assert work.read_bytes * B200_FLOP_PER_BYTE / work.eflops() == pytest.approx(part, abs=0.006)


def test_the_published_formula_is_this_one() -> None:
    """FLOP and bytes are Kinetics' sums, written out for three siblings."""
    one, siblings, prompt, output = SMALL, 3, 500, 70
    work = generation(one, prompt=prompt, output=output, siblings=siblings)
    spread = 2 * prompt * output
    assert work.flop == pytest.approx(
        siblings * (2 * one.parameters * output + 2 * one.query_heads * 128 * one.layers * (spread + output**2))
    )
    assert work.read_bytes == pytest.approx(2 * one.kv_heads * 128 * one.layers * (spread + siblings * output**2))


def test_siblings_read_their_prompt_once() -> None:
    """Over a long prompt eight siblings cost far less than eight requests, and what differs is the prompt's reads."""
    apart = [generation(MIDDLE, prompt=20_000, output=200)] * 8
    together = generation(MIDDLE, prompt=20_000, output=200, siblings=8)
    assert together.flop == pytest.approx(sum(work.flop for work in apart))
    assert together.read_bytes < 0.15 * sum(work.read_bytes for work in apart)


@given(st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 8000))
def test_a_budget_of_keys_never_costs_more_than_all_of_them(prompt: int, output: int, top_k: int) -> None:
    """What the first tokens lack is subtracted, not added: the sum over tokens of the keys that each attends to."""
    sparse, full = (generation(SMALL, prompt=prompt, output=output, top_k=k) for k in (top_k, None))
    assert sparse.read_bytes <= full.read_bytes * (1 + 1e-9)
    per_key = 2 * 2 * SMALL.kv_heads * SMALL.head_dim * SMALL.layers
    keys = sum(min(top_k, prompt + i + 0.5) for i in range(output))
    assert sparse.read_bytes / per_key == pytest.approx(keys, abs=1)


def test_small_batches_pay_for_the_weights() -> None:
    """With few requests at once the weights are read for each token."""
    alone, shared = (generation(MIDDLE, prompt=10, output=100, batch=batch) for batch in (1, 50))
    free = generation(MIDDLE, prompt=10, output=100)
    assert alone.read_bytes - free.read_bytes == pytest.approx(2 * MIDDLE.parameters * 100)
    assert shared.read_bytes - free.read_bytes == pytest.approx((alone.read_bytes - free.read_bytes) / 50)


def test_what_is_cached_is_not_computed() -> None:
    """A prompt in the cache costs attention over it, but no weights."""
    whole, tail = prefill(MIDDLE, computed=1000), prefill(MIDDLE, computed=10, cached=990)
    assert tail.flop < 0.02 * whole.flop
    assert tail.read_bytes == whole.read_bytes
    assert prefill(MIDDLE, computed=0, cached=100).flop == 0


def test_the_hardware_decides_what_a_byte_weighs() -> None:
    """Equivalent FLOP are FLOP and the FLOP that the hardware could have done while it was reading."""
    assert Work(10, 2).eflops(206) == 422
    assert Work(1, 2).plus(Work(3, 4)) == Work(4, 6)


def test_a_meter_adds_up() -> None:
    """Tokens of every kind, money, work and seconds of all requests."""
    meter = Meter()
    for _ in range(2):
        counts = TokenCounts(prompt=1, thinking=2, planner=3, probe=4)
        meter.add(counts, nano_usd=5, work=Work(6, 7), seconds=0.5)
    assert meter == Meter(
        TokenCounts(prompt=2, thinking=4, planner=6, probe=8), nano_usd=10, work=Work(12, 14), seconds=1.0, requests=2
    )


def test_the_cost_of_a_pass_is_a_ratio_of_sums() -> None:
    """Published rows: cost per attempt over success rate; with no right answer it is infinite."""
    passes = Passes()
    assert (passes.accuracy(), passes.e3(), math.isinf(passes.cost_of_pass_usd())) == (0, 0, True)
    for score, nano_usd in ((1, 100), (0, 500), (1, 300), (0, 100)):
        passes.add(score, nano_usd=nano_usd, decoded=50)
    assert passes.cost_of_pass_usd() == pytest.approx(1000 / 1e9 / 2)
    assert passes.accuracy() == 0.5


def test_e3_is_accuracy_in_percent_squared_per_token() -> None:
    """90 % at 412 tokens is 19.66; 35 % at 20 tokens would look better still, which is why it is never shown alone."""
    passes = Passes(scored=10, right=9, decoded=4120)
    assert passes.e3() == pytest.approx(90**2 / 412)
    assert Passes(scored=100, right=35, decoded=2000).e3() > passes.e3()
