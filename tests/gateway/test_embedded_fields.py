"""The client's fields on the embedded backend: honoured, refused by name, or without effect by definition."""

from typing import Any

import msgspec
import pytest

from gateway.backends.embedded_fields import CONSUMED, NO_EFFECT, REFUSED, read_call, read_segment
from gateway.backends.port import Call, Segment, Thinking
from gateway.errors import InvalidRequest
from kernels.params import ChatInput, CompletionInput, Sampling, Stopping, ThinkingRules

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def raw(fields):
    return {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in fields.items()}


def call(surface="chat", **fields):
    given: dict[str, Any] = {"messages": HI} if surface == "chat" else {"prompt": "go"}
    given |= fields
    return Call(
        surface=surface,
        request_id="r",
        model="m",
        fields=raw(given),
        thinking=Thinking(enabled=True, cap=7, start="<a>", end="</a>", wrap_up="w", native=False),
        max_tokens=9,
        n=2,
        priority=-3,
    )


def refusal(asked):
    with pytest.raises(InvalidRequest) as refused:
        read_call(asked, {})
    return refused.value


def segment(*, prompt=(5, 6), max_tokens=3, stop_token_ids=(), stop=(), top_logprobs=None, **fields):
    return Segment(
        prompt=prompt,
        max_tokens=max_tokens,
        fields=raw(fields),
        stop_token_ids=stop_token_ids,
        stop=stop,
        top_logprobs=top_logprobs,
    )


def test_everything_the_engine_honours_reaches_it():
    """Sampling, stopping and limits arrive in the engine's own terms."""
    _, options = read_call(
        call(
            temperature=0.5,
            top_p=0.9,
            top_k=5,
            min_p=0.1,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.2,
            logit_bias={"5": -3},
            seed=4,
            stop=["x"],
            stop_token_ids=[3],
            include_stop_str_in_output=True,
            ignore_eos=True,
            min_tokens=2,
            skip_special_tokens=False,
            cache_salt="ours",
            logprobs=True,
            top_logprobs=2,
        ),
        {},
    )
    assert options.sampling == Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        presence_penalty=1,
        frequency_penalty=-1,
        repetition_penalty=1.2,
        logit_bias={5: -3},
        seed=4,
        logprobs=2,
    )
    assert options.stopping == Stopping(
        max_tokens=9, min_tokens=2, ignore_eos=True, strings=("x",), token_ids=frozenset({3}), include=True
    )
    assert (options.n, options.priority, options.skip_special_tokens) == (2, -3, False)
    assert options.cache_salt == "ours"
    assert options.thinking == ThinkingRules(enabled=True, cap=7, start="<a>", end="</a>", wrap_up="w", native=False)


def test_the_models_defaults_fill_what_the_client_left_open():
    """The model's own sampling values count, unless the client says otherwise; null says nothing."""
    defaults = {"temperature": 0.2, "top_k": 20}
    _, options = read_call(call(temperature=None, top_k=-1), defaults)
    assert (options.sampling.temperature, options.sampling.top_k) == (0.2, None)
    _, options = read_call(call(temperature=0), defaults)
    assert (options.sampling.temperature, options.sampling.top_k) == (0, 20)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_known_field_that_cannot_be_honoured_is_refused_by_name(name):
    """A field we know and cannot honour is named; null and values that ask for nothing pass."""
    error = refusal(call(**{name: {"some": "value"}}))
    assert (error.param, error.code) == (name, "unsupported_parameter")
    read_call(call(**{name: None}), {})
    for harmless in REFUSED[name][0]:
        read_call(call(**{name: msgspec.json.decode(harmless)}), {})


@pytest.mark.parametrize("surface", ["chat", "completions"])
def test_an_unknown_field_is_refused_by_name(surface):
    """Nothing is accepted and ignored."""
    error = refusal(call(surface, frobnicate=1))
    assert (error.param, error.code) == ("frobnicate", "unknown_parameter")
    read_call(call(surface, frobnicate=None), {})


def test_a_field_of_the_other_surface_is_unknown():
    """A chat field does nothing in a completion, so it is refused there."""
    assert refusal(call("completions", tools=[TOOL])).code == "unknown_parameter"


@pytest.mark.parametrize("name", sorted(CONSUMED | NO_EFFECT))
def test_fields_without_effect_pass(name):
    """What the gateway consumed, and what changes nothing by definition, is no reason to refuse."""
    assert read_call(call(**{name: "x"}), {})


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"seed": 2**70}, "seed"),
        ({"seed": True}, "seed"),
        ({"stop": ""}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tool_choice": "always"}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"response_format": {"type": "structural_tag"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": True}}}, "response_format"),
        ({"chat_template_kwargs": 1}, "chat_template_kwargs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"grammar": "start: a"}}, "structured_outputs"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs"),
        ({"structured_outputs": {"json": "[1]"}}, "structured_outputs"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs"),
        ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ],
)
def test_a_wrong_value_is_refused_by_name(fields, param):
    """The error's param begins with the field at fault, and its message names it."""
    error = refusal(call(**fields))
    assert str(error.param).split(".")[0].split("[")[0] == param
    assert param in error.message


