"""One choice under two-phase enforcement, against models that say and do anything."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.chain import Chain, ChainRules, Forcing, Purse
from budget.chain_step import Step
from budget.stopping import MOST_WAITS

OPEN, END, EOS, CALL = 15, 16, 2, 40
PROMPT = [1, 5, 6]
FORCING = Forcing(
    opening=(OPEN, 198), closing=(END,), after=(199,), wrap_up=(70, 71, 72), wait=(80,), start_id=OPEN, end_id=END
)
SOME = settings(max_examples=300, deadline=None)


@dataclass
class Total:
    """Everything the steps of a chain said, added up."""

    thinking: int = 0
    answer: int = 0
    injected: int = 0
    wasted: int = 0
    ids: list[int] = field(default_factory=list)
    ended_by: str | None = None

    def add(self, step: Step) -> Step:
        """Count one step."""
        self.thinking += step.thinking
        self.answer += step.answer
        self.injected += step.injected
        self.wasted += step.wasted
        self.ids += step.ids
        self.ended_by = self.ended_by or step.ended_by
        return step


def begun(rules: ChainRules, *, is_open: bool = True, forcing: Forcing = FORCING) -> tuple[Chain, Total]:
    """A chain that was opened, and what that took."""
    chain, total = Chain(PROMPT, forcing, rules, is_open=is_open), Total()
    total.add(chain.open(is_open=is_open))
    return chain, total


def test_thinking_that_ends_by_itself_goes_on_to_the_answer_from_the_same_ids() -> None:
    """A sampled end marker closes phase one, nothing is forced, and phase two's prompt is all that was sampled."""
    chain, total = begun(ChainRules(cap=10, total=50))
    assert chain.room() == 10
    step = total.add(chain.feed([100, 101, END], "stop", END))
    assert (step.thinking, step.injected, step.forced, step.is_over) == (2, 1, (), True)
    assert (chain.phase, chain.ids) == ("answer", [*PROMPT, 100, 101, END])
    assert chain.room() == 47


def test_thinking_that_meets_the_cap_is_wrapped_up() -> None:
    """At the cap the wrap-up, the end marker and what follows it are forced, and the bound is told."""
    chain, total = begun(ChainRules(cap=2, total=50))
    total.add(chain.feed([100]))
    step = total.add(chain.feed([101], "length"))
    assert (step.forced, step.shown, step.ended_by) == ((70, 71, 72, END, 199), 3, "cap")
    assert chain.ids == [*PROMPT, 100, 101, 70, 71, 72, END, 199]


def test_a_prompt_that_does_not_open_the_thinking_is_opened() -> None:
    """The opening marker is forced before anything is sampled, and counts as injected."""
    chain, total = begun(ChainRules(cap=2, total=50), is_open=False)
    assert (chain.ids, total.injected, total.thinking) == ([*PROMPT, OPEN, 198], 2, 0)


def test_a_cap_of_zero_is_an_empty_block() -> None:
    """Without room to think the block is closed at once, without a wrap-up."""
    chain, _ = begun(ChainRules(cap=0, total=50), is_open=False)
    assert (chain.phase, chain.ids) == ("answer", [*PROMPT, OPEN, 198, END, 199])


def test_an_end_of_turn_inside_the_thinking_is_dropped_and_the_answer_still_given() -> None:
    """The end-of-sequence token reaches no later segment: it is wasted, and the end marker stands in its place."""
    chain, total = begun(ChainRules(cap=10, total=50))
    total.add(chain.feed([100, EOS], "stop", None))
    assert (total.thinking, total.wasted) == (1, 1)
    assert chain.ids == [*PROMPT, 100, END, 199]


def test_thinking_that_ends_too_early_is_made_to_wait() -> None:
    """A marker before the minimum is dropped and "Wait" forced, until the minimum is met."""
    chain, total = begun(ChainRules(cap=10, total=50, min_thinking=3))
    step = total.add(chain.feed([100, END], "stop", END))
    assert (chain.phase, step.wasted, step.forced, step.is_over) == ("thinking", 1, (80,), True)
    total.add(chain.feed([101, 102, END], "stop", END))
    assert (chain.phase, chain.waits, chain.ids) == ("answer", 1, [*PROMPT, 100, 80, 101, 102, END])


def test_waiting_has_an_end() -> None:
    """A model that closes its thinking at once, however often it is told to wait, gets to answer."""
    chain, _ = begun(ChainRules(cap=100, total=500, min_thinking=50))
    for _ in range(MOST_WAITS + 1):
        assert chain.phase == "thinking"
        chain.feed([END], "stop", END)
    assert (chain.phase, chain.waits) == ("answer", MOST_WAITS)


