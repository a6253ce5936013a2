"""A chain that follows a plan: step after step, each within its part, all of them within every bound of the chain."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from budget.chain import Chain, ChainRules, Forcing, Purse
from budget.chain_step import Step
from budget.course import Course, Told
from budget.steps import Steps

OPEN, END, EOS = 15, 16, 2
FORCING = Forcing(opening=(OPEN,), closing=(END,), wrap_up=(70, 71), wait=(80,), start_id=OPEN, end_id=END)
ONE, TWO, THREE = (Told((901, 902), "one "), Told((911, 912), "two "), Told((921, 922), "three "))
RULES = ChainRules(cap=100, total=200, answer_floor=10)
PROMPT = [1, 5, OPEN]


def chain_of(course: Course, rules: ChainRules = RULES) -> tuple[Chain, Step]:
    """A chain on that course, and what beginning it took."""
    chain = Chain(PROMPT, FORCING, rules, is_open=True, course=course)
    return chain, chain.open(is_open=True)


def plan(budget: int = 60, weights: tuple[float, ...] = (3, 2, 1), **more: float) -> Course:
    """A course with three steps."""
    return Course(Steps(budget, weights, **more), (ONE, TWO, THREE))


def thoughts(count: int) -> list[int]:
    """So many tokens of thinking."""
    return list(range(100, 100 + count))


def test_each_step_has_its_heading_and_its_part() -> None:
    """A step that meets its part is followed by the next one's heading, and the last one by the wrap-up."""
    chain, step = chain_of(plan(borrows=0))
    assert (step.forced, step.told, step.shown) == (ONE.ids, "one ", 2)
    seen = []
    for part in (30, 20):
        assert chain.room() == part
        step = chain.feed(thoughts(part), "length")
        seen.append((step.forced, step.told, step.is_over, chain.phase, step.ended_by))
    assert seen == [(TWO.ids, "two ", True, "thinking", None), (THREE.ids, "three ", True, "thinking", None)]
    step = chain.feed(thoughts(10), "length")
    assert (step.forced, step.ended_by, chain.phase) == ((70, 71, END), "plan", "answer")
    assert (chain.thinking, chain.injected) == (60, 9)


def test_a_step_that_the_model_ends_leaves_its_rest_to_the_others() -> None:
    """The end marker of a step is dropped and the next one has more; that of the last one ends the thinking."""
    chain, _ = chain_of(plan(borrows=0))
    step = chain.feed([*thoughts(6), END], "stop", END)
    assert (step.thinking, step.wasted, step.forced) == (6, 1, TWO.ids)
    assert END not in chain.ids
    assert chain.room() == 36
    chain.feed(thoughts(3), "stop", END)
    step = chain.feed([*thoughts(5), END], "stop", END)
    assert (step.forced, chain.phase, chain.thinking, chain.ids[-1]) == ((), "answer", 14, END)


def test_a_turn_that_ends_in_a_step_goes_on_to_the_next() -> None:
    """The end of the turn is dropped, as the end marker is."""
    chain, _ = chain_of(plan())
    step = chain.feed([*thoughts(2), EOS], "stop")
    assert (step.thinking, step.wasted, step.forced, chain.phase) == (2, 1, TWO.ids, "thinking")


def test_a_step_that_is_cut_borrows_before_it_is_given_up() -> None:
    """It goes on from the same ids, nothing forced, with tokens of the later ones, once."""
    chain, _ = chain_of(plan(120, (2, 1, 1)))
    step = chain.feed(thoughts(60), "length")
    assert (step.forced, step.is_over, chain.phase, chain.room()) == ((), True, "thinking", 14)
    step = chain.feed(thoughts(14), "length")
    assert (step.forced, chain.room()) == (TWO.ids, 23)


def test_the_chains_own_bounds_end_a_plan() -> None:
    """A cap, or a total, below what the plan has ends the thinking in the middle of it."""
    chain, _ = chain_of(plan(), ChainRules(cap=12, total=200))
    step = chain.feed(thoughts(12), "length")
    assert (step.forced, step.ended_by) == ((70, 71, END), "cap")
    chain, _ = chain_of(plan(borrows=0), ChainRules(cap=100, total=50, answer_floor=10))
    step = chain.feed(thoughts(30), "length")
    assert (step.told, chain.room()) == ("two ", 3)
    step = chain.feed(thoughts(3), "length")
    assert (step.ended_by, chain.output()) == ("total", 40)


