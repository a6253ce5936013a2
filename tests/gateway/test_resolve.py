"""Every dialect of effort and budget says the same thing in the end, or contradicts by name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ask.resolve import UNCAPPED
from tests.gateway.dialects import (
    ALL_ON,
    EFFORTS,
    EVERYTHING,
    SUMMARIES,
    Json,
    Says,
    cap_statements,
    chat,
    effort_statements,
    merged,
    off_statements,
    on_statements,
    refused,
    same_place,
    visibility_statements,
)

# --------------------------------------------------------------------------------- one dialect at a time


@pytest.mark.parametrize("says", off_statements(), ids=str)
def test_every_dialect_can_switch_thinking_off(says: Says) -> None:
    """An explicit off, and a cap of zero in any dialect, is instant mode and names the field that said it."""
    ask = chat(says.fields)
    assert (ask.mode, ask.mode_field) == ("instant", says.field)
    assert (ask.thinking_tokens, ask.effort) == (None, None)


@pytest.mark.parametrize("says", cap_statements(300), ids=str)
def test_every_dialect_can_name_a_cap(says: Says) -> None:
    """A number of thinking tokens is reasoning mode with that cap, and names the field that gave it."""
    ask = chat(says.fields)
    assert (ask.mode, ask.thinking_tokens, ask.thinking_field, ask.effort) == ("reasoning", 300, says.field, None)


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("place", [0, 1])
def test_every_effort_is_understood_in_both_places(effort: str, place: int) -> None:
    """An effort word, OpenAI's or OpenRouter's, is reasoning mode with that effort."""
    says = effort_statements(effort)[place]
    ask = chat(says.fields)
    assert (ask.mode, ask.effort, ask.effort_field) == ("reasoning", effort, says.field)
    assert (ask.mode_field, ask.thinking_tokens) == (says.field, None)


@pytest.mark.parametrize("says", on_statements(), ids=str)
def test_every_dialect_can_switch_thinking_on(says: Says) -> None:
    """Switched on without a number, the cap is left to the default; only OpenRouter's `enabled` means medium."""
    ask = chat(says.fields)
    assert (ask.mode, ask.mode_field, ask.thinking_tokens) == ("reasoning", says.field, None)
    assert ask.effort == ("medium" if says.field == "reasoning.enabled" else None)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"suffix": "auto"},
        {"thinkgate": {"mode": "auto"}},
        {"thinkgate": {}},
        {"thinkgate": None},
        {"reasoning": {}},
        {"reasoning": {"exclude": True}},
        {"reasoning": {"summary": "detailed"}},
        {"thinkgate": {"min_thinking_tokens": 0}},
        {"thinking_config": {"thinking_budget": -1}},
        {"thinking_config": {}},
        {"chat_template_kwargs": {}},
        {"chat_template_kwargs": {"enable_thinking": None, "language": "de"}},
        {"max_tokens": 100},
    ],
    ids=str,
)
def test_what_decides_nothing_leaves_the_mode_open(fields: Json) -> None:
    """No statement, `auto`, and Gemini's dynamic -1 leave the mode to the gateway."""
    ask = chat(fields)
    assert (ask.mode, ask.mode_field, ask.thinking_tokens, ask.effort) == ("auto", None, None, None)


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget"])
def test_minus_one_asks_for_the_most_that_is_allowed(field: str) -> None:
    """The -1 of vLLM is thinking without a cap of the client's own."""
    ask = chat({field: -1})
    assert (ask.mode, ask.thinking_tokens, ask.thinking_field) == ("reasoning", UNCAPPED, field)


# -------------------------------------------------------------------------------------- contradictions


