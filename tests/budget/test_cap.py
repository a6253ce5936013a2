"""The thinking cap: what is allowed, and where the tokens of a choice fall."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.cap import EFFORT_FLOOR_TOKENS, EFFORT_SHARE, Bounds, CapTooHigh, Split, ThinkingMeter, allow

OPEN, SHUT = 15, 16
WIDE = Bounds(model_max=16384, default=2048)
FEW = settings(max_examples=150, deadline=None)
TOKENS = st.lists(st.sampled_from([OPEN, SHUT, 100, 101, 102, 103]), max_size=24)


def in_chunks(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    """`tokens` cut at these places, whatever their order; empty chunks included."""
    borders = sorted(cut % (len(tokens) + 1) for cut in cuts)
    return [tokens[a:b] for a, b in zip([0, *borders], [*borders, len(tokens)], strict=True)]


def counts(meter: ThinkingMeter) -> tuple[int, int, int, bool, bool]:
    """Everything a meter says."""
    return meter.thinking, meter.answer, meter.injected, meter.is_open, meter.capped


def test_a_named_cap_that_fits_is_taken_as_it_is() -> None:
    """A cap in the request up to and including the ceiling is allowed unchanged."""
    assert allow(0, None, WIDE).tokens == 0
    cap = allow(16384, None, WIDE)
    assert (cap.tokens, cap.source, cap.clamped_from, cap.clamped_by) == (16384, "request", None, None)


@pytest.mark.parametrize(
    ("bounds", "most", "limit"),
    [
        (Bounds(model_max=100), 100, "the model's thinking.max_tokens"),
        (Bounds(model_max=100, key_max=60), 60, "this key's max_thinking_tokens"),
        (
            Bounds(model_max=100, key_max=60, total_max=80, answer_floor=30),
            50,
            "the total limit 80 less 30 kept for the answer",
        ),
        (
            Bounds(model_max=100, total_max=20, answer_floor=30),
            0,
            "the total limit 20 less 30 kept for the answer",
        ),
        (Bounds(model_max=100, key_max=100, total_max=1000), 100, "the model's thinking.max_tokens"),
    ],
)
def test_a_named_cap_that_does_not_fit_is_refused_with_the_bound_it_meets(
    bounds: Bounds, most: int, limit: str
) -> None:
    """One token above the tightest bound raises CapTooHigh, which says what would fit and why."""
    assert allow(most, None, bounds).tokens == most
    with pytest.raises(CapTooHigh) as refused:
        allow(most + 1, None, bounds)
    assert (refused.value.allowed, refused.value.limit) == (most, limit)
    assert str(most) in str(refused.value)
    assert limit in str(refused.value)


@pytest.mark.parametrize(("effort", "share"), EFFORT_SHARE.items())
def test_an_effort_is_a_share_of_the_total(effort: str, share: float) -> None:
    """Without a table an effort is its documented share of the request's total limit."""
    cap = allow(None, effort, Bounds(model_max=16384, total_max=1000))
    assert (cap.tokens, cap.source) == (int(1000 * share), "effort")


def test_an_effort_without_a_total_is_a_share_of_the_models_ceiling() -> None:
    """A request without a total limit takes the effort's share of thinking.max_tokens."""
    assert allow(None, "medium", Bounds(model_max=1000)).tokens == 500


def test_the_models_own_table_beats_the_shares() -> None:
    """An effort that `effort_tokens` names is exactly that many tokens, even none; others stay shares."""
    bounds = Bounds(model_max=1000, effort_tokens={"low": 77, "minimal": 0})
    assert [allow(None, effort, bounds).tokens for effort in ("low", "minimal", "high")] == [77, 0, 800]


def test_a_tiny_total_still_gives_an_effort_some_tokens() -> None:
    """A share below the effort floor is raised to it, as far as the ceiling allows."""
    assert allow(None, "minimal", Bounds(model_max=1000, total_max=50)).tokens == EFFORT_FLOOR_TOKENS
    assert allow(None, "minimal", Bounds(model_max=3)).tokens == 3


def test_efforts_and_defaults_are_clamped_and_say_so() -> None:
    """What the request did not name as a number is clamped to what fits, and the cap remembers from where."""
    bounds = Bounds(model_max=1000, total_max=200, answer_floor=150, default=512)
    default, effort = allow(None, None, bounds), allow(None, "max", bounds)
    why = "the total limit 200 less 150 kept for the answer"
    assert (default.tokens, default.source, default.clamped_from, default.clamped_by) == (50, "default", 512, why)
    assert (effort.tokens, effort.source, effort.clamped_from, effort.clamped_by) == (50, "effort", 190, why)


def test_a_named_cap_beats_an_effort() -> None:
    """With both a number and an effort word, the number decides."""
    assert (allow(5, "max", WIDE).tokens, allow(5, "max", WIDE).source) == (5, "request")


