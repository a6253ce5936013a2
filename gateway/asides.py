"""Which calls on the side a request may need, decided before anything is spent, and the most they can use.

Owns: whether a request is planned and by whom, whether it is probed, and what is held for that and for summarising.
Pure. Does not own: making those calls (gateway/modes/planner.py, summary.py), counting them (tally.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from budget.allocate import level_budget
from budget.plan import NoPlan, pays
from budget.price import PriceTable
from gateway.errors import InvalidRequest
from gateway.models import Model
from gateway.modes.courses import Courses
from gateway.modes.planner import most_prompt
from gateway.modes.probing import Probing, probe_tokens
from gateway.modes.summary import most_used

if TYPE_CHECKING:
    from gateway.ask.resolve import Ask
    from gateway.backends.port import Call
    from gateway.edge.extension import CapReport
    from gateway.modes.flow import Run
    from router.judge import Verdict

# What planning an ordinary request takes; the most it may take is held, this is what it is weighed by.
USUAL_PROMPT_TOKENS, USUAL_OUTPUT_TOKENS = 300, 150
HEADINGS_TOKENS = 320  # of a whole plan, about; they leave the answer its room


class Planning(msgspec.Struct, frozen=True):
    """How one request is planned.

    Attributes:
        planner: the model that is asked.
        refused: why nobody is asked after all.
    """

    planner: Model
    refused: NoPlan | None = None


class Aside(NamedTuple):
    """The most that all calls on the side can use.

    Attributes:
        prompt: tokens.
        output: tokens.
        prices: the dearest of the models that are called, by direction; None: the request's own.
    """

    prompt: int = 0
    output: int = 0
    prices: PriceTable | None = None

    def tokens(self) -> int:
        """In and out."""
        return self.prompt + self.output

    def less_prompt(self, tokens: int) -> Aside:
        """The same with so much less to read."""
        return self._replace(prompt=max(0, self.prompt - tokens))


NO_ASIDE = Aside()


def may_be_planned(ask: Ask, model: Model) -> bool:
    """Whether planning is wished for, and what is asked can be planned at all."""
    wish = ask.plan or model.config.plan.default
    return wish == "on" or (wish == "auto" and ask.n == 1 and not (ask.has_tools or ask.min_thinking))


def may_be_probed(ask: Ask, model: Model) -> bool:
    """Whether thinking is probed; not where probes could take from an envelope, or the answer may be a call."""
    bounds = ask.envelope
    is_bounded = bounds is not None and (bounds.tokens is not None or bounds.nano_usd is not None)
    return model.probes is not None and not (is_bounded or ask.has_tools)


def courses_for(ask: Ask, planning: Planning | None, run: Run) -> Courses | None:
    """What the chains of a request that thinks go along; None where that is nothing but their bounds."""
    config, worth = run.model.config, run.model.probes
    probing = Probing(config.stop, worth, run) if worth is not None and may_be_probed(ask, run.model) else None
    if planning is None:
        return None if probing is None else Courses(config.plan, None, probing=probing)
    return Courses(config.plan, planning.planner.name, planning.refused, probing)


def planning_for(
    ask: Ask, model: Model, models: Mapping[str, Model], cap: CapReport, verdict: Verdict | None
) -> Planning | None:
    """How a request that thinks within `cap` is planned; None: it is not.

    Args:
        ask: what the client wants.
        model: where it runs.
        models: by public name, to find the planner in.
        cap: that was decided.
        verdict: what its text said, if that was asked.

    Raises: InvalidRequest when the client insists on a plan that no backend could follow.
    """
    if not may_be_planned(ask, model):
        return None
    level = None if verdict is None or verdict.score is None else verdict.score.level
    if cap.enforcement != "two_phase" or cap.tokens is None:
        is_up = any(slot.capabilities is not None for slot in model.slots)  # else placement says that none is
        if ask.plan == "on" and is_up:
            raise InvalidRequest(
                f"`thinkgate.plan`: {model.name!r} cannot follow a plan here, since its thinking cannot be continued"
                " from token ids: leave it out, or send `auto`.",
                param="thinkgate.plan",
                code="plan_not_possible",
            )
        return None
    planner = models.get(model.config.planner or model.name, model)
    table = model.config.plan.level_tokens
    budget = cap.tokens if not table or level is None else min(cap.tokens, level_budget(level, table))
    is_worth = ask.plan == "on" or pays(budget, planner_tokens(planner.prices, model.prices))
    return Planning(planner, None if is_worth else NoPlan("too_small", level))


def headings_tokens(planning: Planning | None) -> int:
    """Tokens that the headings of a plan's steps are likely to take."""
    return 0 if planning is None or planning.refused is not None else HEADINGS_TOKENS


def planner_tokens(planner: PriceTable, own: PriceTable) -> float:
    """What planning usually takes, in thinking tokens of the model that is planned for: by price, else by number."""
    if not (own.thinking and planner.answer):
        return USUAL_PROMPT_TOKENS + USUAL_OUTPUT_TOKENS
    return (USUAL_PROMPT_TOKENS * planner.prompt + USUAL_OUTPUT_TOKENS * planner.answer) / own.thinking


def aside_of(ask: Ask, model: Model, call: Call, planning: Planning | None, body_bytes: int) -> Aside:
    """The most that planning, probing, and summarising every choice's thinking, takes."""
    if not call.thinking.enabled:
        return NO_ASIDE
    prompt = output = 0
    prices: PriceTable | None = None
    if ask.summary is not None:
        cap = call.thinking.cap
        once = most_used(ask.summary, call.max_tokens if cap is None else min(cap, call.max_tokens))
        prompt, output = ask.n * once[0], ask.n * once[1]
    if may_be_probed(ask, model):
        stop, cap = model.config.stop, call.thinking.cap or call.max_tokens
        output += ask.n * min(stop.most_probes, cap // stop.every) * probe_tokens(stop)
    if planning is not None and planning.refused is None:
        prompt += most_prompt(body_bytes)
        output += model.config.plan.planner_tokens
        if planning.planner.prices != model.prices:
            prices = model.prices.dearest(planning.planner.prices)
    return Aside(prompt, output, prices)
