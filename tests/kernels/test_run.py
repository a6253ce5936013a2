"""Whole requests on tiny models: a random one for the numbers, a scripted one for the story."""

import json

import pytest
import torch

from kernels.compose import compose
from kernels.errors import GenerationFailed
from kernels.job import Job
from kernels.params import (
    ChatInput,
    CompletionInput,
    Failed,
    Finished,
    Kind,
    Options,
    Sampling,
    Stopping,
    ThinkingRules,
)
from kernels.scheduler import Scheduler
from tests.kernels.tiny import END, OPENED, START, oracle, says, scripted, tiny_llama, tiny_tokenizer

HI = [{"role": "user", "content": "hi"}]
PROMPT = CompletionInput(prompts=("the thin",))
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(tiny_tokenizer())


def run(model, given, *, n=1, thinking=None, sampling=None, **stopping):
    """Outputs and the last event of a request."""
    asked = Options(
        request_id="r",
        n=n,
        thinking=thinking or ThinkingRules(),
        sampling=sampling or Sampling(temperature=0),
        stopping=Stopping(**{"max_tokens": 24, **stopping}),
    )
    *outputs, last = events_of(model, compose(model, given, asked))
    assert isinstance(last, Finished)
    return outputs, last


def events_of(model, request, **how):
    """Everything that is heard of a request that is alone."""
    heard: list[object] = []
    scheduler = Scheduler(model, **how)
    scheduler.submit(Job(request, heard.append, 1))
    while scheduler.has_work:
        scheduler.step()
    return heard


def row_after(model, token_ids):
    """Logits of the vocabulary after a text that transformers' own attention reads at once."""
    return oracle(model)(token_ids)[-1][: model.tokens.size].tolist()


def ids(outputs, index=0):
    return [token.id for out in outputs for token in out.tokens if out.index == index]


def text(outputs, kind=Kind.ANSWER, index=0):
    return "".join(out.text for out in outputs if out.kind is kind and out.index == index)


def count(outputs, name, index=0):
    return sum(getattr(out, name) for out in outputs if out.index == index)


def test_greedy_tokens_are_those_of_the_network_without_a_cache(llama):
    """Token by token with a cache gives what reading everything anew each time gives."""
    outputs, _ = run(llama, PROMPT, ignore_eos=True)
    so_far = llama.tokens.encode("the thin")
    for token_id in ids(outputs):
        row = row_after(llama, so_far)
        assert token_id == row.index(max(row))
        so_far.append(token_id)


def test_only_tokens_of_the_vocabulary_are_sampled():
    """A padding row of the logits is never taken, however likely it is: nobody could go on from its id."""
    tokenizer = tiny_tokenizer()
    model = scripted(tokenizer, lambda so_far: len(tokenizer) + 3)
    outputs, _ = run(model, PROMPT, max_tokens=4)
    assert len(ids(outputs)) == 4
    assert all(token_id < model.tokens.size for token_id in ids(outputs))


@pytest.mark.parametrize("step_tokens", [1, 3, 1000])
def test_a_prefill_in_portions_is_the_same_prefill(llama, step_tokens):
    """A prompt read a few tokens at a time continues as one read at once."""
    asked = Options(request_id="r", sampling=Sampling(temperature=0, logprobs=2), stopping=Stopping(max_tokens=9))
    request = compose(llama, CompletionInput(prompts=("a longer prompt than three tokens " * 3,)), asked)
    wanted, found = events_of(llama, request), events_of(llama, request, step_tokens=step_tokens)
    assert ids(wanted[:-1]) == ids(found[:-1])
    for one, other in zip(wanted[:-1], found[:-1], strict=True):
        assert one.tokens[0].logprob.chosen == pytest.approx(other.tokens[0].logprob.chosen, abs=1e-4)


