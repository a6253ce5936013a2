"""Grammars: what they let through, token by token."""

import json
from typing import Any

import pytest

from kernels.errors import RequestRefused
from kernels.grammar import Constraint, format_grammar, schema_grammar, tools_grammar
from kernels.params import AnswerFormat
from kernels.tokens import Tokens
from tests.kernels.tiny import tiny_tokenizer

WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
ANYTHING = {"name": "log", "parameters": None}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


@pytest.fixture(scope="module")
def tokens():
    tokenizer = tiny_tokenizer()
    return Tokens(tokenizer, [tokenizer.eos_token_id])


def follow(tokens, grammar, text):
    """How much of a text a grammar lets through, whether it may end there, and whether it must."""
    constraint = Constraint(tokens.grammar_tokenizer, grammar)
    passed = ""
    for token_id in tokens.encode(text):
        if not constraint.allowed(tokens.size)[token_id]:
            return passed, False, False
        constraint.take(token_id)
        passed += tokens.decode([token_id])
    may_end = bool(constraint.allowed(tokens.size)[tokens.eos[0]])
    return passed, may_end, constraint.is_complete


def calls(*, required=False, parallel=True, schema=None, marker_ids=None):
    return tools_grammar(
        [WEATHER, ANYTHING],
        is_required=required,
        is_parallel=parallel,
        marker_ids=marker_ids,
        response_schema=schema,
    )


def test_a_schema_lets_matching_json_through(tokens):
    """A value that matches may end, and must where nothing can follow."""
    grammar = schema_grammar(WEATHER["parameters"])
    assert follow(tokens, grammar, '{"city": "Rome"}') == ('{"city": "Rome"}', True, True)
    assert follow(tokens, grammar, '{"town"')[0] == '{"'
    assert follow(tokens, grammar, "Sure")[0] == ""


def test_json_is_written_on_one_line(tokens):
    """White space is the one between items, so that a model cannot wander off in it."""
    assert follow(tokens, schema_grammar({"type": "object"}), '{"a": 1,\n')[0] == '{"a": 1,'


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "thing"},
        {"type": "string", "pattern": "("},
        {"$ref": "#/nowhere"},
        {"type": "array", "uniqueItems": True},
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused_by_name(schema):
    """Broken schemas and keywords nobody implements are the client's to know."""
    with pytest.raises(RequestRefused) as refused:
        schema_grammar(schema)
    assert refused.value.param == "response_format"


