"""The embedded backend behind the port: deltas, counting, errors, and letting go at any moment."""

import asyncio
import threading
from contextlib import aclosing

import msgspec
import pytest

from gateway.backends.embedded import EmbeddedBackend
from gateway.backends.port import Call, Delta, Kind, Thinking
from gateway.errors import InvalidRequest, Overloaded, UpstreamError
from kernels.engine import Engine
from tests.kernels.tiny import END, START, says, scripted, tiny_llama, tiny_tokenizer

HI = [{"role": "user", "content": "hi"}]
OFF = Thinking(enabled=False, cap=0, native=False)
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "boolean"}}, "additionalProperties": False},
    },
}
WAIT_S = 10

pytestmark = pytest.mark.anyio


def call(surface="chat", *, thinking=OFF, max_tokens=24, n=1, priority=0, wants_token_ids=False, **fields):
    given = {**({"messages": HI} if surface == "chat" else {"prompt": "go"}), "temperature": 0, **fields}
    return Call(
        surface=surface,
        request_id="r",
        model="m",
        fields={name: msgspec.Raw(msgspec.json.encode(value)) for name, value in given.items()},
        thinking=thinking,
        max_tokens=max_tokens,
        n=n,
        priority=priority,
        wants_token_ids=wants_token_ids,
    )


class Served:
    """A backend over a tiny model."""

    def __init__(self, model, max_waiting=4, max_running=8, thinking=OFF):
        self.model = model
        self.engine = Engine(model, max_waiting=max_waiting, max_running=max_running)
        self.backend = EmbeddedBackend(id="e", path="tiny", engine=self.engine, thinking=thinking)

    async def all(self, asked):
        return [delta async for deltas in self.backend.generate(asked) for delta in deltas]

    def close_gate(self):
        self.model.network.gate = threading.Semaphore(0)
        return self.model.network.gate

    async def reached(self):
        """Wait until the network stands at its gate once more."""
        assert await asyncio.to_thread(self.model.network.at_gate.acquire, timeout=WAIT_S)

    async def idle(self):
        return await asyncio.to_thread(self.engine.wait_until_idle, WAIT_S)

    async def close(self):
        if getattr(self.model.network, "gate", None) is not None:
            self.model.network.gate.release(10_000)
        await self.backend.close()


@pytest.fixture
async def serve():
    made: list[Served] = []

    def start(model, **options):
        made.append(Served(model, **options))
        return made[-1]

    yield start
    for served in made:
        await served.close()


@pytest.fixture
def saying(serve):
    """A backend whose model says a text and ends its turn."""

    def start(text, *, single_markers=True, **options):
        tokenizer = tiny_tokenizer(single_markers=single_markers)
        return serve(scripted(tokenizer, says(tokenizer.encode(text), then=tokenizer.eos_token_id)), **options)

    return start


@pytest.fixture
def endless(serve):
    """A backend whose model never ends."""
    tokenizer = tiny_tokenizer()
    return serve(scripted(tokenizer, lambda so_far: tokenizer.encode("a")[0]), max_waiting=1, max_running=1)


def text(deltas, kind=Kind.ANSWER, index=0):
    return "".join(d.text for d in deltas if d.kind is kind and d.index == index and d.usage is None)


def total(deltas, name):
    return sum(getattr(delta, name) for delta in deltas)


async def test_a_chat_comes_as_deltas_and_usage(saying):
    """Text, counts, ids and the finish arrive, the usage last, and nothing has wire bytes."""
    served = saying("Hello")
    deltas = await served.all(call(wants_token_ids=True))
    *body, last = deltas
    assert text(body) == "Hello"
    assert (total(body, "answer"), body[-1].finish_reason) == (6, "stop")
    assert [i for d in body for i in d.token_ids] == [*served.model.tokens.encode("Hello"), served.model.tokens.eos[0]]
    assert last.usage is not None
    assert msgspec.structs.astuple(last.usage) == (body[0].prompt_tokens, 6, 0, 0)
    prompt = served.model.tokens.decode(body[0].prompt_token_ids)
    assert prompt == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert len(body[0].prompt_token_ids) == body[0].prompt_tokens
    assert [d.prompt_token_ids for d in deltas[1:]] == [None] * (len(deltas) - 1)
    assert all(d.wire == b"" for d in deltas)


