"""The cap and the output limit of one request, and the refusals where what it asks for does not fit.

Owns: what the budget fields of a request come to on its model, in tokens, and how the cap will be held. Pure; O(1).
Does not own: cap arithmetic (budget/cap.py), the ways to hold a cap (enforcement.py), the mode (prepare.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from budget.cap import MARKER_ALLOWANCE_TOKENS, Bounds, Cap, CapTooHigh, allow
from gateway.ask.resolve import UNCAPPED, Ask
from gateway.edge.extension import CapReport
from gateway.enforcement import How, Needs, instant_enforcement
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    from gateway.models import Model
    from router.mode import Mode


def check_bounds(ask: Ask, model: Model) -> None:
    """Raises: InvalidRequest when no answer can be as long as the request's own floor, or its money bounds nothing."""
    if ask.envelope is not None and ask.envelope.nano_usd is not None and model.config.price_usd_per_mtok is None:
        raise InvalidRequest(
            f"`thinkgate.envelope.usd` bounds nothing, since {model.name!r} has no price: leave it out.",
            param="thinkgate.envelope.usd",
        )
    floor = ask.answer_floor or 0
    most = model.config.answer.max_tokens if ask.total_max is None else ask.total_max
    if floor > most:
        limit = "this model's answer.max_tokens" if ask.total_max is None else f"`{ask.total_field}`"
        raise InvalidRequest(
            f"`thinkgate.answer_tokens_min` is {floor}, but the most that fits is {most}: {limit}.",
            param="thinkgate.answer_tokens_min",
            code="answer_floor_too_high",
        )


def instant_report(model: Model, needs: Needs) -> CapReport:
    """How thinking is kept out of instant mode, on the first backend that is up."""
    for slot in model.slots:
        if slot.capabilities is not None:
            how = instant_enforcement(slot.capabilities, needs)
            return CapReport(tokens=0, source="mode", enforcement=how, hit=False)
    return CapReport(tokens=0, source="mode", enforcement="switch", hit=False)


def cap_of(ask: Ask, bounds: Bounds, model: Model, how: How, why_not: str) -> tuple[Cap, CapReport]:
    """The cap, and how it will be held. Raises: InvalidRequest when an explicit one cannot be."""
    explicit = ask.thinking_tokens
    try:
        if explicit == UNCAPPED:
            ceiling, why = bounds.ceiling()
            cap = Cap(tokens=ceiling, source="request", clamped_by=why)
        else:
            cap = allow(explicit, ask.effort, bounds)
    except CapTooHigh as exc:
        raise InvalidRequest(
            f"`{ask.thinking_field}` is {explicit}, but the most that fits is {exc.allowed}: {exc.limit}.",
            param=ask.thinking_field,
            code="thinking_budget_too_high",
        ) from exc
    if ask.min_thinking > (cap.tokens if how != "none" else 0):
        most = f"the most that may be thought is {cap.tokens}" if how != "none" else why_not
        raise InvalidRequest(
            f"`thinkgate.min_thinking_tokens` is {ask.min_thinking}, which cannot be made to hold: {most}.",
            param="thinkgate.min_thinking_tokens",
            code="cap_not_enforceable" if how == "none" else "thinking_budget_too_high",
        )
    if how == "none" and explicit is not None and explicit != UNCAPPED:
        raise InvalidRequest(
            f"`{ask.thinking_field}`: no way to hold a thinking cap on {model.name!r} ({why_not}):"
            " leave the cap out or use instant mode.",
            param=ask.thinking_field,
            code="cap_not_enforceable",
        )
    return cap, CapReport(
        tokens=cap.tokens if how != "none" else None,
        source=cap.source,
        enforcement=how,
        hit=False,
        clamped_from=cap.clamped_from,
        clamped_by=cap.clamped_by,
    )


def max_tokens_of(ask: Ask, mode: Mode, cap: Cap | None, model: Model, forced: int) -> int:
    """Most output tokens per choice. Raises: InvalidRequest when the request's own limit is too high."""
    answer = model.config.answer
    thinking_max = model.thinking.max_tokens if mode == "reasoning" else 0
    markers = max(MARKER_ALLOWANCE_TOKENS, forced)
    most = answer.max_tokens + (thinking_max + markers if thinking_max else 0)
    if ask.total_max is None:
        thought = 0 if cap is None or mode == "instant" else cap.tokens + markers
        wanted = thought + max(answer.default_tokens, ask.answer_floor or 0)
        window = model.window()
        return min(wanted, most) if window is None else min(wanted, most, window - 1)
    if ask.total_max > most:
        raise InvalidRequest(
            f"`{ask.total_field}` is {ask.total_max}, but this model gives at most {most} tokens in {mode} mode.",
            param=ask.total_field,
            code="max_tokens_too_high",
        )
    return ask.total_max
