"""`thinkgate eval route --log FILE`: decides again what a log says was decided by text, and compares.

Owns: reading request lines and telling what differs. Does not own: the decision (router/judge.py). A log holds
features, never prompts; what was drawn at random is taken as it was drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING

import msgspec

from gateway.edge.extension import DecisionReport
from router.features import NAMES
from router.judge import Policy, judge_score
from router.utility import Arm

if TYPE_CHECKING:
    from router.scorer import Scorer

MOST_TOLD = 20


class _Line(msgspec.Struct):
    """What is read of a request line; other lines have none of it."""

    request_id: str = ""
    decision: DecisionReport | None = None


_decoder = msgspec.json.Decoder(_Line)


def eval_route(lines: Iterable[bytes], scorer: Scorer, out: IO[str]) -> int:
    """Replay every decision; returns the exit status: 1 where one that this scorer made comes out differently."""
    counts: Counter[str] = Counter()
    modes: Counter[str] = Counter()
    for line in lines:
        try:
            found = _decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            counts["lines that are no request"] += bool(line.strip())
            continue
        told = found.decision
        if told is None or not told.scorer:
            continue
        modes[told.mode] += 1
        again = replay(told, scorer)
        is_ours = told.scorer == scorer.digest
        kind = "the same" if again == told else "different" if is_ours else "different under this scorer"
        counts[kind] += 1
        if kind == "different" and counts[kind] <= MOST_TOLD:
            out.write(f"{found.request_id}: {_said(told)}, now {_said(again)}\n")
        elif again.mode != told.mode:
            counts[f"{told.mode} would now be {again.mode}"] += 1
    out.write(f"decided by text: {sum(modes.values())} ({', '.join(f'{n} {m}' for m, n in sorted(modes.items()))})\n")
    out.writelines(f"{what}: {count}\n" for what, count in sorted(counts.items()))
    return 1 if counts["different"] else 0


def replay(told: DecisionReport, scorer: Scorer) -> DecisionReport:
    """What the same features come to now."""
    arms = [Arm(mode=arm.mode, quality=arm.quality, cost_usd=arm.cost_usd, utility=arm.utility) for arm in told.arms]
    policy = Policy(
        on_uncertain=told.on_uncertain,
        quality_floor=told.quality_floor,
        weighed=(lambda _level: arms) if arms and told.by == "utility" else None,
        drawn=(lambda _level: arms) if arms and told.by == "drawn" else None,
    )
    score = scorer.score([told.features.get(name, 0.0) for name in NAMES])
    return DecisionReport.of(judge_score(scorer, score, policy))


def _said(told: DecisionReport) -> str:
    return f"{told.mode} ({told.by}, {told.probability}, difficulty {told.level})"
