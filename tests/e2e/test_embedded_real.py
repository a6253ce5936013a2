"""The embedded backend over a real model: SmolLM2, instructed and thinking.

The folders come from THINKGATE_TEST_MODEL (a plain instruct model) or .cache/models, and are built if
they are missing.
"""

import json
import os
from pathlib import Path

import msgspec
import pytest

from gateway.backends.embedded import EmbeddedBackend
from gateway.backends.port import Call, Kind, Segment, Thinking
from kernels.engine import Engine
from kernels.model import load_model
from kernels.weights import build_smollm2

MODELS = Path(__file__).parents[2] / ".cache/models"
WRAP_UP = "\n\nTime is up: I answer with what I have.\n"
PARIS = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a dragon and a lighthouse."}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}

pytestmark = pytest.mark.anyio


def model_folder(name, *, thinking):
    folder = MODELS / name
    build_smollm2(folder, thinking=thinking, say=print)
    return folder


@pytest.fixture(scope="module")
async def instruct():
    """A backend over the instruct model, which does not think by itself."""
    folder = os.environ.get("THINKGATE_TEST_MODEL") or model_folder("smollm2-135m-instruct", thinking=False)
    backend = await EmbeddedBackend.load(id="instruct", path=str(folder), on_progress=print)
    yield backend
    await backend.close()


@pytest.fixture(scope="module")
async def thinking():
    """A backend over the variant whose template opens a chain and whose markers are single tokens."""
    folder = model_folder("smollm2-135m-thinking", thinking=True)
    backend = await EmbeddedBackend.load(id="thinking", path=str(folder), on_progress=print)
    yield backend
    await backend.close()


@pytest.fixture(scope="module")
async def precise():
    """The thinking variant in float32: in bfloat16 reading a chain at once and token by token round apart."""
    folder = model_folder("smollm2-135m-thinking", thinking=True)
    model = load_model(str(folder), say=print)
    model.network.module.float()
    backend = EmbeddedBackend(id="precise", path=str(folder), engine=Engine(model))
    yield backend
    await backend.close()


class Answer:
    """What came of a call."""

    def __init__(self, deltas):
        *body, last = deltas
        self.deltas = body
        self.usage = last.usage
        self.thought = "".join(d.text for d in body if d.kind is Kind.THINKING)
        self.text = "".join(d.text for d in body if d.kind is Kind.ANSWER)
        self.ids = [i for d in body for i in d.token_ids]
        self.finish = [d.finish_reason for d in body if d.finish_reason is not None]
        self.capped = [d.capped for d in body].count(True)
        self.counts = {k: sum(getattr(d, k) for d in body) for k in ("thinking", "answer", "injected")}
        self.calls = [part for d in body for part in d.tool_calls or ()]


async def ask(backend, *, cap=0, enabled=None, native=False, max_tokens=96, n=1, surface="chat", **fields):
    given = {**({"messages": PARIS} if surface == "chat" else {}), "temperature": 0, **fields}
    call = Call(
        surface=surface,
        request_id="real",
        model="smollm2",
        fields={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in given.items()},
        thinking=Thinking(enabled=cap != 0 if enabled is None else enabled, cap=cap, wrap_up=WRAP_UP, native=native),
        max_tokens=max_tokens,
        n=n,
    )
    return Answer([delta async for deltas in backend.generate(call) for delta in deltas])


async def test_instant_mode_answers(instruct):
    """Without thinking the model simply answers."""
    answer = await ask(instruct)
    assert "Paris" in answer.text
    assert (answer.counts["thinking"], answer.counts["injected"], answer.finish) == (0, 0, ["stop"])
    assert answer.usage.completion_tokens == answer.counts["answer"]


@pytest.mark.parametrize("cap", [1, 5, 40])
async def test_the_cap_is_exact_on_markers_of_several_tokens(instruct, cap):
    """A model that would think on is wrapped up at the cap and answers; markers never show."""
    answer = await ask(instruct, cap=cap, messages=STORY, max_tokens=cap + 60)
    assert answer.counts["thinking"] == cap == answer.usage.reasoning_tokens
    assert answer.capped == 1
    assert answer.thought.endswith(WRAP_UP)
    assert answer.text
    assert "think>" not in answer.thought + answer.text
    assert answer.usage.completion_tokens == sum(answer.counts.values()) <= cap + 60


@pytest.mark.parametrize("cap", [0, 1, 5, 40])
async def test_the_cap_is_exact_on_markers_of_one_token(thinking, cap):
    """On the thinking variant the end marker stands right behind cap and wrap-up in the ids."""
    on = {"chat_template_kwargs": {"enable_thinking": True}}
    answer = await ask(thinking, cap=cap, enabled=True, native=True, messages=STORY, max_tokens=cap + 40, **on)
    assert answer.counts["thinking"] == cap
    end = 16
    assert answer.ids.index(end) == cap + answer.counts["injected"] - 1
    assert (answer.capped, answer.text != "") == (1, True)


async def test_the_chain_may_end_by_itself(thinking):
    """A short question is thought through before the cap: closed, answered, not capped."""
    answer = await ask(thinking, cap=100, native=True, max_tokens=120)
    assert 0 < answer.counts["thinking"] < 100
    assert "Paris" in answer.thought
    assert (answer.capped, answer.text != "") == (0, True)


async def test_instant_mode_uses_the_no_think_switch(thinking):
    """With the template's empty block the thinking variant answers at once."""
    answer = await ask(thinking, native=True, chat_template_kwargs={"enable_thinking": False})
    assert answer.counts["thinking"] == answer.counts["injected"] == 0
    assert answer.text.strip()


