"""Requests in the model's terms: prompts, open chains, and what is refused before it runs."""

import pytest

from kernels.compose import compose, thinking_plan
from kernels.errors import RequestRefused
from kernels.params import ChatInput, CompletionInput, Options, Sampling, Stopping, ThinkingRules
from tests.kernels.tiny import END, OPENED, START, scripted, tiny_tokenizer

HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def model(**options):
    return scripted(tiny_tokenizer(**options), lambda so_far: 0, max_len=200)


@pytest.fixture(scope="module")
def chatml():
    return model()


@pytest.fixture(scope="module")
def text_markers():
    return model(single_markers=False)


@pytest.fixture(scope="module")
def opened():
    return model(template=OPENED)


def options(*, max_tokens=8, thinking=None, sampling=None, **stopping):
    return Options(
        request_id="r",
        thinking=thinking or ThinkingRules(),
        sampling=sampling or Sampling(),
        stopping=Stopping(max_tokens=max_tokens, **stopping),
    )


def refusal(model, given, asked):
    """The error of a request that is refused."""
    with pytest.raises(RequestRefused) as refused:
        compose(model, given, asked)
    return refused.value


def rules(**more):
    return ThinkingRules(**{"enabled": True, "cap": 5, **more})


@pytest.mark.parametrize(
    ("thinking", "tail", "is_open"),
    [
        (rules(native=False), f"assistant\n{START}\n", True),
        (rules(native=False, cap=None), f"assistant\n{START}\n", True),
        (rules(native=False, cap=0), "assistant\n", False),
        (rules(native=False, enabled=False, cap=0), "assistant\n", False),
        (rules(native=True), "assistant\n", False),
    ],
)
def test_a_chain_is_begun_for_a_model_that_does_not_think_by_itself(chatml, thinking, tail, is_open):
    """The start marker is prefilled when thinking is wanted and the model would not open it."""
    (prompt,) = compose(chatml, ChatInput(messages=HI), options(thinking=thinking)).prompts
    assert chatml.tokens.decode(prompt.token_ids).endswith(tail)
    assert prompt.chain_open is is_open


def test_a_chain_that_the_template_opens_is_seen(opened):
    """A native model's template that ends with the marker leaves the chain open, and nothing is added."""
    (on,) = compose(opened, ChatInput(messages=HI), options(thinking=rules())).prompts
    (off,) = compose(opened, ChatInput(messages=HI, template_kwargs={"enable_thinking": False}), options()).prompts
    assert (on.chain_open, off.chain_open) == (True, False)
    assert opened.tokens.decode(on.token_ids).endswith(f"assistant\n{START}\n")


def test_a_marker_in_a_message_opens_nothing(opened):
    """A user who writes about the marker does not open the chain."""
    given = ChatInput(
        messages=[{"role": "user", "content": f"what is {START}"}], template_kwargs={"enable_thinking": False}
    )
    assert not compose(opened, given, options()).prompts[0].chain_open


def test_a_continued_completion_may_be_inside_the_chain(chatml):
    """A completion whose last marker is the opening one goes on thinking, in text or in ids."""
    ids = tuple(chatml.tokens.encode(f"{START}\nso"))
    given = CompletionInput(prompts=(f"{START}\nso", ids, f"{START}a{END}b", "plain"))
    request = compose(chatml, given, options(thinking=rules()))
    assert [prompt.chain_open for prompt in request.prompts] == [True, True, False, False]
    assert request.prompts[0].token_ids == ids


def test_a_grammar_prefills_a_marker_it_could_not_let_through(text_markers):
    """A native model with an opening marker of several tokens gets it prefilled when the answer has a grammar."""
    given = ChatInput(messages=HI, response_schema={"type": "object"})
    assert compose(text_markers, given, options(thinking=rules())).prompts[0].chain_open
    assert not compose(text_markers, ChatInput(messages=HI), options(thinking=rules())).prompts[0].chain_open
    assert not compose(text_markers, given, options()).prompts[0].chain_open
    plan = thinking_plan(text_markers, rules(), is_open=False, has_grammar=True)
    assert plan is not None
    assert plan.start is None


