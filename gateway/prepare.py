"""From a parsed request to what will be run and held: steps three to five of the request.

Owns: putting `Ask`, model, key and mode together into one `Prepared`, and the errors when they do not fit.
Pure; O(fields). Does not own: dialects (resolve.py), caps and limits of the output (caps.py), modes (router/mode.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from budget.cap import Bounds, Cap
from budget.degrade import Step
from budget.ledger import Amounts
from gateway.asides import (
    NO_ASIDE,
    Aside,
    Planning,
    aside_of,
    headings_tokens,
    may_be_planned,
    may_be_probed,
    planning_for,
)
from gateway.ask.fields import check_choices, check_continued, upstream_fields
from gateway.ask.hear import Heard, hear
from gateway.ask.request import RawFields
from gateway.ask.resolve import Ask
from gateway.auth import Key, degrade_steps
from gateway.backends.port import Call, Surface, Thinking
from gateway.caps import cap_of, check_bounds, instant_report, max_tokens_of
from gateway.cascade import Draft, draft_of, hindrance
from gateway.ceiling import ceiling_of
from gateway.edge.extension import CapReport, Degraded, TargetReport
from gateway.enforcement import Needs
from gateway.errors import InvalidRequest, PermissionDenied
from gateway.models import Model
from gateway.modes.enforce import Enforcement
from gateway.modes.reasoning import Stops
from gateway.targets import find_target
from router.mode import Mode, ModeDecision, ModeFacts, ModeForbidden, decide_mode

if TYPE_CHECKING:
    from gateway.config.schema import Config

NO_STOPS = Stops()
UNCERTAIN = "routing.uncertain_thinking_tokens"


class Prepared(msgspec.Struct, frozen=True):
    """Everything decided before anything is spent.

    Attributes:
        ask: what the client wants.
        model: where it runs.
        decision: mode and why.
        call: what a backend will run.
        cap: for the response.
        ceiling: the most it can use, to be held.
        enforcer: how the cap is held.
        slack: output tokens per choice that holding it, or a draft, may waste.
        aside: the most that all calls on the side can use.
        stops: stop strings the gateway matches itself.
        steps: down the degrade ladder, those it may take if its limits refuse it.
        degraded: those it has taken.
        draft: an instant answer that is judged first; None without a cascade.
        target: which of several models a public name came to, and why; None for a name of one.
        planning: how its thinking is planned; None: it is not.
    """

    ask: Ask
    model: Model
    decision: ModeDecision
    call: Call
    cap: CapReport
    ceiling: Amounts
    enforcer: Enforcement
    slack: int = 0
    aside: Aside = NO_ASIDE
    stops: Stops = NO_STOPS
    steps: tuple[Step, ...] = ()
    degraded: tuple[Degraded, ...] = ()
    draft: Draft | None = None
    target: TargetReport | None = None
    planning: Planning | None = None

    @property
    def choices(self) -> int:
        """Choices expected over all prompts."""
        return self.ask.n * self.ask.prompts

    def is_plain(self) -> bool:
        """Whether the backend's whole answer may be passed on: nothing needs watching token by token."""
        return (
            self.decision.mode == "instant"
            and not self.ask.stream
            and self.ask.envelope is None
            and self.draft is None
            and self.cap.enforcement != "two_phase"
            and self.model.kind != "embedded"
            and not self.model.must_be_read()
        )


def prepare(
    body: bytes,
    surface: Surface,
    key: Key,
    models: Mapping[str, Model],
    config: Config,
    *,
    request_id: str,
    trace: tuple[tuple[bytes, bytes], ...],
) -> Prepared:
    """Parse, resolve and decide.

    Raises: InvalidRequest, ModelNotFound, PermissionDenied.
    """
    heard = hear(body, surface, config)
    return decide(heard, len(body), surface, key, models, config, request_id=request_id, trace=trace)


