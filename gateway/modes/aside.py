"""Calls that the gateway makes on a request's behalf: summaries and plans.

Owns: what such a call looks like, and whether the envelope has room for one more. Does not own: what they cost
(gateway/tally.py), what is asked of them (summary.py, planner.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from budget.errors import EnvelopeSpent
from gateway.backends.port import Call, Thinking
from gateway.modes.soft import LEAST_EFFORT

if TYPE_CHECKING:
    from gateway.models import Model
    from gateway.modes.flow import Run
    from gateway.slots import Slot


def instant_call(
    asked: Call,
    model: Model,
    slot: Slot | None,
    content: str,
    max_tokens: int,
    more: Mapping[str, object] | None = None,
) -> Call:
    """A call with one message in instant mode, at temperature 0, with nothing of the client's own but what is quoted.

    Args:
        asked: the client's, whose priority and traces it has.
        model: that is called.
        slot: where; None where that is not known yet.
        content: of the message.
        max_tokens: most output tokens.
        more: fields of its own.
    """
    fields = {"messages": _raw([{"role": "user", "content": content}]), "temperature": _raw(0)}
    switches = model.switches.encoded("instant", None)
    if switches is not None:
        fields["chat_template_kwargs"] = switches
    if slot is not None and slot.capabilities is not None and slot.capabilities.takes_effort:
        fields["reasoning_effort"] = _raw(LEAST_EFFORT)  # such a server has no switch to not think at all
    if "max_completion_tokens" in asked.fields:
        fields["max_completion_tokens"] = asked.fields["max_completion_tokens"]  # the name; the backend sets it
    if "cache_salt" in asked.fields and model.kind == "vllm":
        fields["cache_salt"] = asked.fields["cache_salt"]  # what is quoted is cached for its tenant only
    marks = model.thinking
    return Call(
        surface="chat",
        request_id=asked.request_id,
        model=model.upstream,
        fields=fields | {name: _raw(value) for name, value in (more or {}).items()},
        thinking=Thinking(enabled=False, cap=0, start=marks.start, end=marks.end, native=marks.native),
        max_tokens=max_tokens,
        priority=asked.priority,
        is_live=asked.is_live,
        trace_headers=asked.trace_headers,
    )


def is_spent(run: Run, *, tokens: int = 0, nano_usd: int = 0) -> bool:
    """Whether the envelope is spent by what was used, and so much on top."""
    used = run.used()
    try:
        run.envelope.check(tokens=used.tokens + tokens, nano_usd=used.nano_usd + nano_usd, now_s=run.clock())
    except EnvelopeSpent:
        return True
    return False


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
