"""What a planner says is read, mended, or refused with a reason, and never more than that."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from budget.plan import LEVELS, MOST_QUESTION_CHARS, MOST_STEPS, SCHEMA, NoPlan, Plan, SubQuestion, pays, read_plan

STEP: dict[str, Any] = {"question": "How many?", "level": 2, "credits": 40, "independent": True}
OTHER: dict[str, Any] = {"question": "And then?", "level": 4, "credits": 60, "independent": False}
WHOLE: dict[str, Any] = {"needed": True, "level": 3, "steps": [STEP, OTHER]}
READ = (SubQuestion("How many?", 2, 40, independent=True), SubQuestion("And then?", 4, 60, independent=False))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=7) | st.dictionaries(st.sampled_from([*WHOLE, *STEP, "x"]), inner),
    max_leaves=30,
)


def test_a_sound_plan_is_read_as_it_is() -> None:
    """What keeps to the schema comes out unchanged, and is not called repaired."""
    assert read_plan(json.dumps(WHOLE)) == Plan(READ, 3)
    assert set(WHOLE) == set(SCHEMA["required"])
    assert set(STEP) == set(SCHEMA["properties"]["steps"]["items"]["required"])


def test_a_planner_may_say_that_no_plan_is_needed() -> None:
    """Then there is none, and its level is kept, whatever steps it lists."""
    assert read_plan('{"needed": false, "level": 1, "steps": []}') == NoPlan("not_needed", 1)
    assert read_plan(json.dumps({**WHOLE, "needed": False})) == NoPlan("not_needed", 3)


@pytest.mark.parametrize(
    "text",
    [
        "```json\n" + json.dumps(WHOLE) + "\n```",
        "Here is the plan: " + json.dumps(WHOLE),
        json.dumps({**WHOLE, "steps": [STEP, {**OTHER, "question": "  And\nthen? "}]}) + " Good luck!",
        json.dumps({**WHOLE, "needed": "yes", "level": "3", "steps": [STEP, {**OTHER, "level": "4.2"}, {}]}),
    ],
    ids=["fenced", "prose before", "prose after", "quoted numbers and an empty step"],
)
def test_what_surrounds_a_plan_is_taken_off(text: str) -> None:
    """Fences, prose, numbers in quotes and entries that ask nothing cost no plan, but are remembered as repaired."""
    assert read_plan(text) == Plan(READ, 3, repaired=True)


def test_a_plan_that_was_cut_off_keeps_its_whole_steps() -> None:
    """A planner that met its cap in the second step is believed in the first."""
    text = json.dumps({"needed": True, "level": 3, "steps": [STEP, OTHER]})
    for cut in range(text.index("And"), len(text) - 3):
        assert read_plan(text[:cut]) == Plan(READ[:1], 2, repaired=True)
    assert read_plan(text[:-1]) == Plan(READ, 4, repaired=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not_json"),
        ("I cannot do that.", "not_json"),
        ("[1, 2]", "not_json"),
        ('{"needed": true, "level"', "not_json"),
        ("{" * 100_000, "not_json"),
        ("{}", "no_steps"),
        ('{"needed": true, "steps": "none"}', "no_steps"),
        ('{"steps": [{"question": "  "}, 7]}', "no_steps"),
    ],
)
def test_what_is_no_plan_has_a_reason(text: str, reason: str) -> None:
    """An answer that cannot be used is a reason, not an exception."""
    said = read_plan(text)
    assert isinstance(said, NoPlan)
    assert said.reason == reason


def test_missing_credits_are_the_mean_of_the_others() -> None:
    """A step without credits weighs as much as the others do on average; where none has any, all weigh the same."""
    said = read_plan(json.dumps({"level": 2, "steps": [STEP, {"question": "b"}, {**OTHER, "credits": -3}]}))
    assert isinstance(said, Plan)
    assert [step.credits for step in said.steps] == [40, 40, 40]
    said = read_plan('{"steps": ["a", "b"]}')
    assert said == Plan((SubQuestion("a"), SubQuestion("b")), 3, repaired=True)


def test_steps_beyond_the_fifth_become_part_of_it() -> None:
    """Seven sub-questions are five, and no credit is lost."""
    steps = [{**STEP, "question": str(i), "credits": 10 + i} for i in range(7)]
    said = read_plan(json.dumps({**WHOLE, "steps": steps}))
    assert isinstance(said, Plan)
    assert [step.question for step in said.steps] == ["0", "1", "2", "3", "4; 5; 6"]
    assert sum(step.credits for step in said.steps) == sum(10 + i for i in range(7))


@settings(max_examples=300, deadline=None)
@given(said=JSON, cut=st.integers(0, 400), noise=st.text(max_size=10))
def test_whatever_it_says_there_is_a_usable_plan_or_a_reason(said: Any, cut: int, noise: str) -> None:
    """Any text becomes a plan of one to five questions with credits and levels in range, or a reason."""
    plan = read_plan(noise + json.dumps(said)[: 400 - cut] + noise)
    if isinstance(plan, NoPlan):
        return
    assert 1 <= len(plan.steps) <= MOST_STEPS
    assert LEVELS[0] <= plan.level <= LEVELS[1]
    for step in plan.steps:
        assert 0 < len(step.question) <= MOST_QUESTION_CHARS
        assert step.credits > 0
        assert LEVELS[0] <= step.level <= LEVELS[1]


def test_a_plan_pays_from_four_times_its_price() -> None:
    """A budget under four times what the planner costs is not worth sharing out."""
    assert pays(400, 100)
    assert not pays(399, 100)
