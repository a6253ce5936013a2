"""Less thinking instead of a refusal: a request that its limits refuse, prepared again one step down.

Owns: carrying out the steps that budget/degrade.py decides on, and what is told of them. Slow path: only requests
that were refused come here. Does not own: which steps a key allows (auth.py), holding (serve.py).

Every step is taken at most once and leads down, so that a request is held at most once more than there are steps,
however fast others take what was left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, get_args

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from budget.cap import EFFORT_SHARE, effort_tokens
from budget.degrade import Attempt, Needs, next_attempt, tokens_that_fit
from budget.ledger import Unit
from gateway.ask.hear import Heard, hear
from gateway.edge.extension import Degraded
from gateway.errors import InvalidRequest, PermissionDenied
from gateway.modes.soft import LEAST_EFFORT
from gateway.prepare import Prepared, ceiling_of, decide
from router.mode import ModeDecision

if TYPE_CHECKING:
    from collections.abc import Mapping

    from budget.errors import HoldRefused
    from budget.ledger import Amounts, Hold
    from gateway.asides import Aside
    from gateway.ask.request import RawFields
    from gateway.ask.resolve import Ask
    from gateway.auth import Key
    from gateway.backends.port import Surface
    from gateway.config.schema import Config
    from gateway.models import Model

UNITS: tuple[Unit, ...] = get_args(Unit)


class Request(NamedTuple):
    """What a request is prepared from, to do it again."""

    body: bytes
    surface: Surface
    key: Key
    models: Mapping[str, Model]
    config: Config

    def hear(self) -> Heard:
        """What it says."""
        return hear(self.body, self.surface, self.models, self.config)

    def again(self, before: Prepared, heard: Heard) -> Prepared | None:
        """Decided anew; its text is what it was, so nobody asks that again. None for what cannot be had that way."""
        verdict = before.decision.verdict
        try:
            return decide(
                heard._replace(read=None if verdict is None else lambda _key, _model: verdict),
                len(self.body),
                self.surface,
                self.key,
                self.models,
                self.config,
                request_id=before.call.request_id,
                trace=before.call.trace_headers,
            )
        except (InvalidRequest, PermissionDenied):
            return None


def one_step_down(request: Request, refused: Prepared, hold: Hold, why: HoldRefused) -> Prepared | None:
    """The request with less thinking, after a hold was refused.

    Args:
        request: what came from the client.
        refused: as it was prepared for that hold; its `steps` are those that may still be taken.
        hold: the refused one, which knows what is left.
        why: the refusal.

    Returns: what to hold next; None where no step is of use or allowed.
    """
    if not refused.steps or refused.decision.mode == "instant":
        return None
    ladder = _Ladder(request, refused, hold, why)
    instant = ladder.instant() if "instant" in refused.steps else None
    attempt = next_attempt(ladder.left, ladder.needs(instant), refused.steps)
    if attempt is None:
        return None
    lower = instant if attempt.step == "instant" else ladder.with_cap(attempt)
    if lower is None:
        return None
    steps = refused.steps[refused.steps.index(attempt.step) + 1 :]
    return replace(lower, steps=steps, degraded=(*refused.degraded, ladder.told(attempt)))


class _Ladder:
    """One refused request, and what is left for it."""

    def __init__(self, request: Request, refused: Prepared, hold: Hold, why: HoldRefused) -> None:
        self._request = request
        self._refused = refused
        self._why = why
        self._heard = request.hear()
        self.left = {unit: found.remaining for unit in UNITS if (found := hold.remaining(unit)) is not None}

    def needs(self, instant: Prepared | None) -> Needs:
        """What its holds take."""
        refused, ask, cap = self._refused, self._refused.ask, self._refused.cap.tokens
        bounds = refused.model.bounds(self._request.key.max_thinking_tokens, ask.total_max, ask.answer_floor)
        return Needs(
            cap=cap,
            full=refused.ceiling,
            bare=refused.ceiling if cap is None else self._bare(cap),
            instant=None if instant is None else instant.ceiling,
            least=ask.min_thinking,
            efforts={word: effort_tokens(word, bounds) for word in EFFORT_SHARE},
        )

    def with_cap(self, attempt: Attempt) -> Prepared | None:
        """With a lower cap, or with the effort that it follows from."""
        before, ask = self._refused.cap, self._refused.ask
        if attempt.effort is None:
            lower = self._prepared(replace(ask, thinking_tokens=attempt.cap), attempt.cap)
        else:
            ask = replace(ask, thinking_tokens=None, effort=attempt.effort)
            lower = self._prepared(ask, attempt.cap, effort=attempt.effort)
        if lower is None or lower.cap.tokens is None:
            return None
        cap = replace(
            lower.cap,
            source=before.source if attempt.effort is None else "effort",
            clamped_from=before.tokens if before.clamped_from is None else before.clamped_from,
            clamped_by=self._what_is_left(),
        )
        return replace(lower, cap=cap)

    def instant(self) -> Prepared | None:
        """In instant mode; None where the request insists on thinking, or its key does."""
        ask = self._refused.ask
        if ask.min_thinking:
            return None
        most = self._refused.model.config.answer.max_tokens
        total = None if ask.total_max is None else min(ask.total_max, most)
        ask = replace(ask, mode="instant", thinking_tokens=None, effort=None, summary=None, total_max=total)
        lower = self._prepared(ask, 0, effort=LEAST_EFFORT)
        if lower is None:
            return None
        return replace(lower, decision=_instant(self._refused.decision, self._what_is_left()))

    def told(self, attempt: Attempt) -> Degraded:
        """The step, for the response."""
        was: int | str
        to: int | str
        cap = self._refused.cap.tokens
        if attempt.step == "instant" or cap is None:
            was, to = self._refused.decision.mode, "instant"
        elif attempt.effort is None:
            was, to = cap, attempt.cap
        else:
            was, to = self._refused.ask.effort or cap, attempt.effort
        return Degraded(step=attempt.step, was=was, to=to, scope=self._why.scope, unit=self._why.unit)

    def _prepared(self, ask: Ask, cap: int, *, effort: str | None = None) -> Prepared | None:
        """Decided anew; None for what cannot be had that way."""
        call, heard = self._refused.call, self._heard._replace(ask=ask)
        if effort is not None:
            heard = heard._replace(raw=_with_effort(heard.raw, effort))
        lower = self._request.again(self._refused, heard)
        if lower is None:  # and so refused for its limits, as it would have been anyway
            return None
        before = self._refused.cap.tokens
        return lower if before is None else self._within(lower, max(1, call.max_tokens - (before - cap)))

    def _within(self, lower: Prepared, least: int) -> Prepared:
        """With as many output tokens as there is room for, at least `least`.

        Those are what is left if all that is taken from the thinking is taken from the total.
        """
        more = lower.call.max_tokens - least
        if more <= 0:
            return lower
        bare = self._ceiling(lower, lower.cap.tokens, least, lower.aside)
        more = max(0, tokens_that_fit(self.left, more, lower.ceiling, bare))
        ceiling = self._ceiling(lower, lower.cap.tokens, least + more, lower.aside)
        return replace(lower, call=replace(lower.call, max_tokens=least + more), ceiling=ceiling)

    def _bare(self, cap: int) -> Amounts:
        """The refused hold less everything that is held for thinking."""
        refused = self._refused
        aside = refused.aside.less_prompt(refused.ask.n * cap if refused.ask.summary is not None else 0)
        return self._ceiling(refused, 0, refused.call.max_tokens - cap, aside)

    def _ceiling(self, prepared: Prepared, cap: int | None, max_tokens: int, aside: Aside) -> Amounts:
        size, media_parts = len(self._request.body), self._heard.media_parts
        most = max_tokens + prepared.slack
        return ceiling_of(prepared.ask, prepared.model, cap, most, aside, body_bytes=size, media_parts=media_parts)

    def _what_is_left(self) -> str:
        return f"what {self._why.scope} has left of {self._why.unit}"


def _instant(before: ModeDecision, left: str) -> ModeDecision:
    return ModeDecision("instant", f"less than it needs: {left}", before.verdict)


def _with_effort(raw: RawFields, effort: str) -> RawFields:
    """The client's fields with this effort, if one of them names any: some backends get to see it."""
    if "reasoning_effort" not in raw:
        return raw
    return {**raw, "reasoning_effort": Raw(msgspec.json.encode(effort))}
