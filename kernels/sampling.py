"""Pick the next token: penalties, bias, masks, temperature, then min-p, top-k and top-p.

Owns: the order, which is vLLM's, and the log probabilities that are reported: those of the model's own
distribution, before anything here touched it. Every function takes and returns float32 logits.
"""

from __future__ import annotations

import copy
import secrets
from typing import TYPE_CHECKING

import torch

from kernels.params import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from torch import Tensor

    from kernels.params import Sampling

# Below this, dividing by the temperature overflows: the most likely token is taken instead.
GREEDY_BELOW = 1e-5


def penalise(logits: Tensor, counts: Tensor, in_prompt: Tensor, sampling: Sampling) -> Tensor:
    """Repetition, frequency and presence penalties, in this order.

    Args:
        logits: [vocab].
        counts: [vocab] int, how often each token was put out.
        in_prompt: [vocab] bool.
        sampling: the penalties; repetition also sees the prompt.
    """
    put_out = counts > 0
    seen = put_out | in_prompt
    scaled = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
    logits = torch.where(seen, scaled, logits)
    return logits - sampling.frequency_penalty * counts - sampling.presence_penalty * put_out


def keep_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Drop tokens less likely than `min_p` times the most likely one. [vocab] -> [vocab]."""
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < min_p * probabilities.max(), -torch.inf)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k most likely tokens, and those tied with the last of them. [vocab] -> [vocab]."""
    if k >= logits.numel():
        return logits
    return logits.masked_fill(logits < logits.topk(k).values[-1], -torch.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach `p`. [vocab] -> [vocab]."""
    ordered, order = logits.sort(descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    # The token that reaches p is kept: what counts is the sum before it.
    dropped = probabilities.cumsum(-1) - probabilities >= p
    dropped[0] = False
    return logits.masked_fill(torch.empty_like(dropped).scatter_(0, order, dropped), -torch.inf)


class Sampler:
    """Picks the tokens of one choice.

    Args:
        sampling: how.
        prompt: token ids that the repetition penalty sees.
        vocab: size of the logits.
        device: where the logits live.
        offset: added to the seed: the number of the choice.
    """

    def __init__(
        self, sampling: Sampling, prompt: Iterable[int], *, vocab: int, device: torch.device, offset: int
    ) -> None:
        self._sampling = sampling
        self._device = device
        self._seed(offset)
        self._penalises = bool(
            sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1
        )
        if self._penalises:
            self._counts = torch.zeros(vocab, dtype=torch.int32, device=device)
            self._in_prompt = torch.zeros(vocab, dtype=torch.bool, device=device)
            self._in_prompt[torch.tensor(list(prompt), dtype=torch.long, device=device)] = True
        bias = sampling.logit_bias
        self._bias: tuple[Tensor, Tensor] | None = None
        if bias:
            ids = torch.tensor(list(bias), dtype=torch.long, device=device)
            self._bias = ids, torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    def fork(self, offset: int) -> Sampler:
        """A second sampler that has counted the same tokens and draws others, from seed + `offset`."""
        twin = copy.copy(self)
        twin._seed(offset)
        if self._penalises:
            twin._counts = self._counts.clone()
        return twin

    def note(self, token_ids: Iterable[int]) -> None:
        """Count tokens that were put out, sampled or forced."""
        if self._penalises:
            for token_id in token_ids:
                self._counts[token_id] += 1

    def pick(self, logits: Tensor, *, banned: Collection[int] = (), allowed: Tensor | None = None) -> int:
        """One token.

        Args:
            logits: [vocab] float32, as the model gave them; not changed.
            banned: tokens that must not come yet.
            allowed: [vocab] bool, what a grammar lets through; it beats `banned`.
        """
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        if banned:
            kept = logits.index_fill(0, torch.tensor(list(banned), device=logits.device), -torch.inf)
            # A grammar that is complete leaves only the end, however early that is.
            logits = kept if torch.isfinite(kept).any() else logits
        if self._bias is not None:
            logits = logits.index_add(0, *self._bias)
        if self._penalises:
            logits = penalise(logits, self._counts, self._in_prompt, self._sampling)
        if self._sampling.temperature < GREEDY_BELOW:
            return int(logits.argmax())
        return self._draw(logits / self._sampling.temperature)

    def _seed(self, offset: int) -> None:
        seed = secrets.randbits(63) if self._sampling.seed is None else self._sampling.seed + offset
        self._generator = torch.Generator(device=self._device).manual_seed(seed % 2**63)

    def _draw(self, logits: Tensor) -> int:
        sampling = self._sampling
        if sampling.min_p > 0:
            logits = keep_min_p(logits, sampling.min_p)
        if sampling.top_k is not None:
            logits = keep_top_k(logits, sampling.top_k)
        if sampling.top_p < 1:
            logits = keep_top_p(logits, sampling.top_p)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=self._generator))


def describe(logits: Tensor, token_id: int, alternatives: int) -> TokenLogprob:
    """Log probability of a token and of the most likely ones.

    Args:
        logits: [vocab] float32, as the model gave them.
        token_id: the token that came.
        alternatives: how many to list.
    """
    logprobs = logits.log_softmax(-1)
    if not alternatives:
        return TokenLogprob(float(logprobs[token_id]), ())
    values, ids = logprobs.topk(min(alternatives, logprobs.numel()))
    return TokenLogprob(float(logprobs[token_id]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
