"""Tool calls out of raw answer text: what is forced, what is read, and that no border of pieces matters."""

from __future__ import annotations

import json
import re
from functools import reduce
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.tool_text import ToolPlan, ToolsNotParsable, answer_plan, tool_format_of

MANY = settings(max_examples=200, deadline=None)
TAG = re.compile(r"</?tool_call>")
PLACE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "when": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/Date"}]},
        "exact": {"type": ["boolean", "null"]},
        "grid": {"type": "array"},
        "unit": {"enum": ["C", "F", 0]},
    },
    "$defs": {"Date": {"type": "object"}},
}


def tool(name, parameters=None):
    """A tool as clients send it."""
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


TOOLS = [tool("f"), tool("weather", PLACE)]
AUTO = answer_plan(TOOLS, "auto", True, "hermes")
REQUIRED = answer_plan(TOOLS, "required", True, None)


def tagged(inner):
    """A block."""
    return f"<tool_call>{inner}</tool_call>"


def block(name, arguments, key="arguments"):
    """A call as Hermes' format has it."""
    return tagged("\n" + json.dumps({"name": name, key: arguments}) + "\n")


def pieces_of(texts, plan=AUTO, *, cut=False):
    """Each push's content, and each push's deltas, which are checked to be OpenAI's."""
    reader = plan.reader()
    settled = [reader.push(text) for text in texts] + [reader.finish(cut=cut)]
    begun: list[str] = []
    for _, deltas in settled:
        assert len({delta["index"] for delta in deltas}) == len(deltas)
        for delta in deltas:
            if delta["index"] == len(begun):
                assert re.fullmatch("call_[0-9a-f]{24}", delta["id"])
                assert set(delta) == {"index", "id", "type", "function"}
                assert delta["type"] == "function"
                assert set(delta["function"]) == {"name", "arguments"}
                begun.append(delta["id"])
            else:
                assert delta["index"] == len(begun) - 1
                assert set(delta) == {"index", "function"}
                assert set(delta["function"]) == {"arguments"}
    assert len(set(begun)) == len(begun)
    assert reader.finish_reason("length") == "length"
    assert reader.finish_reason("stop") == ("tool_calls" if begun and plan.how != "named" else "stop")
    return [content for content, _ in settled], [deltas for _, deltas in settled]


def read(*texts, plan=AUTO, cut=False):
    """The content of a text that arrives like this, and its calls as pairs of name and arguments."""
    contents, deltas = pieces_of(texts, plan, cut=cut)
    calls = []
    for delta in (delta for some in deltas for delta in some):
        if "id" in delta:
            calls.append([delta["function"]["name"], ""])
        calls[delta["index"]][1] += delta["function"]["arguments"]
    return "".join(contents), [tuple(call) for call in calls]


def said(texts, plan=AUTO):
    """The pieces of arguments that each text brings."""
    return [[delta["function"]["arguments"] for delta in deltas] for deltas in pieces_of(texts, plan)[1]]


CALL, NONE = ("f", '{"a": 1}'), ("f", "{}")
XML = "<tool_call>\n<function=weather>\n{}</function>\n</tool_call>"


def parameter(name, value):
    """A parameter as Qwen3-Coder writes it."""
    return f"<parameter={name}>\n{value}\n</parameter>\n"


