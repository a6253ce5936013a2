"""Messages to prompts, through templates that know tools and templates that do not."""

import json

import pytest

from kernels.chat import render_chat
from kernels.errors import RequestRefused
from kernels.templates import SMOLLM2_THINKING
from kernels.tokens import Tokens
from tests.kernels.tiny import HERMES, tiny_tokenizer

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALLED = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "42"}
HI = {"role": "user", "content": "hi"}


def tokens(**options):
    tokenizer = tiny_tokenizer(**options)
    return Tokens(tokenizer, [tokenizer.eos_token_id])


@pytest.fixture(scope="module")
def plain():
    return tokens()


@pytest.fixture(scope="module")
def hermes():
    return tokens(template=HERMES)


@pytest.fixture(scope="module")
def smollm():
    return tokens(template=SMOLLM2_THINKING)


def test_a_conversation_is_rendered_by_the_models_template(plain):
    """Roles and texts go through the template, and the prompt ends where the answer begins."""
    assert render_chat(plain, [HI], [], {}) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_text_parts_are_joined(plain):
    """Several text parts of one message become its text."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert "user\na\nb<|im_end|>" in render_chat(plain, [{"role": "user", "content": parts}], [], {})


def test_a_developer_speaks_as_the_system(plain):
    """The role `developer` is the template's `system`."""
    assert render_chat(plain, [{"role": "developer", "content": "x"}, HI], [], {}).startswith("<|im_start|>system\nx")


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}, "messages[1].content"),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "messages[1].content"),
        ({"role": "user", "content": ["text"]}, "messages[1].content"),
        ({"role": "user", "content": None}, "messages[1].content"),
        ({"role": "user", "content": 7}, "messages[1].content"),
        ({"role": "robot", "content": "x"}, "messages[1].role"),
        ({"content": "x"}, "messages[1].role"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[1].tool_calls[0].function"),
        ({"role": "assistant", "tool_calls": ["x"]}, "messages[1].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[1].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_cannot_be_rendered_is_refused_by_name(plain, message, param):
    """Media, unknown roles and broken calls are named, not dropped."""
    with pytest.raises(RequestRefused) as refused:
        render_chat(plain, [HI, message], [], {})
    assert refused.value.param == param


def test_tools_go_to_a_template_that_knows_them(hermes):
    """A template in Hermes' format gets the tools, and calls in the history as objects."""
    text = render_chat(hermes, [HI, CALLED, RESULT], [TOOL], {})
    assert text.startswith("TOOLS [{")
    assert '<tool_call>f{"a": 1}' in text
    assert "[tool]42" in text


def test_tools_are_explained_to_a_template_that_does_not(plain):
    """Without a place for tools they stand in the system message, in Hermes' format."""
    text = render_chat(plain, [{"role": "system", "content": "Be brief."}, HI], [TOOL], {})
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert json.dumps(TOOL) in text
    assert render_chat(plain, [HI], [TOOL], {}).startswith("<|im_start|>system\n# Tools")


def test_a_template_with_another_tool_format_is_not_trusted():
    """A template that would teach another format than the one that is parsed counts as knowing none."""
    other = tokens(template="{{ 'JSON: ' if tools }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    text = render_chat(other, [HI], [TOOL], {})
    assert text.startswith("# Tools")
    assert "JSON: " not in text


def test_calls_and_results_in_the_history_are_written_out(plain):
    """A template without tools sees calls as the model writes them and results as one user turn."""
    text = render_chat(plain, [HI, CALLED, RESULT, {**RESULT, "content": "43"}], [], {})
    assert '<|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    assert "user\n<tool_response>\n42\n</tool_response>\n<tool_response>\n43\n</tool_response><|im_end|>" in text


def test_the_thinking_template_renders_tools_calls_and_results(smollm):
    """The template of the thinking test model speaks the same format as the engine's own instruction."""
    text = render_chat(smollm, [HI, CALLED, RESULT], [TOOL], {})
    assert "# Tools\n\nYou may call" in text
    assert f"<tools>\n{json.dumps(TOOL)}\n</tools>" in text
    assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>' in text
    assert "<tool_response>\n42\n</tool_response>" in text


def test_the_thinking_template_opens_or_closes_the_chain(smollm):
    """The chain is open unless enable_thinking is false, and then it is an empty block."""
    on, also_on, off = (
        render_chat(smollm, [HI], [], kwargs) for kwargs in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert on == also_on
    assert on.endswith("<|im_start|>assistant\n<think>\n")
    assert off == on + "\n</think>\n\n"


def test_the_thinking_template_leaves_earlier_turns_alone(smollm):
    """What the assistant said before is rendered byte for byte, thinking included, so prefixes stay cached."""
    said = "<think>\n a \n</think>\n\nb "
    assert f"assistant\n{said}<|im_end|>\n" in render_chat(
        smollm, [HI, {"role": "assistant", "content": said}, HI], [], {}
    )


def test_variables_reach_the_template():
    """chat_template_kwargs are the template's variables; the arguments of rendering itself are not."""
    mood = tokens(template="{{ mood }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert render_chat(mood, [HI], [], {"mood": "glad "}) == "glad hi"
    with pytest.raises(RequestRefused) as refused:
        render_chat(mood, [HI], [], {"tokenize": True})
    assert refused.value.param == "chat_template_kwargs.tokenize"


def test_a_template_may_refuse():
    """What a template raises is told to the client."""
    strict = tokens(template="{{ raise_exception('no system here') }}")
    with pytest.raises(RequestRefused, match="no system here") as refused:
        render_chat(strict, [HI], [], {})
    assert refused.value.param == "messages"


def test_a_model_without_a_template_takes_no_chats():
    """A base model answers completions only, and says so."""
    with pytest.raises(RequestRefused, match="v1/completions"):
        render_chat(tokens(template=None), [HI], [], {})


def test_a_chat_needs_a_message(plain):
    """An empty list of messages is refused."""
    with pytest.raises(RequestRefused) as refused:
        render_chat(plain, [], [], {})
    assert refused.value.param == "messages"


def test_earlier_thinking_is_offered_to_the_template():
    """The history's reasoning is there under both names, for templates that want it."""
    keeps = tokens(template="{% for m in messages %}{{ m.get('reasoning_content', '') + m['content'] }}{% endfor %}")
    message = {"role": "assistant", "content": "b", "reasoning": "a"}
    assert render_chat(keeps, [message], [], {}) == "ab"
