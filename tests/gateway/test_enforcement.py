"""Which way a cap is held, by what was measured."""

from __future__ import annotations

import pytest

from budget.chain import Forcing
from gateway.backends.port import Capabilities
from gateway.enforcement import Needs, Policy, enforcement, instant_enforcement

FORCING = Forcing(opening=(15,), closing=(16,))
HOLDS = Capabilities(cap_binds=True, cap_binds_with_tools=True, instant_is_quiet=True)
BOTH = Capabilities(cap_binds=True, cap_binds_with_tools=False, forcing=FORCING, instant_is_quiet=True)
IDS = Capabilities(cap_binds=False, forcing=FORCING)
NOTHING = Capabilities(detail={"two_phase": "takes no token ids", "cap": "ignored"})
SEEN = Capabilities(thinking_field="reasoning")
PLAIN, TOOLS = Needs(), Needs(has_tools=True)


@pytest.mark.parametrize(
    ("found", "needs", "policy", "kind", "how"),
    [
        (HOLDS, PLAIN, "auto", "vllm", "native"),
        (HOLDS, TOOLS, "auto", "vllm", "native"),
        (BOTH, PLAIN, "auto", "vllm", "native"),
        (BOTH, TOOLS, "auto", "vllm", "two_phase"),
        (BOTH, TOOLS, "native", "vllm", "none"),
        (BOTH, PLAIN, "two_phase", "vllm", "two_phase"),
        (BOTH, Needs(has_envelope=True), "auto", "vllm", "two_phase"),
        (HOLDS, Needs(has_envelope=True), "auto", "vllm", "native"),
        (BOTH, Needs(min_thinking=5), "native", "vllm", "two_phase"),
        (HOLDS, Needs(min_thinking=5), "auto", "vllm", "none"),
        (BOTH, Needs(is_native=False), "auto", "vllm", "two_phase"),
        (HOLDS, Needs(is_native=False), "auto", "vllm", "none"),
        (HOLDS, Needs(is_native=False), "auto", "embedded", "native"),
        (IDS, PLAIN, "auto", "vllm", "two_phase"),
        (IDS, PLAIN, "native", "vllm", "none"),
        (SEEN, Needs(has_media=True), "auto", "vllm", "soft"),
        (IDS, Needs(has_media=True), "auto", "vllm", "none"),
        (BOTH, Needs(has_media=True), "two_phase", "vllm", "none"),
        (SEEN, PLAIN, "auto", "openai", "soft"),
        (NOTHING, PLAIN, "auto", "openai", "none"),
        (NOTHING, PLAIN, "two_phase", "openai", "none"),
        (NOTHING, PLAIN, "auto", "embedded", "none"),
    ],
)
def test_a_cap_is_held_the_surest_way_there_is(
    found: Capabilities, needs: Needs, policy: Policy, kind: str, how: str
) -> None:
    """The backend's own cap if it binds, else from token ids, else softly; what needs ids never goes without."""
    chosen, why = enforcement(found, needs, policy, kind)
    assert chosen == how
    assert bool(why) == (how == "none")


def test_why_not_is_what_was_measured() -> None:
    """The reason names both what the backend ignored and why its chains cannot be continued."""
    assert enforcement(NOTHING, PLAIN, "auto", "embedded")[1] == "ignored; takes no token ids"
    assert "media" in enforcement(BOTH, Needs(has_media=True), "two_phase", "vllm")[1]


def test_instant_mode_prefills_an_empty_block_only_where_the_switch_does_not_work() -> None:
    """A template that switches thinking off is left to do so."""
    assert instant_enforcement(HOLDS, PLAIN) == "native"
    assert instant_enforcement(Capabilities(instant_is_quiet=True, forcing=FORCING), PLAIN) == "switch"
    assert instant_enforcement(IDS, PLAIN) == "two_phase"
    assert instant_enforcement(IDS, Needs(has_media=True)) == "switch"
