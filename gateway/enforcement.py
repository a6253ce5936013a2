"""Which way a cap is held on a backend, going by what was measured there.

Owns: the choice between the backend's own cap, two-phase enforcement and the soft fallback, and why none
will do. Pure; O(1). Does not own: carrying it out (gateway/modes/).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from gateway.backends.port import Capabilities

How = Literal["native", "two_phase", "soft", "switch", "none"]
Policy = Literal["auto", "native", "two_phase"]


class Needs(NamedTuple):
    """What a request asks of enforcement.

    Attributes:
        is_chat: a chat call; text completions have no thinking to cap.
        has_tools: the client brings tools.
        forces_call: one of them must be called.
        has_media: the prompt is not text only, so that it cannot be rendered as token ids.
        has_envelope: the envelope may have to end the thinking before the cap does.
        min_thinking: thinking may have to be made to go on.
        is_native: the model thinks by itself.
        continues: goes on from a message of the assistant's.
        has_course: thinking is to be led: by a plan, or by probes.
    """

    is_chat: bool = True
    has_tools: bool = False
    forces_call: bool = False
    has_media: bool = False
    has_envelope: bool = False
    min_thinking: int = 0
    is_native: bool = True
    continues: bool = False
    has_course: bool = False


def enforcement(found: Capabilities, needs: Needs, policy: Policy, kind: str) -> tuple[How, str]:
    """How thinking is capped on one backend, and, if it is not, why.

    Args:
        found: what it was measured to do.
        needs: of the request.
        policy: the model's `thinking.enforce`.
        kind: of the backend.
    """
    can_chain = found.forcing is not None and needs.is_chat and not needs.has_media
    binds = bool(found.cap_binds_with_tools if needs.has_tools else found.cap_binds)
    must_prefill = not needs.is_native and kind != "embedded"
    # There a grammar makes forced calls; vLLM's own parsers let them break their schema after thinking.
    makes_calls = needs.forces_call and policy == "auto" and kind == "vllm" and found.tool_format is not None
    must_chain = policy == "two_phase" or needs.has_envelope or needs.min_thinking or must_prefill
    must_chain = must_chain or needs.has_course
    if can_chain and (must_chain or makes_calls):
        return "two_phase", ""
    if policy == "two_phase" or needs.min_thinking or must_prefill:
        return "none", _why_no_chain(found, needs)
    if binds:
        return "native", ""
    if policy == "auto" and can_chain:
        return "two_phase", ""
    return _last_resort(found, needs, policy, kind)


def _last_resort(found: Capabilities, needs: Needs, policy: Policy, kind: str) -> tuple[How, str]:
    """The soft fallback, where thinking can be told from answers and the configuration does not insist on better."""
    name = "cap + tools" if needs.has_tools and found.cap_binds else "cap"
    ignored = found.detail.get(name, "not measured")
    if policy == "native":
        return "none", f"{ignored}, and thinking.enforce is native"
    if kind == "embedded":
        return "none", f"{ignored}; {_why_no_chain(found, needs)}"
    if found.thinking_field is None:
        return "none", f"{ignored}; and no thinking was recognised in its answers"
    return "soft", ""


def instant_enforcement(found: Capabilities, needs: Needs) -> How:
    """How thinking is kept out of instant mode: by the template's switch, else by a prefilled empty chain.

    A model that does not think by itself needs neither; and in the middle of a message no chain can be put. An envelope
    is kept exactly only where the prompt is counted before it is paid for.
    """
    can_chain = needs.is_chat and found.forcing is not None and not needs.has_media and not needs.continues
    if can_chain and (needs.has_envelope or (not found.instant_is_quiet and needs.is_native)):
        return "two_phase"
    return "native" if found.cap_binds else "switch"


def _why_no_chain(found: Capabilities, needs: Needs) -> str:
    if needs.has_media:
        return "prompts with media cannot be rendered as token ids"
    return found.detail.get("two_phase", "choices cannot be continued from token ids here")