async def test_ids_of_the_prompt_come_only_when_asked_for(saying):
    """Without return_token_ids the rendered prompt stays here."""
    deltas = await saying("x").all(call())
    assert all(d.prompt_token_ids is None for d in deltas)
    assert deltas[0].prompt_tokens > 0


@pytest.mark.parametrize("cap", [0, 1, 2, 5])
async def test_thinking_and_answer_are_told_apart(saying, cap):
    """A native model's chain is thinking up to the cap, markers are injected, the rest is the answer."""
    rules = Thinking(enabled=True, cap=cap, wrap_up="!", native=True)
    deltas = await saying(f"{START}hm{END}ok").all(call(thinking=rules))
    capped = cap <= 2
    assert total(deltas, "thinking") == min(cap, 2)
    assert [d.capped for d in deltas].count(True) == capped
    assert text(deltas, Kind.THINKING) == "hm"[:cap] + ("!" if capped and cap else "")
    assert text(deltas).endswith("ok")
    assert deltas[-1].usage.reasoning_tokens == min(cap, 2)
    assert deltas[-1].usage.completion_tokens == sum(total(deltas, k) for k in ("thinking", "answer", "injected"))
    assert all(not (d.thinking and d.answer) for d in deltas)


async def test_choices_and_prompts_are_numbered(saying):
    """Choice p * n + j belongs to prompt p, and each prompt's ids are told once."""
    served = saying("x")
    deltas = await served.all(call("completions", prompt=["ab", [3, 4, 5]], n=2, wants_token_ids=True))
    assert [d.index for d in deltas if d.finish_reason] == [0, 1, 2, 3]
    told = {d.index: d.prompt_token_ids for d in deltas if d.prompt_token_ids is not None}
    assert told == {0: served.model.tokens.encode("ab"), 2: [3, 4, 5]}
    assert deltas[0].prompt_tokens == deltas[-1].usage.prompt_tokens == 5


async def test_chat_logprobs_have_the_chat_shape(saying):
    """Each token has text, bytes, log probability and alternatives."""
    deltas = await saying("é!").all(call(logprobs=True, top_logprobs=2))
    entries = [e for d in deltas if d.logprobs is not None for e in d.logprobs["content"]]
    assert len(entries) == 4
    assert bytes(b for e in entries for b in e["bytes"]).decode() == "é!<|im_end|>"
    assert all(len(e["top_logprobs"]) == 2 and e["logprob"] <= 0 for e in entries)
    assert entries[2]["token"] == entries[2]["top_logprobs"][0]["token"] == "!"


async def test_completion_logprobs_have_the_completions_shape(saying):
    """Parallel lists of tokens, log probabilities, alternatives and running offsets."""
    deltas = await saying("the ab").all(call("completions", logprobs=1))
    shapes = [d.logprobs for d in deltas if d.logprobs is not None]
    joined = {name: [x for shape in shapes for x in shape[name]] for name in shapes[0]}
    assert joined["tokens"] == ["the", " ", "a", "b", "<|im_end|>"]
    assert joined["text_offset"] == [0, 3, 4, 5, 6]
    assert [max(top, key=top.get) for top in joined["top_logprobs"]] == joined["tokens"]
    assert all(x <= 0 for x in joined["token_logprobs"])


async def test_impossible_tokens_stay_json(saying):
    """A log probability of minus infinity is reported as vLLM reports it."""
    served = saying("x")
    row = served.model.network._row
    served.model.network._row = lambda cache: row(cache).masked_fill(row(cache) == 0, -float("inf"))
    deltas = await served.all(call(logprobs=True, top_logprobs=2))
    content = deltas[0].logprobs["content"]
    assert content[0]["top_logprobs"][1]["logprob"] == -9999.0


