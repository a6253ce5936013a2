"""Training: Muon for the matrices, AdamW for the rest, from a seed, and from where it was interrupted.

Owns: the recipe and the loop. The state after block i is a function of the recipe alone (on one machine with one
number of threads), whether the run was interrupted or not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from bench.tinythinker.lessons import IGNORED, Lesson, Teacher
from bench.tinythinker.model import Shape, build_model, save_folder
from bench.tinythinker.words import build_tokenizer

Say = Callable[[str], None]

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a training depends on.

    Attributes:
        blocks: how many; of `batches` batches each.
        batch_tokens: most tokens in a batch, padding included.
        warm_up, steady: share of the run in which the learning rate rises, and the share after which it falls.
    """

    seed: int = 0
    blocks: int = 60
    batches: int = 16
    batch_tokens: int = 7000
    muon_rate: float = 0.02
    adamw_rate: float = 3e-3
    warm_up: float = 0.02
    steady: float = 0.6
    shape: Shape = field(default_factory=Shape)

    def rate_at(self, done: float) -> float:
        """The learning rate as a share of its highest, after this share of the run."""
        if done < self.warm_up:
            return (done + 1e-3) / (self.warm_up + 1e-3)
        return min(1.0, max(0.0, (1 - done) / (1 - self.steady)))


class Training:
    """A network on its way.

    Args:
        recipe: what to do.

    Attributes:
        block: how many blocks are done.
        tokens: seen so far, without padding.
        seconds: spent in training, interruptions left out.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model = build_model(recipe.shape, seed=recipe.seed)
        # A quarter faster than torch's fused attention here: sequences are short.
        self.model.set_attn_implementation("eager")
        self.block = self.tokens = 0
        self.seconds = 0.0
        self._teacher = Teacher(build_tokenizer())
        named = list(self.model.named_parameters())
        matrices = [each for name, each in named if each.ndim == 2 and "embed" not in name]
        rest = [each for name, each in named if each.ndim != 2 or "embed" in name]
        self._optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=recipe.muon_rate, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=recipe.adamw_rate, weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def run_block(self) -> float:
        """Train on the next block; returns the mean loss."""
        recipe, started = self.recipe, time.perf_counter()
        batches = self._teacher.block(recipe.seed, self.block, batches=recipe.batches, batch_tokens=recipe.batch_tokens)
        losses = []
        for i, batch in enumerate(batches):
            share = recipe.rate_at((self.block + i / len(batches)) / recipe.blocks)
            for optimizer, rate in zip(self._optimizers, (recipe.muon_rate, recipe.adamw_rate), strict=True):
                optimizer.param_groups[0]["lr"] = rate * share
            losses.append(self._step(batch))
            self.tokens += sum(len(lesson.ids) for lesson in batch)
        self.block += 1
        self.seconds += time.perf_counter() - started
        return sum(losses) / len(losses)

    def _step(self, batch: Sequence[Lesson]) -> float:
        """One batch; returns its loss."""
        ids, labels = tensors_of(batch, pad=self.model.config.pad_token_id)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            # Padding stands on the right, where a causal network does not look.
            hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            wanted = labels[:, 1:] != IGNORED
            logits = self.model.lm_head(hidden[wanted])
        loss = functional.cross_entropy(logits.float(), labels[:, 1:][wanted])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def save(self, folder: Path) -> None:
        """Write the checkpoint; the old one stays until the new one is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "recipe": asdict(self.recipe),
            "block": self.block,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
        }
        torch.save(state, folder / f"{CHECKPOINT}.new")
        (folder / f"{CHECKPOINT}.new").replace(folder / CHECKPOINT)

    def resume(self, folder: Path) -> bool:
        """Go on from the checkpoint in `folder`; returns False if there is none.

        Raises: ValueError, if it was made by another recipe.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            return False
        state: dict[str, Any] = torch.load(path, weights_only=True)
        if state["recipe"] != asdict(self.recipe):
            raise ValueError(f"{path} was made by another recipe: {json.dumps(state['recipe'])}")
        self.block, self.tokens, self.seconds = state["block"], state["tokens"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return True


def tensors_of(batch: Sequence[Lesson], *, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, [len(batch), longest], padded on the right."""
    longest = max(len(lesson.ids) for lesson in batch)
    ids = torch.full((len(batch), longest), pad)
    labels = torch.full((len(batch), longest), IGNORED)
    for row, lesson in enumerate(batch):
        ids[row, : len(lesson.ids)] = torch.tensor(lesson.ids)
        labels[row, : len(lesson.ids)] = torch.tensor(lesson.labels)
    return ids, labels


def train(recipe: Recipe, folder: Path, *, threads: int, say: Say) -> Training:
    """Train, or go on training, until the recipe is done.

    Args:
        recipe: what to do.
        folder: where the checkpoint is, and is kept after each block.
        threads: processor threads to use.
        say: takes a line after each block.

    Raises: ValueError, if the checkpoint there was made by another recipe.
    """
    torch.set_num_threads(threads)
    training = Training(recipe)
    if training.resume(folder):
        say(f"going on after block {training.block} of {recipe.blocks}")
    while training.block < recipe.blocks:
        loss = training.run_block()
        training.save(folder)
        left_s = training.seconds / training.block * (recipe.blocks - training.block)
        say(
            f"block {training.block}/{recipe.blocks}  loss {loss:.4f}  {training.tokens / 1e6:.2f} M tokens  "
            f"{training.seconds:.0f} s, {left_s:.0f} s left"
        )
    return training


def export(run: Path, folder: Path) -> None:
    """Write the network of a checkpoint as a model folder, with `training.json` that says how it came about.

    Raises: FileNotFoundError, if there is no checkpoint in `run`.
    """
    state: dict[str, Any] = torch.load(run / CHECKPOINT, weights_only=True)
    recipe = {**state["recipe"], "shape": Shape(**state["recipe"]["shape"])}
    training = Training(Recipe(**recipe))
    training.resume(run)
    save_folder(training.model, folder)
    noted = {
        "recipe": state["recipe"],
        "blocks": state["block"],
        "tokens": state["tokens"],
        "seconds": state["seconds"],
    }
    (folder / "training.json").write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
