"""What bounds the chains of one request once its prompt is known, and where they begin.

Owns: fitting window, envelope and total together into the rules of a chain, and the errors when they do not fit; what a
rendered prompt leaves open. Does not own: the rules themselves (budget/chain.py), carrying them out (chains.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from budget.chain import ChainRules
from budget.envelope import chain_bounds
from gateway.backends.events import TAIL_TOKENS
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    from gateway.backends.port import Call, Capabilities
    from gateway.modes.flow import Run


def chain_rules(
    run: Run, found: Capabilities, prompt: int, *, aside: int, has_closed: bool, finds_calls: bool
) -> tuple[ChainRules, bool]:
    """What bounds each chain, and whether the envelope's tokens leave each less than it might have had.

    Args:
        run: the request; what calls on its behalf have used is no part of what its chains may use.
        found: what the backend was measured to do.
        prompt: tokens of it.
        aside: tokens that are still to be spent besides.
        has_closed: the prompt ends with a closed chain: nothing is forced.
        finds_calls: a tool call may begin in the thinking.

    Raises: InvalidRequest when the window, the envelope or `max_tokens` has no room.
    """
    forcing, call = found.forcing, run.call
    assert forcing is not None
    least = 0 if has_closed else forcing.ending()  # of a chain that ends as soon as it begins
    forced = forcing.overhead() if call.thinking.cap != 0 and not has_closed else least
    most = _within_window(call, found.max_model_len, prompt, forced)
    spent = run.tally.aside_amounts()
    envelope = run.envelope.less(tokens=spent.tokens, nano_usd=spent.nano_usd)
    total, purse = chain_bounds(envelope, run.model.prices, prompt=prompt, choices=run.choices, total=most, aside=aside)
    if total <= least or (purse is not None and purse.femto_usd <= least * purse.answer):
        raise InvalidRequest(
            f"`thinkgate.envelope` has no room for an answer to a prompt of {prompt} tokens.",
            param="thinkgate.envelope",
            code="envelope_too_small",
        )
    opener = found.tool_opener if finds_calls else None
    thinking = call.thinking
    rules = ChainRules(
        cap=thinking.cap if thinking.cap is not None else total,
        total=total,
        answer_floor=thinking.answer_floor,
        min_thinking=thinking.min_tokens,
        answer_openers=frozenset() if opener is None else frozenset({opener}),
        purse=purse,
    )
    return rules, total < most


def _within_window(call: Call, window: int | None, prompt: int, forced: int) -> int:
    """Most output tokens of a chain. Raises: InvalidRequest when that is no more than what is forced."""
    total = call.max_tokens
    if window is not None and window - prompt < total:
        total = window - prompt
        if total <= forced:
            raise InvalidRequest(
                f"The prompt has {prompt} tokens: the model's window of {window} has no room for an answer.",
                param="messages",
                code="context_length_exceeded",
            )
    if total <= forced:
        raise InvalidRequest(
            f"`max_tokens` must be above {forced}: so many tokens keep this model from thinking.",
            param="max_tokens",
        )
    return total


def prompt_tail(run: Run, found: Capabilities, prompt: Sequence[int]) -> tuple[bool, bool]:
    """Whether a prompt leaves the thinking open, or ends with a closed chain."""
    forcing, thinking = found.forcing, run.call.thinking
    assert forcing is not None
    if thinking.cap == 0 and (found.instant_is_quiet or not run.model.thinking.native):
        return False, True  # nothing has to be forced: its template, or the model, does not think
    if forcing.end_id is None:
        if thinking.enabled:
            return found.template_opens, False
        return tuple(prompt[-len(forcing.opening) :]) == forcing.opening, False
    for token_id in reversed(prompt[-TAIL_TOKENS:]):
        if token_id in (forcing.start_id, forcing.end_id):
            return token_id == forcing.start_id, token_id == forcing.end_id
    return False, False