# What each text comes to: its content and its calls.
TOLERATED = {
    "plain": (block("f", {"a": 1}), "", [CALL]),
    "no white space": (tagged('{"name":"f","arguments":{"a": 1}}'), "", [CALL]),
    "much white space": ("\n" + tagged('\n\t {\n"name" : "f" ,\r\n"arguments" : {"a": 1}\n}\n \n') + "\n", "", [CALL]),
    "arguments first": (tagged('{"arguments": {"a": 1}, "name": "f"}'), "", [CALL]),
    "parameters": (block("f", {"a": 1}, "parameters"), "", [CALL]),
    "arguments as text": (block("f", '{"a": 1}'), "", [CALL]),
    "arguments as text that is no JSON": (block("f", "Paris\ud800"), "", [("f", "Paris?")]),
    "no arguments": (tagged('{"name": "f"}'), "", [NONE]),
    "null arguments": (block("f", None), "", [NONE]),
    "empty arguments": (block("f", " "), "", [NONE]),
    "arguments in a list": (block("f", [{"a": 1}]), "", [("f", '[{"a": 1}]')]),
    "more keys": (tagged('{"id": 3, "name": "f", "arguments": {"a": 1}, "x": {"y": "}"}}'), "", [CALL]),
    "an array": (tagged('[{"name": "f", "arguments": {"a": 1}}, {"name": "f"}]'), "", [CALL, NONE]),
    "one after another": (tagged('{"name": "f"}\n{"name": "f", "arguments": {"a": 1}}'), "", [NONE, CALL]),
    "no closing tag": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}}', "", [CALL]),
    "no closing tag and brace": ('<tool_call>\n{"name": "f", "arguments": {"a": 1}', "", [CALL]),
    "no closing tag before the next": (block("f", {"a": 1})[:-12] + block("f", {}), "", [CALL, NONE]),
    "no closing brace": (tagged('{"name": "f", "arguments": {"a": 1}') + "ok", "ok", [CALL]),
    "a closing brace too many": (tagged('{"name": "f", "arguments": {"a": 1}}}'), "", [CALL]),
    "a second opening tag": (tagged("\n" + block("f", {"a": 1}) + "\n"), "", [CALL]),
    "a closing tag alone": ("a </tool_call>b", "a b", []),
    "text around": (f"Hm.\n{block('f', {'a': 1})}\nSo {block('f', {})} end\n", "Hm.\n\nSo  end\n", [CALL, NONE]),
    "only text": ("\n a < b <tool\n", "\n a < b <tool\n", []),
    "no JSON": (tagged("\nhello {}\n"), "\nhello {}\n", []),
    "no JSON, unfinished": ('so <tool_call>{"nam', 'so {"nam', []),
    "JSON that is no call": (tagged('[{"a": 1}]'), '[{"a": 1}]', []),
    "a name that is none": (tagged('{"name": "\\ud800"}'), '{"name": "\\ud800"}', []),
    "a number too large": (tagged('{"arguments": 1e999, "name": "f"}'), '{"arguments": 1e999, "name": "f"}', []),
    "nested too deeply": (tagged("{" + "[" * 9999 + "]" * 9999 + "}"), "{" + "[" * 9999 + "]" * 9999 + "}", []),
    "an array without calls": (tagged("[]"), "[]", []),
    "tags in strings": (block("f", {"<tool_call>": "</tool_call>"}), "", [("f", '{"<tool_call>": "</tool_call>"}')]),
    "a line end inside a string": (tagged('{"name": "f", "arguments": {"a": "\n"}}'), "", [("f", '{"a": "\\n"}')]),
    "a string left open": (tagged('{"name": "f", "arguments": {"a": "1}}\n') + "\nok", "ok", [("f", '{"a": "1}}')]),
    "a sign where a value should be": (tagged('{"name": "f", "arguments": {"a": <}}'), "", [("f", '{"a": <}')]),
    "a tag that a broken block makes up": ("<tool_<tool_call>call>x", "<tool_callx", []),
    "XML": (XML.format(parameter("city", "Rome")), "", [("weather", '{"city": "Rome"}')]),
    "XML without parameters": (tagged("<function=f></function>"), "", [NONE]),
    "XML left open": ("<tool_call><function=f><parameter=a>1\n<parameter=b>", "", [("f", '{"a": "1", "b": ""}')]),
    "XML, the function left open": (tagged("<function=f>\n") + "ok", "ok", [NONE]),
    "XML, the value left open": (tagged("<function=f><parameter=a>1\n</function>"), "", [("f", '{"a": "1"}')]),
    "XML twice": (XML.format("") + "\n" + XML.format(""), "", [("weather", "{}")] * 2),
    "XML that is none": (tagged("<function=a<b>"), "<function=a<b>", []),
}  # fmt: skip