def test_options_smuggled_into_a_schema_are_overruled(tokens):
    """A schema cannot switch llguidance to lenient or to free white space."""
    schema = {"type": "object", "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert follow(tokens, schema_grammar(schema), "{ ")[0] == "{"


def test_choices_are_texts_and_nothing_else(tokens):
    """An answer is one of the choices, whatever characters they hold; one that goes on may end or go on."""
    odd = '\u00e9\U0001f600 "\\n/.*\n\x00'
    grammar = format_grammar(AnswerFormat(response_choices=("ab", "abc", odd)))
    assert follow(tokens, grammar, "ab")[1:] == (True, False)
    assert follow(tokens, grammar, "abc")[1:] == (True, True)
    assert follow(tokens, grammar, odd)[1:] == (True, True)
    assert follow(tokens, grammar, "abe")[0] == "ab"


def test_a_regular_expression_matches_the_whole_answer(tokens):
    """The answer follows it from its first character to its last."""
    grammar = format_grammar(AnswerFormat(response_regex="[0-9]{2}/x"))
    assert follow(tokens, grammar, "12/x") == ("12/x", True, True)
    assert follow(tokens, grammar, "1x")[0] == "1"


def test_a_format_that_cannot_be_enforced_is_refused_by_its_own_name():
    """The field that asked for it is named, and a free answer has no grammar."""
    for asked in (
        AnswerFormat(response_regex="(", response_param="p"),
        AnswerFormat(response_schema={"type": "x"}, response_param="p"),
    ):
        with pytest.raises(RequestRefused) as refused:
            format_grammar(asked)
        assert refused.value.param == "p"
    assert format_grammar(AnswerFormat()) is None


def test_a_required_call_is_all_that_may_come(tokens):
    """Nothing but a valid call of a known function passes."""
    grammar = calls(required=True)
    assert follow(tokens, grammar, CALL)[:2] == (CALL, True)
    assert follow(tokens, grammar, "Hello")[0] == ""
    assert follow(tokens, grammar, CALL.replace("get_weather", "get_time"))[0].endswith('"get_')
    assert follow(tokens, grammar, CALL.replace('"city": "Paris"', ""))[0].endswith('"arguments": ')


def test_an_optional_call_may_follow_text(tokens):
    """Text is free until a call begins, and then the call is held to its schema."""
    grammar = calls()
    assert follow(tokens, grammar, "Hello <there>\n") == ("Hello <there>\n", True, False)
    assert follow(tokens, grammar, f"Let me see.\n{CALL}")[:2] == (f"Let me see.\n{CALL}", True)
    assert follow(tokens, grammar, "ok <tool_call>nonsense")[0] == "ok <tool_call>"


def test_parallel_calls_can_be_forbidden(tokens):
    """One call and no more, if the client wants no parallel calls."""
    twice = f"{CALL}\n{CALL}"
    assert follow(tokens, calls(), twice)[:2] == (twice, True)
    assert follow(tokens, calls(parallel=False), twice)[0] == CALL


def test_calls_and_an_answer_format_live_together(tokens):
    """With a schema for the answer, it is either JSON that matches or calls."""
    grammar = calls(schema=WEATHER["parameters"])
    assert follow(tokens, grammar, '{"city": "Rome"}')[1]
    assert follow(tokens, grammar, CALL)[:2] == (CALL, True)
    assert follow(tokens, grammar, "Hello")[0] == ""


def test_markers_that_are_tokens_are_matched_by_id():
    """A vocabulary with special tool-call tokens gets a grammar that names them by id."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"], special_tokens=True)
    tokens = Tokens(tokenizer, [tokenizer.eos_token_id])
    assert tokens.tool_marker_ids is not None
    for required in (True, False):
        grammar = calls(required=required, marker_ids=tokens.tool_marker_ids)
        assert follow(tokens, grammar, CALL)[:2] == (CALL, True)
    assert follow(tokens, calls(marker_ids=tokens.tool_marker_ids), "Hi " + CALL)[:2] == ("Hi " + CALL, True)
    shown = tokens.shown(skip_special_tokens=True)
    assert b"".join(map(shown, tokens.encode(CALL))).decode() == CALL


def test_parameters_that_are_no_schema_are_refused_by_name():
    """The tool at fault is named."""
    broken = {"name": "f", "parameters": {"type": "thing"}}
    with pytest.raises(RequestRefused) as refused:
        tools_grammar([WEATHER, broken], is_required=True, is_parallel=True, marker_ids=None, response_schema=None)
    assert refused.value.param == "tools[1].function.parameters"


def test_tools_are_lenient_unless_strict():
    """A keyword nobody implements is description in a tool, and an error in a strict one."""
    odd = {"name": "f", "parameters": {"type": "array", "uniqueItems": True}}
    arguments: dict[str, Any] = {"is_required": True, "is_parallel": True, "marker_ids": None, "response_schema": None}
    assert tools_grammar([odd], **arguments)
    with pytest.raises(RequestRefused):
        tools_grammar([{**odd, "strict": True}], **arguments)


def test_a_large_schema_is_fine():
    """A schema with hundreds of properties compiles within the limits."""
    properties = {f"field_{i}": {"type": "string", "enum": [f"v{j}" for j in range(20)]} for i in range(200)}
    assert json.loads(schema_grammar({"type": "object", "properties": properties}))