@pytest.mark.parametrize(
    ("off", "on"),
    [(off, on) for off, on in product(off_statements(), ALL_ON) if not same_place(off, on)],
    ids=str,
)
def test_off_and_on_contradict_each_other_by_name(off: Says, on: Says) -> None:
    """Whichever two dialects say off and on, the answer is a 400 that names the fields of both."""
    error = refused(off.fields, on.fields)
    assert (error.status, error.code) == (400, "contradictory_parameters")
    assert f"`{off.field}`" in error.message
    assert f"`{on.field}`" in error.message or f"`{on.field.split('.')[0]}.type`" in error.message
    assert error.param is not None
    assert f"`{error.param}`" in error.message


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pair
        for pair in [
            *product(cap_statements(300), cap_statements(77)),
            *product(effort_statements("low"), effort_statements("high")),
        ]
        if not same_place(*pair)
    ],
    ids=str,
)
def test_two_numbers_or_efforts_contradict_each_other_by_name(one: Says, other: Says) -> None:
    """Different caps, or different efforts, in two dialects are a 400 that names both fields."""
    error = refused(one.fields, other.fields)
    assert error.code == "contradictory_parameters"
    assert f"`{one.field}`" in error.message
    assert f"`{other.field}`" in error.message


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"reasoning": {"effort": "low", "max_tokens": 300}}, ("reasoning.effort", "reasoning.max_tokens")),
        ({"thinking": {"type": "disabled", "budget_tokens": 300}}, ("thinking.type", "thinking.budget_tokens")),
        ({"max_tokens": 10, "max_completion_tokens": 11}, ("max_tokens", "max_completion_tokens")),
        ({"include_reasoning": True, "reasoning": {"exclude": True}}, ("reasoning.exclude", "include_reasoning")),
        (
            {"include_reasoning": True, "thinking_config": {"include_thoughts": False}},
            ("thinking_config.include_thoughts", "include_reasoning"),
        ),
        (
            {"reasoning": {"exclude": False}, "thinking_config": {"include_thoughts": False}},
            ("reasoning.exclude", "thinking_config.include_thoughts"),
        ),
        (
            {"thinking_token_budget": -1, "thinkgate": {"thinking_tokens": 5}},
            ("thinking_token_budget", "thinkgate.thinking_tokens"),
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": True, "thinking": False}},
            ("chat_template_kwargs.enable_thinking", "chat_template_kwargs.thinking"),
        ),
    ],
    ids=str,
)
def test_other_pairs_contradict_each_other_by_name(fields: Json, names: tuple[str, str]) -> None:
    """Pairs within one dialect, of totals and of visibility, are a 400 naming both fields too."""
    error = refused(fields)
    assert error.code == "contradictory_parameters"
    assert all(f"`{name}`" in error.message for name in names)


@pytest.mark.parametrize("word", SUMMARIES)
@pytest.mark.parametrize(
    ("field", "fields"), [*visibility_statements(hidden=True), *visibility_statements(hidden=False)], ids=str
)
def test_a_summary_contradicts_what_shows_or_hides_the_thinking(word: str, field: str, fields: Json) -> None:
    """A summary beside a field that hides the thinking text, or shows all of it, is a 400 naming both."""
    error = refused(fields, {"reasoning": {"summary": word}})
    assert error.code == "contradictory_parameters"
    assert error.param in {field, "reasoning.summary"}
    assert f"`{field}`" in error.message
    assert "`reasoning.summary`" in error.message


@pytest.mark.parametrize("off", off_statements(), ids=str)
def test_a_summary_contradicts_instant_mode(off: Says) -> None:
    """Where the request switches thinking off there is nothing to summarise, which is a 400 naming both."""
    error = refused(off.fields, {"reasoning": {"summary": "auto"}})
    assert (error.code, error.param) == ("contradictory_parameters", "reasoning.summary")
    assert f"`{off.field}` and `reasoning.summary`" in error.message


@settings(max_examples=200, deadline=None)
@given(picked=st.lists(st.sampled_from(EVERYTHING), unique_by=str, max_size=5))
def test_any_combination_is_refused_exactly_when_it_contradicts_itself(picked: Sequence[Says]) -> None:
    """Any dialects together either agree and give what each of them said, or are refused as a contradiction."""
    said = [says for i, says in enumerate(picked) if not any(same_place(says, other) for other in picked[:i])]
    fields = [says.fields for says in said]
    caps, efforts = {s.tokens for s in said} - {None}, {s.effort for s in said} - {None}
    reasoning = merged({}, *fields).get("reasoning", {})
    contradicts = (
        len({says.on for says in said}) > 1
        or len(caps) > 1
        or len(efforts) > 1
        or {"effort", "max_tokens"} <= reasoning.keys()
    )
    if contradicts:
        assert refused(*fields).code == "contradictory_parameters"
        return
    ask = chat(*fields)
    modes = {True: "reasoning", False: "instant"}
    assert ask.mode == (modes[said[0].on] if said else "auto")
    names = {s.field for s in said} | {s.field.split(".")[0] + ".type" for s in said}
    assert ask.mode_field in names if said else ask.mode_field is None
    assert {ask.thinking_tokens} == (caps or {None})
    if efforts:
        assert {ask.effort} == efforts


def test_the_statements_of_these_tests_are_all_different() -> None:
    """No two statements of one meaning are the same request, so every row above tests a row of its own."""
    for rows in (off_statements(), ALL_ON):
        assert all(one.fields != other.fields for one, other in combinations(rows, 2))
