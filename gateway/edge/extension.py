"""What every response says about thinking and money: the `thinkgate` object and `usage`.

Owns: their shape (docs/api.md, "Responses").
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from budget.degrade import Step
from budget.plan import Reason
from budget.tokens import TokenCounts
from router.features import NAMES

if TYPE_CHECKING:
    from budget.ledger import Amounts
    from gateway.modes.flow import Enforced
    from router.judge import Verdict


SummaryReport = Literal["auto", "concise", "detailed", "failed"]


class CapReport(Struct, kw_only=True, omit_defaults=True):
    """The cap and how it was held.

    Attributes:
        tokens: most thinking tokens per choice; None: no cap could be held.
        source: `request`, `effort`, `default` or `mode` (instant).
        enforcement: `native` (the backend ends the thinking, the gateway counts), `two_phase` (the gateway ends it,
            by continuing from exact token ids), `soft` (cut off, and answered in a second call), `switch` (instant
            mode by the template's switch alone; what thinking still appears is cut), `none`.
        hit: it ended the thinking of some choice.
        overrun_tokens: thinking the backend sent beyond it; dropped, counted as wasted.
        ended_by: what else ended the thinking: `total`, `usd`, `seconds`, `plan` or `stable`.
        waits: how often thinking that ended too early was made to go on.
        resent_tokens: prompt tokens of further segments under two-phase enforcement, and
        resent_cached_tokens: those that the backend had in its prefix cache.
        probes: made, to see whether more thinking changes the answer.
    """

    tokens: int | None
    source: str
    enforcement: str
    hit: bool
    clamped_from: int | None = None
    clamped_by: str | None = None
    overrun_tokens: int = 0
    ended_by: str | None = None
    waits: int = 0
    resent_tokens: int = 0
    resent_cached_tokens: int = 0
    probes: int = 0

    def tell(self, enforced: Enforced, overrun_tokens: int) -> None:
        """Add what holding the cap took."""
        self.enforcement = enforced.how
        self.overrun_tokens = overrun_tokens
        self.ended_by = None if enforced.ended_by == "cap" else enforced.ended_by
        self.waits, self.probes = enforced.waits, enforced.probes
        self.resent_tokens, self.resent_cached_tokens = enforced.resent_tokens, enforced.resent_cached_tokens


class Degraded(Struct, frozen=True, kw_only=True, rename={"was": "from"}):
    """One step down the degrade ladder.

    Attributes:
        step: `cap`, `effort`, `instant` or `model`, another model.
        was: what there was: the cap in tokens, the effort word, the mode or the model.
        to: what there is instead.
        scope: whose limit was short; or the model that was full, or could not serve.
        unit: of what; or `load`, or the code of the model's error.
    """

    step: Step
    was: int | str
    to: int | str
    scope: str
    unit: str


class StepReport(Struct, frozen=True):
    """One step of a plan: its part of the thinking, what it borrowed included, and what it thought."""

    tokens: int
    thinking: int


class PlanReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a plan.

    Attributes:
        outcome: `planned`, or why there was no plan: `not_needed`, `too_small`, `not_json`, `no_steps`, `failed`,
            `spent` or `unencodable`.
        planner: the model that was asked, or would have been.
        level: of the whole task, 1 to 5, where it is known.
        tokens: thinking tokens that the steps shared.
        schedule: how.
        repaired: what the planner said had to be mended.
        steps: those of the first choice that were begun.
    """

    outcome: Reason | Literal["planned"]
    planner: str
    level: int | None = None
    tokens: int = 0
    schedule: str = ""
    repaired: bool = False
    steps: tuple[StepReport, ...] = ()


class Spent(Struct, kw_only=True):
    """Amounts held or settled."""

    tokens: int
    thinking_tokens: int
    nano_usd: int

    @classmethod
    def of(cls, amounts: Amounts) -> Spent:
        """From the ledger's amounts."""
        return cls(tokens=amounts.tokens, thinking_tokens=amounts.thinking_tokens, nano_usd=amounts.nano_usd)


class ArmReport(Struct, frozen=True, kw_only=True):
    """One mode as it was weighed."""

    mode: Literal["instant", "reasoning"]
    quality: float
    cost_usd: float
    utility: float


class DecisionReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the text of a request said, and what that followed from: enough to decide it again.

    Attributes:
        mode: what the text said; `thinkgate.mode` may be less where there was no room, and what a cascade came to.
        by: `text`, `utility`, `drawn` or `uncertain`.
        on_uncertain: `routing.on_uncertain` as it was.
        quality_floor: the key's.
        scorer: the first characters of the artefact's digest; none where the text was not read.
        probability: that thinking pays.
        level: difficulty, 1 to 5.
        features: those that are not 0; numbers, from which no text can be told.
        arms: what was weighed.
    """

    mode: Literal["instant", "reasoning"]
    by: Literal["text", "utility", "drawn", "uncertain"]
    on_uncertain: Literal["instant", "reasoning"]
    quality_floor: float = 0.0
    scorer: str = ""
    probability: float | None = None
    level: int | None = None
    features: dict[str, float] = {}
    arms: tuple[ArmReport, ...] = ()

    @classmethod
    def of(cls, verdict: Verdict) -> DecisionReport:
        """From the text's verdict."""
        score = verdict.score
        on_uncertain, floor = verdict.policy
        return cls(
            mode=verdict.mode,
            by=verdict.by,
            on_uncertain=on_uncertain,
            quality_floor=floor,
            scorer=verdict.scorer,
            probability=None if score is None else score.probability,
            level=None if score is None else score.level,
            features={} if score is None else {n: v for n, v in zip(NAMES, score.features, strict=True) if v},
            arms=tuple(ArmReport(**arm._asdict()) for arm in verdict.arms),
        )


class CascadeReport(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of an instant draft.

    Attributes:
        outcome: `planned` (`/v1/route`: it would run), `accepted` (the draft is the answer), `escalated` (it was thrown
            away, and the request reasoned) or `aside` (none was made).
        reason: why.
        confidence: of the draft, or of the part of it that was too low; the least of all choices.
        least: what it had to reach.
        window_tokens: how many tokens were looked at together.
    """

    outcome: Literal["planned", "accepted", "escalated", "aside"]
    reason: str
    confidence: float | None = None
    least: float | None = None
    window_tokens: int | None = None


class TargetArmReport(Struct, frozen=True, kw_only=True):
    """One model in one mode as it was weighed."""

    model: str
    mode: Literal["instant", "reasoning"]
    quality: float
    cost_usd: float
    utility: float


class TargetReport(Struct, frozen=True, kw_only=True):
    """Which of several models a public name came to.

    Attributes:
        name: as it was asked for.
        model: that it came to.
        reason: why.
        arms: what was weighed.
    """

    name: str
    model: str
    reason: str
    arms: tuple[TargetArmReport, ...]


class Report(Struct, kw_only=True):
    """The `thinkgate` object."""

    mode: str
    mode_reason: str
    capped: bool
    cap: CapReport
    tokens: TokenCounts
    hold: Spent
    settled: Spent
    cost_usd: float
    backend: str
    request_id: str
    ended_by: str | msgspec.UnsetType = msgspec.UNSET
    counted: str | msgspec.UnsetType = msgspec.UNSET
    summary: SummaryReport | msgspec.UnsetType = msgspec.UNSET
    degraded: tuple[Degraded, ...] | msgspec.UnsetType = msgspec.UNSET
    decision: DecisionReport | msgspec.UnsetType = msgspec.UNSET
    cascade: CascadeReport | msgspec.UnsetType = msgspec.UNSET
    target: TargetReport | msgspec.UnsetType = msgspec.UNSET
    plan: PlanReport | msgspec.UnsetType = msgspec.UNSET


class EmbeddingReport(Struct, kw_only=True):
    """The `thinkgate` object of embeddings, where nothing thinks: no mode and no cap."""

    tokens: TokenCounts
    hold: Spent
    settled: Spent
    cost_usd: float
    backend: str
    request_id: str
    counted: str | msgspec.UnsetType = msgspec.UNSET


class RouteReport(Struct, kw_only=True):
    """The answer of `/v1/route`.

    Attributes:
        by_text: the text decided; else structure did, and `text` tells what it would have said.
        text: what the text says; null without a scorer.
        cap: as a response would have it.
        hold: what would be held.
        cascade: whether an instant draft would be judged first; null where none is wanted.
        target: which of several models the name came to; null for a name of one.
    """

    object: str = "thinkgate.route"
    model: str
    mode: str
    mode_reason: str
    by_text: bool
    text: DecisionReport | None
    cap: CapReport
    hold: Spent
    cascade: CascadeReport | None
    target: TargetReport | None
    request_id: str


class Feedback(Struct, forbid_unknown_fields=True):
    """The body of `/v1/feedback`."""

    request_id: Annotated[str, Meta(min_length=1, max_length=128)]
    score: Annotated[float, Meta(ge=0, le=1)]


class PromptTokens(Struct):
    """`usage.prompt_tokens_details`."""

    cached_tokens: int


class CompletionTokens(Struct):
    """`usage.completion_tokens_details`."""

    reasoning_tokens: int


class UsageReport(Struct, kw_only=True):
    """`usage`, as OpenAI defines it."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens

    @classmethod
    def of(cls, counts: TokenCounts) -> UsageReport:
        """From tokens by kind."""
        prompt, completion = counts.prompt + counts.cached, counts.completion()
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokens(counts.cached),
            completion_tokens_details=CompletionTokens(counts.thinking),
        )


_encoder = msgspec.json.Encoder()


def encode(report: Struct) -> bytes:
    """As JSON."""
    return _encoder.encode(report)
