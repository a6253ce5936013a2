"""The most a request can use: what is held for it.

Owns: the bounds of prompt, output and calls on the side. Pure; O(1). Does not own: caps and limits of the output
(prepare.py), prices (budget/price.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budget.ledger import Amounts
from gateway.modes.summary import most_used

if TYPE_CHECKING:
    from gateway.ask.resolve import Ask
    from gateway.backends.port import Call
    from gateway.models import Model

TEMPLATE_MARGIN_TOKENS = 256
MEDIA_PART_TOKENS = 4096


def aside_of(ask: Ask, call: Call) -> tuple[int, int]:
    """The most prompt and output tokens that summarising every choice's thinking takes, if that is to be done."""
    if ask.summary is None or not call.thinking.enabled:
        return 0, 0
    cap = call.thinking.cap
    prompt, output = most_used(ask.summary, call.max_tokens if cap is None else min(cap, call.max_tokens))
    return ask.n * prompt, ask.n * output


def ceiling_of(
    ask: Ask,
    model: Model,
    cap: int | None,
    max_tokens: int,
    aside: tuple[int, int],
    *,
    body_bytes: int,
    media_parts: int = 0,
) -> Amounts:
    """The hold: prompt bound + output limit times choices + the calls on the side."""
    # A body's bytes bound the tokens of its text.
    prompt = TEMPLATE_MARGIN_TOKENS + body_bytes + MEDIA_PART_TOKENS * media_parts
    choices = ask.n * ask.prompts
    aside_prompt, aside_output = aside
    thinking = max_tokens if cap is None else min(cap, max_tokens)
    return Amounts(
        tokens=prompt + choices * max_tokens + aside_prompt + aside_output,
        thinking_tokens=choices * thinking,
        nano_usd=model.prices.ceiling_nano_usd(
            prompt=prompt + aside_prompt,
            thinking=choices * thinking,
            answer=choices * (max_tokens - thinking) + aside_output,
        ),
    )
