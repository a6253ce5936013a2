"""Whether a cascade can judge a request, the call for its draft, and what is told of it.

Owns: what makes a draft's log probabilities say nothing, and the draft beside a request that is prepared to think.
Pure; O(fields). Does not own: for which requests it is wanted (router/mode.py), running it (modes/cascade.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from msgspec import Raw
from msgspec.structs import replace

from gateway.backends.port import Call
from gateway.edge.extension import CapReport, CascadeReport

if TYPE_CHECKING:
    from gateway.ask.request import RawFields
    from gateway.ask.resolve import Ask
    from gateway.config.routing import CascadeConfig
    from gateway.models import Model
    from gateway.prepare import Prepared
    from router.mode import ModeDecision

TRUE = Raw(b"true")
# What these allow is what is said, however unlikely: a backend's probabilities are those before they apply.
BENDING = (
    "allowed_token_ids",
    "bad_words",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "logit_bias",
    "structured_outputs",
)
NOTHING = frozenset((b"null", b"[]", b"{}"))


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """An instant answer that is to be judged before anybody sees it.

    Attributes:
        call: what runs, with log probabilities.
        cap: as the response has it if the draft is taken.
        confidence: least that is taken, a probability.
        window: tokens that are looked at together.
        keeps_logprobs: the client asked for them, too.
    """

    call: Call
    cap: CapReport
    confidence: float
    window: int
    keeps_logprobs: bool


def hindrance(ask: Ask, raw: RawFields, model: Model) -> str:
    """Why the log probabilities of a draft would say nothing, in words; empty where they do."""
    if ask.has_tools:
        return "tools: how sure the words of a call are does not tell whether it is right"
    form = raw.get("response_format")
    if form is not None and (msgspec.json.decode(form) or {}).get("type", "text") != "text":
        return "response_format: what a format forces was not the model's choice"
    bent = [name for name in BENDING if name in raw and bytes(raw[name]) not in NOTHING]
    if bent:
        return f"{bent[0]}: what it forces was not the model's choice"
    for slot in model.slots:
        if slot.capabilities is not None and slot.capabilities.logprobs is False:
            return f"backend {slot.config.id} gives no log probabilities"
    return ""


def draft_of(call: Call, cap: CapReport, raw: RawFields, config: CascadeConfig, *, has_envelope: bool) -> Draft:
    """The draft that an instant call is."""
    keeps = bytes(raw.get("logprobs") or b"") == b"true"
    call = replace(call, fields={**call.fields, "logprobs": TRUE}, is_live=has_envelope)
    return Draft(call=call, cap=cap, confidence=config.confidence, window=config.window_tokens, keeps_logprobs=keeps)


def with_messages(
    draft: Draft | None, messages: Raw, request_id: str, trace: tuple[tuple[bytes, bytes], ...]
) -> Draft | None:
    """The same for another request of the same shape; None for none."""
    if draft is None:
        return None
    fields = {name: value.copy() for name, value in draft.call.fields.items()}  # a view would keep a whole body
    call = replace(draft.call, fields={**fields, "messages": messages}, request_id=request_id, trace_headers=trace)
    return replace(draft, call=call, cap=replace(draft.cap))


def told(decision: ModeDecision, draft: Draft | None) -> CascadeReport | None:
    """What a decision says of a cascade before it runs; None where none was to."""
    cascade = decision.cascade
    if cascade is None:
        return None
    if draft is None:
        return CascadeReport(outcome="aside", reason=cascade.hindrance or "no room for thinking")
    return CascadeReport(
        outcome="planned", reason="an instant draft decides", least=draft.confidence, window_tokens=draft.window
    )


def taken(prepared: Prepared, report: CascadeReport) -> Prepared:
    """The request as an instant one: its draft is the answer."""
    draft = prepared.draft
    assert draft is not None
    decision = prepared.decision._replace(mode="instant", reason=f"{prepared.decision.reason}; {report.reason}")
    return replace(prepared, decision=decision, call=draft.call, cap=draft.cap)
