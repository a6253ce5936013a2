"""Tool calls out of streaming text."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.toolcalls import ToolCallParser
from tests.kernels.test_detokenize import cut

BORDERS = st.lists(st.integers(min_value=0, max_value=10_000))
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
ARGUMENTS = st.dictionaries(st.text(max_size=4), st.text('ab}\n</tool_call>{"', max_size=24), max_size=3)
CONTENT = st.text("ab<\n ", max_size=12).filter(lambda text: "<tool_call>" not in text)


def written(calls):
    """Calls as the grammar lets a model write them."""
    blocks = [
        f'<tool_call>\n{{"name": {json.dumps(name)}, "arguments": {json.dumps(arguments)}}}\n</tool_call>'
        for name, arguments in calls
    ]
    return "\n".join(blocks)


def parse(pieces, *, cut_off=False):
    """Content, and [name, arguments] of every call."""
    parser = ToolCallParser()
    content, calls = "", []
    for piece in pieces:
        text, parts = parser.push(piece)
        content += text
        for part in parts:
            if part.name is not None:
                assert str(part.id).startswith("call_")
                calls.append([part.name, ""])
            calls[part.index][1] += part.arguments
    return content + parser.finish(cut=cut_off), calls


@given(CONTENT, st.lists(st.tuples(NAMES, ARGUMENTS), max_size=3), BORDERS)
def test_content_and_calls_come_apart_at_any_cut(content, calls, borders):
    """The content before the calls and every call's name and arguments survive any cut of the text."""
    text, got = parse(cut(content + written(calls), borders))
    assert text == (content if content.strip() else "")
    assert [[name, json.loads(arguments)] for name, arguments in got] == [list(call) for call in calls]


@given(st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=2), BORDERS)
def test_markup_never_reaches_the_content(calls, borders):
    """Calls without text around them leave no content at all, not even while they arrive."""
    assert parse(cut(written(calls), borders))[0] == ""


def test_each_call_is_one_piece_per_push():
    """Name and arguments that arrive together are one piece, so a delta has each index once."""
    _, parts = ToolCallParser().push(written([("f", {"a": "b"}), ("g", {})]))
    assert [(part.index, part.name, part.arguments) for part in parts] == [(0, "f", '{"a": "b"}'), (1, "g", "{}")]


def test_arguments_stream_before_the_call_is_over():
    """The arguments of a call are handed on while they are written."""
    parser = ToolCallParser()
    parser.push('<tool_call>\n{"name": "f", "arguments": ')
    _, parts = parser.push('{"city": "Par')
    assert [part.arguments for part in parts] == ['{"city": "Par']


@pytest.mark.parametrize(
    ("text", "content"),
    [("done <tool", "done "), ("done", "done"), ('<tool_call>\n{"name": "f', ""), ("a < b", "a < b")],
)
def test_a_cut_text_shows_no_beginning_of_markup(text, content):
    """What may be the start of a call is dropped when the token limit ends the text there."""
    assert parse([text], cut_off=True)[0] == content


def test_a_text_that_ends_by_itself_is_shown_whole():
    """Without a cut, an end that only looks like markup is text."""
    assert parse(["use <tool"])[0] == "use <tool"