@pytest.mark.parametrize(("text", "content", "calls"), TOLERATED.values(), ids=TOLERATED)
def test_calls_are_read_as_models_write_them(text, content, calls):
    """A text comes to the same content and calls whether it arrives whole or by the character."""
    assert read(text) == (content, calls)
    if len(text) < 5000:
        assert read(*text) == (content, calls)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ('a\n<tool_call>\n{"name": "f", "arguments": {"a": "xy\\', "a", [("f", '{"a": "xy')]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": 1}', "", [("f", '{"a": 1}')]),
        ('<tool_call>\n{"name": "f", "arguments": ', "", [("f", "")]),
        ('<tool_call>\n{"name": "f", "argu', "", [("f", "")]),
        ('<tool_call>\n[{"name": "f", "arguments": "{\\"a\\": 1\\u00', "", [("f", '{"a": 1')]),
        ('<tool_call>\n{"name": "f', "", []),
        ('<tool_call>\n{"arguments": {"a": 1}, "na', "", []),
        ("<tool_call>\n[", "", []),
        ("<tool_call>\n<function=we", "", []),
        ("<tool_call><function=f><parameter=a>1</parameter><parame", "", [("f", '{"a": "1"')]),
        ("<tool_call><function=f><parameter=a>\nsome te\n</par", "", [("f", '{"a": "some te')]),
        ("<tool_call><function=weather><parameter=days>1", "", [("weather", '{"days": 1')]),
        ("the end <tool_", "the end ", []),
        (block("f", {"a": 1})[:-3], "", [CALL]),
    ],
)
def test_a_cut_call_arrives_cut(text, content, calls):
    """Where the token limit ends the text, what is there of a call is handed on, and begun markup is not."""
    assert read(text, cut=True) == (content, calls)
    assert read(*text, cut=True) == (content, calls)


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("city", "42", "42"),
        ("city", "\n two\nlines </p>\n", "\n two\nlines </p>\n"),
        ("city", '"quoted"', '"quoted"'),
        ("days", "3", 3),
        ("days", "three", "three"),
        ("when", "null", None),
        ("when", '{"y": 2026}', {"y": 2026}),
        ("exact", "True", True),
        ("exact", "None", None),
        ("grid", "[1, [2]]", [1, [2]]),
        ("unit", "0", 0),
        ("unit", "C", "C"),
        ("unknown", "7", "7"),
    ],
)
def test_values_of_xml_are_typed_by_the_schema(name, value, typed):
    """A value becomes what its schema names if it is that, and stays text otherwise."""
    _, [(_, arguments)] = read(XML.format(parameter(name, value)))
    assert json.loads(arguments) == {name: typed}
    assert type(json.loads(arguments)[name]) is type(typed)


def test_a_schema_that_refers_to_itself_is_followed_once():
    """References in a circle, from the root on, still tell the type of a value."""
    number = {"anyOf": [{"$ref": "#/$defs/N"}, {"const": 1}, {"$ref": "elsewhere"}]}
    parts = {"a/b": {"properties": {"n": {"allOf": [{"$ref": "#/$defs/N"}]}}}, "N": number}
    plan = answer_plan([tool("weather", {"$ref": "#/$defs/a~1b", "$defs": parts})], None, True, "hermes")
    assert read(XML.format(parameter("n", "5")), plan=plan) == ("", [("weather", '{"n": 5}')])


def test_arguments_arrive_as_they_are_written():
    """If the name came first, every piece of the arguments is handed on with the text that holds it."""
    texts = ['<tool_call>{"name": "f", "arguments": ', '{"a', '": "b', 'c"', "}", "}", "</tool_call>"]
    assert said(texts) == [[], ['{"a'], ['": "b'], ['c"'], ["}"], [], [], []]


def test_xml_arguments_arrive_by_the_parameter():
    """The name arrives with its tag and each parameter with its closing tag."""
    texts = ["<tool_call><function=f>", "<parameter=a>1", "</parameter>", "<parameter=b>2</parameter>", "</function>"]
    assert said(texts) == [[""], [], ['{"a": "1"'], [', "b": "2"'], ["}"], []]


def test_only_the_first_call_is_handed_on_without_parallel_calls():
    """parallel_tool_calls: false drops the calls after the first, and none of them becomes content."""
    plan = answer_plan(TOOLS, None, False, "hermes")
    text = "a " + block("f", {"a": 1}) + block("g", {}) + XML.format(parameter("city", "Rome")) + " b"
    assert read(*text, plan=plan) == ("a  b", [CALL])


