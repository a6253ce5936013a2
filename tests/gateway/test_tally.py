"""What a request has used: counted as it comes, corrected by the backend's own usage."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.ledger import Amounts
from budget.price import PriceTable
from budget.tokens import TokenCounts
from gateway.backends.port import Delta, Usage
from gateway.tally import Tally

COUNT = st.integers(0, 20)


def tally(*deltas: Delta) -> Tally:
    """The tally after these deltas."""
    counted = Tally(PriceTable.from_usd_per_mtok(1, 2, cached=0.5, thinking=4))
    for delta in deltas:
        counted.add(delta)
    return counted


def usage(prompt: int, completion: int, *, cached: int | None = None, reasoning: int | None = None) -> Delta:
    """The last delta of a call."""
    return Delta(
        usage=Usage(
            prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached, reasoning_tokens=reasoning
        )
    )


def test_nothing_received_is_nothing_used() -> None:
    """Before the first delta every count is zero, and nothing is an estimate."""
    counted = tally()
    assert (counted.counts(), counted.output(), counted.is_estimated) == (TokenCounts(), 0, False)
    assert counted.amounts(counted.counts()) == Amounts()


def test_deltas_add_up_by_kind_and_choice() -> None:
    """Kinds are summed over all choices, thinking also by choice, and the prompt is what was last said."""
    counted = tally(
        Delta(prompt_tokens=9),
        Delta(index=0, thinking=2, token_ids=[1, 2]),
        Delta(index=1, thinking=3, injected=1, token_ids=[1, 2, 3, 4], capped=True),
        Delta(index=0, answer=4, injected=1, token_ids=[1, 2, 3, 4, 5]),
    )
    assert counted.counts() == TokenCounts(prompt=9, thinking=5, answer=4, injected=2)
    assert counted.thinking_by_choice == {0: 2, 1: 3}
    assert (counted.output(), counted.capped, counted.is_estimated) == (11, True, False)


def test_wasted_thinking_leaves_its_choice() -> None:
    """Thinking beyond the cap moves to `wasted`; the output stays the same."""
    delta = Delta(index=1, thinking=3, token_ids=[1, 2, 3])
    counted = tally(Delta(index=1, thinking=4, token_ids=[1]), delta)
    counted.waste(delta)
    assert (counted.thinking, counted.wasted, counted.thinking_by_choice) == (4, 3, {1: 4})
    assert counted.output() == 7


def test_usage_corrects_prompt_and_cache() -> None:
    """The backend knows its prompt and how much of it was cached."""
    counted = tally(Delta(prompt_tokens=7), Delta(answer=2, token_ids=[1, 2]), usage(10, 2, cached=6))
    assert counted.counts() == TokenCounts(prompt=4, cached=6, answer=2)


def test_a_cache_larger_than_the_prompt_is_not_believed() -> None:
    """Kinds stay disjoint and non-negative whatever a backend reports."""
    assert tally(usage(5, 0, cached=9)).counts() == TokenCounts(cached=5)


def test_ids_beat_the_backends_own_reasoning_count() -> None:
    """Special tokens are no reasoning to vLLM; by their ids they are, and are the truth."""
    counted = tally(Delta(thinking=4, injected=1, answer=2, token_ids=[1]), usage(5, 7, reasoning=3))
    assert counted.counts() == TokenCounts(prompt=5, thinking=4, injected=1, answer=2)
    assert not counted.is_estimated


def test_without_ids_the_backend_is_believed() -> None:
    """A backend that reports reasoning tokens is taken at its word, zero only if no thinking was seen."""
    assert tally(Delta(thinking=1), Delta(answer=1), usage(5, 10, reasoning=7)).counts() == TokenCounts(
        prompt=5, thinking=7, answer=3
    )
    assert tally(Delta(answer=2), usage(5, 10, reasoning=0)).counts() == TokenCounts(prompt=5, answer=10)


def test_without_any_count_thinking_is_estimated_by_its_share() -> None:
    """Neither ids nor reasoning tokens: the events' share of the total, rounded up, and said to be an estimate."""
    counted = tally(Delta(thinking=1), Delta(answer=2), usage(5, 10))
    assert counted.counts() == TokenCounts(prompt=5, thinking=4, answer=6)
    assert counted.is_estimated
    doubted = tally(Delta(thinking=2), Delta(answer=2), usage(5, 10, reasoning=0))
    assert (doubted.counts().thinking, doubted.is_estimated) == (5, True)


