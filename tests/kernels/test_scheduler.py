"""The scheduler over networks with random weights: trees against forward passes that know no cache."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from kernels.compose import compose
from kernels.errors import ModelUnusable
from kernels.job import Job
from kernels.model import assemble
from kernels.params import CompletionInput, Failed, Finished, Options, Output, Sampling, Stopping, ThinkingRules
from kernels.scheduler import Scheduler
from tests.kernels.tiny import END, START, oracle, scripted, tiny_llama, tiny_tokenizer

FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
OFF = ThinkingRules(native=False)
TEXT = "in the beginning there was the thin thing that the inn had in it, "


def tiny_family(name, **more):
    """A two-layer model of a family with random weights."""
    tokenizer = tiny_tokenizer()
    torch.manual_seed(5)
    config_class, module_class = {**FAMILIES, "mistral": (MistralConfig, MistralForCausalLM)}[name]
    config = config_class(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    return assemble(module_class(config).eval(), tokenizer, name=name)


class Desk:
    """Submits to a scheduler and hears what comes."""

    def __init__(self, model, **how):
        self.model = model
        self.scheduler = Scheduler(model, **how)
        self.heard: dict[Job, list[object]] = {}

    def ask(self, prompt, *, max_tokens=8, n=1, priority=0, salt=None, thinking=OFF, **sampling):
        asked = Options(
            thinking=thinking,
            request_id="r",
            n=n,
            priority=priority,
            cache_salt=salt,
            sampling=Sampling(**{"temperature": 0, **sampling}),
            stopping=Stopping(max_tokens=max_tokens, ignore_eos=True),
        )
        request = compose(self.model, CompletionInput(prompts=(prompt,)), asked)
        heard: list[object] = []
        job = Job(request, heard.append, len(self.heard))
        self.heard[job] = heard
        self.scheduler.submit(job)
        return job

    def run(self, steps=10**6):
        while self.scheduler.has_work and steps:
            self.scheduler.step()
            steps -= 1
        return self

    def outputs(self, job) -> list[Output]:
        return [each for each in self.heard[job] if isinstance(each, Output)]

    def ids(self, job, index=0):
        return [token.id for out in self.outputs(job) if out.index == index for token in out.tokens]

    def last(self, job):
        return self.heard[job][-1]


def greedy(read, ids, count, vocab):
    """What follows, each token from a forward pass over all before it."""
    so_far = list(ids)
    for _ in range(count):
        so_far.append(int(read(so_far)[-1][:vocab].argmax()))
    return so_far[len(ids) :]


def full_blocks(sequences, size):
    """Distinct prefixes of sequences in full blocks, and the unfinished blocks behind them."""
    full = {tuple(ids[:end]) for ids in sequences for end in range(size, len(ids) + 1, size)}
    return len(full), sum(bool(len(ids) % size) for ids in sequences)


@pytest.fixture(scope="module")
def llama():
    return tiny_llama(tiny_tokenizer())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tree_of_64_branches_is_64_forward_passes(family):
    """Greedy, 64 branches of a tree of depth three say, token for token, what full forwards without a cache say."""
    model = tiny_family(family)
    read, vocab = oracle(model), model.tokens.size
    root = model.tokens.encode(TEXT * 4)
    prompts = [
        (*root, *(11 + a, 5, 6) * 9, *(30 + b, 7) * 8, 50 + c) for a in range(4) for b in range(4) for c in range(4)
    ]
    desk = Desk(model, step_tokens=200, share_from=16)
    jobs = [desk.ask(prompt, max_tokens=5) for prompt in prompts]
    desk.run()
    assert [desk.ids(job) for job in jobs] == [greedy(read, prompt, 5, vocab) for prompt in prompts]
    stats = desk.scheduler.stats
    # The whole is some 64 times the root; what the network read is less than a fifth of it.
    assert stats.read < sum(map(len, prompts)) / 5
    assert stats.attended < stats.attended_apart / 4
    trie = desk.scheduler.trie
    assert trie.free + trie.idle == model.kv_blocks
    trie.evict(model.kv_blocks)
    assert trie.free == model.kv_blocks


def test_blocks_in_use_are_the_distinct_blocks_of_the_tree(llama):
    """While branches run, the cache holds each distinct full block once and a tail for each, exactly."""
    desk = Desk(llama)
    prompt = TEXT * 2
    job = desk.ask(prompt, n=1, max_tokens=100, temperature=1.0, seed=1)
    desk.run(steps=3)
    assert all(desk.scheduler.fork(job, 0, twin) for twin in range(1, 6))
    for _ in range(40):
        desk.run(steps=1)
        sequences = [each.ids[: each.done] for each in desk.scheduler.sequences]
        full, tails = full_blocks(sequences, llama.block_tokens)
        branches = [each.branch for each in desk.scheduler.sequences if each.branch is not None]
        shared = {branch.blocks[-1] for branch in branches if branch.tail}
        trie = desk.scheduler.trie
        assert llama.kv_blocks - trie.room == full + len(shared)
        assert len(shared) == tails
    desk.run()
    assert isinstance(desk.last(job), Finished)
    assert llama.kv_blocks == desk.scheduler.trie.room


def test_a_prefix_is_read_once_whoever_comes_with_it(llama):
    """Requests that come together or later read a common prompt once, and are told what was cached."""
    desk = Desk(llama, step_tokens=32)
    ids = llama.tokens.encode(TEXT * 3)
    together = [desk.ask((*ids, 40 + i)) for i in range(4)]
    desk.run()
    later = desk.ask((*ids, 60))
    desk.run()
    known = len(ids) // 16 * 16
    assert [desk.last(job).cached_tokens for job in (*together, later)] == [0, *[known] * 4]
    assert desk.scheduler.stats.reused == 4 * known


def test_a_salt_keeps_prompts_apart(llama):
    """The same prompt under another salt is read anew."""
    desk = Desk(llama)
    for salt, cached in ((None, 0), ("a", 0), ("b", 0), ("a", 32)):
        job = desk.ask(TEXT, salt=salt)
        desk.run()
        assert desk.last(job).cached_tokens == cached


def test_too_small_a_cache_delays_but_changes_nothing(llama):
    """With room for a few sequences the rest waits or is preempted and read again: the same tokens come out."""
    wanted = Desk(llama)
    small = tiny_llama(tiny_tokenizer())
    small.kv_blocks = 14
    found = Desk(small, step_tokens=40)
    for desk in (wanted, found):
        jobs = [desk.ask(f"{i} {TEXT}", max_tokens=50, n=2, temperature=1.0, seed=i) for i in range(4)]
        desk.run()
        assert all(isinstance(desk.last(job), Finished) for job in jobs)
    told = [[[desk.ids(job, index) for index in range(2)] for job in desk.heard] for desk in (wanted, found)]
    assert told[0] == told[1]
    assert found.scheduler.stats.preemptions > 0
    assert wanted.scheduler.stats.preemptions == 0
    assert found.scheduler.trie.room == 14


def test_preemption_amid_forced_text_keeps_its_log_probabilities(llama):
    """What is forced is read and told the same, whether or not its blocks were taken away in between."""
    rules = ThinkingRules(enabled=True, cap=4, wrap_up="so that is it, and here is the rest of what there is. ")
    small = tiny_llama(tiny_tokenizer())
    small.kv_blocks = 12
    told = []
    for model, how in ((llama, {}), (small, {"step_tokens": 10})):
        desk = Desk(model, **how)
        prompts = [f"{i} {TEXT}{START}" for i in range(3)]
        banned = dict.fromkeys(model.tokens.marker(END).ids, -100.0)
        jobs = [desk.ask(each, max_tokens=75, thinking=rules, logprobs=1, logit_bias=banned) for each in prompts]
        desk.run()
        tokens = [token for job in jobs for out in desk.outputs(job) for token in out.tokens]
        told.append(([token.id for token in tokens], [token.logprob.chosen for token in tokens if token.logprob]))
        assert (desk.scheduler.stats.preemptions > 0) == (model is small)
    assert told[0][0] == told[1][0]
    assert told[0][1] == pytest.approx(told[1][1], abs=1e-3)


def test_a_request_that_the_cache_cannot_hold_fails_alone(llama):
    """A single request larger than the cache ends with an error, and the others with their answers."""
    small = tiny_llama(tiny_tokenizer())
    small.kv_blocks = 6
    desk = Desk(small)
    large, little = desk.ask(TEXT * 4), desk.ask("the")
    desk.run()
    assert isinstance(desk.last(large), Failed)
    assert isinstance(desk.last(little), Finished)
    assert desk.scheduler.trie.room == 6


def test_urgent_requests_keep_their_blocks():
    """Whoever is preempted is the one with the highest priority value, the latest first."""
    tokenizer = tiny_tokenizer()
    model = scripted(tokenizer, lambda so_far: 5, kv_blocks=10)
    desk = Desk(model)
    late = desk.ask("a" * 40, max_tokens=60, priority=5)
    desk.run(steps=2)
    urgent = desk.ask("b" * 40, max_tokens=60, priority=1)
    while len(desk.heard[urgent]) < 61:
        desk.run(steps=1)
    assert desk.scheduler.stats.preemptions >= 1
    assert isinstance(desk.last(urgent), Finished)
    assert not isinstance(desk.last(late), Finished)
    desk.run()
    assert desk.ids(late) == [5] * 60


def test_a_fork_goes_on_from_where_it_stands(llama):
    """A fork says what the choice would have said, greedily, and reads nothing anew."""
    desk = Desk(llama)
    job = desk.ask(TEXT, max_tokens=20)
    desk.run(steps=6)
    before = desk.ids(job)
    assert desk.scheduler.fork(job, 0, 1)
    read = desk.scheduler.stats.read
    desk.run()
    assert before + desk.ids(job, 1) == desk.ids(job)
    assert desk.scheduler.stats.read - read == 2 * (20 - len(before))
    assert desk.last(job).completion_tokens == 20 + 20 - len(before)


def test_forks_draw_their_own_tokens(llama):
    """With a seed, forks of one choice part, and do so the same way every time."""
    told = []
    for _ in range(2):
        desk = Desk(llama)
        job = desk.ask(TEXT, max_tokens=20, temperature=1.0, seed=4)
        desk.run(steps=3)
        assert all(desk.scheduler.fork(job, 0, twin) for twin in (1, 2))
        desk.run()
        told.append([desk.ids(job, index)[-10:] for index in range(3)])
    assert told[0] == told[1]
    assert len({tuple(ids) for ids in told[0]}) == 3


def test_a_fork_before_the_prompt_is_read_reads_it_once(llama):
    """A choice that is forked while its prompt is being read shares it."""
    desk = Desk(llama, step_tokens=20)
    job = desk.ask(TEXT * 2, max_tokens=4)
    desk.run(steps=1)
    assert desk.scheduler.fork(job, 0, 1)
    desk.run()
    assert desk.ids(job) == desk.ids(job, 1)
    assert desk.scheduler.stats.read == len(llama.tokens.encode(TEXT * 2)) + 2 * 3


def test_a_pruned_choice_gives_its_blocks_back_at_once(llama):
    """Nothing is kept of a dead end but what others grew on, and nothing more is heard of it."""
    desk = Desk(llama)
    job = desk.ask(TEXT, n=2, max_tokens=60, temperature=1.0, seed=9)
    desk.run(steps=40)
    heard = len(desk.ids(job, 1))
    free, room = desk.scheduler.trie.free, desk.scheduler.trie.room
    assert desk.scheduler.prune(job, 1)
    assert desk.scheduler.trie.free - free == desk.scheduler.trie.room - room >= 2
    assert not desk.scheduler.prune(job, 1)
    assert not desk.scheduler.fork(job, 1, 2)
    desk.run()
    assert len(desk.ids(job, 1)) == heard
    assert isinstance(desk.last(job), Finished)
    assert desk.last(job).completion_tokens == 60 + heard


def test_pruning_all_choices_ends_the_request(llama):
    """A request whose choices are all pruned, before or after the prompt was read, is over."""
    for steps in (0, 4):
        desk = Desk(llama)
        job = desk.ask(TEXT, n=2, max_tokens=60)
        desk.run(steps=steps)
        assert desk.scheduler.prune(job, 0)
        assert desk.scheduler.prune(job, 1)
        assert isinstance(desk.last(job), Finished)
        assert not desk.scheduler.has_work
        assert desk.scheduler.trie.room == llama.kv_blocks


def test_an_aborted_request_leaves_nothing(llama):
    """Aborting frees every block that only this request needs, and the others go on as if nothing had been."""
    desk, alone = Desk(llama), Desk(llama)
    kept, gone = desk.ask(TEXT, max_tokens=12), desk.ask("no " + TEXT, n=3, max_tokens=12)
    desk.run(steps=4)
    desk.scheduler.abort(gone)
    desk.run()
    wanted = alone.ask(TEXT, max_tokens=12)
    alone.run()
    assert desk.ids(kept) == alone.ids(wanted)
    assert desk.scheduler.trie.room == llama.kv_blocks


def test_what_one_request_breaks_is_its_own():
    """A forward pass that fails for one sequence is repeated for each alone, and only that one fails."""
    tokenizer = tiny_tokenizer()
    bad = tokenizer.encode("x")[0]
    model = scripted(tokenizer, lambda so_far: 10**9 if bad in so_far else 5)
    desk = Desk(model)
    jobs = [desk.ask("go", max_tokens=6), desk.ask("go", max_tokens=6, logit_bias={bad: 100.0}), desk.ask("go")]
    desk.run()
    assert [type(desk.last(job)) for job in jobs] == [Finished, Failed, Finished]
    assert desk.ids(jobs[0]) == [5] * 6
    assert desk.scheduler.trie.room == model.kv_blocks


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    ],
)
def test_sliding_windows_are_refused_by_name(family, more):
    """A model whose layers do not see everything is refused with the reason, not served wrongly."""
    with pytest.raises(ModelUnusable, match="sliding_attention"):
        tiny_family(family, **more)


def test_a_model_with_another_attention_is_refused(monkeypatch):
    """A model whose attention differs from what is known is noticed when it is loaded."""
    monkeypatch.setattr("kernels.hf.Reads.__call__", lambda self, q, k, v, scale: (q, None))
    with pytest.raises(ModelUnusable, match="in a way that this engine does not know"):
        tiny_family("llama")
