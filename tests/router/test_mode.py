"""Which mode a request gets, and the reason it is told."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from router.judge import By, Verdict
from router.mode import Cascade, Mode, ModeDecision, ModeFacts, ModeForbidden, When, decide_mode

BOTH = frozenset({"instant", "reasoning"})


def facts(**changes: Any) -> ModeFacts:
    """A request that names no mode, from a key without restrictions, with room to think."""
    plain: dict[str, Any] = {
        "asked": "auto",
        "asked_by": None,
        "allowed": None,
        "default_mode": "auto",
        "on_uncertain": "reasoning",
        "thinking_room": 1000,
    }
    return ModeFacts(**{**plain, **changes})


@pytest.mark.parametrize("mode", ["instant", "reasoning"])
@pytest.mark.parametrize("allowed", [None, BOTH, frozenset({"instant", "reasoning", "agentic"})])
@pytest.mark.parametrize("room", [0, 1000])
def test_what_the_request_names_comes_first(mode: str, allowed: frozenset[str] | None, room: int) -> None:
    """An explicit mode wins over every default, and the reason names the field that asked."""
    other = "reasoning" if mode == "instant" else "instant"
    decision = decide_mode(
        facts(
            asked=mode,
            asked_by="thinkgate.mode",
            allowed=allowed,
            thinking_room=room,
            default_mode=other,
            on_uncertain=other,
        )
    )
    assert decision == ModeDecision(mode, "asked by thinkgate.mode")  # type: ignore[arg-type]  # one of the two


@pytest.mark.parametrize(
    ("mode", "allowed"),
    [("instant", {"reasoning"}), ("reasoning", {"instant"}), ("reasoning", {"agentic"}), ("instant", set())],
)
def test_a_mode_the_key_may_not_use_is_refused_not_replaced(mode: str, allowed: set[str]) -> None:
    """A request that names a forbidden mode gets an error with the allowed ones, never another mode."""
    with pytest.raises(ModeForbidden) as refused:
        decide_mode(facts(asked=mode, asked_by="model", allowed=frozenset(allowed)))
    assert (refused.value.mode, set(refused.value.allowed)) == (mode, allowed)


@pytest.mark.parametrize("mode", ["instant", "reasoning"])
def test_a_key_with_one_mode_gets_it(mode: str) -> None:
    """Where the key leaves no choice, neither room nor defaults matter."""
    other = "reasoning" if mode == "instant" else "instant"
    for room, allowed in product((0, 1000), ({mode}, {mode, "agentic"})):
        decision = decide_mode(facts(allowed=frozenset(allowed), thinking_room=room, default_mode=other))
        assert decision == ModeDecision(mode, "the key's only mode")  # type: ignore[arg-type]  # one of the two


def test_a_key_without_a_usable_mode_is_refused() -> None:
    """A key that may only use modes that are not built cannot be served by an automatic choice either."""
    with pytest.raises(ModeForbidden):
        decide_mode(facts(allowed=frozenset({"agentic"})))


@pytest.mark.parametrize("room", [0, -5])
def test_no_room_for_thinking_means_instant(room: int) -> None:
    """When limits leave no thinking tokens, the automatic choice is instant and says why."""
    decision = decide_mode(facts(thinking_room=room, default_mode="reasoning", allowed=BOTH))
    assert decision == ModeDecision("instant", "limits leave no room for thinking")


@pytest.mark.parametrize("mode", ["instant", "reasoning"])
def test_the_configured_default_beats_the_uncertain_choice(mode: str) -> None:
    """`routing.default_mode` decides where the request says nothing."""
    other = "reasoning" if mode == "instant" else "instant"
    decision = decide_mode(facts(default_mode=mode, on_uncertain=other))
    assert decision == ModeDecision(mode, "routing.default_mode")  # type: ignore[arg-type]  # one of the two


@pytest.mark.parametrize("mode", ["instant", "reasoning"])
def test_with_nothing_to_go_by_the_uncertain_choice_is_taken(mode: str) -> None:
    """`routing.on_uncertain` is the last word of an automatic choice."""
    decision = decide_mode(facts(on_uncertain=mode))
    assert decision.mode == mode
    assert decision.reason.endswith("routing.on_uncertain")


def test_every_decision_is_allowed_and_has_a_reason() -> None:
    """Over all combinations of facts, the chosen mode is one the key may use, and the reason is never empty."""
    sets = [None, *(frozenset(s) for s in ((), ("instant",), ("reasoning",), ("agentic",), tuple(BOTH)))]
    for asked, allowed, default, uncertain, room in product(
        ("auto", "instant", "reasoning"),
        sets,
        ("auto", "instant", "reasoning"),
        ("instant", "reasoning"),
        (0, 1),
    ):
        try:
            decision = decide_mode(
                facts(
                    asked=asked,
                    asked_by="x",
                    allowed=allowed,
                    default_mode=default,
                    on_uncertain=uncertain,
                    thinking_room=room,
                )
            )
        except ModeForbidden:
            assert allowed is not None
            assert asked not in allowed if asked != "auto" else not allowed & BOTH
            continue
        assert decision.reason
        assert allowed is None or decision.mode in allowed
        assert asked in ("auto", decision.mode)


def test_a_request_that_continues_a_message_is_instant_unless_it_says_otherwise() -> None:
    """No thinking can begin there: neither the default nor an uncertain case makes it reasoning."""
    decision = decide_mode(facts(continues=True, default_mode="reasoning"))
    assert decision == ModeDecision("instant", "the request continues a message")
    assert decide_mode(facts(continues=True, asked="reasoning", asked_by="x")).mode == "reasoning"


@pytest.mark.parametrize("when", ["off", "uncertain", "always"])
@pytest.mark.parametrize("by", ["text", "utility", "drawn", "uncertain"])
@pytest.mark.parametrize("mode", ["instant", "reasoning"])
def test_a_cascade_takes_the_place_of_what_is_not_certain(when: When, by: By, mode: Mode) -> None:
    """It runs where it is wanted, comes to reasoning at most, and remembers what there would be without it."""
    verdict = Verdict(mode, "so it says", by=by)
    decision = decide_mode(ModeFacts("auto", None, None, "auto", "reasoning", 100, read=lambda: verdict, cascade=when))
    wanted = when == "always" or (when == "uncertain" and by == "uncertain")
    assert decision.cascade == (Cascade(runs=True, instead_of=mode) if wanted else None)
    assert decision.mode == ("reasoning" if wanted else mode)
    assert decision.verdict is verdict


def test_a_cascade_that_is_hindered_changes_nothing() -> None:
    """The mode is what it would be, and the reason is kept."""
    facts = ModeFacts("auto", None, None, "auto", "instant", 100, cascade="always", hindrance="tools")
    decision = decide_mode(facts)
    assert (decision.mode, decision.cascade) == ("instant", Cascade(False, "instant", "tools"))


@pytest.mark.parametrize(
    "facts",
    [
        ModeFacts("instant", "thinkgate.mode", None, "auto", "reasoning", 100, cascade="always"),
        ModeFacts("auto", None, {"reasoning"}, "auto", "reasoning", 100, cascade="always"),
        ModeFacts("auto", None, None, "instant", "reasoning", 100, cascade="always"),
        ModeFacts("auto", None, None, "auto", "reasoning", 0, cascade="always"),
        ModeFacts("auto", None, None, "auto", "reasoning", 100, is_native=False, cascade="always"),
    ],
)
def test_what_structure_decides_has_no_cascade(facts: ModeFacts) -> None:
    """A mode that is asked for, configured, the key's only one or the only one possible is not tried out."""
    assert decide_mode(facts).cascade is None
