"""A tiny tokenizer and two tiny models, made from nothing: one random, one that says what a test tells it.

The tokenizer is byte-level, so every text has tokens and a character may take several of them.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from kernels.batch import Batch, Feed
from kernels.model import LanguageModel, assemble
from kernels.tokens import Tokens
from kernels.trie import Copy

# Two threads on tensors this small only wait for each other.
torch.set_num_threads(1)

START, END = "<think>", "</think>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("<", "/"), ("i", "n"), (".", "<"), ("{", '"')]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
OPENED = CHATML + "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% endif %}"
# As Qwen's: it shows the tools and renders calls.
HERMES = (
    "{% if tools %}{{ 'TOOLS ' + tools | tojson + '\n' }}{% endif %}"
    "{% for m in messages %}{{ '[' + m['role'] + ']' + (m['content'] or '') }}"
    "{% for c in m['tool_calls'] or [] %}"
    "{{ '<tool_call>' + c['function']['name'] + c['function']['arguments'] | tojson }}"
    "{% endfor %}{% endfor %}"
)


def tiny_tokenizer(*, single_markers: bool = True, template: str = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer; the thinking markers are single tokens or ordinary text."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += ["".join(pair) for pair in MERGES]
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True), AddedToken("<|im_start|>", special=True)])
    if single_markers:
        tokenizer.add_tokens([AddedToken(START, special=False), AddedToken(END, special=False)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    made.chat_template = template
    return made


def tiny_llama(tokenizer: PreTrainedTokenizerFast, *, max_len: int = 1024) -> LanguageModel:
    """A two-layer Llama with random weights; its logits have padding rows beyond the vocabulary."""
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 7,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_len,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return assemble(LlamaForCausalLM(config).eval(), tokenizer, name="tiny")


def oracle(model: LanguageModel) -> Callable[[Sequence[int]], torch.Tensor]:
    """The logits after every token of a text that the same weights read at once, by transformers' own attention."""
    module = copy.deepcopy(model.network.module)
    module.set_attn_implementation("eager")

    def read(token_ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            rows: torch.Tensor = module(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0].float()
        return rows

    return read


class ScriptedNetwork:
    """A network that puts one token above all others, chosen by a function of what came after the prompt.

    Args:
        vocab: size of the logits.
        reply: from the ids after the prompt to the next one.

    Attributes:
        fed: lengths of the portions it was given, in order; those of one step by sequence.
        gate: if set, every step waits for a permit, so that a test decides when tokens come.
        at_gate: a permit for every step that has arrived at the gate.
    """

    def __init__(self, vocab: int, reply: Callable[[list[int]], int]) -> None:
        self.vocab = vocab
        self.device = torch.device("cpu")
        self.fed: list[int] = []
        self.gate: threading.Semaphore | None = None
        self.at_gate = threading.Semaphore(0)
        self._reply = reply

    def limit_threads(self, threads: int) -> None:
        pass

    def new_pool(self, blocks: int, block_tokens: int) -> ScriptedPool:
        return ScriptedPool(block_tokens)

    def read(self, pool: ScriptedPool, batch: Batch) -> list[torch.Tensor]:
        """What the real one does, with the tokens themselves for keys and values."""
        self.fed += [len(feed.ids) for feed in batch.feeds]
        self._wait()
        for feed in batch.feeds:
            pool.tokens.update(zip(feed.slots, feed.ids, strict=True))
        return [self._rows(pool, feed) for feed in batch.feeds]

    def _rows(self, pool: ScriptedPool, feed: Feed) -> torch.Tensor:
        end = feed.start + len(feed.ids)
        size = pool.block_tokens
        after = [pool.tokens[feed.table[at // size] * size + at % size] for at in range(feed.prompt, end)]
        rows = [self._row(after[: at - feed.prompt]) for at in range(end - feed.keep + 1, end + 1)]
        return torch.stack(rows) if rows else torch.empty(0, self.vocab)

    def _wait(self) -> None:
        self.at_gate.release()
        if self.gate is not None:
            self.gate.acquire()

    def _row(self, cache: list[int]) -> torch.Tensor:
        row = torch.zeros(self.vocab)
        row[self._reply(list(cache))] = 20.0
        return row


class ScriptedPool:
    """Remembers which token was written into which slot."""

    def __init__(self, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.tokens: dict[int, int] = {}

    def copy(self, copies: Sequence[Copy]) -> None:
        for each in copies:
            for at in range(each.tokens):
                source = each.source * self.block_tokens + at
                self.tokens[each.target * self.block_tokens + at] = self.tokens[source]


def scripted(
    tokenizer: PreTrainedTokenizerFast,
    reply: Callable[[list[int]], int],
    *,
    max_len: int = 4096,
    kv_blocks: int = 1024,
) -> LanguageModel:
    """A model that says what `reply` tells it, one greedy token at a time."""
    tokens = Tokens(tokenizer, [tokenizer.eos_token_id])
    network = ScriptedNetwork(tokens.size + 7, reply)
    return LanguageModel("scripted", tokens, network, max_len, kv_blocks)  # type: ignore[arg-type]


def says(ids: Sequence[int], *, then: int) -> Callable[[list[int]], int]:
    """A reply: these tokens in order, whatever was forced in between, and then always the same one.

    A token that was put out although it was not its turn was forced and does not count.
    """

    def reply(so_far: list[int]) -> int:
        said = 0
        for token_id in so_far:
            if said < len(ids) and token_id == ids[said]:
                said += 1
        return ids[said] if said < len(ids) else then

    return reply
