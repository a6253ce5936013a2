"""Carry out one request: prefill each prompt once, then its choices one after the other.

Owns: the loop between network, sampler, grammar and choice. Runs on the engine's thread; a generator, so
that whoever drives it can stop between two tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kernels.choice import Choice
from kernels.compose import thinking_plan
from kernels.grammar import Constraint
from kernels.model import Stopped
from kernels.params import Finished, Token
from kernels.sampling import Sampler, describe

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

    from transformers import DynamicCache

    from kernels.model import LanguageModel
    from kernels.params import Event, GenerationRequest, Output, Prompt


def generate(model: LanguageModel, request: GenerationRequest, is_stopped: Callable[[], bool]) -> Generator[Event]:
    """Outputs in the order of the choices, then Finished.

    Args:
        model: what generates.
        request: what is asked.
        is_stopped: asked between tokens and between portions of a prefill.

    Raises: Stopped once `is_stopped` says so; GenerationFailed.
    """

    def check() -> None:
        if is_stopped():
            raise Stopped

    completion = thinking = 0
    n = request.options.n
    with torch.inference_mode():
        for p, prompt in enumerate(request.prompts):
            cache = model.network.new_cache()
            logits = model.network.prefill(cache, prompt.token_ids, check)
            for j in range(n):
                own = cache if j == n - 1 else model.network.fork(cache)
                run = _Run(model, request, prompt, index=p * n + j, offset=j)
                for output in run.outputs(own, logits, check):
                    completion += len(output.tokens)
                    thinking += output.thinking
                    yield output
    prompt_tokens = sum(len(prompt.token_ids) for prompt in request.prompts)
    yield Finished(prompt_tokens=prompt_tokens, completion_tokens=completion, reasoning_tokens=thinking)


class _Run:
    """One choice and what it needs."""

    def __init__(
        self, model: LanguageModel, request: GenerationRequest, prompt: Prompt, *, index: int, offset: int
    ) -> None:
        options = request.options
        self._model = model
        self._alternatives = options.sampling.logprobs
        self._stopping = options.stopping
        # The logits may have padding rows beyond the vocabulary: what is sampled must be a token, or
        # nobody could go on from its id.
        self._vocab = min(model.network.vocab, model.tokens.size)
        self._choice = Choice(
            index,
            plan=thinking_plan(
                model, options.thinking, is_open=prompt.chain_open, has_grammar=request.grammar is not None
            ),
            stopping=options.stopping,
            shown=model.tokens.shown(skip_special_tokens=options.skip_special_tokens),
            eos=model.tokens.eos,
            chain_open=prompt.chain_open,
            parses_tools=request.parses_tools,
            before=model.tokens.tail(prompt.token_ids),
        )
        self._sampler = Sampler(
            options.sampling,
            prompt.token_ids,
            vocab=self._vocab,
            device=model.network.device,
            offset=offset,
        )
        grammar = request.grammar
        self._constraint = Constraint(model.tokens.grammar_tokenizer, grammar) if grammar is not None else None

    def outputs(self, cache: DynamicCache, logits: torch.Tensor, check: Callable[[], None]) -> Iterator[Output]:
        """Generate until the choice ends.

        Args:
            cache: holds the prompt.
            logits: [vocab] float32, of the first token.
            check: called before every token.
        """
        choice = self._choice
        while True:
            check()
            forced = choice.forced()
            if forced:
                rows = self._model.network.step(cache, forced, every=self._alternatives is not None)
                yield from choice.accept_forced(self._tokens(forced, logits, rows))
                self._sampler.note(forced)
                logits = rows[-1]
            else:
                token_id = self._pick(logits)
                if choice.replaces(token_id):
                    continue
                yield from self._take(token_id, logits)
                if choice.finish_reason is None:
                    logits = self._model.network.step(cache, [token_id])[-1]
            if choice.finish_reason is not None:
                return

    def _pick(self, logits: torch.Tensor) -> int:
        """Sample the next token."""
        banned: set[int] = set()
        if self._choice.total < self._stopping.min_tokens or self._choice.owes_answer:
            banned = {*self._model.tokens.eos, *self._stopping.token_ids}
        allowed = None
        if self._constraint is not None and self._choice.is_constrained:
            allowed = self._constraint.allowed(self._vocab)
            if self._choice.opening_id is not None:
                allowed[self._choice.opening_id] = True
            allowed = allowed.to(self._model.network.device)
        return self._sampler.pick(logits[: self._vocab], banned=banned, allowed=allowed)

    def _take(self, token_id: int, logits: torch.Tensor) -> list[Output]:
        """Hand a sampled token to everybody who follows."""
        choice = self._choice
        follows = self._constraint is not None and choice.is_answer(token_id)
        outputs = choice.accept(self._tokens([token_id], logits)[0])
        self._sampler.note([token_id])
        if self._constraint is not None and follows:
            self._constraint.take(token_id)
            if self._constraint.is_complete and choice.finish_reason is None:
                choice.complete(outputs[-1])
        return outputs

    def _tokens(self, ids: Sequence[int], logits: torch.Tensor, rows: torch.Tensor | None = None) -> list[Token]:
        """Tokens with their log probabilities, if they were asked for.

        Args:
            ids: the tokens.
            logits: [vocab], before the first of them.
            rows: [len(ids), vocab], after each of them.
        """
        if self._alternatives is None:
            return [Token(token_id) for token_id in ids]
        before = [logits, *(rows[:-1] if rows is not None else ())]
        rows_of = zip(ids, before, strict=True)
        return [Token(i, describe(row[: self._vocab], i, self._alternatives)) for i, row in rows_of]