def test_text_without_tools_stays_as_it_is():
    """Without tools, and with tool_choice none, even tags are text."""
    text = " " + block("f", {})
    for tools, tool_choice in (([], None), ([], "auto"), ([], "none"), (TOOLS, "none")):
        plan = answer_plan(tools, tool_choice, True, None)
        assert plan == ToolPlan()
        assert read(*text, plan=plan) == (text, [])


def test_a_named_function_gets_the_whole_text():
    """A named function forces its own schema, its name comes with the first text, and the reason stays stop."""
    plan = answer_plan(TOOLS, {"type": "function", "function": {"name": "weather"}}, True, None)
    assert plan.structured_outputs == {"json": PLACE}
    assert said(['{"ci', 'ty": "', 'Rome"}'], plan) == [['{"ci'], ['ty": "'], ['Rome"}'], []]
    assert read(plan=plan) == ("", [("weather", "")])


def test_required_calls_are_an_array_of_any_tool():
    """The forced array has a branch per tool, at least one call, and one at most without parallel calls."""
    closed: dict[str, Any] = {"type": "object", "additionalProperties": False}
    call: dict[str, Any] = {"name": {"const": "f"}, "parameters": {**closed, "properties": {}}}
    one = {**closed, "properties": call, "required": ["name", "parameters"]}
    forced = {"type": "array", "minItems": 1, "items": {"anyOf": [one]}}
    assert answer_plan([tool("f")], "required", True, None).structured_outputs == {"json": forced}
    only = answer_plan([tool("f", {})], "required", False, None)
    assert only.structured_outputs == {"json": {**forced, "maxItems": 1}}


def test_required_calls_are_streamed():
    """Of a forced array each name arrives before its arguments, and these as they are written."""
    texts = ['[{"name": "f", "parameters": {', '"a": 1}', '}, {"name": "g", "parameters": {}}', "]"]
    assert said(texts, REQUIRED) == [["{"], ['"a": 1}'], ["{}"], [], []]
    assert read(*"".join(texts), plan=REQUIRED) == ("", [CALL, ("g", "{}")])
    assert read(texts[0], plan=REQUIRED, cut=True) == ("", [("f", "{")])


def test_references_still_resolve_in_the_forced_array():
    """Parameters that refer to their own parts move as a whole; what only looks like a reference does not change."""
    schema: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "properties": {"$ref": {"type": "string"}, "p": {"$ref": "#/definitions/P"}, "again": {"$ref": "#"}},
        "definitions": {"P": {"enum": [{"$ref": "#/x"}], "items": [{"$ref": "#anchor"}]}},
    }
    forced = answer_plan([tool("f"), tool("g", schema)], "required", True, None).structured_outputs
    assert forced is not None
    assert forced["json"]["items"]["anyOf"][1]["properties"]["parameters"] == {"$ref": "#/$defs/tool_1"}
    moved = {**schema["properties"], "p": {"$ref": "#/$defs/tool_1/definitions/P"}, "again": {"$ref": "#/$defs/tool_1"}}
    assert forced["json"]["$defs"] == {"tool_1": {"properties": moved, "definitions": schema["definitions"]}}


DEEP: dict[str, Any] = reduce(lambda inner, _: {"items": inner}, range(5000), {})


@pytest.mark.parametrize(
    ("tools", "tool_choice", "param"),
    [
        (TOOLS, "auto", "tools"),
        (TOOLS, None, "tools"),
        ([], "required", "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": "h"}}, "tool_choice"),
        ([], {"type": "function", "function": {"name": "f"}}, "tool_choice"),
        (TOOLS, {"type": "allowed_tools"}, "tool_choice"),
        (TOOLS, {"type": "function", "function": {"name": 3}}, "tool_choice"),
        (TOOLS, 3, "tool_choice"),
        ([tool("f"), "g"], "required", "tools[1]"),
        ([{"type": "custom", "custom": {"name": "f"}}], "required", "tools[0]"),
        ([{"type": "function"}], "required", "tools[0]"),
        ([tool("")], "required", "tools[0].function.name"),
        ([tool("f"), tool("f")], "required", "tools[1].function.name"),
        ([tool("f", "any")], "required", "tools[0].function.parameters"),
        ([tool("f", DEEP)], "required", "tools"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tools, tool_choice, param):
    """Tools that are malformed, contradictory or not to be told from text are refused with the field's name."""
    with pytest.raises(ToolsNotParsable) as refused:
        answer_plan(tools, tool_choice, True, None)
    assert refused.value.param == param
    assert f"`{param}`" in refused.value.message or param == "tools"


