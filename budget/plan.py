"""A planner's answer, read: sub-questions with their level and credits, or the reason why there is no plan.

Owns: the schema a planner is asked for, reading and repairing what it says, and whether asking it can pay. A plan that
cannot be used is a value with a reason, never an exception: the request goes on without one. Pure; O(answer). Does not
own: what each step may spend (allocate.py, steps.py), asking the planner (gateway/modes/planner.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

MOST_STEPS = 5
LEVELS = (1, 5)
USUAL_LEVEL = 3
MOST_QUESTION_CHARS = 240
PAYS_FROM = 4  # a plan may cost a quarter of what it shares out
Reason = Literal["not_needed", "too_small", "not_json", "no_steps", "failed", "spent", "unencodable"]

SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "needed": {"type": "boolean"},
        "level": {"type": "integer", "minimum": LEVELS[0], "maximum": LEVELS[1]},
        "steps": {
            "type": "array",
            "maxItems": MOST_STEPS,
            "items": {
                "type": "object",
                "properties": {
                    "question": {"type": "string", "minLength": 1, "maxLength": MOST_QUESTION_CHARS},
                    "level": {"type": "integer", "minimum": LEVELS[0], "maximum": LEVELS[1]},
                    "credits": {"type": "integer", "minimum": 1, "maximum": 100},
                    "independent": {"type": "boolean"},
                },
                "required": ["question", "level", "credits", "independent"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["needed", "level", "steps"],
    "additionalProperties": False,
}


class SubQuestion(msgspec.Struct, frozen=True):
    """One step of a plan.

    Attributes:
        question: what it is to find out, in one line.
        level: how hard the planner thinks it is, 1 to 5.
        credits: its part of the whole effort, above 0; only their proportion counts.
        independent: it needs nothing that another step finds out.
    """

    question: str
    level: int = USUAL_LEVEL
    credits: float = 1
    independent: bool = False


class Plan(msgspec.Struct, frozen=True):
    """One to five sub-questions, in order.

    Attributes:
        steps: at least one.
        level: of the whole, 1 to 5.
        repaired: what the planner said had to be mended before it could be read.
    """

    steps: tuple[SubQuestion, ...]
    level: int = USUAL_LEVEL
    repaired: bool = False


class NoPlan(msgspec.Struct, frozen=True):
    """Why the request is reasoned about without a plan.

    Attributes:
        reason: `not_needed`, the planner says so; `too_small`, nobody asked it, since it would cost too much of the
            budget; `not_json` and `no_steps`, it said nothing that can be used; `failed`, it could not be asked, or
            did not finish; `spent`, the envelope had no room for it; `unencodable`, its questions cannot be put
            before the model.
        level: of the whole, where the planner said one.
    """

    reason: Reason
    level: int | None = None


def pays(budget_tokens: float, planner_tokens: float) -> bool:
    """Whether a plan can be worth its price: what it shares out is about four times what it costs, or more."""
    return budget_tokens >= PAYS_FROM * planner_tokens


def read_plan(text: str) -> Plan | NoPlan:
    """What a planner's answer says; whatever it is, this returns.

    Fences and prose around the object, an object that was cut off, numbers in quotes, credits that are missing or do
    not add up, and steps beyond the fifth (they become part of it) are mended.
    """
    said, is_whole = _object(text)
    if said is None:
        return NoPlan("not_json")
    level = _level(said.get("level"))
    if _flag(said.get("needed")) is False:
        return NoPlan("not_needed", level)
    raw = said.get("steps")
    listed = raw if isinstance(raw, list) else []
    steps = _with_credits([step for step in map(_step, listed) if step is not None])
    if not steps:
        return NoPlan("no_steps", level)
    few = _few(steps)
    is_sound = is_whole and len(steps) == len(listed) <= MOST_STEPS and level is not None
    own = level if level is not None else max(step.level for step in few)
    return Plan(few, own, repaired=not is_sound)


def _object(text: str) -> tuple[dict[str, Any] | None, bool]:
    """The JSON object in a text, and whether it was all of it."""
    start = text.find("{")
    if start < 0:
        return None, False
    try:
        said, end = json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError):
        return _salvaged(text), False
    return (said, not (text[:start] + text[end:]).strip()) if isinstance(said, dict) else (None, False)


def _salvaged(text: str) -> dict[str, Any] | None:
    """The whole steps of an answer that was cut off in a later one."""
    name = text.find('"steps"')
    at = text.find("[", name) + 1 if name >= 0 else 0
    steps: list[Any] = []
    while at:
        begin = text.find("{", at)
        if begin < 0:
            break
        try:
            step, at = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            break
        steps.append(step)
    return {"steps": steps} if steps else None


def _step(said: object) -> SubQuestion | None:
    """One entry of the list, if it asks anything."""
    if isinstance(said, str):
        said = {"question": said}
    if not isinstance(said, dict):
        return None
    question = " ".join(str(said.get("question") or "").split())[:MOST_QUESTION_CHARS]
    if not question:
        return None
    level, credits = _level(said.get("level")), _number(said.get("credits"))
    return SubQuestion(
        question=question,
        level=USUAL_LEVEL if level is None else level,
        credits=max(0.0, credits or 0),
        independent=_flag(said.get("independent")) is True,
    )


def _with_credits(steps: Sequence[SubQuestion]) -> list[SubQuestion]:
    """Steps without credits get as many as the others have on average."""
    given = [step.credits for step in steps if step.credits]
    usual = sum(given) / len(given) if given else 1.0
    return [step if step.credits else msgspec.structs.replace(step, credits=usual) for step in steps]


def _few(steps: Sequence[SubQuestion]) -> tuple[SubQuestion, ...]:
    """At most five steps: those beyond become part of the fifth."""
    kept, rest = steps[: MOST_STEPS - 1], steps[MOST_STEPS - 1 :]
    if len(rest) < 2:
        return tuple(steps)
    last = SubQuestion(
        question="; ".join(step.question for step in rest)[:MOST_QUESTION_CHARS],
        level=max(step.level for step in rest),
        credits=sum(step.credits for step in rest),
        independent=all(step.independent for step in rest),
    )
    return (*kept, last)


def _level(said: object) -> int | None:
    number = _number(said)
    return None if number is None else min(LEVELS[1], max(LEVELS[0], round(number)))


def _number(said: object) -> float | None:
    """A finite number, also one in quotes."""
    if isinstance(said, bool) or not isinstance(said, int | float | str):
        return None
    try:
        number = float(said)
    except (ValueError, OverflowError):
        return None
    return number if abs(number) < 1e9 else None


def _flag(said: object) -> bool | None:
    """True or false, also as a word."""
    words = {"true": True, "yes": True, "false": False, "no": False}
    return said if isinstance(said, bool) else words.get(str(said).strip().lower())
