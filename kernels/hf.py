"""A transformers decoder over the KV pool: every sequence of a step in one forward pass, without padding.

Owns: the hook into transformers' attention, and which models it serves. Does not own: loading (model.py),
blocks (trie.py), and what a step reads (scheduler.py).

The tokens of all sequences stand in one row, each with its own position. transformers hands the queries, keys
and values of every layer to the function registered here, which writes the pool and reads it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from kernels.attention import Reads
from kernels.batch import Batch, Feed
from kernels.errors import ModelUnusable
from kernels.pool import Pool

_NAME = "thinkgate_trie"
_CHECK_TOKENS, _CHECK_BLOCK = 24, 4
# Of the spread of the logits; rounding of bfloat16 stays well below.
_MOST_DIFFERENCE = 0.1


@dataclass(frozen=True, slots=True)
class _Step:
    """What the attention of every layer of one forward pass needs.

    Attributes:
        pool: where keys and values are.
        slots: [tokens], where those of this step go.
        reads: the attention.
    """

    pool: Pool
    slots: Tensor
    reads: Reads


class Network:
    """The network.

    Args:
        module: a transformers causal language model in evaluation mode; its attention is replaced.

    Attributes:
        module: as given.
        vocab: size of the logits.
        device: where they live.

    Raises: ModelUnusable, naming what cannot be served.
    """

    def __init__(self, module: Any) -> None:  # noqa: ANN401 - no common type in transformers
        config = module.config.get_text_config()
        _refuse(module, config)
        self.module = module
        self.vocab: int = config.vocab_size
        self.device: torch.device = module.device
        self._layers: int = config.num_hidden_layers
        self._kv_heads: int = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        ids = torch.arange(_CHECK_TOKENS, device=self.device) * 7 % self.vocab
        with torch.inference_mode():
            wanted = module(input_ids=ids[None], use_cache=False).logits[0].float()
            AttentionInterface.register(_NAME, _attend)
            module.set_attn_implementation(_NAME)
            self._check(ids.tolist(), wanted)

    @property
    def token_bytes(self) -> int:
        """What the keys and values of one token take."""
        return 2 * self._layers * self._kv_heads * self._head_dim * int(self.module.dtype.itemsize)

    def limit_threads(self, threads: int) -> None:
        """Bound what the calling thread uses of the processor."""
        if self.device.type == "cpu":
            torch.set_num_threads(threads)

    def new_pool(self, blocks: int, block_tokens: int) -> Pool:
        """Memory for keys and values that `read` writes and reads."""
        return Pool(
            layers=self._layers,
            blocks=blocks,
            block_tokens=block_tokens,
            kv_heads=self._kv_heads,
            head_dim=self._head_dim,
            dtype=self.module.dtype,
            device=self.device,
        )

    def read(self, pool: Pool, batch: Batch) -> list[Tensor]:
        """Read tokens into the pool.

        Args:
            pool: from `new_pool`.
            batch: what each sequence reads.

        Returns: per feed, [keep, vocab] float32, the logits after its last tokens.
        """
        feeds = batch.feeds
        own = [feed.slots if len(feed.ids) > 1 else () for feed in feeds]
        step = _Step(pool, self._numbers(s for f in feeds for s in f.slots), Reads(batch.plan, self.device, own))
        ends = [0]
        for feed in feeds:
            ends.append(ends[-1] + len(feed.ids))
        kept = [at for feed, end in zip(feeds, ends[1:], strict=True) for at in range(end - feed.keep, end)]
        positions = (at for feed in feeds for at in range(feed.start, feed.start + len(feed.ids)))
        out = self.module(
            input_ids=self._numbers(i for feed in feeds for i in feed.ids)[None],
            position_ids=self._numbers(positions)[None],
            use_cache=False,
            # None kept is the rule in a prompt's first portions; the slice that 0 means would keep all.
            logits_to_keep=self._numbers(kept or [ends[-1] - 1]),
            thinkgate_step=step,
        )
        rows: Tensor = out.logits[0, : len(kept)].float()
        return list(torch.split(rows, [feed.keep for feed in feeds]))

    def _check(self, ids: Sequence[int], wanted: Tensor) -> None:
        """Read tokens in two portions and compare with what the model says without us. Raises: ModelUnusable."""
        blocks = list(range(_CHECK_TOKENS // _CHECK_BLOCK))
        found: list[Tensor] = []
        try:
            pool = self.new_pool(len(blocks), _CHECK_BLOCK)
            for start, end in ((0, _CHECK_TOKENS - 5), (_CHECK_TOKENS - 5, _CHECK_TOKENS)):
                feed = Feed(ids[start:end], start, blocks, range(start, end), end - start, _CHECK_TOKENS)
                found += self.read(pool, Batch.of([feed], block_tokens=_CHECK_BLOCK, share_from=1))
        except (TypeError, ValueError, RuntimeError) as exc:
            raise ModelUnusable(f"{self._kind} cannot be served from a KV pool: {exc}") from exc
        difference = float((torch.cat(found) - wanted).abs().max() / wanted.std())
        if not difference < _MOST_DIFFERENCE:
            message = (
                f"{self._kind} computes attention in a way that this engine does not know (off by {difference:.2f})"
            )
            raise ModelUnusable(message)

    @property
    def _kind(self) -> str:
        return type(self.module).__name__

    def _numbers(self, numbers: Any) -> Tensor:  # noqa: ANN401 - any iterable of integers
        return torch.tensor(list(numbers), dtype=torch.long, device=self.device)


def _refuse(module: Any, config: Any) -> None:  # noqa: ANN401 - as Network's
    """Raises: ModelUnusable for a model whose layers do not all attend to everything before."""
    kind = type(module).__name__
    if not getattr(module, "_supports_attention_backend", False):
        raise ModelUnusable(f"{kind} does not let its attention be replaced, which the embedded engine needs")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None):
        layers.add("sliding_attention")
    if others := layers - {"full_attention"}:
        names = ", ".join(sorted(others))
        raise ModelUnusable(f"{kind} has layers of {names}: the embedded engine serves full attention only")


def _attend(
    module: Any,  # noqa: ANN401 - an attention layer of any model
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - the step knows who sees what
    scaling: float | None = None,
    *,
    thinkgate_step: _Step,
    **others: object,  # noqa: ARG001 - what changes the result is found by Network._check
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    Args:
        module: the layer.
        query: [1, query_heads, tokens, dim].
        key: [1, kv_heads, tokens, dim].
        value: as `key`.
        attention_mask: not used.
        scaling: of the scores.
        thinkgate_step: the step; it comes through all of transformers as a keyword.
        others: not used.

    Returns: [1, tokens, query_heads, dim], and no weights.
    """
    step, layer = thinkgate_step, module.layer_idx
    step.pool.write(layer, step.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    out, _ = step.reads(query[0].transpose(0, 1), step.pool.k[layer], step.pool.v[layer], scaling)
    return out[None], None