async def test_tool_calls_stream_in_openais_shape(saying):
    """The first delta of a call has id, type and name, the later ones arguments, and none has markup."""
    said = '<tool_call>\n{"name": "f", "arguments": {"a": true}}\n</tool_call>'
    deltas = await saying(said).all(call(tools=[TOOL], max_tokens=200))
    parts = [p for d in deltas if d.tool_calls is not None for p in d.tool_calls]
    assert (parts[0]["index"], parts[0]["type"], parts[0]["function"]["name"]) == (0, "function", "f")
    assert parts[0]["id"].startswith("call_")
    assert "".join(p["function"]["arguments"] for p in parts) == '{"a": true}'
    assert text(deltas) == ""
    assert deltas[-2].finish_reason == "tool_calls"


async def test_a_stop_string_is_named(saying):
    """The delta that ends a choice at a stop string says which it was."""
    deltas = await saying("go STOP now").all(call(stop="STOP"))
    assert (text(deltas), deltas[-2].finish_reason, deltas[-2].stop_reason) == ("go ", "stop", "STOP")


async def test_the_engine_refuses_in_the_gateways_words(saying):
    """What the model cannot do is an InvalidRequest with param and code."""
    served = saying("x")
    with pytest.raises(InvalidRequest) as too_long:
        await served.all(call(max_tokens=10**6))
    assert (too_long.value.param, too_long.value.code) == ("max_completion_tokens", "context_length_exceeded")
    with pytest.raises(InvalidRequest) as unknown:
        await served.all(call(frobnicate=1))
    assert unknown.value.code == "unknown_parameter"
    assert len(served.model.network.fed) == 0


async def test_a_request_nested_beyond_reason_is_refused(saying):
    """A document that no parser follows to its end is the client's mistake."""
    served = saying("x")
    asked = call()
    asked = msgspec.structs.replace(asked, fields={**asked.fields, "tools": msgspec.Raw(b"[" * 9000 + b"]" * 9000)})
    with pytest.raises(InvalidRequest):
        await served.all(asked)


async def test_a_failure_is_an_upstream_error_and_the_next_call_works(saying):
    """A request that breaks the model fails alone."""
    served = saying("x")
    good, served.model.network._reply = served.model.network._reply, lambda so_far: 10**9
    with pytest.raises(UpstreamError):
        await served.all(call())
    served.model.network._reply = good
    assert text(await served.all(call())) == "x"


async def test_tokens_that_are_ready_together_come_together(endless):
    """Deltas that arrived while the consumer was away are one batch."""
    gate = endless.close_gate()
    async with aclosing(endless.backend.generate(call(max_tokens=8))) as batches:
        gate.release(1)
        first = await anext(batches)
        gate.release(100)
        assert await endless.idle()
        await asyncio.sleep(0)
        second = await anext(batches)
    assert len(first) == 1
    assert len(second) == 8
    assert second[-1].usage is not None


async def test_closing_the_iterator_frees_the_engine(endless):
    """A caller that closes its iterator amid tokens lets the next one in at the next token."""
    gate = endless.close_gate()
    batches = endless.backend.generate(call(max_tokens=1000))
    gate.release(3)
    assert await anext(batches)
    await batches.aclose()
    gate.release(1)
    assert await endless.idle()
    assert len(endless.model.network.fed) < 10
    gate.release(100)
    assert len(text(await endless.all(call(max_tokens=2)))) == 2


async def test_cancelling_the_task_frees_the_engine(endless):
    """A task that is cancelled while it waits for a token lets go of the engine."""
    gate = endless.close_gate()
    async with asyncio.TaskGroup() as group:
        task = group.create_task(endless.all(call(max_tokens=1000)))
        await endless.reached()
        task.cancel()
    gate.release(1)
    assert await endless.idle()
    assert len(endless.model.network.fed) == 1


