"""The network: Qwen3's architecture, 2.3 million parameters, and its folder.

Owns: shapes, and writing a folder that transformers, vLLM and the embedded engine load. Does not own: training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from bench.tinythinker.words import IM_END, PAD, WINDOW, build_tokenizer, wrap

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the network."""

    width: int = 192
    layers: int = 5
    heads: int = 6
    head_width: int = 32
    feed_forward: int = 512


def build_model(shape: Shape, *, seed: int) -> Any:  # noqa: ANN401 - transformers' classes are untyped
    """A network of random float32 weights, the same for the same seed."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=shape.width,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.head_width,
        max_position_embeddings=WINDOW,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.token_to_id(IM_END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(config)


def save_folder(model: Any, folder: Path) -> None:  # noqa: ANN401 - as above
    """Write weights (bfloat16 safetensors), configuration, tokenizer and chat template.

    Args:
        model: a network of `build_model`; stays as it is.
        folder: made if it is missing, overwritten where it is not.
    """
    tokenizer = wrap(build_tokenizer())
    half: Any = Qwen3ForCausalLM(model.config)
    half = half.to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    # Qwen3's own recommendation: its makers advise against greedy decoding.
    half.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        top_k=20,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load_folder(folder: Path) -> Any:  # noqa: ANN401 - as above
    """The network of a folder, float32, ready to generate.

    Raises: FileNotFoundError, if nothing was trained there.
    """
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"no weights in {folder}: python -m bench.tinythinker train, then export")
    model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def recipe_of(folder: Path) -> dict[str, Any]:
    """What the folder's weights were trained with, as the trainer noted it; empty if it did not."""
    path = folder / "training.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found