def test_without_room_for_a_heading_there_is_no_plan() -> None:
    """A first heading that does not fit leaves a plain chain; a later one ends the thinking."""
    chain, step = chain_of(plan(), ChainRules(cap=2, total=200))
    assert (step.forced, chain.room(), chain.course is not None) == ((), 2, True)
    chain, _ = chain_of(plan(borrows=0), ChainRules(cap=31, total=200))
    step = chain.feed(thoughts(30), "length")
    assert (step.forced, chain.phase, step.ended_by) == ((70, 71, END), "answer", "plan")
    assert chain.course is not None
    assert chain.course.begun == 1


def test_a_step_without_tokens_is_passed_over() -> None:
    """Where the first steps have no part at all, the first that has one begins."""
    _, step = chain_of(plan(60, (0, 0, 1)))
    assert step.told == "three "
    assert chain_of(plan(0))[1].forced == ()


def test_a_course_may_pause_for_probes() -> None:
    """Every so many tokens the segment ends with nothing forced, until it is told to stop; a pause is no bound."""
    course = Course(every=8)
    chain, step = chain_of(course)
    assert step.forced == ()
    for _ in range(2):
        assert chain.room() == 8
        step = chain.feed(thoughts(8), "length")
        assert (step.is_over, step.forced, chain.phase, course.is_due) == (True, (), "thinking", True)
        course.is_due = False
    course.stop_pausing()
    assert chain.room() == 84
    step = chain.feed([*thoughts(3), END], "stop", END)
    assert (chain.phase, chain.thinking) == ("answer", 19)


def test_a_minimum_holds_after_the_last_step() -> None:
    """Steps come first; thinking that is still too short when they are over goes on with "Wait"."""
    chain, _ = chain_of(plan(), ChainRules(cap=100, total=200, min_thinking=20))
    for told in ("two ", "three "):
        assert chain.feed(thoughts(2), "stop", END).told == told
    step = chain.feed([*thoughts(2), END], "stop", END)
    assert (step.forced, step.told, chain.waits) == ((80,), "", 1)


Move = tuple[int, str]
MOVE = st.tuples(st.integers(1, 60), st.sampled_from(["goes on", "length", "marker", "held marker", "turn"]))


RULE = st.builds(
    ChainRules,
    cap=st.integers(0, 250),
    total=st.integers(4, 300),
    answer_floor=st.integers(0, 40),
    min_thinking=st.integers(0, 60),
    purse=st.none() | st.builds(Purse, femto_usd=st.integers(0, 900), thinking=st.just(3), answer=st.just(2)),
)


@settings(max_examples=1500, deadline=None)
@given(
    budget=st.integers(0, 300),
    weights=st.lists(st.floats(0, 9), min_size=1, max_size=5),
    borrows=st.floats(0, 1),
    every=st.none() | st.integers(1, 40),
    rules=RULE,
    moves=st.lists(MOVE, max_size=60),
)
def test_no_plan_and_no_model_break_a_bound(
    budget: int, weights: list[float], borrows: float, every: int | None, rules: ChainRules, moves: list[Move]
) -> None:
    """Whatever the model does: thinking within cap and plan, output within total and money, the answer's floor kept."""
    headings = [Told(tuple(range(900 + 10 * i, 902 + 10 * i)), str(i)) for i in range(len(weights))]
    course = Course(Steps(budget, weights, borrows=borrows), headings, every=every)
    chain, _ = chain_of(course, rules)
    is_planned = course.steps is not None
    for count, how in moves:
        if chain.phase != "thinking":
            break
        room = chain.room()
        ids = thoughts(min(count, room)) if how != "length" else thoughts(room)
        before = chain.thinking
        if how == "marker":
            chain.feed([*ids, END], "stop", END)
        elif how == "held marker":
            chain.feed(ids, "stop", END)
        elif how == "turn":
            chain.feed([*ids[:-1], EOS] if ids else [EOS], "stop")
        else:
            chain.feed(ids, "length" if how == "length" else None)
        assert chain.thinking - before <= room
        assert chain.thinking <= rules.cap
        if is_planned and course.steps is not None:
            assert chain.thinking <= budget
            assert sum(course.steps.used) <= chain.thinking
    if chain.thinking:
        ending = 0 if chain.phase == "answer" else len(FORCING.wrap_up) + len(FORCING.closing)
        assert rules.total - chain.output() - ending >= rules.answer_floor
        spent, purse = chain.femto_usd, rules.purse
        assert purse is None or spent + (ending + rules.answer_floor) * purse.answer <= purse.femto_usd
