"""Less thinking, or a cheaper model, instead of a refusal or a long wait: a request, prepared again one step down.

Owns: carrying out the steps that budget/degrade.py decides on, and what is told of them. Slow path: only requests
that were refused, or whose backends are all full, come here. Does not own: which steps a key allows
(auth.py), holding (serve.py).

Every step is taken at most once on each model and leads down, so that a request is held only so often, however
fast others take what was left.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple, get_args

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from budget.cap import EFFORT_SHARE, effort_tokens
from budget.degrade import LEAST_CAP_TOKENS, Attempt, Needs, Step, next_attempt, step_under_load, tokens_that_fit
from budget.ledger import Unit
from gateway.ask.hear import Heard, hear
from gateway.ceiling import ceiling_of
from gateway.edge.extension import Degraded
from gateway.errors import InvalidRequest, PermissionDenied
from gateway.modes.soft import LEAST_EFFORT
from gateway.prepare import Prepared, decide
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
NOT_SPENT = frozenset(("requests", "concurrency"))  # units of which every request takes one, whatever it does


class Cause(NamedTuple):
    """Why a request goes down.

    Attributes:
        scope: whose limit was short, or the model that is full.
        unit: of what, or `load`.
        text: the same, in words.
    """

    scope: str
    unit: str
    text: str


class Request(NamedTuple):
    """What a request is prepared from, to do it again."""

    body: bytes
    surface: Surface
    key: Key
    models: Mapping[str, Model]
    config: Config

    def hear(self) -> Heard:
        """What it says."""
        return hear(self.body, self.surface, self.config)

    def without_cascade(self) -> Request:
        """The same, with no draft first."""
        return self._replace(key=dataclasses.replace(self.key, cascade="off"))

    def again(self, before: Prepared, heard: Heard) -> Prepared | None:
        """Decided anew; its text is what it was, so nobody asks that again. None for what cannot be had that way."""
        verdict = before.decision.verdict
        try:
            found = decide(
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
        return replace(found, target=before.target)


def one_step_down(request: Request, refused: Prepared, hold: Hold, why: HoldRefused) -> Prepared | None:
    """The request with less thinking, or on a cheaper model, after a hold was refused.

    Args:
        request: what came from the client.
        refused: as it was prepared for that hold; its `steps` are those that may still be taken.
        hold: the refused one, which knows what is left.
        why: the refusal.

    Returns: what to hold next; None where no step is of use or allowed.
    """
    request = request.without_cascade()
    cause = Cause(why.scope, why.unit, f"what {why.scope} has left of {why.unit}")
    if refused.draft is not None:
        return _without_draft(request, refused, cause)
    lower = None
    if refused.decision.mode != "instant":
        left = {unit: found.remaining for unit in UNITS if (found := hold.remaining(unit)) is not None}
        lower = _less_thinking(_Ladder(request, refused, left, cause))
    if lower is None and (why.unit not in NOT_SPENT or why.scope == refused.model.scope):
        lower = _on_cheaper_model(request, refused, cause)
    return lower


def relieved(request: Request, prepared: Prepared) -> Prepared:
    """The request as the load of its model leaves it: further down the ladder the fuller all its backends are.

    The step that the load asks for, else one further down, else one further up; the request itself where there is none,
    or where a backend has room.
    """
    model, steps = prepared.model, prepared.steps
    if not steps or model.admission.is_open():
        return prepared
    saturation = model.admission.saturation()
    wanted = step_under_load(saturation, request.config.routing.queue.degrade_at, steps)
    if wanted is None:
        return prepared
    cause = Cause(model.scope, "load", f"the load of {model.name}")
    request, at = request.without_cascade(), steps.index(wanted)
    ladder = _Ladder(request, prepared, dict.fromkeys(UNITS, 0), cause)
    for step in (*steps[at:], *reversed(steps[:at])):
        if step == "model":
            lower = _on_cheaper_model(request, prepared, cause)
        else:
            lower = None if prepared.decision.mode == "instant" else ladder.forced(step)
        if lower is not None:
            return lower
    return prepared


def _less_thinking(ladder: _Ladder) -> Prepared | None:
    """The first step that makes it fit."""
    instant = ladder.instant() if "instant" in ladder.steps else None
    attempt = next_attempt(ladder.left, ladder.needs(instant), ladder.steps)
    if attempt is None:
        return None
    return ladder.taken(attempt, instant if attempt.step == "instant" else ladder.with_cap(attempt))


def _without_draft(request: Request, refused: Prepared, cause: Cause) -> Prepared | None:
    """The same request as it is without a cascade: no step of the ladder, and allowed to all."""
    lower, cascade = request.again(refused, request.hear()._replace(ask=refused.ask)), refused.decision.cascade
    if lower is None or cascade is None:
        return None
    cascade = cascade._replace(runs=False, hindrance=f"a draft does not fit into {cause.text}")
    return replace(
        lower, decision=lower.decision._replace(cascade=cascade), steps=refused.steps, degraded=refused.degraded
    )


def _on_cheaper_model(request: Request, before: Prepared, cause: Cause) -> Prepared | None:
    """The request as it was asked, on the next cheaper model along the chain of the model it names.

    It may go down the whole ladder there: every model is tried once, so this ends. Where load is the cause, one that is
    full itself is passed over.
    """
    if "model" not in before.steps:
        return None
    heard = request.hear()
    first = next((taken.was for taken in before.degraded if taken.step == "model"), before.model.name)
    asked = str(first)
    tried = {asked, before.model.name, *(taken.to for taken in before.degraded if taken.step == "model")}
    for name in request.models[asked].config.fallback:
        lower = None if name in tried else request.again(before, heard._replace(ask=replace(heard.ask, model=name)))
        if lower is None or not _is_cheaper(lower, before):
            continue
        if cause.unit == "load" and lower.model.admission.saturation() > 0:
            continue
        told = Degraded(step="model", was=before.model.name, to=name, scope=cause.scope, unit=cause.unit)
        return replace(lower, degraded=(*before.degraded, told))
    return None


def _is_cheaper(lower: Prepared, before: Prepared) -> bool:
    """Whether the same tokens cost less there; of two models without a price the chain says which is the lesser."""
    if before.model.config.price_usd_per_mtok is None:
        return lower.model.config.price_usd_per_mtok is None
    output = lower.call.max_tokens * lower.choices
    prompt = lower.ceiling.tokens - output
    now, then = (one.model.prices.ceiling_nano_usd(prompt=prompt, thinking=0, answer=output) for one in (lower, before))
    return now < then


class _Ladder:
    """One request that is too much, and what is left for it."""

    def __init__(self, request: Request, refused: Prepared, left: Mapping[Unit, int], cause: Cause) -> None:
        self._request = request
        self._refused = refused
        self._cause = cause
        self._heard = request.hear()
        self.left, self.steps = left, refused.steps

    def forced(self, step: Step) -> Prepared | None:
        """One step down, whatever is left: half of the cap, the lowest effort, or instant; None for what cannot be."""
        cap, needs = self._refused.cap.tokens, self.needs(None)
        if step == "instant":
            return self.taken(Attempt(step), self.instant())
        if cap is None:
            return None
        least = max(needs.least, LEAST_CAP_TOKENS)
        words = {tokens: word for word, tokens in needs.efforts.items() if least <= tokens < cap}
        if step == "effort" and words:
            attempt = Attempt(step, min(words), words[min(words)])
        elif step == "cap" and cap // 2 >= least:
            attempt = Attempt(step, cap // 2)
        else:
            return None
        return self.taken(attempt, self.with_cap(attempt))

    def taken(self, attempt: Attempt, lower: Prepared | None) -> Prepared | None:
        """What a step came to, with what is told of it; None for a step that cannot be had."""
        if lower is None:
            return None
        refused = self._refused
        return replace(
            lower,
            steps=refused.steps[refused.steps.index(attempt.step) + 1 :],
            degraded=(*refused.degraded, self._told(attempt)),
            decision=lower.decision._replace(cascade=refused.decision.cascade),
        )

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
            clamped_by=self._cause.text,
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
        return replace(lower, decision=_instant(self._refused.decision, self._cause.text))

    def _told(self, attempt: Attempt) -> Degraded:
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
        return Degraded(step=attempt.step, was=was, to=to, scope=self._cause.scope, unit=self._cause.unit)

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


def _instant(before: ModeDecision, left: str) -> ModeDecision:
    return ModeDecision("instant", f"less than it needs: {left}", before.verdict)


def _with_effort(raw: RawFields, effort: str) -> RawFields:
    """The client's fields with this effort, if one of them names any: some backends get to see it."""
    if "reasoning_effort" not in raw:
        return raw
    return {**raw, "reasoning_effort": Raw(msgspec.json.encode(effort))}
