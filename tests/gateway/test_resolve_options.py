"""Totals, streams, tiers, suffixes and text completions: what else a request says."""

from __future__ import annotations

import msgspec
import pytest

from gateway.ask.resolve import EnvelopeAsk, split_suffix
from tests.gateway.dialects import (
    ALL_ON,
    EVERYTHING,
    SUMMARIES,
    Json,
    Says,
    cap_statements,
    chat,
    merged,
    refused,
    text,
)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_either_name_of_the_total_counts(field: str) -> None:
    """The total may come by its old or its new name, and an error will use the name the client used."""
    ask = chat({field: 100})
    assert (ask.total_max, ask.total_field) == (100, field)


def test_both_names_of_the_total_may_agree() -> None:
    """Clients that send both names with one value are understood."""
    ask = chat({"max_tokens": 100, "max_completion_tokens": 100})
    assert (ask.total_max, ask.total_field) == (100, "max_completion_tokens")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_anthropics_budget_stays_below_the_total(field: str) -> None:
    """`budget_tokens` at or above the total is a 400 that names both; one below it is fine."""
    assert chat({"thinking": {"type": "enabled", "budget_tokens": 99}, field: 100}).thinking_tokens == 99
    error = refused({"thinking": {"type": "enabled", "budget_tokens": 100}, field: 100})
    assert error.param == "thinking.budget_tokens"
    assert f"`{field}` (100)" in error.message


@pytest.mark.parametrize("value", [1, "true", {}, [], 0])
@pytest.mark.parametrize("name", ["enable_thinking", "thinking"])
def test_a_template_switch_is_true_or_false(name: str, value: object) -> None:
    """A template switch for thinking that is no boolean is refused by its path."""
    error = refused({"chat_template_kwargs": {name: value}})
    assert (error.code, error.param) == ("invalid_type", f"chat_template_kwargs.{name}")


@pytest.mark.parametrize(
    ("fields", "hidden"),
    [
        ({}, False),
        ({"reasoning": {"exclude": True}}, True),
        ({"reasoning": {"exclude": False}}, False),
        ({"include_reasoning": False}, True),
        ({"include_reasoning": True}, False),
        ({"thinking_config": {"include_thoughts": False}}, True),
        ({"thinking_config": {"include_thoughts": True}, "include_reasoning": True}, False),
    ],
    ids=str,
)
def test_every_dialect_can_hide_the_thinking(fields: Json, hidden: bool) -> None:
    """Hiding the thinking text changes what is shown, not the mode."""
    ask = chat(fields)
    assert (ask.exclude_thinking, ask.mode) == (hidden, "auto")


@pytest.mark.parametrize("word", SUMMARIES)
@pytest.mark.parametrize("says", [None, *ALL_ON], ids=str)
def test_a_summary_may_take_the_place_of_the_thinking(word: str, says: Says | None) -> None:
    """A summary changes what is shown and nothing else, whatever asks for the thinking."""
    fields = says.fields if says else {}
    ask = chat(fields, {"reasoning": {"summary": word}})
    assert (ask.summary, ask.exclude_thinking) == (word, False)
    assert msgspec.structs.replace(ask, summary=None) == chat(fields)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_least_thinking_stays_below_the_total(field: str) -> None:
    """A least at or above the total is a 400 that names both fields; one below it is fine."""
    assert chat({"thinkgate": {"min_thinking_tokens": 99}, field: 100}).min_thinking == 99
    error = refused({"thinkgate": {"min_thinking_tokens": 100}, field: 100})
    assert (error.code, error.param) == ("contradictory_parameters", "thinkgate.min_thinking_tokens")
    assert error.message == f"`thinkgate.min_thinking_tokens` (100) must be less than `{field}` (100)."


@pytest.mark.parametrize("says", cap_statements(300), ids=str)
def test_the_least_thinking_may_reach_the_cap(says: Says) -> None:
    """A least above a cap of the request is a 400 that names both fields; one as high as the cap is fine."""
    ask = chat(says.fields, {"thinkgate": {"min_thinking_tokens": 300}})
    assert (ask.min_thinking, ask.thinking_tokens, ask.mode_field) == (300, 300, chat(says.fields).mode_field)
    error = refused(says.fields, {"thinkgate": {"min_thinking_tokens": 301}})
    assert (error.code, error.param) == ("contradictory_parameters", "thinkgate.min_thinking_tokens")
    assert error.message == f"`thinkgate.min_thinking_tokens` (301) must be at most `{says.field}` (300)."


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_token_budget": -1},
        {"thinking_budget": -1},
        {"reasoning_effort": "low"},
        {"reasoning": {"enabled": True}},
        {"suffix": "reasoning"},
    ],
    ids=str,
)
def test_the_least_thinking_decides_the_mode_only_alone(fields: Json) -> None:
    """Where another field asks for thinking, that field is the reason; a cap of -1 is above every least."""
    least = {"thinkgate": {"min_thinking_tokens": 50}}
    assert chat(fields, least) == msgspec.structs.replace(chat(fields), min_thinking=50)
    for open_to_all in ({}, {"suffix": "auto"}, {"thinking_config": {"thinking_budget": -1}}):
        ask = chat(open_to_all, least)
        assert (ask.mode, ask.mode_field) == ("reasoning", "thinkgate.min_thinking_tokens")
        assert (ask.min_thinking, ask.thinking_tokens, ask.effort) == (50, None, None)