def decide(
    heard: Heard,
    body_bytes: int,
    surface: Surface,
    key: Key,
    models: Mapping[str, Model],
    config: Config,
    *,
    request_id: str,
    trace: tuple[tuple[bytes, bytes], ...],
) -> Prepared:
    """What follows from what was heard. Raises: InvalidRequest, ModelNotFound, PermissionDenied."""
    heard, model, target = find_target(heard, models, key, config)
    ask, raw, media_parts = heard.ask, heard.raw, heard.media_parts
    check_choices(ask.n, ask.prompts, model.config.max_n)
    check_bounds(ask, model)
    needs = _needs(ask, model, is_chat=surface == "chat", has_media=media_parts > 0, continues=_continues(raw))
    if needs.continues:
        check_continued(raw.get("messages"), model.thinking)
    decision, bounds, cap, report, slack = _bounded(heard, model, key, config, needs)
    is_thinking = decision.mode == "reasoning"
    planning = planning_for(ask, model, models, report, decision.verdict) if is_thinking else None
    max_tokens = max_tokens_of(ask, decision.mode, cap, model, bounds.forced + headings_tokens(planning))
    stops, fields = _own_stops(raw, in_thinking=ask.stop_in_thinking) if is_thinking else (NO_STOPS, raw)
    call = Call(
        surface=surface,
        request_id=request_id,
        model=model.upstream,
        fields=upstream_fields(fields, model.switches, kind=model.kind, mode=decision.mode, salt=_salt(key, config)),
        thinking=_thinking(ask, model, decision.mode, report.tokens, bounds.answer_floor),
        max_tokens=max_tokens,
        n=ask.n,
        priority=ask.priority,
        is_live=ask.stream or ask.envelope is not None,
        wants_token_ids=ask.wants_token_ids,
        trace_headers=trace,
    )
    draft = None
    if decision.cascade is not None and decision.cascade.runs:
        draft = _draft(heard, call, model, key, config, needs)
        slack += draft.call.max_tokens
    aside = aside_of(ask, model, call, planning, body_bytes)
    ceiling = ceiling_of(
        ask, model, report.tokens, max_tokens + slack, aside, body_bytes=body_bytes, media_parts=media_parts
    )
    steps = degrade_steps(key, ask.degrade)
    held = ceiling, Enforcement(needs), slack, aside
    return Prepared(
        ask, model, decision, call, report, *held, stops, steps, draft=draft, target=target, planning=planning
    )


def _thinking(ask: Ask, model: Model, mode: Mode, cap: int | None, answer_floor: int) -> Thinking:
    marks, is_thinking = model.thinking, mode == "reasoning"
    return Thinking(
        enabled=is_thinking,
        cap=cap,
        start=marks.start,
        end=marks.end,
        wrap_up=marks.wrap_up,
        native=marks.native,
        answer_floor=answer_floor,
        min_tokens=ask.min_thinking if is_thinking else 0,
    )


def _draft(heard: Heard, call: Call, model: Model, key: Key, config: Config, needs: Needs) -> Draft:
    """What the same request is in instant mode, which is all that its hold has more."""
    ask, salt = heard.ask, _salt(key, config)
    most = model.config.answer.max_tokens
    ask = msgspec.structs.replace(ask, total_max=None if ask.total_max is None else min(ask.total_max, most))
    cap = instant_report(model, needs)
    instant = msgspec.structs.replace(
        call,
        fields=upstream_fields(heard.raw, model.switches, kind=model.kind, mode="instant", salt=salt),
        thinking=_thinking(ask, model, "instant", cap.tokens, call.thinking.answer_floor),
        max_tokens=max_tokens_of(ask, "instant", None, model, 0),
    )
    return draft_of(instant, cap, heard.raw, config.routing.cascade, has_envelope=ask.envelope is not None)


def _salt(key: Key, config: Config) -> str | None:
    return key.salt if config.routing.placement.isolate else None


class _Bounded(NamedTuple):
    """Mode and cap, which decide each other; `slack` tokens per choice are held for what enforcement may waste."""

    decision: ModeDecision
    bounds: Bounds
    cap: Cap | None
    report: CapReport
    slack: int


