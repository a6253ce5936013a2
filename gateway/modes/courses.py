"""What the chains of one request go along: its plan, put before the model in its own tokens.

Owns: turning a plan into headings and parts, giving each chain a course of its own, and telling what became of it.
Does not
own: plans (budget/plan.py), courses (budget/course.py), following them (chains.py).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from budget.allocate import level_budget, shares, whole
from budget.course import Course, Told
from budget.plan import NoPlan, Plan
from budget.steps import Steps
from gateway.edge.extension import PlanReport, StepReport
from gateway.errors import GatewayError

if TYPE_CHECKING:
    from gateway.backends.port import Backend, Call, Capabilities
    from gateway.config.planning import PlanConfig
    from gateway.modes.probing import Probing

_MARKERS = re.compile(r"<\|[^|>]*\|>|</?\w*think\w*>|</?tool_call>", re.IGNORECASE)


class Courses:
    """The courses of one request.

    Args:
        settings: of its model.
        planner: the public name of the model that plans; None: nothing is planned.
        plan: what is known before anybody was asked: a reason why nobody will be.
        probing: of its chains; None: they are not probed.

    Attributes:
        plan: what the planner said; None until it has.
        probing: as given.
    """

    def __init__(
        self,
        settings: PlanConfig,
        planner: str | None,
        plan: Plan | NoPlan | None = None,
        probing: Probing | None = None,
    ) -> None:
        self._settings = settings
        self._planner = planner
        self.plan = plan
        self.probing = probing
        self._budget = 0
        self._weights: Sequence[float] = ()
        self._headings: list[Told] = []
        self._made: list[Course] = []

    async def begin(self, call: Call, backend: Backend, found: Capabilities) -> None:
        """Put the plan, and what probes ask, into the tokens of the backend that will follow it.

        Another backend may have failed before: its chains are forgotten.
        """
        self._made = []
        if self.probing is not None:
            await self.probing.begin(backend, found)
        plan, settings = self.plan, self._settings
        if not isinstance(plan, Plan):
            return
        most, table = call.thinking.cap or 0, settings.level_tokens
        self._budget = min(most, level_budget(plan.level, table)) if table else most
        weights = shares([step.credits for step in plan.steps], settings.schedule, keeps_trend=settings.keeps_trend)
        texts = headings(plan, whole(self._budget, weights), is_single=settings.carry_out == "single")
        self._weights = weights if settings.carry_out == "steps" else [1.0]
        try:
            self._headings = [Told(tuple(await backend.encode(text)), text) for text in texts]
        except GatewayError:
            self._headings = []
        # A marker, or what begins a call, that somehow came through would end the thinking, or never begin.
        forcing = found.forcing
        markers = {found.tool_opener} if forcing is None else {forcing.start_id, forcing.end_id, found.tool_opener}
        if not self._headings or any(markers & set(told.ids) for told in self._headings):
            self.plan = NoPlan("unencodable", plan.level)

    def new(self, index: int) -> Course | None:
        """A course for one more chain; None where nothing leads it."""
        every = None if self.probing is None else self.probing.every(index)
        if not isinstance(self.plan, Plan):
            return None if every is None else Course(every=every)
        steps = Steps(self._budget, self._weights, borrows=self._settings.borrows)
        course = Course(steps, self._headings, every=every)
        self._made.append(course)
        return course

    def report(self) -> PlanReport | None:
        """What became of the plan, as the response tells it: the steps are those of the first choice."""
        plan = self.plan
        if self._planner is None:
            return None
        if not isinstance(plan, Plan):
            reason = "failed" if plan is None else plan.reason
            return PlanReport(outcome=reason, planner=self._planner, level=None if plan is None else plan.level)
        course = self._made[0] if self._made else None
        steps = None if course is None else course.steps
        return PlanReport(
            outcome="planned" if steps is not None else "too_small",
            planner=self._planner,
            level=plan.level,
            tokens=self._budget,
            schedule=self._settings.schedule,
            repaired=plan.repaired,
            steps=() if course is None or steps is None else _begun(steps, course.begun),
        )


def _begun(steps: Steps, count: int) -> tuple[StepReport, ...]:
    return tuple(map(StepReport, steps.caps[:count], steps.used[:count]))


def headings(plan: Plan, tokens: Sequence[int], *, is_single: bool) -> list[str]:
    """What the model reads in its thinking before each step, or, as one, before all of them."""
    count = len(plan.steps)
    lines = [
        f"Step {i} of {count} (about {most} tokens): {_harmless(step.question)}\n"
        for i, (step, most) in enumerate(zip(plan.steps, tokens, strict=True), 1)
    ]
    return ["".join(lines) + "\n"] if is_single else [lines[0], *(f"\n\n{line}" for line in lines[1:])]


def _harmless(question: str) -> str:
    """A question without anything that a model might take for a marker."""
    while (clean := _MARKERS.sub("", question)) != question:
        question = clean
    return question
