"""A transformers causal language model from a folder, and how large its KV cache is.

Owns: loading. Does not own: tensors in and out of the network (hf.py), sampling, chat templates, scheduling.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from kernels.errors import ModelUnusable
from kernels.hf import Network
from kernels.params import Json
from kernels.tokens import Tokens

_BLOCK_TOKENS = 16
# The cache: bytes on the CPU, where pages that are not used take no memory; on a GPU, a part of what is free.
_KV_BYTES = 2 << 30
_KV_PART = 0.6
# More than so many full context windows is of no use.
_MOST_WINDOWS = 64

# Sampling defaults that a model's generation_config.json may set, as vLLM takes them.
_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(slots=True)
class LanguageModel:
    """What the engine serves.

    Attributes:
        name: for humans.
        max_len: context window in tokens; the cache holds at least one.
        kv_blocks: size of the KV cache.
        block_tokens: tokens per block.
        defaults: sampling values for requests that do not set them.
    """

    name: str
    tokens: Tokens
    network: Network
    max_len: int
    kv_blocks: int
    block_tokens: int = _BLOCK_TOKENS
    defaults: Json = field(default_factory=dict)


def load_model(
    path: str,
    *,
    say: Callable[[str], None],
    device: str = "auto",
    max_len: int | None = None,
    kv_bytes: int | None = None,
) -> LanguageModel:
    """Load a Hugging Face folder or id.

    Args:
        path: a folder, or an id that transformers finds in its cache or on the hub.
        say: takes progress lines.
        device: a torch device, or `auto`: a GPU if there is one.
        max_len: context window to use; default: the model's own. A cache that holds less sets the limit.
        kv_bytes: size of the KV cache; default: 2 GiB, on a GPU 60 % of what is free there.

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
    if kv_bytes is None and module.device.type == "cuda":
        kv_bytes = int(torch.cuda.mem_get_info(module.device)[0] * _KV_PART)
    model = assemble(module, tokenizer, name=path, max_len=max_len, kv_bytes=kv_bytes or _KV_BYTES)
    parameters = sum(each.numel() for each in module.parameters())
    cache = model.kv_blocks * model.block_tokens
    say(f"loaded {parameters / 1e6:.0f}M parameters as {module.dtype}, context {model.max_len} tokens of {cache}")
    return model


def assemble(
    module: Any,  # noqa: ANN401 - no common type in transformers
    tokenizer: Any,  # noqa: ANN401 - as above
    *,
    name: str,
    max_len: int | None = None,
    kv_bytes: int = _KV_BYTES,
) -> LanguageModel:
    """A LanguageModel from a transformers model and its tokenizer; arguments as of `load_model`.

    Raises: ModelUnusable.
    """
    config = module.config.get_text_config()
    generation = module.generation_config
    eos = generation.eos_token_id if generation is not None else None
    ids = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id]
    chosen = generation.to_diff_dict() if generation is not None else {}
    if (chosen.get("top_k") or 0) <= 0:
        chosen.pop("top_k", None)
    longest = int(max_len or getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length)
    network = Network(module)
    windows = _MOST_WINDOWS * -(-longest // _BLOCK_TOKENS)
    blocks = min(kv_bytes // (network.token_bytes * _BLOCK_TOKENS), windows)
    # One block is for the copy of an unfinished one.
    if blocks < 2:
        raise ModelUnusable(f"a KV cache of {kv_bytes} bytes holds nothing of {name}")
    return LanguageModel(
        name=name,
        tokens=Tokens(tokenizer, list(dict.fromkeys(i for i in ids if i is not None))),
        network=network,
        max_len=min(longest, (blocks - 1) * _BLOCK_TOKENS),
        kv_blocks=blocks,
        defaults={key: chosen[key] for key in _DEFAULTS if chosen.get(key) is not None},
    )
