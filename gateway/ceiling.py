"""The most a request can use: what is held for it.

Owns: the bound of a prompt, and the sum. Pure; O(1). Does not own: caps and limits of the output (caps.py), the bound
of calls on the side (asides.py), prices (budget/price.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budget.ledger import Amounts
from budget.price import PriceTable
from gateway.asides import NO_ASIDE

if TYPE_CHECKING:
    from gateway.asides import Aside
    from gateway.ask.resolve import Ask
    from gateway.models import Model

TEMPLATE_MARGIN_TOKENS = 256
MEDIA_PART_TOKENS = 4096


def ceiling_of(
    ask: Ask,
    model: Model,
    cap: int | None,
    max_tokens: int,
    aside: Aside,
    *,
    body_bytes: int,
    media_parts: int = 0,
) -> Amounts:
    """The hold: prompt bound + output limit times choices + the calls on the side."""
    # A body's bytes bound the tokens of its text.
    prompt = TEMPLATE_MARGIN_TOKENS + body_bytes + MEDIA_PART_TOKENS * media_parts
    choices = ask.n * ask.prompts
    own = aside if aside.prices is None else NO_ASIDE
    elsewhere = PriceTable() if aside.prices is None else aside.prices
    thinking = max_tokens if cap is None else min(cap, max_tokens)
    return Amounts(
        tokens=prompt + choices * max_tokens + aside.tokens(),
        thinking_tokens=choices * thinking,
        nano_usd=model.prices.ceiling_nano_usd(
            prompt=prompt + own.prompt,
            thinking=choices * thinking,
            answer=choices * (max_tokens - thinking) + own.output,
        )
        + elsewhere.ceiling_nano_usd(prompt=aside.prompt, thinking=0, answer=aside.output),
    )
