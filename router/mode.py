"""Which mode a request gets: by structure first, which is free and certain, and by its text only then. Pure.

O(1) by structure. The decision carries its reason, which ends up in the response, the log and the metrics.
Structure never says agentic: a client's own tools, and their results in the history, are the client's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal, NamedTuple

from router.judge import Verdict
from router.utility import Mode

__all__ = ["MODES", "Cascade", "Mode", "ModeDecision", "ModeFacts", "ModeForbidden", "When", "decide_mode"]
MODES: tuple[Mode, ...] = ("instant", "reasoning")
When = Literal["off", "uncertain", "always"]


class ModeForbidden(Exception):
    """The request names a mode that its key may not use.

    Attributes:
        mode: the mode asked for.
        allowed: the modes the key may use.
    """

    def __init__(self, mode: Mode, allowed: Collection[str]) -> None:
        super().__init__(f"{mode} is not among {sorted(allowed)}")
        self.mode = mode
        self.allowed = allowed


class ModeFacts(NamedTuple):
    """What the decision rests on.

    Attributes:
        asked: the mode the request names or implies; `auto` if none.
        asked_by: the field that did.
        allowed: the key's modes; None for all.
        default_mode: `routing.default_mode`.
        on_uncertain: `routing.on_uncertain`.
        thinking_room: tokens of thinking that limits leave for this request.
        is_native: the model thinks by itself; another one thinks only when asked to.
        continues: the request goes on from a message of the assistant's, where no thinking can begin.
        read: asks the text; None where it cannot be asked.
        cascade: for which requests an instant draft shows whether thinking is needed: for none, those that neither
            structure nor text decides, or all that structure does not decide.
        hindrance: why none can be judged here; empty where it can.
    """

    asked: Literal["auto", "instant", "reasoning"]
    asked_by: str | None
    allowed: Collection[str] | None
    default_mode: Literal["auto", "instant", "reasoning"]
    on_uncertain: Mode
    thinking_room: int
    is_native: bool = True
    continues: bool = False
    read: Callable[[], Verdict] | None = None
    cascade: When = "off"
    hindrance: str = ""


class Cascade(NamedTuple):
    """An instant draft first, and thinking where the model was not sure of it.

    Attributes:
        runs: it does; else it was to, and `hindrance` says why not.
        instead_of: the mode there would be without it.
        hindrance: as in the facts.
    """

    runs: bool
    instead_of: Mode
    hindrance: str = ""


class ModeDecision(NamedTuple):
    """A mode, and why.

    Attributes:
        mode: with a cascade that runs, reasoning: what it may come to.
        reason: in words.
        verdict: the text's, where it was asked.
        cascade: None where none was to run.
    """

    mode: Mode
    reason: str
    verdict: Verdict | None = None
    cascade: Cascade | None = None


def decide_mode(facts: ModeFacts) -> ModeDecision:
    """Explicit wishes first, then permissions, then room, then the configured default, then the text.

    Raises: ModeForbidden when the request itself names a mode the key may not use.
    """
    if facts.asked != "auto":
        if facts.allowed is not None and facts.asked not in facts.allowed:
            raise ModeForbidden(facts.asked, facts.allowed)
        return ModeDecision(facts.asked, f"asked by {facts.asked_by}")
    only = None if facts.allowed is None else _only_mode(facts.allowed)
    if only is not None:
        return ModeDecision(only, "the key's only mode")
    return _auto(facts)


def _auto(facts: ModeFacts) -> ModeDecision:
    """The mode of a request that names none and may have any."""
    if facts.continues:
        return ModeDecision("instant", "the request continues a message")
    if facts.thinking_room <= 0:
        return ModeDecision("instant", "limits leave no room for thinking")
    if facts.default_mode != "auto":
        return ModeDecision(facts.default_mode, "routing.default_mode")
    if not facts.is_native:
        return ModeDecision("instant", "the model does not think by itself, and nothing asks it to")
    if facts.read is not None:
        verdict = facts.read()
        decision, is_uncertain = ModeDecision(verdict.mode, verdict.reason, verdict), verdict.by == "uncertain"
    else:
        reason = "nothing in the request decides it: routing.on_uncertain"
        decision, is_uncertain = ModeDecision(facts.on_uncertain, reason), True
    if facts.cascade == "always" or (facts.cascade == "uncertain" and is_uncertain):
        cascade = Cascade(not facts.hindrance, decision.mode, facts.hindrance)
        return decision._replace(mode="reasoning" if cascade.runs else decision.mode, cascade=cascade)
    return decision


def _only_mode(allowed: Collection[str]) -> Mode | None:
    """The one mode a key may use; None when it may use several. Raises: ModeForbidden when it may use none."""
    usable = [mode for mode in MODES if mode in allowed]
    if not usable:
        raise ModeForbidden("instant", allowed)
    return usable[0] if len(usable) == 1 else None
