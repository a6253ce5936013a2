"""Which step down the degrade ladder a refused request takes."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from budget.degrade import LEAST_CAP_TOKENS, ROUNDING, STEPS, Attempt, Needs, Step, fits, next_attempt, tokens_that_fit
from budget.ledger import Amounts, Unit

EFFORTS = {"minimal": 50, "low": 100, "medium": 250, "high": 400}
UNITS: tuple[Unit, ...] = ("tokens", "thinking_tokens", "usd", "requests", "concurrency")


def needs(cap: int | None = 400, *, choices: int = 1, nano_per_token: int = 3, **more: Any) -> Needs:
    """A request with a prompt bound of 100, answers of 200, and forced texts of 20 tokens."""
    thinking = choices * (cap or 0)
    besides = 100 + choices * 220
    instant = 100 + choices * 200
    return Needs(
        **{
            "cap": cap,
            "full": Amounts(
                tokens=besides + thinking, thinking_tokens=thinking, nano_usd=nano_per_token * (besides + thinking)
            ),
            "bare": Amounts(tokens=besides, nano_usd=nano_per_token * besides),
            "instant": Amounts(tokens=instant, nano_usd=nano_per_token * instant),
            "efforts": EFFORTS,
            **more,
        }
    )


def hold_for(some: Needs, cap: int) -> Amounts:
    """What is held with a cap, between `bare` and `full`."""
    full, bare = some.full, some.bare
    assert some.cap
    return Amounts(
        tokens=bare.tokens + (full.tokens - bare.tokens) * cap // some.cap,
        thinking_tokens=full.thinking_tokens * cap // some.cap,
        nano_usd=bare.nano_usd + (full.nano_usd - bare.nano_usd) * cap // some.cap,
    )


lefts = st.dictionaries(st.sampled_from(UNITS), st.integers(0, 3000))
requests = st.builds(
    needs,
    st.integers(1, 1000),
    choices=st.integers(1, 4),
    nano_per_token=st.integers(0, 5),
    least=st.sampled_from([0, 0, 1, 200]),
    efforts=st.dictionaries(st.sampled_from(list(EFFORTS)), st.integers(0, 1000)),
)
ladders = st.lists(st.sampled_from(STEPS), unique=True)


@pytest.mark.parametrize(
    ("left", "attempt"),
    [
        (719, Attempt("cap", 399)),
        (520, Attempt("cap", 200)),
        (519, Attempt("effort", 100, "low")),
        (420, Attempt("effort", 100, "low")),
        (419, Attempt("effort", 50, "minimal")),
        (369, Attempt("instant")),
        (300, Attempt("instant")),
        (299, None),
        (0, None),
    ],
)
def test_the_less_is_left_the_further_down(left: int, attempt: Attempt | None) -> None:
    """A smaller cap, below half of it a lower effort, below the lowest instant mode, and then nothing."""
    assert next_attempt({"tokens": left}, needs(), STEPS) == attempt


@pytest.mark.parametrize(
    ("steps", "left", "attempt"),
    [
        (["cap"], 420, Attempt("cap", 100)),
        (["cap"], 336, Attempt("cap", 16)),
        (["cap"], 335, None),
        (["cap", "effort"], 369, Attempt("cap", 49)),
        (["cap", "instant"], 519, Attempt("instant")),
        (["effort"], 719, Attempt("effort", 250, "medium")),
        (["effort"], 369, None),
        (["instant"], 719, Attempt("instant")),
        ([], 719, None),
    ],
)
def test_where_a_better_step_is_not_possible_the_cap_goes_as_low_as_it_must(
    steps: list[Step], left: int, attempt: Attempt | None
) -> None:
    """Steps that are not allowed are passed over, and a cap is lowered to 16 tokens before a request is refused."""
    assert next_attempt({"tokens": left}, needs(), steps) == attempt


@pytest.mark.parametrize("unit", ["tokens", "thinking_tokens", "usd"])
def test_each_unit_that_less_thinking_helps_is_looked_at(unit: Unit) -> None:
    """Half of the thinking's part being left in any of the three, the cap is about halved."""
    full, bare = needs().full.by_unit()[unit], needs().bare.by_unit()[unit]
    attempt = next_attempt({unit: bare + (full - bare) * 3 // 4}, needs(), STEPS)
    assert attempt is not None
    assert attempt.step == "cap"
    assert 298 <= attempt.cap <= 300


@pytest.mark.parametrize("unit", ["requests", "concurrency"])
def test_less_thinking_helps_no_limit_of_requests(unit: Unit) -> None:
    """A request that came too many is refused however little it might think."""
    assert next_attempt({unit: 0, "tokens": 500}, needs(), STEPS) is None


def test_the_least_thinking_a_request_insists_on_is_kept() -> None:
    """No cap or effort below it, and no instant mode."""
    assert next_attempt({"tokens": 420}, needs(least=100), STEPS) == Attempt("effort", 100, "low")
    assert next_attempt({"tokens": 419}, needs(least=100), STEPS) is None


def test_where_no_cap_can_be_held_only_instant_mode_is_less() -> None:
    """Without a cap to lower, neither a smaller one nor a lower effort promises anything."""
    some = needs(None, full=Amounts(tokens=700, thinking_tokens=600))
    assert next_attempt({"thinking_tokens": 500}, some, STEPS) == Attempt("instant")
    assert next_attempt({"thinking_tokens": 500}, some, ["cap", "effort"]) is None


@given(left=lefts, some=requests, steps=ladders)
def test_bifrost_5770_a_request_that_fits_is_never_degraded(left: dict[Unit, int], some: Needs, steps: list[Step]):
    """A step is taken only by a request whose hold does not fit, whatever share of the limits is used."""
    assume(fits(left, some.full))
    assert next_attempt(left, some, steps) is None
    exactly: dict[Unit, int] = some.full.by_unit()
    assert next_attempt(exactly, some, steps) is None


@given(left=lefts, some=requests, steps=ladders)
def test_an_attempt_fits_is_allowed_and_never_raises_the_cap(left: dict[Unit, int], some: Needs, steps: list[Step]):
    """What is decided has room in every limit, is among the allowed steps, and thinks less than before."""
    attempt = next_attempt(left, some, steps)
    if attempt is None:
        return
    assert attempt.step in steps
    assert some.cap is not None
    if attempt.step == "instant":
        assert some.instant is not None
        assert (attempt.cap, some.least) == (0, 0)
        assert fits(left, some.instant)
        return
    assert max(some.least, LEAST_CAP_TOKENS) <= attempt.cap < some.cap
    assert fits(left, hold_for(some, attempt.cap))
    assert (attempt.step == "effort") == (attempt.effort is not None)


@given(left=lefts, less=lefts, some=requests, steps=ladders)
def test_less_left_never_means_more_thinking(
    left: dict[Unit, int], less: dict[Unit, int], some: Needs, steps: list[Step]
):
    """Of two states of the limits, the one with less room in every unit leads to no larger cap."""
    tighter = {unit: min(left.get(unit, 3000), less.get(unit, 3000)) for unit in UNITS}
    before, after = next_attempt(left, some, steps), next_attempt(tighter, some, steps)
    if after is not None and not fits(left, some.full):
        assert before is not None
        assert after.cap <= before.cap


@given(left=lefts, some=requests)
def test_the_cap_that_is_found_is_the_largest_that_fits(left: dict[Unit, int], some: Needs):
    """One token more would not fit, but for the few nano-US-dollars kept for rounding, a token each at the least."""
    assert some.cap is not None
    found = tokens_that_fit(left, some.cap, some.full, some.bare)
    if found < some.cap:
        assert not fits(left, hold_for(some, found + 1 + ROUNDING["usd"]))


@given(lefts_seen=st.lists(lefts, min_size=1, max_size=8), some=requests)
def test_going_down_ends_after_as_many_attempts_as_there_are_steps(lefts_seen: list[dict[Unit, int]], some: Needs):
    """However the limits change between attempts, each step is taken once and the cap falls with each."""
    steps, caps = list(STEPS), [some.cap or 0]
    for left in lefts_seen:
        attempt = next_attempt(left, some, steps)
        if attempt is None:
            break
        steps = steps[steps.index(attempt.step) + 1 :]
        caps.append(attempt.cap)
        if attempt.step == "instant":
            break
        some = needs(attempt.cap, least=some.least, efforts=some.efforts)
    assert len(caps) <= 1 + len(STEPS)
    assert caps == sorted(set(caps), reverse=True)