def test_a_tool_call_begun_in_the_thinking_ends_it() -> None:
    """The opening token of a call closes the block first, so that no wrap-up can ever land inside the call."""
    chain, total = begun(ChainRules(cap=10, total=50, answer_openers=frozenset({CALL})))
    assert chain.stop_token_ids() == (END, CALL)
    step = total.add(chain.feed([100, CALL], "stop", CALL))
    assert (step.thinking, step.answer, chain.phase) == (1, 1, "answer")
    assert chain.ids == [*PROMPT, 100, END, 199, CALL]


def test_a_tool_call_found_by_its_text_is_begun_anew_behind_the_block() -> None:
    """Where the opening is several tokens, they stay in the thinking, and are forced again after its end."""
    chain, total = begun(ChainRules(cap=10, total=50))
    total.add(chain.feed([100, 41, 42]))
    step = total.add(chain.begin_call((41, 42)))
    assert (step.begins_call, step.forced, chain.phase) == (True, (END, 199, 41, 42), "answer")
    assert chain.ids == [*PROMPT, 100, 41, 42, END, 199, 41, 42]
    assert chain.begin_call((41, 42)) == Step()


def test_a_stop_token_that_the_backend_keeps_to_itself_is_put_back() -> None:
    """A server that stops at the marker without returning it gets it forced."""
    chain, total = begun(ChainRules(cap=10, total=50))
    total.add(chain.feed([100], "stop", END))
    assert (total.thinking, chain.ids) == (1, [*PROMPT, 100, END, 199])


def test_a_deadline_ends_the_thinking_like_a_cap() -> None:
    """`cut` wraps up with the bound's name, and does nothing once the answer has begun."""
    chain, total = begun(ChainRules(cap=10, total=50))
    chain.feed([100])
    assert total.add(chain.cut("seconds")).ended_by == "seconds"
    assert chain.phase == "answer"
    assert chain.cut("seconds") == Step()


def test_the_answer_keeps_its_floor() -> None:
    """Thinking ends early enough for the floor and for the tokens that end it, whatever the cap."""
    chain, total = begun(ChainRules(cap=100, total=30, answer_floor=10))
    assert chain.room() == 30 - 10 - 5
    total.add(chain.feed(list(range(100, 115)), "length"))
    assert (total.ended_by, chain.room()) == ("total", 10)


def test_money_ends_the_thinking_before_the_floor_is_spent() -> None:
    """With thinking at 4 and answers at 2 a token, the purse keeps the floor's price back."""
    purse = Purse(femto_usd=100, thinking=4, answer=2)
    chain, total = begun(ChainRules(cap=100, total=1000, answer_floor=10, purse=purse))
    assert chain.room() == (100 - 2 * (10 + 5)) // 4
    total.add(chain.feed(list(range(100, 117)), "length"))
    assert total.ended_by == "usd"
    assert chain.room() == (100 - 17 * 4 - 5 * 2) // 2


def test_an_answer_ends_as_its_backend_says() -> None:
    """finish_reason and stop_reason of the last segment are the choice's."""
    chain, _ = begun(ChainRules(cap=0, total=50))
    chain.feed([7, 8, EOS], "stop", None)
    assert (chain.phase, chain.finish_reason, chain.stop_reason, chain.answer) == ("over", "stop", None, 3)


def test_thinking_reopened_in_the_answer_is_dropped() -> None:
    """What stands between markers in the answer is wasted and reaches no client."""
    chain, total = begun(ChainRules(cap=0, total=50))
    total.add(chain.feed([7, OPEN, 100, 101, END, 8]))
    assert (total.answer, total.wasted) == (2, 4)


@pytest.mark.parametrize("marker", [[30, 31, 32], [31, 32]])
def test_a_marker_of_several_tokens_is_closed_by_its_text(marker: list[int]) -> None:
    """`close` takes the tokens that wrote the marker, however many they were."""
    forcing = Forcing(opening=(20, 21), closing=(30, 31, 32), wrap_up=(70,))
    chain, total = begun(ChainRules(cap=10, total=50), forcing=forcing)
    total.add(chain.feed([100]))
    total.add(chain.close(marker))
    assert (chain.phase, total.injected, chain.ids) == ("answer", len(marker), [*PROMPT, 100, *marker])