def test_without_usage_events_are_counted_and_said_to_be_estimated() -> None:
    """A stream that broke off before its usage was counted by what came; without ids that is an estimate."""
    counted = tally(Delta(thinking=1), Delta(answer=2))
    assert counted.counts() == TokenCounts(thinking=1, answer=2)
    assert counted.is_estimated
    exact = tally(Delta(answer=2, token_ids=[1, 2]))
    exact.counts()
    assert not exact.is_estimated


def test_amounts_are_in_the_ledgers_units() -> None:
    """Tokens of all kinds, thinking tokens, and money at the model's prices."""
    counts = TokenCounts(prompt=1000, cached=1000, thinking=1000, answer=1000, wasted=1000)
    nano = 1000 * (1000 + 500 + 4000 + 2000 + 2000)
    assert tally().amounts(counts) == Amounts(tokens=5000, thinking_tokens=1000, nano_usd=nano)


def test_calls_on_the_side_are_planner_tokens_and_nothing_else() -> None:
    """They are in the counts, in and out, but in no bound, no usage and no thinking of the answer's own."""
    counted = tally(Delta(prompt_tokens=9), Delta(thinking=2, token_ids=[1, 2]), Delta(answer=4, token_ids=[3]))
    aside = counted.begin_aside(most_prompt=30, most_output=9)
    aside.add(Delta(prompt_tokens=20))
    aside.add(Delta(thinking=1, injected=1, token_ids=[1, 2]))
    aside.add(Delta(answer=3, token_ids=[1]))
    aside.add(usage(20, 5, cached=16))
    counted.begin_aside(most_prompt=30, most_output=9).add(Delta(prompt_tokens=7))
    counts = counted.counts()
    assert counts == TokenCounts(prompt=9, thinking=2, answer=4, planner=25 + 7)
    assert (counted.output(), counts.completion(), counted.most_thinking, counted.is_estimated) == (6, 6, 2, False)


def test_calls_on_the_side_are_priced_by_direction() -> None:
    """Prompt, cached and output tokens of theirs have the prices of prompt, cached and answer, rounded once."""
    counted = Tally(PriceTable.from_usd_per_mtok(0.0004, 0.0004, cached=0.0001, thinking=4))
    counted.add(Delta(prompt_tokens=1, answer=1, token_ids=[1]))
    for _ in range(2):
        aside = counted.begin_aside(most_prompt=30, most_output=9)
        aside.add(Delta(thinking=1, answer=1, token_ids=[1, 2]))
        aside.add(usage(3, 2, cached=2))
    used = counted.amounts(counted.counts())
    assert used == Amounts(tokens=2 + 2 * 5, thinking_tokens=0, nano_usd=round(2 * 0.4 + 2 * (0.4 + 2 * 0.1 + 2 * 0.4)))


@pytest.mark.parametrize(
    ("ended", "is_estimated"), [(usage(3, 5), False), (Delta(answer=1, token_ids=[1]), False), (Delta(), True)]
)
def test_a_call_on_the_side_may_be_an_estimate(ended: Delta, is_estimated: bool) -> None:
    """One that was cut without usage and ids makes the counts an estimate; one that told its usage does not."""
    counted = tally(Delta(answer=1, token_ids=[1]))
    aside = counted.begin_aside(most_prompt=30, most_output=9)
    aside.add(Delta(answer=1))
    counted.counts()
    aside.add(ended)
    assert (counted.counts().planner > 0, counted.is_estimated) == (True, is_estimated)