@pytest.mark.parametrize("says", [None, *EVERYTHING], ids=str)
def test_a_least_of_zero_says_nothing(says: Says | None) -> None:
    """No thinking at all is at least zero tokens: such a least agrees with every field, off included."""
    fields = says.fields if says else {}
    zero = merged({"thinkgate": {"min_thinking_tokens": 0}}, fields)
    assert chat(zero) == chat(fields)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "agentic"}, "model"),
        ({"suffix": "search"}, "model"),
        ({"thinkgate": {"mode": "agentic"}}, "thinkgate.mode"),
        ({"thinkgate": {"mode": "search"}}, "thinkgate.mode"),
        ({"thinkgate": {"search": {}}}, "thinkgate.search"),
        ({"thinkgate": {"search": {"policy": "beam"}}}, "thinkgate.search"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(fields: Json, param: str) -> None:
    """A feature that does not exist yet is a 400 with what to use instead, never silently ignored."""
    error = refused(fields)
    assert (error.code, error.param) == ("not_built", param)
    assert "use" in error.message or "leave" in error.message


@pytest.mark.parametrize("wish", ["off", "auto", "on"])
def test_a_plan_may_be_wished_for(wish: str) -> None:
    """`thinkgate.plan` is taken as it is, and decides no mode."""
    ask = chat({"thinkgate": {"plan": wish}})
    assert (ask.plan, ask.mode) == (wish, "auto")


@pytest.mark.parametrize("fields", [{"search": None, "plan": None, "degrade": None}])
def test_switching_off_what_is_not_built_is_fine(fields: Json) -> None:
    """Saying no to a reserved feature is accepted."""
    assert chat({"thinkgate": fields}) == chat()


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        (None, None),
        (True, None),
        (False, ()),
        ([], ()),
        (["instant"], ("instant",)),
        (["instant", "cap", "effort", "cap"], ("cap", "effort", "instant")),
    ],
)
def test_the_steps_a_request_agrees_to_are_heard(asked: bool | list[str] | None, steps: tuple[str, ...] | None) -> None:
    """Nothing said, or true, leaves it to the key; the order of a list does not matter."""
    assert chat({"thinkgate": {"degrade": asked}}).degrade == steps


@pytest.mark.parametrize(
    ("tier", "priority"),
    [(None, 0), ("auto", 0), ("default", 0), ("scale", 0), ("priority", -1), ("flex", 1)],
)
def test_the_service_tier_is_a_priority_class(tier: str | None, priority: int) -> None:
    """OpenAI's tiers order the queue; lower goes first."""
    ask = chat({"service_tier": tier})
    assert (ask.tier, ask.priority) == (tier, priority)


@pytest.mark.parametrize(
    ("fields", "stream", "usage"),
    [
        ({}, False, False),
        ({"stream": False}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": None}, True, False),
        ({"stream": True, "stream_options": {}}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
    ],
    ids=str,
)
def test_streams_and_their_usage_are_asked_for(fields: Json, stream: bool, usage: bool) -> None:
    """`stream` and `include_usage` mean what they mean at OpenAI."""
    ask = chat(fields)
    assert (ask.stream, ask.include_usage) == (stream, usage)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": False, "stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
    ],
    ids=str,
)
def test_options_that_need_another_field_are_refused(fields: Json, param: str) -> None:
    """Options without what they refine, and options we cannot honour, are refused by name."""
    assert refused(fields).param == param


def test_everything_else_is_carried_over() -> None:
    """Choices, ids, names of the thinking field, tools, floor and envelope end up in the Ask."""
    ask = chat(
        {
            "n": 3,
            "return_token_ids": True,
            "tools": [{"type": "function", "function": {"name": "f"}}],
            "thinkgate": {
                "answer_tokens_min": 7,
                "reasoning_field": "both",
                "envelope": {"tokens": 5, "usd": 0.01, "seconds": 1.5},
            },
        }
    )
    assert (ask.model, ask.n, ask.prompts, ask.wants_token_ids, ask.has_tools) == ("qwen", 3, 1, True, True)
    assert (ask.answer_floor, ask.both_fields) == (7, True)
    assert ask.envelope == EnvelopeAsk(tokens=5, nano_usd=10_000_000, seconds=1.5)
    assert chat({"thinkgate": {"reasoning_field": "upstream"}}).both_fields is False
    assert chat({"tools": [], "n": None}) == chat({"tools": None}) == chat()
    assert chat({"thinkgate": {"envelope": {}}}).envelope == EnvelopeAsk()


