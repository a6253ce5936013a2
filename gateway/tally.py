"""What one request has used so far, by kind, in tokens and money.

Owns: the running counts, those of calls on the side apart, and how the backend's own usage corrects them at
the end (docs/api.md, "Counting"). O(1) per delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from budget.ledger import Amounts
from budget.tokens import TokenCounts

if TYPE_CHECKING:
    from budget.price import PriceTable
    from gateway.backends.port import Delta, Usage


UNBOUNDED = 2**63


class Discarded(NamedTuple):
    """A whole answer that was thrown away, as it was counted."""

    answer: int
    injected: int
    unseen: int
    output: int
    wasted_thinking: int
    usage: Usage | None


class Tally:
    """Counts of one request.

    Args:
        prices: of its model.
        most_prompt: bound of its prompt, and
        likely_prompt: its tokens, if the call is cut before its backend tells and without ids; and
        most_output: output tokens it was allowed: a backend that claims more, without having sent it, is not believed.

    Attributes:
        is_guess: some tokens were guessed.
        probe: tokens by which a backend was made to check the request, in and out.
        most_thinking: thinking tokens of the choice that thought most.
        wasted_thinking: those of `wasted` that the backend calls thinking.
        lost_tries: tries that another one overtook, each with the whole prompt, and
        lost_output: what they had answered; both are in no other attribute.
        capped: the cap ended the thinking of some choice.
        asides: of the calls that the gateway makes on the request's behalf; they are in no other attribute.
    """

    __slots__ = (
        "_likely_prompt",
        "_most_output",
        "_most_prompt",
        "_prices",
        "answer",
        "asides",
        "capped",
        "has_ids",
        "injected",
        "is_guess",
        "lost_output",
        "lost_tries",
        "most_thinking",
        "probe",
        "prompt",
        "thinking",
        "thinking_by_choice",
        "usage",
        "wasted",
        "wasted_thinking",
    )

    def __init__(
        self,
        prices: PriceTable,
        *,
        most_prompt: int = UNBOUNDED,
        most_output: int = UNBOUNDED,
        likely_prompt: int = 0,
    ) -> None:
        self._prices = prices
        self._most_prompt = most_prompt
        self._most_output = most_output
        self._likely_prompt = likely_prompt
        self.prompt = self.thinking = self.answer = self.injected = self.wasted = self.most_thinking = self.probe = 0
        self.wasted_thinking = self.lost_tries = self.lost_output = 0
        self.thinking_by_choice: dict[int, int] = {}
        self.capped = self.has_ids = self.is_guess = False
        self.usage: Usage | None = None
        self.asides: list[Tally] = []

    def begin_aside(self, *, most_prompt: int, most_output: int, prices: PriceTable | None = None) -> Tally:
        """The tally of one more call on the side: nobody asked for its tokens, somebody pays for them.

        Args:
            most_prompt: as for the request itself.
            most_output: likewise.
            prices: of the model that is called; None: it is the request's own.
        """
        aside = Tally(prices or self._prices, most_prompt=most_prompt, most_output=most_output)
        self.asides.append(aside)
        return aside

    def aside_amounts(self) -> Amounts:
        """What the calls on the side have used so far."""
        return self.amounts(TokenCounts(planner=sum(aside.counts().total() for aside in self.asides)))

    @property
    def is_estimated(self) -> bool:
        """Tokens were counted by events or text, since the backend gave neither ids nor usage."""
        return self.is_guess or self._is_unsaid() or any(aside._is_unsaid() for aside in self.asides)

    def _is_unsaid(self) -> bool:
        return self.usage is None and not self.has_ids and self.output() > 0

    def add(self, delta: Delta) -> None:
        """Count one delta."""
        if delta.thinking:
            self.thinking += delta.thinking
            of_choice = self.thinking_by_choice.get(delta.index, 0) + delta.thinking
            self.thinking_by_choice[delta.index] = of_choice
            self.most_thinking = max(self.most_thinking, of_choice)
        self.answer += delta.answer
        self.injected += delta.injected
        if delta.token_ids:
            self.has_ids = True
        if delta.prompt_tokens:
            self.prompt = delta.prompt_tokens
        if delta.capped:
            self.capped = True
        if delta.usage is not None:
            self.usage = delta.usage

    def add_one(self, index: int, *, is_thinking: bool) -> None:
        """Count one token that came with its id."""
        if is_thinking:
            self.thinking += 1
            of_choice = self.thinking_by_choice[index] = self.thinking_by_choice.get(index, 0) + 1
            self.most_thinking = max(self.most_thinking, of_choice)
        else:
            self.answer += 1

    def take_back(self, index: int) -> None:
        """A thinking token is none: it is counted again when it is known what becomes of it."""
        self.thinking -= 1
        self.thinking_by_choice[index] -= 1
        self.most_thinking = max(self.thinking_by_choice.values())

    def waste(self, delta: Delta) -> None:
        """Move a counted delta's tokens to `wasted`: it reaches no client."""
        if delta.thinking:
            self.thinking -= delta.thinking
            self.wasted_thinking += delta.thinking
            self.thinking_by_choice[delta.index] -= delta.thinking
        self.answer -= delta.answer
        self.injected -= delta.injected
        self.wasted += delta.thinking + delta.answer + delta.injected

    def discard(self, most: int) -> Discarded:
        """Throw away everything that came so far, none of which is thinking: another answer to the same prompt begins.

        What only the backend's usage tells of, up to `most` tokens in all, counts as well.
        """
        usage, received = self.usage, self.output()
        unseen = 0 if usage is None or self.has_ids else max(0, min(usage.completion_tokens, most) - received)
        gone = Discarded(self.answer, self.injected, unseen, received + unseen, self.wasted_thinking, usage)
        self.wasted += self.answer + self.injected + unseen
        self.answer = self.injected = self.most_thinking = 0
        self.capped = False
        self.usage = None
        if usage is not None:
            self.prompt = max(self.prompt, min(usage.prompt_tokens, self._most_prompt))
        return gone

    def restore(self, gone: Discarded) -> None:
        """Take it back: it is the answer after all."""
        self.wasted -= gone.answer + gone.injected + gone.unseen
        self.answer += gone.answer
        self.injected += gone.injected
        self.usage = gone.usage

    def add_up(self, gone: Discarded) -> None:
        """The usage of a second answer becomes that of both; their prompt was processed twice, and counts once."""
        usage, first = self.usage, gone.usage
        if usage is None:
            return
        self.usage = msgspec.structs.replace(
            usage,
            prompt_tokens=usage.prompt_tokens if first is None else first.prompt_tokens,
            completion_tokens=usage.completion_tokens + gone.output,
            cached_tokens=None if first is None else first.cached_tokens,
            reasoning_tokens=None if usage.reasoning_tokens is None else usage.reasoning_tokens + gone.wasted_thinking,
        )

    def saw_bytes(self, size: int) -> None:
        """An answer of `size` bytes came in one piece: so many tokens, at most, may be in it."""
        self._most_output = max(self._most_output, size)

    def output(self) -> int:
        """Output tokens received so far."""
        return self.thinking + self.answer + self.injected + self.wasted

    def counts(self) -> TokenCounts:
        """Tokens by kind, corrected by the backend's usage once that is known."""
        counts = self._own_counts()
        for aside in self.asides:
            counts.planner += aside.counts().total()
        if self.lost_tries:
            counts.wasted += self._lost_prompts(counts) + self.lost_output
        return counts

    def _lost_prompts(self, counts: TokenCounts) -> int:
        """Prompt tokens of lost tries: nobody hears how far they came, so all of them count."""
        return self.lost_tries * (counts.prompt + counts.cached)

    def _own_counts(self) -> TokenCounts:
        usage = self.usage
        if usage is None:
            return TokenCounts(
                prompt=self.prompt or (self._likely_prompt if self._is_unsaid() else 0),
                thinking=self.thinking,
                answer=self.answer,
                probe=self.probe,
                injected=self.injected,
                wasted=self.wasted,
            )
        # What was received is the truth; a backend's word fills in what cannot be counted here.
        prompt = max(self.prompt, min(usage.prompt_tokens, self._most_prompt))
        cached = min(usage.cached_tokens or 0, prompt)
        received = self.output()
        completion = received if self.has_ids else min(usage.completion_tokens, max(received, self._most_output))
        thinking, injected = self._thinking(usage, completion)
        return TokenCounts(
            prompt=prompt - cached,
            cached=cached,
            thinking=thinking,
            probe=self.probe,
            injected=injected,
            answer=max(0, completion - thinking - injected - self.wasted),
            wasted=self.wasted,
        )

    def amounts(self, counts: TokenCounts) -> Amounts:
        """`counts` in the ledger's units."""
        return Amounts(
            tokens=counts.total(),
            thinking_tokens=counts.thinking,
            nano_usd=self._nano_usd(counts),
        )

    def _nano_usd(self, counts: TokenCounts) -> int:
        """What `counts` cost; a call on the side costs what a call costs, by direction, at the prices of its model."""
        if self.lost_tries:
            lost = self._lost_prompts(counts)
            counts = msgspec.structs.replace(counts, prompt=counts.prompt + lost, wasted=counts.wasted - lost)
        if not self.asides:
            return self._prices.cost_nano_usd(counts)
        asides = [(aside._prices, _by_direction(aside.counts())) for aside in self.asides]
        own = msgspec.structs.replace(counts, planner=counts.planner - sum(found.total() for _, found in asides))
        cost = 0
        for prices, found in asides:
            if prices != self._prices:
                cost += prices.cost_nano_usd(found)
                continue
            own.prompt += found.prompt
            own.cached += found.cached
            own.answer += found.answer
        return cost + self._prices.cost_nano_usd(own)

    def _thinking(self, usage: Usage, completion: int) -> tuple[int, int]:
        """Thinking and injected tokens: by ids, else as reported, else in proportion to the events seen."""
        total = max(0, completion - self.wasted)
        if self.has_ids:
            return min(self.thinking, total), min(self.injected, max(0, total - self.thinking))
        if usage.reasoning_tokens is not None and (usage.reasoning_tokens or not self.thinking):
            return min(max(0, usage.reasoning_tokens - self.wasted_thinking), total), 0
        seen = self.thinking + self.answer + self.injected
        if not seen:
            return 0, 0
        self.is_guess = self.thinking > 0
        return min(total, -(-self.thinking * total // seen)), 0


def _by_direction(counts: TokenCounts) -> TokenCounts:
    """Tokens of a call on the side: what went in, and what came out."""
    put_in = counts.prompt + counts.cached
    return TokenCounts(prompt=counts.prompt, cached=counts.cached, answer=counts.total() - put_in)