def _bounded(heard: Heard, model: Model, key: Key, config: Config, needs: Needs) -> _Bounded:
    ask = heard.ask
    bounds = model.bounds(key.max_thinking_tokens, ask.total_max, ask.answer_floor)
    decision = _decide(heard, key, bounds, config, model, needs)
    if decision.mode == "reasoning" and needs.continues:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt: false` go on from a message, where thinking cannot"
            " begin: leave them out, or ask for instant mode.",
            param="continue_final_message",
            code="contradictory_parameters",
        )
    if decision.mode == "reasoning":
        how, why_not, forcing = model.enforcement(needs)
        slack = 0
        if how == "two_phase" and forcing is not None:
            slack = forcing.most_wasted()
            bounds = msgspec.structs.replace(bounds, forced=forcing.overhead())
        elif how == "native" and forcing is not None:
            # An engine of ours forces the same texts, and so does the gateway if it has to take over.
            bounds = msgspec.structs.replace(bounds, forced=forcing.overhead() - len(forcing.opening))
        cap, report = cap_of(ask, bounds, model, how, why_not)
        most = _most_uncertain(decision, config)
        if most is not None and most < cap.tokens and report.tokens is not None:
            cap = msgspec.structs.replace(cap, tokens=most)
            report = msgspec.structs.replace(report, tokens=most, clamped_from=report.tokens, clamped_by=UNCERTAIN)
        if cap.tokens:
            return _Bounded(decision, bounds, cap, report, slack)
        why = f"no room for thinking: {cap.clamped_by}"
        cascade = decision.cascade and decision.cascade._replace(runs=False, hindrance=why)
        decision = ModeDecision("instant", why, decision.verdict, cascade)
    return _Bounded(decision, bounds, None, instant_report(model, needs), 0)


def _most_uncertain(decision: ModeDecision, config: Config) -> int | None:
    """The cap of a request that is not known to need its thinking; None for the usual one."""
    if decision.cascade is not None and decision.cascade.runs and decision.cascade.instead_of == "instant":
        return config.routing.uncertain_thinking_tokens
    return None if decision.verdict is None else decision.verdict.most_thinking


def _continues(raw: RawFields) -> bool:
    """Whether the model is to go on from the last message, whatever state of thinking that is in."""
    goes_on, begins = raw.get("continue_final_message"), raw.get("add_generation_prompt")
    return (goes_on is not None and bytes(goes_on) == b"true") or (begins is not None and bytes(begins) == b"false")


def _needs(ask: Ask, model: Model, *, is_chat: bool, has_media: bool, continues: bool) -> Needs:
    return Needs(
        is_chat=is_chat,
        has_tools=ask.has_tools,
        forces_call=ask.forces_call,
        has_media=has_media,
        has_envelope=ask.envelope is not None,
        min_thinking=ask.min_thinking,
        is_native=model.thinking.native,
        continues=continues,
        has_course=is_chat and (may_be_planned(ask, model) or may_be_probed(ask, model)),
    )


def _decide(heard: Heard, key: Key, bounds: Bounds, config: Config, model: Model, needs: Needs) -> ModeDecision:
    ask, when = heard.ask, key.cascade or config.routing.cascade.when
    facts = ModeFacts(
        asked=ask.mode,
        asked_by=ask.mode_field,
        allowed=key.modes,
        default_mode=config.routing.default_mode,
        on_uncertain=config.routing.on_uncertain,
        thinking_room=bounds.ceiling()[0],
        is_native=model.thinking.native,
        continues=needs.continues,
        read=None if heard.read is None else partial(heard.read, key, model),
        cascade=when,
        hindrance="" if when == "off" else hindrance(ask, heard.raw, model),
    )
    try:
        return decide_mode(facts)
    except ModeForbidden as exc:
        allowed = ", ".join(sorted(exc.allowed)) or "none"
        raise PermissionDenied(
            f"This key may not use {exc.mode} mode (allowed: {allowed}).", param=ask.mode_field
        ) from exc


def _own_stops(raw: RawFields, *, in_thinking: bool) -> tuple[Stops, RawFields]:
    """Take `stop` out of the backend's fields: in reasoning mode the gateway matches it."""
    if "stop" not in raw:
        return NO_STOPS, raw
    stop = msgspec.json.decode(raw["stop"]) or []
    keep = bytes(raw.get("include_stop_str_in_output") or b"") == b"true"
    rest = {name: value for name, value in raw.items() if name not in {"stop", "include_stop_str_in_output"}}
    return Stops((stop,) if isinstance(stop, str) else tuple(stop), keep, in_thinking), rest
