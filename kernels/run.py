"""One choice on its way: from logits to tokens, outputs, and what the network has to read next.

Owns: the loop between sampler, grammar and choice. Knows neither the network nor who else runs: logits come
in, ids to read go out, so that any number of choices may be read together.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from kernels.choice import Choice
from kernels.compose import thinking_plan
from kernels.grammar import Constraint
from kernels.params import Token
from kernels.sampling import Sampler, describe

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kernels.model import LanguageModel
    from kernels.params import GenerationRequest, Output, Prompt


class Run:
    """One choice and what it needs.

    Args:
        model: whose tokens.
        request: what is asked.
        prompt: what it continues.
        index: its number in the request.
        offset: added to the request's seed.

    Attributes:
        index: as given.
        feed: what has to be read before `advance`; nothing at first, when the prompt has to be, and at the end.

    Raises: GenerationFailed if the grammar cannot be followed.
    """

    def __init__(
        self, model: LanguageModel, request: GenerationRequest, prompt: Prompt, *, index: int, offset: int
    ) -> None:
        options = request.options
        self.index = index
        self.feed: tuple[int, ...] = ()
        self._is_forced = False
        self._logits: torch.Tensor | None = None
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

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None while it runs."""
        return self._choice.finish_reason

    @property
    def keep(self) -> int:
        """After how many of the last tokens that are read `advance` needs logits."""
        return len(self.feed) if self._is_forced and self._alternatives is not None else 1

    def advance(self, rows: torch.Tensor) -> list[Output]:
        """Go on until something has to be read, or to the end.

        Args:
            rows: [keep, vocab] float32, the logits after the last tokens that were read.

        Raises: GenerationFailed.
        """
        choice = self._choice
        outputs: list[Output] = []
        if self._is_forced:
            outputs += choice.accept_forced(self._tokens(self.feed, rows))
            self._sampler.note(self.feed)
            self._is_forced = False
        self._logits, self.feed = rows[-1], ()
        while choice.finish_reason is None and not self.feed:
            self.feed = choice.forced()
            self._is_forced = bool(self.feed)
            if not self._is_forced:
                outputs += self._sample()
        return outputs

    def fork(self, index: int, offset: int) -> Run:
        """A second choice that stands where this one does and draws its own tokens from here on.

        Args:
            index: its number in the request.
            offset: added to the request's seed.
        """
        twin = copy.copy(self)
        twin.index = index
        twin._choice = self._choice.fork(index)
        twin._sampler = self._sampler.fork(offset)
        twin._constraint = None if self._constraint is None else self._constraint.fork()
        return twin

    def _sample(self) -> list[Output]:
        """Take one token; nothing comes of one that is replaced by the end of the thinking."""
        choice = self._choice
        token_id = self._pick()
        if choice.replaces(token_id):
            return []
        follows = self._constraint is not None and choice.is_answer(token_id)
        outputs = choice.accept(self._tokens([token_id])[0])
        self._sampler.note([token_id])
        if self._constraint is not None and follows:
            self._constraint.take(token_id)
            if self._constraint.is_complete and choice.finish_reason is None:
                choice.complete(outputs[-1])
        if choice.finish_reason is None:
            self.feed = (token_id,)
        return outputs

    def _pick(self) -> int:
        """Sample the next token."""
        assert self._logits is not None
        banned: set[int] = set()
        if self._choice.total < self._stopping.min_tokens or self._choice.owes_answer:
            banned = {*self._model.tokens.eos, *self._stopping.token_ids}
        allowed = None
        if self._constraint is not None and self._choice.is_constrained:
            allowed = self._constraint.allowed(self._vocab)
            if self._choice.opening_id is not None:
                allowed[self._choice.opening_id] = True
            allowed = allowed.to(self._model.network.device)
        return self._sampler.pick(self._logits[: self._vocab], banned=banned, allowed=allowed)

    def _tokens(self, ids: Sequence[int], rows: torch.Tensor | None = None) -> list[Token]:
        """Tokens with their log probabilities, if they were asked for.

        Args:
            ids: the tokens.
            rows: [len(ids), vocab], after each of them; not needed for one.
        """
        if self._alternatives is None:
            return [Token(token_id) for token_id in ids]
        assert self._logits is not None
        before = [self._logits, *(rows[:-1] if rows is not None else ())]
        rows_of = zip(ids, before, strict=True)
        return [Token(i, describe(row[: self._vocab], i, self._alternatives)) for i, row in rows_of]
