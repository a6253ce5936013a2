"""From a parsed request to what will be run and held: steps three to five of the request.

Owns: putting `Ask`, model, key and mode together into one `Prepared`, and the errors when they do not fit.
Pure; O(fields). Does not own: dialects (resolve.py), cap arithmetic (budget/cap.py), modes (router/mode.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from budget.cap import MARKER_ALLOWANCE_TOKENS, Bounds, Cap, CapTooHigh, allow
from budget.degrade import Step
from budget.ledger import Amounts
from budget.price import PriceTable
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
from gateway.ask.resolve import UNCAPPED, Ask
from gateway.auth import Key, check_model, degrade_steps
from gateway.backends.port import Call, Surface, Thinking
from gateway.edge.extension import CapReport, Degraded
from gateway.enforcement import How, Needs, instant_enforcement
from gateway.errors import InvalidRequest, ModelNotFound, PermissionDenied
from gateway.models import Model
from gateway.modes.enforce import Enforcement
from gateway.modes.reasoning import Stops
from router.mode import Mode, ModeDecision, ModeFacts, ModeForbidden, decide_mode

if TYPE_CHECKING:
    from gateway.config.schema import Config

TEMPLATE_MARGIN_TOKENS = 256
MEDIA_PART_TOKENS = 4096
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
        slack: output tokens per choice that holding it may waste.
        aside: the most that all calls on the side can use.
        stops: stop strings the gateway matches itself.
        steps: down the degrade ladder, those it may take if its limits refuse it.
        degraded: those it has taken.
        planning: how it is planned; None: it is not.
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
    heard = hear(body, surface, models, config)
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
    ask, raw, media_parts = heard.ask, heard.raw, heard.media_parts
    model = find_model(ask.model, models, key)
    check_choices(ask.n, ask.prompts, model.config.max_n)
    if ask.answer_floor is not None:
        _check_floor(ask, ask.answer_floor, model)
    needs = _needs(ask, model, is_chat=surface == "chat", has_media=media_parts > 0, continues=_continues(raw))
    if needs.continues:
        check_continued(raw.get("messages"), model.thinking)
    if ask.envelope is not None and ask.envelope.nano_usd is not None and model.config.price_usd_per_mtok is None:
        raise InvalidRequest(
            f"`thinkgate.envelope.usd` bounds nothing, since {model.name!r} has no price: leave it out.",
            param="thinkgate.envelope.usd",
        )
    decision, bounds, cap, report, slack = _bounded(heard, model, key, config, needs)
    is_thinking = decision.mode == "reasoning"
    planning = planning_for(ask, model, models, report, decision.verdict) if is_thinking else None
    max_tokens = _max_tokens(ask, decision.mode, cap, model, bounds.forced + headings_tokens(planning))
    stops, raw = _own_stops(raw, in_thinking=ask.stop_in_thinking) if is_thinking else (NO_STOPS, raw)
    thinking = model.thinking
    call = Call(
        surface=surface,
        request_id=request_id,
        model=model.upstream,
        fields=upstream_fields(raw, model.switches, kind=model.kind, mode=decision.mode, salt=_salt(key, config)),
        thinking=Thinking(
            enabled=is_thinking,
            cap=report.tokens,
            start=thinking.start,
            end=thinking.end,
            wrap_up=thinking.wrap_up,
            native=thinking.native,
            answer_floor=bounds.answer_floor,
            min_tokens=ask.min_thinking if is_thinking else 0,
        ),
        max_tokens=max_tokens,
        n=ask.n,
        priority=ask.priority,
        is_live=ask.stream or ask.envelope is not None,
        wants_token_ids=ask.wants_token_ids,
        trace_headers=trace,
    )
    aside = aside_of(ask, model, call, planning, body_bytes)
    ceiling = ceiling_of(
        ask, model, report.tokens, max_tokens + slack, aside, body_bytes=body_bytes, media_parts=media_parts
    )
    steps = degrade_steps(key, ask.degrade)
    held = ceiling, Enforcement(needs), slack, aside
    return Prepared(ask, model, decision, call, report, *held, stops, steps, planning=planning)


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
        cap, report = _cap(ask, bounds, model, how, why_not)
        most = None if decision.verdict is None else decision.verdict.most_thinking
        if most is not None and most < cap.tokens and report.tokens is not None:
            cap = msgspec.structs.replace(cap, tokens=most)
            report = msgspec.structs.replace(report, tokens=most, clamped_from=report.tokens, clamped_by=UNCERTAIN)
        if cap.tokens:
            return _Bounded(decision, bounds, cap, report, slack)
        decision = ModeDecision("instant", f"no room for thinking: {cap.clamped_by}", decision.verdict)
    return _Bounded(decision, bounds, None, _instant_report(model, needs), 0)


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


def find_model(name: str, models: Mapping[str, Model], key: Key) -> Model:
    """The model of that public name. Raises: ModelNotFound, PermissionDenied."""
    model = models.get(name)
    if model is None:
        raise ModelNotFound(f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model")
    check_model(key, name)
    return model


def _check_floor(ask: Ask, floor: int, model: Model) -> None:
    """Raises: InvalidRequest when no answer can be as long as the request's own floor."""
    most = model.config.answer.max_tokens if ask.total_max is None else ask.total_max
    if floor > most:
        limit = "this model's answer.max_tokens" if ask.total_max is None else f"`{ask.total_field}`"
        raise InvalidRequest(
            f"`thinkgate.answer_tokens_min` is {floor}, but the most that fits is {most}: {limit}.",
            param="thinkgate.answer_tokens_min",
            code="answer_floor_too_high",
        )


def _decide(heard: Heard, key: Key, bounds: Bounds, config: Config, model: Model, needs: Needs) -> ModeDecision:
    ask = heard.ask
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
    )
    try:
        return decide_mode(facts)
    except ModeForbidden as exc:
        allowed = ", ".join(sorted(exc.allowed)) or "none"
        raise PermissionDenied(
            f"This key may not use {exc.mode} mode (allowed: {allowed}).", param=ask.mode_field
        ) from exc


def _instant_report(model: Model, needs: Needs) -> CapReport:
    """How thinking is kept out of instant mode, on the first backend that is up."""
    for slot in model.slots:
        if slot.capabilities is not None:
            how = instant_enforcement(slot.capabilities, needs)
            return CapReport(tokens=0, source="mode", enforcement=how, hit=False)
    return CapReport(tokens=0, source="mode", enforcement="switch", hit=False)


def _cap(ask: Ask, bounds: Bounds, model: Model, how: How, why_not: str) -> tuple[Cap, CapReport]:
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


def _max_tokens(ask: Ask, mode: Mode, cap: Cap | None, model: Model, forced: int) -> int:
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


def _own_stops(raw: RawFields, *, in_thinking: bool) -> tuple[Stops, RawFields]:
    """Take `stop` out of the backend's fields: in reasoning mode the gateway matches it."""
    if "stop" not in raw:
        return NO_STOPS, raw
    stop = msgspec.json.decode(raw["stop"]) or []
    keep = bytes(raw.get("include_stop_str_in_output") or b"") == b"true"
    rest = {name: value for name, value in raw.items() if name not in {"stop", "include_stop_str_in_output"}}
    return Stops((stop,) if isinstance(stop, str) else tuple(stop), keep, in_thinking), rest


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