async def test_cancelling_in_the_queue_frees_the_place(endless):
    """A call that is cancelled while it waits never runs, and its place is free at once."""
    gate = endless.close_gate()
    async with asyncio.TaskGroup() as group:
        running = group.create_task(endless.all(call(max_tokens=2)))
        await endless.reached()
        waiting = group.create_task(endless.all(call(max_tokens=3)))
        while not endless.engine.waiting:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await endless.all(call())
        waiting.cancel()
        while endless.engine.waiting:
            await asyncio.sleep(0)
        gate.release(1000)
        assert text(await running) == "aa"
    assert text(await endless.all(call(max_tokens=4))) == "aaaa"
    assert len(endless.model.network.fed) == 2 + 4


async def test_a_call_that_is_never_started_costs_nothing(endless):
    """A generator that nobody iterates submits nothing."""
    batches = endless.backend.generate(call())
    await batches.aclose()
    assert endless.engine.is_idle


async def test_the_probe_measures(serve):
    """A random model is measured: the cap binds, with tools too, calls are valid, ids go in and out."""
    rules = Thinking(enabled=True, cap=None, native=False)
    model = tiny_llama(tiny_tokenizer())
    # A chain that the model would end by itself measures nothing.
    model.defaults = {"logit_bias": dict.fromkeys([*model.tokens.eos, *model.tokens.marker(END).ids], -100.0)}
    capabilities = await serve(model, thinking=rules).backend.probe()
    assert capabilities.cap_binds is True
    assert capabilities.cap_binds_with_tools is True
    assert capabilities.thinking_field == "reasoning"
    assert capabilities.tools
    assert capabilities.instant_is_quiet
    assert capabilities.token_ids_in
    assert capabilities.token_ids_out
    assert capabilities.cached_tokens
    assert capabilities.max_model_len == 1024


async def test_the_probe_says_when_it_learned_nothing(saying):
    """A model that thinks less than the probing cap leaves the question open."""
    rules = Thinking(enabled=True, cap=None, native=True)
    capabilities = await saying(f"{START}a{END}b", thinking=rules).backend.probe()
    assert capabilities.cap_binds is None


async def test_a_backend_that_is_not_loaded_is_overloaded():
    """Before the first probe a call is told to come back."""
    backend = EmbeddedBackend(id="e", path="/nowhere")
    with pytest.raises(Overloaded):
        await anext(backend.generate(call()))
    await backend.close()


async def test_a_model_that_cannot_be_loaded_is_down():
    """Loading what is not there is an UpstreamError that says so, from load and from probe."""
    with pytest.raises(UpstreamError, match="there is no model folder"):
        await EmbeddedBackend.load(id="e", path="/nowhere")
    with pytest.raises(UpstreamError, match="there is no model folder"):
        await EmbeddedBackend(id="e", path="/nowhere").probe()


async def test_a_folder_is_loaded_once_with_progress(tmp_path):
    """A model folder is loaded on the first probe, told line by line, and not a second time."""
    tokenizer = tiny_tokenizer()
    tiny_llama(tokenizer).network.module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    said: list[str] = []
    backend = EmbeddedBackend(id="e", path=str(tmp_path), on_progress=said.append, device="cpu")
    try:
        await backend.probe()
        lines = len(said)
        await backend.probe()
        assert lines == len(said) == 3
    finally:
        await backend.close()


async def test_a_closed_backend_refuses(saying):
    """After closing, calls are overloaded and probes are down; closing twice is fine."""
    served = saying("x")
    await served.backend.close()
    await served.backend.close()
    with pytest.raises(Overloaded):
        await served.all(call())
    with pytest.raises(UpstreamError):
        await served.backend.probe()


def test_a_delta_has_no_field_we_forgot():
    """The port's delta has the fields that this backend fills, and no others."""
    filled = {"index", "kind", "text", "thinking", "answer", "injected", "token_ids", "logprobs", "tool_calls"}
    filled |= {"finish_reason", "stop_reason", "capped", "usage", "prompt_tokens", "prompt_token_ids"}
    assert set(Delta.__struct_fields__) - {"wire"} == filled