@FEW
@given(
    explicit=st.none() | st.integers(0, 300),
    effort=st.none() | st.sampled_from(sorted(EFFORT_SHARE)),
    model_max=st.integers(0, 200),
    key_max=st.none() | st.integers(0, 200),
    total_max=st.none() | st.integers(1, 300),
    answer_floor=st.integers(0, 150),
    default=st.integers(0, 300),
)
def test_no_cap_is_ever_above_any_bound(
    explicit: int | None,
    effort: str | None,
    model_max: int,
    key_max: int | None,
    total_max: int | None,
    answer_floor: int,
    default: int,
) -> None:
    """Whatever is asked and configured, the cap fits model, key and total, or the request is refused."""
    bounds = Bounds(
        model_max=model_max, key_max=key_max, total_max=total_max, answer_floor=answer_floor, default=default
    )
    limits = [model_max, *([] if key_max is None else [key_max])]
    if total_max is not None:
        limits.append(max(0, total_max - answer_floor))
    if explicit is not None and explicit > min(limits):
        with pytest.raises(CapTooHigh) as refused:
            allow(explicit, effort, bounds)
        assert refused.value.allowed == min(limits)
        return
    cap = allow(explicit, effort, bounds)
    assert 0 <= cap.tokens <= min(limits)
    if explicit is not None:
        assert cap.tokens == explicit
    if cap.clamped_from is not None:
        assert cap.tokens == min(limits) < cap.clamped_from


def test_a_choice_is_sorted_by_its_markers() -> None:
    """Tokens after the opening marker are thinking, after the closing one answer, and markers are injected."""
    meter = ThinkingMeter(OPEN, SHUT, cap=10)
    assert meter.feed([7, OPEN, 8, 9, SHUT, 10, 2]) == Split(thinking=2, answer=3, injected=2, closed=True)
    assert counts(meter) == (2, 3, 2, False, False)


def test_thinking_that_the_prompt_opened_counts_from_the_first_token() -> None:
    """With an open prompt there is no opening marker to wait for."""
    meter = ThinkingMeter(OPEN, SHUT, cap=None, is_open=True)
    meter.feed([8, 9])
    assert counts(meter) == (2, 0, 0, True, False)


def test_a_second_opening_marker_inside_the_thinking_is_thinking() -> None:
    """The model may sample the opening marker while it thinks: that token is thinking like any other."""
    meter = ThinkingMeter(OPEN, SHUT, cap=None, is_open=True)
    assert meter.feed([OPEN, 8]) == Split(thinking=2)


def test_a_stray_closing_marker_is_injected_and_closes_nothing() -> None:
    """A closing marker in the answer is a marker, but no thinking ended there."""
    meter = ThinkingMeter(OPEN, SHUT, cap=0)
    assert meter.feed([8, SHUT, 9]) == Split(answer=2, injected=1)
    assert not meter.capped


@pytest.mark.parametrize(
    ("cap", "slack", "thought", "capped"),
    [(3, 0, 2, False), (3, 0, 3, True), (3, 1, 2, True), (3, 1, 1, False), (0, 0, 0, True), (None, 5, 90, False)],
)
def test_capped_is_said_when_the_thinking_ends_at_the_cap(
    cap: int | None, slack: int, thought: int, capped: bool
) -> None:
    """The closing marker at the cap means capped; template tokens that a native cap counts are its slack."""
    meter = ThinkingMeter(OPEN, SHUT, cap=cap, is_open=True, slack=slack)
    meter.feed([8] * thought)
    assert not meter.capped
    meter.feed([SHUT])
    assert meter.capped == capped


@FEW
@given(
    tokens=TOKENS,
    cuts=st.lists(st.integers(0, 100), max_size=6),
    cap=st.none() | st.integers(0, 6),
    is_open=st.booleans(),
)
def test_chunks_do_not_change_the_counts(tokens: list[int], cuts: list[int], cap: int | None, is_open: bool) -> None:
    """Feeding a choice in any pieces counts the same as feeding it whole, and every token falls somewhere."""
    whole = ThinkingMeter(OPEN, SHUT, cap=cap, is_open=is_open)
    total = whole.feed(tokens)
    assert (total.thinking, total.answer, total.injected) == (whole.thinking, whole.answer, whole.injected)
    assert whole.thinking + whole.answer + whole.injected == len(tokens)
    pieces = ThinkingMeter(OPEN, SHUT, cap=cap, is_open=is_open)
    splits = [pieces.feed(chunk) for chunk in in_chunks(tokens, cuts)]
    assert counts(pieces) == counts(whole)
    assert any(split.closed for split in splits) == total.closed


@FEW
@given(tokens=TOKENS, is_open=st.booleans())
def test_the_fast_path_agrees_with_the_slow_one(tokens: list[int], is_open: bool) -> None:
    """`feed_plain` counts what `feed` would, and leaves markers, uncounted, to `feed`."""
    slow = ThinkingMeter(OPEN, SHUT, cap=4, is_open=is_open)
    fast = ThinkingMeter(OPEN, SHUT, cap=4, is_open=is_open)
    slow.feed(tokens)
    for token in tokens:
        before = counts(fast)
        if not fast.feed_plain(token):
            assert counts(fast) == before
            assert token in {OPEN, SHUT}
            fast.feed([token])
    assert counts(fast) == counts(slow)