def test_instant_mode_watches_native_models_only(chatml):
    """Without thinking a native model is held to zero; for another one nothing is watched."""
    plan = thinking_plan(chatml, rules(enabled=False, cap=None), is_open=False, has_grammar=False)
    assert plan is not None
    assert (plan.cap, plan.reports_cap) == (0, False)
    assert thinking_plan(chatml, rules(native=False), is_open=False, has_grammar=False) is None


def test_markers_are_tokenised_once(chatml, monkeypatch):
    """The second request with the same markers tokenises none of them."""
    thinking = rules(wrap_up="wrap it up")
    thinking_plan(chatml, thinking, is_open=True, has_grammar=False)
    monkeypatch.setattr(chatml.tokens, "encode", lambda text: pytest.fail(f"tokenised {text!r} again"))
    thinking_plan(chatml, thinking, is_open=True, has_grammar=False)


def test_prompt_and_output_must_fit_the_window(chatml):
    """A request that cannot fit is refused by the field that is too large, with vLLM's code."""
    given = CompletionInput(prompts=("x" * 10,))
    too_much = refusal(chatml, given, options(max_tokens=191))
    assert (too_much.param, too_much.code) == ("max_tokens", "context_length_exceeded")
    assert "maximum context length is 200 tokens" in too_much.message
    too_long = refusal(chatml, CompletionInput(prompts=("x" * 200,)), options(max_tokens=1))
    assert (too_long.param, too_long.code) == ("prompt", "context_length_exceeded")
    chat = refusal(chatml, ChatInput(messages=HI), options(max_tokens=200))
    assert chat.param == "max_completion_tokens"
    long_chat = refusal(chatml, ChatInput(messages=[{"role": "user", "content": "x" * 300}]), options())
    assert long_chat.param == "messages"
    assert compose(chatml, given, options(max_tokens=190)).prompts


@pytest.mark.parametrize(
    ("given", "asked", "param"),
    [
        (CompletionInput(prompts=((1, 100_000),)), options(), "prompt"),
        (CompletionInput(prompts=((-1,),)), options(), "prompt"),
        (CompletionInput(prompts=("",)), options(), "prompt"),
        (CompletionInput(prompts=("a",)), options(sampling=Sampling(logit_bias={9999: 1})), "logit_bias"),
        (CompletionInput(prompts=("a",)), options(token_ids=frozenset({-4})), "stop_token_ids"),
        (CompletionInput(prompts=("a",)), options(min_tokens=9), "min_tokens"),
        (ChatInput(messages=HI, tool_choice="required"), options(), "tool_choice"),
        (ChatInput(messages=HI, tools=[TOOL], tool_choice=("g",)), options(), "tool_choice"),
        (ChatInput(messages=HI, response_schema={"type": "nope"}), options(), "response_format"),
        (ChatInput(messages=HI, tools=[TOOL], response_regex="a", response_param="s.regex"), options(), "s.regex"),
        (ChatInput(messages=HI, tools=[TOOL], response_choices=("a",), response_param="s"), options(), "s"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(chatml, given, asked, param):
    """Tokens that do not exist, prompts that are empty and tools that are missing are named."""
    assert refusal(chatml, given, asked).param == param


def test_tools_are_hidden_when_none_may_be_called(chatml):
    """With tool_choice none the prompt shows no tools and the answer is not parsed for calls."""
    free = compose(chatml, ChatInput(messages=HI, tools=[TOOL], tool_choice="none"), options(max_tokens=1))
    assert (free.grammar, free.parses_tools) == (None, False)
    assert "Tools" not in chatml.tokens.decode(free.prompts[0].token_ids)