def test_a_side_calls_usage_is_believed_within_its_bounds() -> None:
    """What a backend claims beyond what such a call can be is not booked."""
    counted = tally()
    counted.begin_aside(most_prompt=30, most_output=9).add(usage(1000, 1000))
    assert counted.counts() == TokenCounts(planner=39)


def test_usage_that_comes_after_a_report_ends_the_estimate() -> None:
    """Counts asked for in the middle of a stream do not mark its end as estimated."""
    counted = tally(Delta(answer=1))
    counted.counts()
    assert counted.is_estimated
    counted.add(usage(5, 3))
    assert (counted.counts(), counted.is_estimated) == (TokenCounts(prompt=5, answer=3), False)


@settings(max_examples=200, deadline=None)
@given(
    parts=st.lists(st.tuples(COUNT, COUNT, COUNT), max_size=5),
    wasted=st.booleans(),
    has_ids=st.booleans(),
    reported=st.none() | st.tuples(COUNT, st.integers(0, 120), st.none() | COUNT, st.none() | COUNT),
)
def test_kinds_are_disjoint_and_sum_to_what_the_backend_says(
    parts: list[tuple[int, int, int]],
    wasted: bool,
    has_ids: bool,
    reported: tuple[int, int, int | None, int | None] | None,
) -> None:
    """Whatever arrives and is reported: no count is negative; ids received are the output, else the usage is."""
    counted = tally()
    for index, (thinking, answer, injected) in enumerate(parts):
        delta = Delta(
            index=index,
            thinking=thinking,
            answer=answer,
            injected=injected,
            token_ids=[1] * (thinking + answer + injected) if has_ids else [],
        )
        counted.add(delta)
        if wasted and index == 0 and thinking:
            counted.waste(delta)
    if reported is not None:
        prompt, completion, cached, reasoning = reported
        counted.add(usage(prompt, completion, cached=cached, reasoning=reasoning))
    counts = counted.counts()
    kinds = [getattr(counts, name) for name in counts.__struct_fields__]
    assert min(kinds) >= 0
    assert counts.wasted == counted.wasted
    if reported is None:
        assert counts.total() == sum(map(sum, parts))
        return
    assert counts.prompt + counts.cached == reported[0]
    received = sum(map(sum, parts))
    assert counts.completion() + counts.wasted == (
        received if has_ids and received else max(reported[1], counts.wasted)
    )


@pytest.mark.parametrize("times", [1, 3])
def test_asking_does_not_change_the_counts(times: int) -> None:
    """Reports while streaming ask again and again."""
    counted = tally(Delta(thinking=3), Delta(answer=5), usage(5, 11))
    assert len({repr(counted.counts()) for _ in range(times)}) == 1


def test_a_call_to_another_model_costs_what_that_model_costs() -> None:
    """Planner tokens are priced by direction, at the prices of the model that planned."""
    own = PriceTable.from_usd_per_mtok(prompt=1, answer=2, cached=0.5, thinking=4)
    other = PriceTable.from_usd_per_mtok(prompt=10, answer=30, cached=5)
    tally = Tally(own)
    tally.add(Delta(thinking=100, answer=50, token_ids=[1], prompt_tokens=10))
    for prices, prompt, cached, answer in ((other, 40, 20, 7), (None, 30, 10, 5)):
        aside = tally.begin_aside(most_prompt=100, most_output=100, prices=prices)
        aside.add(Delta(answer=answer, token_ids=[1] * answer))
        aside.add(Delta(usage=Usage(prompt_tokens=prompt, completion_tokens=answer, cached_tokens=cached)))
    counts = tally.counts()
    assert counts.planner == 40 + 7 + 30 + 5
    own_nano = 10 * 1000 + 100 * 4000 + 50 * 2000 + 20 * 1000 + 10 * 500 + 5 * 2000
    planner_nano = 20 * 10_000 + 20 * 5_000 + 7 * 30_000
    assert tally.amounts(counts).nano_usd == own_nano + planner_nano
    aside_nano = planner_nano + 20 * 1000 + 10 * 500 + 5 * 2000
    assert (tally.aside_amounts().tokens, tally.aside_amounts().nano_usd) == (82, aside_nano)
