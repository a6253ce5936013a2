"""Every dialect of effort and budget says the same thing in the end, or contradicts by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import InvalidRequest
from gateway.request import parse_chat, parse_completion
from gateway.resolve import UNCAPPED, Ask, EnvelopeAsk, resolve_chat, resolve_completion, split_suffix

Json = dict[str, Any]
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")


def merged(*trees: Json) -> Json:
    """Objects laid over each other, also inside."""
    result: Json = {}
    for tree in trees:
        for key, value in tree.items():
            old = result.get(key)
            result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def chat(*parts: Json) -> Ask:
    """The Ask of a chat request with these fields; `suffix` is what stood behind the model's name."""
    body = merged({"model": "qwen", "messages": [{"role": "user", "content": "hi"}]}, *parts)
    suffix = body.pop("suffix", None)
    return resolve_chat(parse_chat(json.dumps(body).encode())[0], "qwen", suffix)


def text(*parts: Json) -> Ask:
    """The Ask of a text completion with these fields."""
    body = merged({"model": "qwen", "prompt": "hi"}, *parts)
    suffix = body.pop("suffix", None)
    return resolve_completion(parse_completion(json.dumps(body).encode())[0], "qwen", suffix)


def refused(*parts: Json, ask: Any = chat) -> InvalidRequest:
    """The error that such a request is answered with."""
    with pytest.raises(InvalidRequest) as caught:
        ask(*parts)
    return caught.value


@dataclass(frozen=True)
class Says:
    """One field of one dialect, and what it means.

    Attributes:
        field: the name an error uses.
        fields: as the client sends it.
        on: it switches thinking on or off.
        tokens: cap it names.
        effort: effort it names.
    """

    field: str
    fields: Json
    on: bool
    tokens: int | None = None
    effort: str | None = None

    def __str__(self) -> str:
        """For the test's name."""
        return json.dumps(self.fields).replace('"', "").replace(" ", "")[1:-1]


def off_statements() -> list[Says]:
    """Every way to say that the model shall not think."""
    return [
        Says("model", {"suffix": "instant"}, False),
        Says("thinkgate.mode", {"thinkgate": {"mode": "instant"}}, False),
        Says("thinkgate.thinking_tokens", {"thinkgate": {"thinking_tokens": 0}}, False),
        Says("reasoning_effort", {"reasoning_effort": "none"}, False),
        Says("reasoning.effort", {"reasoning": {"effort": "none"}}, False),
        Says("reasoning.max_tokens", {"reasoning": {"max_tokens": 0}}, False),
        Says("reasoning.enabled", {"reasoning": {"enabled": False}}, False),
        Says("thinking.type", {"thinking": {"type": "disabled"}}, False),
        Says("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": 0}}, False),
        Says("thinking_config.thinking_budget", {"thinking_config": {"thinking_budget": 0}}, False),
        Says("enable_thinking", {"enable_thinking": False}, False),
        Says("thinking_budget", {"thinking_budget": 0}, False),
        Says("thinking_token_budget", {"thinking_token_budget": 0}, False),
        Says("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": False}}, False),
        Says("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": False}}, False),
    ]


def cap_statements(tokens: int) -> list[Says]:
    """Every way to name a cap."""
    return [
        Says("thinkgate.thinking_tokens", {"thinkgate": {"thinking_tokens": tokens}}, True, tokens),
        Says("reasoning.max_tokens", {"reasoning": {"max_tokens": tokens}}, True, tokens),
        Says("thinking.budget_tokens", {"thinking": {"type": "enabled", "budget_tokens": tokens}}, True, tokens),
        Says("thinking_config.thinking_budget", {"thinking_config": {"thinking_budget": tokens}}, True, tokens),
        Says("thinking_budget", {"thinking_budget": tokens}, True, tokens),
        Says("thinking_token_budget", {"thinking_token_budget": tokens}, True, tokens),
    ]


def effort_statements(effort: str) -> list[Says]:
    """Every way to name an effort."""
    return [
        Says("reasoning_effort", {"reasoning_effort": effort}, True, effort=effort),
        Says("reasoning.effort", {"reasoning": {"effort": effort}}, True, effort=effort),
    ]


def on_statements() -> list[Says]:
    """Every way to say that the model shall think, without saying how much."""
    return [
        Says("model", {"suffix": "reasoning"}, True),
        Says("thinkgate.mode", {"thinkgate": {"mode": "reasoning"}}, True),
        Says("reasoning.enabled", {"reasoning": {"enabled": True}}, True),
        Says("thinking.type", {"thinking": {"type": "enabled"}}, True),
        Says("enable_thinking", {"enable_thinking": True}, True),
        Says("chat_template_kwargs.enable_thinking", {"chat_template_kwargs": {"enable_thinking": True}}, True),
        Says("chat_template_kwargs.thinking", {"chat_template_kwargs": {"thinking": True}}, True),
    ]


ALL_ON = [*on_statements(), *cap_statements(300), *effort_statements("low")]
EVERYTHING = [*off_statements(), *ALL_ON, *cap_statements(77), *effort_statements("max")]


def same_place(one: Says, other: Says) -> bool:
    """Whether no request can hold both statements, or one of them is a part of the other."""
    both = merged(one.fields, other.fields)
    return merged(both, one.fields) != both or both in (one.fields, other.fields)


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


# ------------------------------------------------------------------------------- totals, streams, the rest


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


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "agentic"}, "model"),
        ({"suffix": "search"}, "model"),
        ({"thinkgate": {"mode": "agentic"}}, "thinkgate.mode"),
        ({"thinkgate": {"mode": "search"}}, "thinkgate.mode"),
        ({"thinkgate": {"search": {}}}, "thinkgate.search"),
        ({"thinkgate": {"search": {"policy": "beam"}}}, "thinkgate.search"),
        ({"thinkgate": {"plan": "on"}}, "thinkgate.plan"),
        ({"thinkgate": {"plan": "auto"}}, "thinkgate.plan"),
        ({"thinkgate": {"degrade": True}}, "thinkgate.degrade"),
        ({"thinkgate": {"degrade": ["cap"]}}, "thinkgate.degrade"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ],
    ids=str,
)
def test_what_is_not_built_is_refused_by_name(fields: Json, param: str) -> None:
    """A feature that does not exist yet is a 400 with what to use instead, never silently ignored."""
    error = refused(fields)
    assert (error.code, error.param) == ("not_built", param)
    assert "use" in error.message or "leave" in error.message


@pytest.mark.parametrize(
    "fields", [{"plan": "off"}, {"degrade": False}, {"degrade": []}, {"search": None, "plan": None, "degrade": None}]
)
def test_switching_off_what_is_not_built_is_fine(fields: Json) -> None:
    """Saying no to a reserved feature is accepted."""
    assert chat({"thinkgate": fields}) == chat()


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
    [{"suffix": "instant"}, {"thinkgate": {"mode": "instant"}}, {"thinking_token_budget": 0}, {"thinkgate": None}],
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


def test_the_statements_of_these_tests_are_all_different() -> None:
    """No two statements of one meaning are the same request, so every row above tests a row of its own."""
    for rows in (off_statements(), ALL_ON):
        assert all(one.fields != other.fields for one, other in combinations(rows, 2))