async def test_a_required_call_is_valid(instruct):
    """A model of 135 million parameters makes a call that parses, after thinking."""
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    required = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    answer = await ask(instruct, cap=8, messages=messages, **required)
    assert answer.calls[0]["function"]["name"] == "get_weather"
    arguments = json.loads("".join(part["function"]["arguments"] for part in answer.calls))
    assert set(arguments) == {"city"}
    assert (answer.text, answer.finish) == ("", ["tool_calls"])


async def test_the_answer_matches_its_schema(instruct):
    """The answer is the JSON that was asked for, and the chain before it is free."""
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    asked = {"type": "json_schema", "json_schema": {"name": "person", "schema": schema}}
    messages = [{"role": "user", "content": "Invent a person."}]
    answer = await ask(instruct, cap=6, messages=messages, response_format=asked)
    assert set(json.loads(answer.text)) == {"name", "age"}
    assert 0 < answer.counts["thinking"] <= 6


async def test_a_conversation_with_a_tool_result_is_understood(instruct):
    """A call and its result in the history reach the model."""
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "It is snowing in Oslo, -7 degrees."},
    ]
    answer = await ask(instruct, messages=messages, max_tokens=48)
    assert "snow" in answer.text.lower() or "-7" in answer.text


async def test_seeds_repeat_on_real_weights(instruct):
    """Choice i of seed s is choice 0 of seed s + i."""
    sampled = {"messages": STORY, "temperature": 1, "max_tokens": 12}
    two = await ask(instruct, n=2, seed=7, **sampled)
    alone = await ask(instruct, seed=8, **sampled)
    assert [i for d in two.deltas if d.index == 1 for i in d.token_ids] == alone.ids


async def test_completions_take_text_and_ids(instruct):
    """A prompt as ids continues as the same prompt as text does."""
    text = await ask(instruct, surface="completions", prompt="The capital of France is", max_tokens=6)
    tokens = instruct._engine.model.tokens.encode("The capital of France is")
    ids = await ask(instruct, surface="completions", prompt=tokens, max_tokens=6)
    assert text.ids == ids.ids
    assert "Paris" in text.text


async def test_the_probe_measures_the_real_thing(instruct, thinking):
    """Both models are measured: the cap binds, calls are valid, instant mode is quiet."""
    for backend, native in ((instruct, False), (thinking, True)):
        backend._thinking = Thinking(enabled=True, cap=None, native=native)
        capabilities = await backend.probe()
        assert capabilities.cap_binds
        assert capabilities.cap_binds_with_tools
        assert capabilities.tools
        assert capabilities.instant_is_quiet
        assert capabilities.max_model_len == 8192


def chat(*, cap=0, enabled=False, native=True, max_tokens=96, **fields):
    """A greedy chat, as the gateway hands it to the backend."""
    given = {"messages": STORY, "temperature": 0, **fields}
    return Call(
        surface="chat",
        request_id="real",
        model="smollm2",
        fields={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in given.items()},
        thinking=Thinking(enabled=enabled, cap=cap, wrap_up=WRAP_UP, native=native),
        max_tokens=max_tokens,
    )


async def extend(backend, prompt, max_tokens, *, stop_token_ids=(), **fields):
    """Text, ids and stop reason of a greedy segment, whose usage has to agree."""
    given = {"temperature": 0, **fields}
    segment = Segment(
        prompt=prompt,
        max_tokens=max_tokens,
        fields={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in given.items()},
        stop_token_ids=stop_token_ids,
    )
    *body, last = [delta async for deltas in backend.extend(chat(), segment) for delta in deltas]
    ids = [i for delta in body for i in delta.token_ids]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), len(ids))
    return "".join(delta.text for delta in body), ids, body[-1].stop_reason


@pytest.mark.parametrize("k", [1, 2, 7, 23, 40])
async def test_a_chain_cut_and_continued_equals_the_uninterrupted_one(precise, k):
    """Greedy, a chain that goes on from the exact ids of its first k tokens is the chain that was never cut."""
    prompt = await precise.tokenize(chat())
    text, ids, _ = await extend(precise, prompt, 48, ignore_eos=True)
    first, begun, _ = await extend(precise, prompt, k, ignore_eos=True)
    rest, followed, _ = await extend(precise, [*prompt, *begun], 48 - k, ignore_eos=True)
    assert begun + followed == ids
    assert first + rest == text


async def test_two_segments_are_what_the_engine_makes_of_a_cap(precise):
    """Cut at the cap, wrapped up and closed by ids, a chain is the one that the engine's own cap gives."""
    cap, end = 20, 16
    bias = {"logit_bias": {"2": -100}}
    call = msgspec.structs.replace(chat(cap=cap, enabled=True, max_tokens=60, **bias), wants_token_ids=True)
    own = Answer([delta async for deltas in precise.generate(call) for delta in deltas])
    prompt = await precise.tokenize(call)
    assert prompt == own.deltas[0].prompt_token_ids
    thought, ids, stopped_by = await extend(precise, prompt, cap, stop_token_ids=(end,), **bias)
    assert (len(ids), stopped_by, thought + WRAP_UP) == (cap, None, own.thought)
    closing = [*await precise.encode(WRAP_UP), end]
    answer, answered, _ = await extend(precise, [*prompt, *ids, *closing], 60 - cap - len(closing), **bias)
    assert [*ids, *closing, *answered] == own.ids
    assert answer.lstrip("\n") == own.text