@pytest.mark.parametrize("marker", ["one token", "text"])
@pytest.mark.parametrize("cap", [0, 1, 5, 40])
def test_the_cap_is_exact_on_a_model_that_would_think_on(cap, marker):
    """A random model that never closes its chain is closed at the cap, in the KV cache too."""
    model = tiny_llama(tiny_tokenizer(single_markers=marker == "one token", template=OPENED))
    markers = [*model.tokens.marker(START).ids, *model.tokens.marker(END).ids]
    banned = dict.fromkeys([*model.tokens.eos, *markers], -100.0)
    rules = ThinkingRules(enabled=True, cap=cap, wrap_up="so.\n")
    sampling = Sampling(seed=3, logit_bias=banned)
    outputs, last = run(model, ChatInput(messages=HI), thinking=rules, sampling=sampling, max_tokens=80)
    closing = model.tokens.marker("so.\n" if cap else "").ids + model.tokens.marker(END).ids
    assert tuple(ids(outputs)[cap : cap + len(closing)]) == closing
    assert count(outputs, "thinking") == last.reasoning_tokens == cap
    assert count(outputs, "injected") == len(closing)
    assert last.completion_tokens == 80
    assert [out.capped for out in outputs].count(True) == 1
    prompt = model.tokens.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n")
    greedy, _ = run(model, ChatInput(messages=HI), thinking=rules, sampling=Sampling(temperature=0, logit_bias=banned))
    shown = [*prompt, *ids(greedy)]
    row = row_after(model, shown[:-1])
    allowed = {i: x for i, x in enumerate(row) if i not in banned}
    assert shown[-1] == max(allowed, key=lambda i: allowed[i])


def test_without_a_cap_thinking_goes_on(llama):
    """No cap leaves the chain to the model and to max_tokens."""
    sampling = Sampling(seed=1, logit_bias=dict.fromkeys([*llama.tokens.eos, *llama.tokens.marker(END).ids], -100.0))
    rules = ThinkingRules(enabled=True, cap=None, native=False)
    outputs, last = run(llama, ChatInput(messages=HI), thinking=rules, sampling=sampling, max_tokens=60)
    assert last.reasoning_tokens == 60
    assert outputs[-1].finish_reason == "length"


def test_a_model_without_native_thinking_thinks_and_answers():
    """The prefilled chain is prompt, the forced end is injected, and the end of the turn inside it is closed."""
    tokenizer = tiny_tokenizer(single_markers=False)
    script = [*tokenizer.encode("hm"), tokenizer.eos_token_id, *tokenizer.encode("ok")]
    model = scripted(tokenizer, says(script[:2] + script[3:], then=script[2]))
    rules = ThinkingRules(enabled=True, cap=2, native=False, wrap_up="!")
    outputs, last = run(model, ChatInput(messages=HI), thinking=rules)
    assert (text(outputs, Kind.THINKING), text(outputs)) == ("hm!", "ok")
    forced = len(tokenizer.encode("!")) + len(tokenizer.encode(END)) + len(tokenizer.encode("\n\n"))
    assert (count(outputs, "injected"), last.reasoning_tokens) == (forced, 2)
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n"
    assert last.prompt_tokens == len(tokenizer.encode(prompt))


def test_an_answer_follows_a_chain_that_was_closed_for_the_model():
    """A model that ends its turn inside the chain, and would do so again, says at least one token."""
    tokenizer = tiny_tokenizer()
    model = scripted(tokenizer, lambda so_far: tokenizer.eos_token_id)
    outputs, last = run(model, ChatInput(messages=HI), thinking=ThinkingRules(enabled=True, cap=9, native=False))
    assert last.reasoning_tokens == 0
    assert count(outputs, "answer") == 2
    assert outputs[-1].finish_reason == "stop"


def test_thinking_in_instant_mode_is_cut(llama):
    """A native model that opens its chain in instant mode gets it closed at once."""
    start, end = llama.tokens.marker(START).ids[0], llama.tokens.marker(END).ids[0]
    outputs, last = run(llama, PROMPT, sampling=Sampling(temperature=0, logit_bias={start: 100.0}), max_tokens=6)
    assert ids(outputs) == [start, end] * 3
    assert (last.reasoning_tokens, count(outputs, "injected")) == (0, 6)
    assert not any(out.capped for out in outputs)