def test_a_request_without_its_prompt_is_refused():
    """Chats need messages and completions a prompt."""
    for surface, param in (("chat", "messages"), ("completions", "prompt")):
        assert refusal(msgspec.structs.replace(call(surface), fields={})).param == param


@pytest.mark.parametrize(
    ("choice", "engine"),
    [
        (None, "auto"),
        ("none", "none"),
        ("required", "required"),
        ({"type": "function", "function": {"name": "f"}}, ("f",)),
    ],
)
def test_tool_choice_is_translated(choice, engine):
    """A named function becomes its name; saying nothing means auto."""
    given, _ = read_call(call(tools=[TOOL], tool_choice=choice, parallel_tool_calls=False), {})
    assert isinstance(given, ChatInput)
    assert given.tool_choice == engine
    assert not given.parallel_tool_calls
    assert given.tools == [TOOL]


@pytest.mark.parametrize(
    ("asked", "schema"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "array"}}}, {"type": "array"}),
    ],
)
@pytest.mark.parametrize("surface", ["chat", "completions"])
def test_response_formats_become_schemas(surface, asked, schema):
    """Free text has no schema, a JSON object the widest one, and a schema is itself."""
    assert read_call(call(surface, response_format=asked), {})[0].response_schema == schema


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [1]], ("a", (1,))),
    ],
)
def test_prompts_are_texts_or_token_ids(prompt, prompts):
    """One text, several texts, one list of ids or several."""
    given, options = read_call(call("completions", prompt=prompt, logprobs=0, add_special_tokens=False), {})
    assert isinstance(given, CompletionInput)
    assert given.prompts == prompts
    assert (options.sampling.logprobs, given.add_special_tokens) == (0, False)


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], 2], 5, [1.5]])
def test_a_prompt_that_is_neither_is_refused(prompt):
    """Mixtures and numbers are no prompts."""
    assert str(refusal(call("completions", prompt=prompt)).param).startswith("prompt")


@pytest.mark.parametrize(
    ("asked", "format_"),
    [
        ({"json": {"type": "array"}}, ({"type": "array"}, (), None, "structured_outputs.json")),
        ({"json": '{"type": "array"}'}, ({"type": "array"}, (), None, "structured_outputs.json")),
        ({"json_object": True}, ({"type": "object"}, (), None, "structured_outputs.json_object")),
        ({"choice": ["a", "b"], "regex": None}, (None, ("a", "b"), None, "structured_outputs.choice")),
        ({"regex": "a+"}, (None, (), "a+", "structured_outputs.regex")),
    ],
)
@pytest.mark.parametrize("surface", ["chat", "completions"])
def test_structured_outputs_become_answer_formats(surface, asked, format_):
    """The field of vLLM says the same as response_format and more, and its kinds are named in refusals."""
    given, _ = read_call(call(surface, structured_outputs=asked), {})
    found = (given.response_schema, given.response_choices, given.response_regex, given.response_param)
    assert found == format_


def test_a_segment_goes_on_from_ids_without_thinking_rules():
    """Its own ids, limit and logprobs count, once, at the call's priority, with the model's defaults."""
    asked = segment(top_logprobs=4, seed=9, top_p=0.5, n=7, structured_outputs={"choice": ["a"]})
    given, options = read_segment(call(), asked, {"temperature": 0.3})
    assert given == CompletionInput(
        prompts=((5, 6),), response_choices=("a",), response_param="structured_outputs.choice"
    )
    assert options.sampling == Sampling(temperature=0.3, top_p=0.5, seed=9, logprobs=4)
    assert (options.n, options.priority, options.request_id) == (1, -3, "r")
    assert options.stopping == Stopping(max_tokens=3, include=True)
    assert options.thinking == ThinkingRules(native=False)


@pytest.mark.parametrize(("keeps", "silent"), [(None, {1, 2, 3}), (False, {1, 2, 3}), (True, {1, 2})])
def test_a_segment_stops_at_its_own_stops_and_at_the_fields(keeps, silent):
    """Stop texts are kept, and the text of a stop token is kept only if it is the client's and it wants it."""
    fields = {"stop": ["y"], "stop_token_ids": [2, 3], "include_stop_str_in_output": keeps}
    asked = msgspec.structs.replace(segment(stop_token_ids=(1, 2), stop=("x",)), fields=raw(fields))
    _, options = read_segment(call(), asked, {})
    stopping = options.stopping
    assert (stopping.strings, stopping.include) == (("x", "y"), True)
    assert stopping.token_ids == {1, 2, 3}
    assert stopping.silent_ids == silent


@pytest.mark.parametrize(
    ("asked", "param", "code"),
    [
        (segment(frobnicate=1), "frobnicate", "unknown_parameter"),
        (segment(messages=HI), "messages", "unknown_parameter"),
        (segment(bad_words=["x"]), "bad_words", "unsupported_parameter"),
        (segment(temperature=-1), "temperature", "invalid_value"),
        (segment(max_tokens=0), "max_tokens", "invalid_value"),
    ],
)
def test_a_segment_with_what_cannot_be_honoured_is_refused_by_name(asked, param, code):
    """Nothing in a segment is accepted and ignored either."""
    with pytest.raises(InvalidRequest) as refused:
        read_segment(call(), asked, {})
    assert (refused.value.param, refused.value.code) == (param, code)