def test_an_ask_never_changes() -> None:
    """The resolved value is frozen: later steps decide by it, they do not edit it."""
    with pytest.raises(AttributeError):
        chat().n = 2  # type: ignore[misc]  # frozen


# --------------------------------------------------------------------------------------- model suffixes


@pytest.mark.parametrize(
    ("name", "known", "model", "suffix"),
    [
        ("qwen", {"qwen"}, "qwen", None),
        ("qwen:instant", {"qwen"}, "qwen", "instant"),
        ("qwen:reasoning", {"qwen"}, "qwen", "reasoning"),
        ("qwen:auto", {"qwen"}, "qwen", "auto"),
        ("qwen:agentic", {"qwen"}, "qwen", "agentic"),
        ("qwen:search", {"qwen"}, "qwen", "search"),
        ("qwen:8b", {"qwen:8b"}, "qwen:8b", None),
        ("qwen:8b:instant", {"qwen:8b"}, "qwen:8b", "instant"),
        ("qwen:instant", {"qwen:instant"}, "qwen:instant", None),
        ("qwen:instant:reasoning", {"qwen:instant"}, "qwen:instant", "reasoning"),
        ("qwen:instant:instant", {"qwen:instant"}, "qwen:instant", "instant"),
        ("qwen:8b", {"qwen"}, "qwen:8b", None),
        ("qwen:Instant", {"qwen"}, "qwen:Instant", None),
        ("qwen:", {"qwen"}, "qwen:", None),
        (":instant", {"qwen"}, "", "instant"),
    ],
)
def test_a_suffix_is_split_from_the_model(name: str, known: set[str], model: str, suffix: str | None) -> None:
    """The last colon starts a suffix if it is one; a configured name that holds colons stays whole."""
    assert split_suffix(name, known) == (model, suffix)


# ------------------------------------------------------------------------------------- text completions


def test_a_text_completion_is_instant() -> None:
    """A raw prompt has no thinking switch: the mode is instant and the prompt is the reason."""
    ask = text({"max_tokens": 5})
    assert (ask.mode, ask.mode_field, ask.total_max, ask.total_field) == ("instant", "prompt", 5, "max_tokens")
    assert (ask.prompts, ask.has_tools) == (1, False)


@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "instant"},
        {"thinkgate": {"mode": "instant", "min_thinking_tokens": 0}},
        {"thinking_token_budget": 0},
        {"thinkgate": None},
    ],
    ids=str,
)
def test_a_text_completion_may_say_off(fields: Json) -> None:
    """Switching off what a raw prompt cannot switch on is fine."""
    assert text(fields).mode == "instant"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "reasoning"}, "model"),
        ({"thinkgate": {"mode": "reasoning"}}, "thinkgate.mode"),
        ({"thinkgate": {"thinking_tokens": 5}}, "thinkgate.thinking_tokens"),
        ({"thinkgate": {"min_thinking_tokens": 5}}, "thinkgate.min_thinking_tokens"),
        ({"thinkgate": {"min_thinking_tokens": 5}, "max_tokens": 5}, "thinkgate.min_thinking_tokens"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
    ],
    ids=str,
)
def test_a_text_completion_cannot_think(fields: Json, param: str) -> None:
    """Asking a raw prompt to think is refused by the field that asks, with the route that can."""
    error = refused(fields, ask=text)
    assert (error.code, error.param) == ("unsupported_parameter", param)
    assert "/v1/chat/completions" in error.message


@pytest.mark.parametrize(
    ("prompt", "count"),
    [("hi", 1), (["hi"], 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1], [2, 3]], 2), ([[]], 1), ([""], 1)],
)
def test_prompts_are_counted(prompt: object, count: int) -> None:
    """A list of texts or of id lists is that many prompts; one list of ids is one."""
    assert text({"prompt": prompt, "n": 2}).prompts == count


@pytest.mark.parametrize("prompt", [["a", 1], [1, "a"], [[1], "a"], ["a", [1]], [1, [1]], [[1], 1]])
def test_prompts_of_mixed_kinds_are_refused(prompt: object) -> None:
    """Text, ids and lists do not mix in one prompt field."""
    assert refused({"prompt": prompt}, ask=text).param == "prompt"


@pytest.mark.parametrize(("n", "best_of", "fits"), [(2, 2, True), (None, 1, True), (None, 2, False), (2, 3, False)])
def test_best_of_must_equal_n(n: int | None, best_of: int, fits: bool) -> None:
    """More candidates than answers are not built: `best_of` is refused unless it changes nothing."""
    if fits:
        assert text({"n": n, "best_of": best_of}).n == (n or 1)
    else:
        assert refused({"n": n, "best_of": best_of}, ask=text).param == "best_of"