def test_a_seed_repeats_and_choices_count_up_from_it(llama):
    """The same seed gives the same tokens, and choice i of several is the only choice of seed + i."""
    three, last = run(llama, PROMPT, n=3, sampling=Sampling(seed=40), ignore_eos=True)
    again, _ = run(llama, PROMPT, n=3, sampling=Sampling(seed=40), ignore_eos=True)
    assert [ids(three, i) for i in range(3)] == [ids(again, i) for i in range(3)]
    for i in range(3):
        alone, _ = run(llama, PROMPT, sampling=Sampling(seed=40 + i), ignore_eos=True)
        assert ids(three, i) == ids(alone)
    assert len({tuple(ids(three, i)) for i in range(3)}) == 3
    assert last.completion_tokens == 3 * 24
    assert last.prompt_tokens == len(llama.tokens.encode("the thin"))


def test_choices_share_one_prefill():
    """The prompt of several choices is read once."""
    tokenizer = tiny_tokenizer()
    model = scripted(tokenizer, says(tokenizer.encode("ok"), then=tokenizer.eos_token_id))
    outputs, _ = run(model, PROMPT, n=3)
    fed = model.network.fed  # type: ignore[attr-defined]
    assert fed.count(len(tokenizer.encode("the thin"))) == 1
    assert [text(outputs, index=i) for i in range(3)] == ["ok"] * 3


def test_prompts_multiply_choices(llama):
    """Choice p * n + j continues prompt p, and usage has every prompt once."""
    given = CompletionInput(prompts=("a", "the"))
    outputs, last = run(llama, given, n=2, sampling=Sampling(seed=1), max_tokens=5)
    for p, prompt in enumerate(given.prompts):
        alone, _ = run(llama, CompletionInput(prompts=(prompt,)), n=2, sampling=Sampling(seed=1), max_tokens=5)
        assert [ids(outputs, 2 * p + j) for j in range(2)] == [ids(alone, j) for j in range(2)]
    assert last.prompt_tokens == 2


def test_penalties_and_bias_reach_the_sampler(llama):
    """A frequency penalty ends repetition, and a bias decides."""
    a = llama.tokens.encode("a")[0]
    forced, _ = run(llama, PROMPT, sampling=Sampling(temperature=0, logit_bias={a: 100.0}))
    assert set(ids(forced)) == {a}
    penalised = Sampling(temperature=0, frequency_penalty=2.0, logit_bias={a: 100.0})
    freed, _ = run(llama, PROMPT, sampling=penalised, max_tokens=120, ignore_eos=True)
    assert ids(freed)[:40] == [a] * 40
    assert set(ids(freed)) != {a}


@pytest.mark.parametrize("cap", [None, 3])
def test_every_token_has_its_log_probability(llama, cap):
    """Each token, forced ones too, carries the model's own log probability and the best alternatives."""
    rules = ThinkingRules(enabled=True, cap=cap, native=False, wrap_up="up")
    given = ChatInput(messages=HI)
    sampling = Sampling(seed=2, logprobs=3, temperature=0.7, top_p=0.5)
    outputs, _ = run(llama, given, thinking=rules, sampling=sampling, ignore_eos=True)
    tokens = [token for out in outputs for token in out.tokens]
    so_far = llama.tokens.encode(f"<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n{START}\n")
    for token in tokens:
        row = torch.tensor(row_after(llama, so_far)).log_softmax(-1)
        assert token.logprob.chosen == pytest.approx(float(row[token.id]), abs=1e-3)
        assert [i for i, _ in token.logprob.top] == row.topk(3).indices.tolist()
        so_far.append(token.id)


def test_characters_and_stop_strings_survive_byte_tokens():
    """One byte per token: whole characters come out, and a stop string is found across them."""
    tokenizer = tiny_tokenizer()
    model = scripted(tokenizer, says(tokenizer.encode("héllo 😀 STOP it"), then=tokenizer.eos_token_id))
    outputs, _ = run(model, PROMPT, strings=("STOP",))
    assert text(outputs) == "héllo 😀 "
    assert all("\ufffd" not in out.text for out in outputs)
    assert outputs[-1].stop_reason == "STOP"


