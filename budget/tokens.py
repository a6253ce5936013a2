"""Tokens by kind: the one vocabulary of counting (docs/api.md, "Counting")."""

from __future__ import annotations

import msgspec


class TokenCounts(msgspec.Struct, kw_only=True):
    """Disjoint counts of one request; their sum is everything the backends processed for it.

    Attributes:
        prompt: prompt tokens that were computed (the client's prompt less `cached`).
        cached: prompt tokens the backend took from its prefix cache.
        thinking: tokens the model sampled between the thinking markers, markers excluded.
        answer: tokens of the visible answer, the end-of-sequence token included.
        planner: tokens of planning and of summarising calls, in and out.
        probe: tokens of probing calls, in and out.
        injected: markers, wrap-up and other forced text in the delivered choices.
        wasted: tokens of branches and attempts that reached no client.
    """

    prompt: int = 0
    cached: int = 0
    thinking: int = 0
    answer: int = 0
    planner: int = 0
    probe: int = 0
    injected: int = 0
    wasted: int = 0

    def output(self) -> int:
        """What the backend generated for the request itself, what was forced upon it included."""
        return self.thinking + self.answer + self.injected + self.wasted

    def total(self) -> int:
        """Ledger unit `tokens`: all kinds together."""
        return (
            self.prompt
            + self.cached
            + self.thinking
            + self.answer
            + self.planner
            + self.probe
            + self.injected
            + self.wasted
        )

    def completion(self) -> int:
        """`usage.completion_tokens`: every output token of the delivered choices."""
        return self.thinking + self.answer + self.injected

    def plus(self, more: TokenCounts) -> TokenCounts:
        """Both together."""
        return TokenCounts(**{name: getattr(self, name) + getattr(more, name) for name in self.__struct_fields__})
