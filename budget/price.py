"""Tokens to money, exactly.

Money is integer nano-USD. A price per million tokens may be a fraction of a nano-USD per token, so
prices are kept as integer femto-USD (1e-15 USD) per token and a request is rounded once, half up.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from budget.tokens import TokenCounts

FEMTO_PER_NANO = 1_000_000
NANO_PER_USD = 1_000_000_000


@dataclass(frozen=True, slots=True)
class PriceTable:
    """Femto-USD per token, by direction and kind; all zero for a model without prices."""

    prompt: int = 0
    cached: int = 0
    thinking: int = 0
    answer: int = 0

    @classmethod
    def from_usd_per_mtok(
        cls, prompt: float, answer: float, *, cached: float | None = None, thinking: float | None = None
    ) -> PriceTable:
        """Build from US dollars per million tokens; `cached` defaults to `prompt`, `thinking` to `answer`."""
        return cls(
            prompt=_femto(prompt),
            cached=_femto(prompt if cached is None else cached),
            thinking=_femto(answer if thinking is None else thinking),
            answer=_femto(answer),
        )

    def dearest(self, other: PriceTable) -> PriceTable:
        """The higher price of both, kind by kind: a bound for calls that may go to either model."""
        return PriceTable(
            prompt=max(self.prompt, other.prompt),
            cached=max(self.cached, other.cached),
            thinking=max(self.thinking, other.thinking),
            answer=max(self.answer, other.answer),
        )

    def cost_nano_usd(self, tokens: TokenCounts) -> int:
        """What `tokens` cost; injected output tokens are priced as answer, planner and probe likewise."""
        return self._round(
            tokens.prompt * self.prompt
            + tokens.cached * self.cached
            + tokens.thinking * self.thinking
            + (tokens.answer + tokens.injected + tokens.planner + tokens.probe + tokens.wasted) * self.answer
        )

    def ceiling_nano_usd(self, *, prompt: int, thinking: int, answer: int) -> int:
        """The most a call can cost: nothing cached, the dearer output price where kinds may trade places."""
        dearest = max(self.thinking, self.answer)
        return self._round(prompt * max(self.prompt, self.cached) + thinking * dearest + answer * dearest)

    @staticmethod
    def _round(femto: int) -> int:
        return (femto + FEMTO_PER_NANO // 2) // FEMTO_PER_NANO


def _femto(usd_per_mtok: float) -> int:
    return int(Decimal(str(usd_per_mtok)) * 1_000_000_000)


def nano_usd(usd: float) -> int:
    """US dollars as integer nano-USD, exact for the decimal that was written."""
    return int(Decimal(str(usd)) * NANO_PER_USD)