@pytest.mark.parametrize(
    ("ids", "is_open", "counted", "phase"),
    [
        ([100, 101], True, (2, 0, 0), "thinking"),
        ([OPEN, 100], False, (1, 0, 1), "thinking"),
        ([100, END, 7, 8], True, (1, 2, 1), "answer"),
        ([100, END, 7, OPEN, 101], True, (2, 1, 2), "thinking"),
    ],
)
def test_a_choice_is_taken_over_where_its_markers_say_it_is(
    ids: list[int], is_open: bool, counted: tuple[int, int, int], phase: str
) -> None:
    """What was delivered is counted by kind, and the last marker tells thinking from answer."""
    chain = Chain(PROMPT, FORCING, ChainRules(cap=10, total=50), is_open=is_open)
    chain.resume(ids)
    assert ((chain.thinking, chain.answer, chain.injected), chain.phase) == (counted, phase)
    assert chain.ids == [*PROMPT, *ids]


def test_a_backend_that_ends_the_thinking_by_a_limit_of_its_own_spends_no_money() -> None:
    """Without a purse the bound is the total, never dollars."""
    chain, total = begun(ChainRules(cap=10, total=50))
    assert total.add(chain.feed([100], "length")).ended_by == "total"


TOKENS = st.lists(st.sampled_from([OPEN, END, EOS, CALL, 100, 101, 102]), max_size=12)
ENDS = st.sampled_from([None, ("stop", END), ("stop", None), ("stop", CALL), ("length", None), ("abort", None)])
RULES = st.builds(
    ChainRules,
    cap=st.integers(0, 12),
    total=st.integers(1, 40),
    answer_floor=st.integers(0, 8),
    min_thinking=st.integers(0, 12),
    answer_openers=st.sampled_from([frozenset(), frozenset({CALL})]),
    purse=st.none()
    | st.builds(Purse, femto_usd=st.integers(0, 120), thinking=st.integers(0, 5), answer=st.integers(0, 5)),
)


@SOME
@given(rules=RULES, is_open=st.booleans(), said=st.lists(st.tuples(TOKENS, ENDS), max_size=30))
def test_whatever_a_backend_sends_the_bounds_hold_and_every_token_is_accounted(
    rules: ChainRules, is_open: bool, said: list[tuple[list[int], tuple[str, int | None] | None]]
) -> None:
    """Also from backends that ignore limits and stops: thinking <= cap, sampled output <= total, no token lost."""
    chain, total = begun(rules, is_open=is_open)
    forced = total.injected
    received = 0
    for ids, end in said:
        if chain.phase == "over" or chain.room() <= 0:
            break
        room, phase, before = chain.room(), chain.phase, chain.thinking + chain.answer
        step = total.add(chain.feed(ids, *(end or (None, None))))
        received += len(ids)
        forced += len(step.forced)
        assert chain.thinking + chain.answer - before <= room + (phase == "thinking" and step.answer)
        assert step.is_over == (chain.phase != phase or bool(step.forced))
    assert total.thinking == chain.thinking <= rules.cap
    if rules.total >= FORCING.overhead():
        assert chain.output() <= rules.total + (CALL in chain.ids)
    assert received + forced == total.thinking + total.answer + total.injected + total.wasted
    assert chain.ids == [*PROMPT, *total.ids]
    assert (total.thinking, total.answer, total.injected) == (chain.thinking, chain.answer, chain.injected)
    assert total.wasted >= 0


@SOME
@given(
    thinking=st.integers(0, 20),
    answer=st.integers(0, 20),
    cap=st.integers(0, 24),
    cuts=st.lists(st.integers(0, 60), max_size=6),
)
def test_an_honest_backend_gets_through_whatever_the_chunks(
    thinking: int, answer: int, cap: int, cuts: list[int]
) -> None:
    """Thinking is the model's or the cap, the answer is whole, and only a cap that was met forces a wrap-up."""
    chain, total = begun(ChainRules(cap=cap, total=500))
    thoughts = [100 + i for i in range(thinking)]
    if chain.phase == "thinking":
        natural = [*thoughts, END]
        sampled = natural[: chain.room()]
        for at, ids in enumerate(chunked(sampled, cuts)):
            is_last = at == len(chunked(sampled, cuts)) - 1
            ended = ("stop", END) if sampled == natural else ("length", None)
            total.add(chain.feed(ids, *(ended if is_last else (None, None))))
    assert chain.phase == "answer"
    assert total.thinking == min(thinking, cap)
    assert (total.ended_by == "cap") == (cap > 0 and thinking >= cap)
    total.add(chain.feed([200 + i for i in range(answer)] + [EOS], "stop", None))
    assert (total.answer, chain.finish_reason) == (answer + 1, "stop")


def chunked(tokens: list[int], cuts: list[int]) -> list[list[int]]:
    """`tokens` in pieces, the last one never empty unless all are."""
    borders = sorted({cut % len(tokens) for cut in cuts} - {0}) if tokens else []
    return [tokens[a:b] for a, b in zip([0, *borders], [*borders, len(tokens)], strict=True)]