@pytest.mark.parametrize(
    ("prompt", "taught"),
    [
        ('in tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>', "hermes"),
        ("<tool_call>\n{'arguments': <args-dict>, 'name': <function-name>}\n</tool_call>", "hermes"),
        ("<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>", "hermes"),
        ("<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>", None),
        ('<|tool_call|>[{"name": "f"}]', None),
        ("You have tools: f", None),
    ],
)
def test_the_format_is_what_the_prompt_teaches(prompt, taught):
    """Both spellings inside <tool_call> are one format; a spelling that cannot be read is none."""
    assert tool_format_of(prompt) == taught


def cuts(text):
    """Any way that the text may arrive."""
    borders = st.lists(st.integers(0, len(text)), max_size=12).map(lambda at: sorted({0, len(text), *at}))
    return st.one_of(st.just(list(text)), borders.map(lambda at: [text[a:b] for a, b in pairwise(at)]))


WORDS = "<tool_call> </tool_call> <tool_ call> </ < > { } [ ] , é😀 x 1 </function> </parameter> <parameter=city>"
CODE = [
    '{"name": "f"',
    '{"name": "f", "arguments": ',
    '"arguments": ',
    '"',
    "\\",
    "\n",
    " ",
    "\n</tool_call>",
    "<function=",
]
BITS = st.sampled_from([*WORDS.split(), *CODE, "<function=f>", "<parameter=", block("f", {})])
TEXTS = st.lists(BITS, max_size=14).map("".join)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('a"\\}<\n', max_size=3), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.dictionaries(st.text(max_size=4), VALUES | st.text('ab}\n</tool_call>{"', max_size=24), max_size=3)
CONTENT = st.text("ab<>/\n ", max_size=12)


@MANY
@given(data=st.data(), text=TEXTS, plan=st.sampled_from([AUTO, REQUIRED]), cut=st.booleans())
def test_borders_of_pieces_never_matter(data, text, plan, cut):
    """Whatever the text, it gives the same content and calls in any pieces, and no tag is ever in the content."""
    whole = read(text, plan=plan, cut=cut)
    pieces = data.draw(cuts(text))
    assert read(*pieces, plan=plan, cut=cut) == whole
    contents, _ = pieces_of(pieces, plan, cut=cut)
    assert not TAG.search("".join(contents))


@MANY
@given(
    data=st.data(),
    before=CONTENT,
    after=CONTENT,
    calls=st.lists(ARGUMENTS, min_size=1, max_size=3),
    keys=st.sampled_from([("name", "arguments"), ("name", "parameters")]),
    is_first=st.booleans(),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
)
def test_arguments_come_whole(data, before, after, calls, keys, is_first, indent, is_ascii):
    """The pieces of each call's arguments make up JSON equal to what the model wrote, between the text around."""
    written = [dict([("name", "f"), (keys[1], arguments)][:: -1 if is_first else 1]) for arguments in calls]
    blocks = (f"<tool_call>{json.dumps(call, indent=indent, ensure_ascii=is_ascii)}</tool_call>" for call in written)
    content, found = read(*data.draw(cuts(before + "\n".join(blocks) + after)))
    assert "".join(content.split()) == "".join((before + after).split())
    assert [(name, json.loads(arguments)) for name, arguments in found] == [("f", arguments) for arguments in calls]


@pytest.mark.parametrize("filler", ["x", "<", " ", '\\"', "[", "\n<", "<p"])
def test_what_is_held_back_is_bounded(filler):
    """However long a part of a text grows, no more of it is held back and read again than a tag with a name."""
    for text in (text for text, _, _ in TOLERATED.values() if len(text) < 5000):
        for at in range(0, len(text), 11):
            reader = AUTO.reader()
            for piece in (text[:at], *[filler * 4] * 80, text[at:]):
                reader.push(piece)
                assert len(vars(reader)["_held"]) <= 280