def test_min_tokens_keeps_the_end_away(llama):
    """No end of the sequence and no stop token comes before min_tokens, although they are most likely."""
    eos = llama.tokens.eos[0]
    pushed = Sampling(temperature=0, logit_bias={eos: 90.0, 5: 80.0})
    outputs, _ = run(llama, PROMPT, sampling=pushed, min_tokens=4, token_ids=frozenset({5}))
    assert len(ids(outputs)) == 5
    assert ids(outputs)[-1] == eos
    assert not {eos, 5} & set(ids(outputs)[:-1])


def test_json_is_guaranteed_from_random_weights(llama):
    """A random model writes a valid object when the answer has a schema, and its chain stays free."""
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "kind": {"enum": ["red", "blue"]}},
        "required": ["ok", "kind"],
        "additionalProperties": False,
    }
    for seed in range(3):
        given = ChatInput(messages=HI, response_schema=schema)
        rules = ThinkingRules(enabled=True, cap=6, native=False)
        outputs, last = run(llama, given, thinking=rules, sampling=Sampling(seed=seed), max_tokens=120)
        answer = json.loads(text(outputs))
        assert set(answer) == {"ok", "kind"}
        assert last.reasoning_tokens <= 6
        assert outputs[-1].finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", ("get_weather",)])
def test_a_required_call_is_guaranteed_from_random_weights(llama, choice):
    """A random model makes a valid call when it has to, after thinking as it likes."""
    for seed in range(3):
        given = ChatInput(messages=HI, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False)
        rules = ThinkingRules(enabled=True, cap=4, native=False)
        outputs, _ = run(llama, given, thinking=rules, sampling=Sampling(seed=seed), max_tokens=160)
        parts = [part for out in outputs for part in out.calls]
        assert [part.name for part in parts if part.name] == ["get_weather"]
        arguments = json.loads("".join(part.arguments for part in parts))
        assert set(arguments) == {"city"}
        assert (text(outputs), outputs[-1].finish_reason) == ("", "tool_calls")


def test_an_optional_call_becomes_a_call():
    """A model that writes a call among text is heard as content and call."""
    tokenizer = tiny_tokenizer()
    said = 'Wait. <tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    model = scripted(tokenizer, says(tokenizer.encode(said), then=tokenizer.eos_token_id))
    given = ChatInput(messages=HI, tools=[WEATHER])
    outputs, _ = run(model, given, thinking=ThinkingRules(native=False), max_tokens=200)
    assert text(outputs) == "Wait. "
    assert json.loads("".join(part.arguments for out in outputs for part in out.calls)) == {"city": "Rome"}
    assert outputs[-1].finish_reason == "tool_calls"


def test_a_native_chain_before_a_constrained_answer():
    """A grammar lets a native model open its chain first, and only then watches."""
    tokenizer = tiny_tokenizer()
    script = tokenizer.encode(f'{START}hm{END}{{"a": 1}}')
    model = scripted(tokenizer, says(script, then=tokenizer.eos_token_id))
    given = ChatInput(messages=HI, response_schema={"type": "object"})
    outputs, last = run(model, given, thinking=ThinkingRules(enabled=True, cap=9))
    assert (text(outputs, Kind.THINKING), text(outputs), last.reasoning_tokens) == ("hm", '{"a": 1}', 2)


def test_a_grammar_that_cannot_be_followed_fails_the_request(llama):
    """An engine-side failure of the grammar is an error of this request, not a wrong answer."""
    asked = Options(request_id="r", stopping=Stopping(max_tokens=5))
    request = compose(llama, ChatInput(messages=HI, response_schema={"type": "object"}), asked)
    broken = type(request)(prompts=request.prompts, options=asked, grammar='start: "a" BROKEN')
    (failed,) = events_of(llama, broken)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, GenerationFailed)
