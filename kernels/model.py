"""A transformers causal language model: loading, prefill in portions, the KV cache of one sequence.

Owns: tensors in and out of the network. Does not own: sampling, chat templates, scheduling.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.utils import logging as transformers_logging

from kernels.errors import ModelUnusable
from kernels.params import Json
from kernels.tokens import Tokens

# Sampling defaults that a model's generation_config.json may set, as vLLM takes them.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Stopped(Exception):
    """The caller asked to stop; raised between two portions of work."""


class Network:
    """The network and its KV caches.

    Args:
        module: a transformers causal language model in evaluation mode.
        portion: tokens per step of a prefill; between two steps it can be stopped.

    Attributes:
        vocab: size of the logits.
        device: where they live.
    """

    def __init__(self, module: Any, *, portion: int = 512) -> None:  # noqa: ANN401 - no common type in transformers
        self._module = module
        self._portion = portion
        self.vocab: int = module.config.get_text_config().vocab_size
        self.device: torch.device = module.device
        self._keeps = "logits_to_keep" in inspect.signature(module.forward).parameters

    def limit_threads(self, threads: int) -> None:
        """Bound what the calling thread uses of the processor."""
        if self.device.type == "cpu":
            torch.set_num_threads(threads)

    def new_cache(self) -> DynamicCache:
        """An empty cache for one sequence."""
        return DynamicCache(config=self._module.config)

    def fork(self, cache: DynamicCache) -> DynamicCache:
        """An independent copy of a cache."""
        return copy.deepcopy(cache)

    def prefill(self, cache: DynamicCache, ids: Sequence[int], check: Callable[[], None]) -> torch.Tensor:
        """Read a prompt into the cache.

        Args:
            cache: empty; extended by `ids`.
            ids: at least one token.
            check: called between portions; what it raises ends the prefill.

        Returns: [vocab] float32, logits of the next token.
        """
        rows = torch.empty(0)
        for start in range(0, len(ids), self._portion):
            check()
            rows = self.step(cache, ids[start : start + self._portion])
        return rows[-1]

    def step(self, cache: DynamicCache, ids: Sequence[int], *, every: bool = False) -> torch.Tensor:
        """Feed tokens after what the cache holds.

        Args:
            cache: extended by `ids`.
            ids: at least one token.
            every: logits after every token, not only after the last.

        Returns: [len(ids) if every else 1, vocab] float32.
        """
        keep = {} if every or not self._keeps else {"logits_to_keep": 1}
        given = torch.tensor([list(ids)], device=self.device)
        out = self._module(input_ids=given, past_key_values=cache, use_cache=True, **keep)
        rows: torch.Tensor = out.logits[0]
        return (rows if every else rows[-1:]).float()


@dataclass(slots=True)
class LanguageModel:
    """What the engine serves.

    Attributes:
        name: for humans.
        max_len: context window in tokens.
        defaults: sampling values for requests that do not set them.
    """

    name: str
    tokens: Tokens
    network: Network
    max_len: int
    defaults: Json = field(default_factory=dict)


def load_model(
    path: str, *, say: Callable[[str], None], device: str = "auto", max_len: int | None = None
) -> LanguageModel:
    """Load a Hugging Face folder or id.

    Args:
        path: a folder, or an id that transformers finds in its cache or on the hub.
        say: takes progress lines.
        device: a torch device, or `auto`: a GPU if there is one.
        max_len: context window to use; default: the model's own.

    Raises: ModelUnusable.
    """
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise ModelUnusable(f"there is no model folder {path}")
    source = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        say(f"loading the tokenizer of {path}")
        tokenizer = AutoTokenizer.from_pretrained(source)
        say(f"loading {path} on {device}")
        module: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
        module = module.to(device).eval()
    except (OSError, ValueError, RuntimeError, ImportError) as exc:
        raise ModelUnusable(f"cannot load {path}: {exc}") from exc
    model = assemble(module, tokenizer, name=path, max_len=max_len)
    parameters = sum(each.numel() for each in module.parameters())
    say(f"loaded {parameters / 1e6:.0f}M parameters as {module.dtype}, context {model.max_len} tokens")
    return model


def assemble(module: Any, tokenizer: Any, *, name: str, max_len: int | None = None) -> LanguageModel:  # noqa: ANN401
    """A LanguageModel from a transformers model and its tokenizer.

    Raises: ModelUnusable.
    """
    config = module.config.get_text_config()
    generation = module.generation_config
    eos = generation.eos_token_id if generation is not None else None
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    chosen = generation.to_diff_dict() if generation is not None else {}
    if (chosen.get("top_k") or 0) <= 0:
        chosen.pop("top_k", None)
    longest = max_len or getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    return LanguageModel(
        name=name,
        tokens=Tokens(tokenizer, list(dict.fromkeys(i for i in ids if i is not None))),
        network=Network(module),
        max_len=int(longest),
        defaults={key: chosen[key] for key in _DEFAULTS if chosen.get(key) is not None},
    )
