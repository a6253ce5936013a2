"""Asking the text of a request which mode it deserves, under one configuration.

Owns: the scorer in force, and what a verdict depends on beside the text: the key's weights, prices, load and
statistics. Does not own: the verdict (router/judge.py), when the text is asked at all (router/mode.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from router.judge import LONG_CHARS, Policy, Verdict, judge
from router.mode import MODES
from router.scorer import Scorer, WrongArtefact, parse_scorer
from router.utility import Arm, Mode, Prior, Statistics, TargetArm

if TYPE_CHECKING:
    from gateway.ask.request import Message
    from gateway.auth import Key
    from gateway.config.routing import Priors, Routing
    from gateway.models import Model

log = logging.getLogger("thinkgate.judge")
MIDDLE = 3
BUILTIN = Path(__file__).parents[1] / "router" / "scorer.json"


class Judge:
    """Verdicts under one configuration.

    Args:
        routing: what is in force.
        statistics: what was seen of each mode so far.
        scorer: reads texts; None: structure alone decides.
        random: for what is drawn where `routing.explore` is on.
    """

    def __init__(
        self, routing: Routing, statistics: Statistics, scorer: Scorer | None, random: Random | None = None
    ) -> None:
        self._routing = routing
        self._statistics = statistics
        self._draw = (random or Random()).betavariate  # noqa: S311  # exploring is no secret
        self.scorer = scorer

    def reader(self, messages: Sequence[Message], media_parts: int) -> Callable[[Key, Model], Verdict] | None:
        """What asks the text of these messages; None without a scorer."""
        return None if self.scorer is None else partial(self.read, messages, media_parts)

    def read(self, messages: Sequence[Message], media_parts: int, key: Key, model: Model) -> Verdict:
        """The verdict on the last thing the user said; O(characters read)."""
        assert self.scorer is not None
        return judge(self.scorer, text_of(messages), self.policy(key, model), has_media=media_parts > 0)

    def picker(
        self, messages: Sequence[Message], media_parts: int
    ) -> Callable[[Key, Sequence[Model], Mode | None], list[TargetArm]]:
        """What weighs models for these messages."""
        return partial(self.weigh, messages, media_parts)

    def weigh(
        self, messages: Sequence[Message], media_parts: int, key: Key, models: Sequence[Model], mode: Mode | None
    ) -> list[TargetArm]:
        """Every model in one mode; with no mode, in all that the key may have, or, if it weighs no money, the text's.

        Without a text that tells it, difficulty is in the middle.
        """
        text, level = text_of(messages), MIDDLE
        if self.scorer is not None and text and not media_parts and len(text) <= LONG_CHARS:
            level = self.scorer.read(text).level
        allowed = [one for one in MODES if key.modes is None or one in key.modes]
        if mode is None and len(allowed) == 1:
            mode = allowed[0]
        if mode is None and not (key.lambda_per_usd or key.quality_floor):
            by_text = self.scorer is not None
            mode = self.read(messages, media_parts, key, models[0]).mode if by_text else self._routing.on_uncertain
        return [
            TargetArm(model.name, arm)
            for model in models
            for arm in self._arms(model, key.lambda_per_usd, level)
            if arm.mode in allowed and mode in {None, arm.mode}
        ]

    def policy(self, key: Key, model: Model) -> Policy:
        """How it is reached for this key and model."""
        routing = self._routing
        weigh = partial(self._arms, model, key.lambda_per_usd) if key.lambda_per_usd or key.quality_floor else None
        return Policy(
            on_uncertain=routing.on_uncertain,
            uncertain_tokens=routing.uncertain_thinking_tokens,
            quality_floor=key.quality_floor,
            weighed=weigh,
            drawn=partial(self._arms, model, key.lambda_per_usd, draw=self._draw) if routing.explore else None,
        )

    def _arms(
        self,
        model: Model,
        lambda_per_usd: float,
        level: int,
        draw: Callable[[float, float], float] | None = None,
    ) -> list[Arm]:
        calls, capacity = sum(s.in_flight for s in model.slots), sum(s.config.weight for s in model.slots)
        busy = 1 + calls / (self._routing.busy_at * capacity)

        def cost_usd(mode: Mode, tokens: float) -> float:
            thinking, answer = (round(tokens), 0) if mode == "reasoning" else (0, round(tokens))
            return model.prices.ceiling_nano_usd(prompt=0, thinking=thinking, answer=answer) * busy / 1e9

        return self._statistics.arms(model.name, level, cost_usd, lambda_per_usd, draw)


def text_of(messages: Sequence[Message]) -> str:
    """The text of the last message of the user's; empty if there is none."""
    for message in reversed(messages):
        if message.role == "user":
            content = message.content
            if content is None or isinstance(content, str):
                return content or ""
            return "\n".join(part.text for part in content if part.text)
    return ""


def priors_of(priors: Priors) -> dict[Mode, Prior]:
    """The configuration's, as the statistics take them."""
    return {
        "instant": Prior(priors.instant.success, priors.instant.tokens),
        "reasoning": Prior(priors.reasoning.success, priors.reasoning.tokens),
    }


def load_scorer(setting: str) -> Scorer | None:
    """The scorer of `routing.scorer`; None for `none`, and, with a warning, where there is none that fits."""
    if setting == "none":
        return None
    path = BUILTIN if setting == "builtin" else Path(setting)
    try:
        return parse_scorer(path.read_bytes())
    except (OSError, WrongArtefact) as exc:
        log.warning("text scorer not used: modes are decided by structure alone", extra={"reason": f"{path}: {exc}"})
        return None
