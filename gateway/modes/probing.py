"""Probes: a short answer asked for in the middle of the thinking, to see whether more thinking changes it.

Owns: making a probe from a chain's own token ids, what it gets read as, and learning from all of them whether they
pay. Does not own: the rule (budget/stopping.py), when a chain pauses (budget/course.py), ending it (chains.py).
"""

from __future__ import annotations

import logging
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from budget.stopping import ProbeWorth, StableAnswer
from budget.vote import boxed
from gateway.backends.port import Segment
from gateway.errors import GatewayError

if TYPE_CHECKING:
    from budget.chain import Chain
    from gateway.backends.port import Backend, Capabilities
    from gateway.config.stopping import StopConfig
    from gateway.modes.flow import Run

log = logging.getLogger("thinkgate.probing")
BOX = "\\boxed{"
GREEDY = {"temperature": msgspec.Raw(b"0")}
MARKERS_TOKENS = 16  # of the markers around a probe's text, at most


def probe_tokens(settings: StopConfig) -> int:
    """The most that one probe takes, in and out; its prompt's prefix was sent before."""
    return len(settings.ask.encode()) + MARKERS_TOKENS + settings.probe_tokens


def usual_tokens(settings: StopConfig) -> int:
    """What one probe usually takes: about a token for four letters, and half of the answer that it may give."""
    return len(settings.ask) // 4 + 2 + settings.probe_tokens // 2


@dataclass(slots=True)
class _Watched:
    """One chain that is probed."""

    rule: StableAnswer
    made: int = 0
    is_over: bool = False


class Probing:
    """The probes of one request.

    Args:
        settings: of its model.
        worth: what is known of all probes of that model.
        run: the request; its tally counts them.
    """

    def __init__(self, settings: StopConfig, worth: ProbeWorth, run: Run) -> None:
        self._settings = settings
        self._worth = worth
        self._run = run
        self._suffix: tuple[int, ...] | None = None
        self._watched: dict[int, _Watched] = {}

    async def begin(self, backend: Backend, found: Capabilities) -> None:
        """Learn what ends the thinking and asks for an answer, in the backend's tokens; without it none is made."""
        if found.forcing is None:
            return
        try:
            asked = await backend.encode(self._settings.ask) if self._settings.ask else []
        except GatewayError:
            return
        self._suffix = (*found.forcing.closing, *found.forcing.after, *asked)

    def every(self, index: int) -> int | None:
        """Thinking tokens between two probes of one more chain; None: it is not probed."""
        if self._suffix is None or not self._worth.begin():
            return None
        self._watched[index] = _Watched(StableAnswer(self._settings.agree))
        return self._settings.every

    async def says_stop(self, index: int, chain: Chain, backend: Backend) -> bool:
        """Make a probe where that is worth it; whether the answer has been the same for long enough."""
        watched, course = self._watched[index], chain.course
        assert course is not None
        course.is_due = False
        if chain.thinking < self._run.call.thinking.min_tokens:
            return False
        room, missing = chain.free(), watched.rule.missing()
        is_worth = self._worth.is_worth(chain.thinking, room, missing=missing, made=watched.made)
        said = None
        if is_worth and watched.made < self._settings.most_probes:
            said = await self._probe(chain, backend)
        if said is None:
            course.stop_pausing()
            return False
        watched.made += 1
        self._run.enforced.probes += 1
        watched.is_over = watched.rule.feed(said)
        return watched.is_over

    def ended(self, index: int, chain: Chain) -> None:
        """A chain has thought: learn from it, once."""
        watched = self._watched.pop(index, None)
        if watched is None or not watched.made:
            self._worth.learn_length(chain.thinking)
        else:
            self._worth.learn(watched.made, stopped=watched.is_over)

    async def _probe(self, chain: Chain, backend: Backend) -> str | None:
        """The answer that the model would give now; None where it cannot be had."""
        run, settings = self._run, self._settings
        assert self._suffix is not None
        prompt = [*chain.ids, *self._suffix]
        segment = Segment(prompt=prompt, max_tokens=settings.probe_tokens, fields=GREEDY)
        run.tally.probe += len(self._suffix)
        text, sampled = "", 0
        try:
            async with aclosing(backend.extend(run.call, segment)) as batches:
                async for batch in batches:
                    for delta in batch:
                        run.tally.probe += len(delta.token_ids)
                        sampled += len(delta.token_ids)
                        text += delta.text
                        if delta.usage is not None:
                            run.enforced.resent_tokens += delta.usage.prompt_tokens
                            run.enforced.resent_cached_tokens += delta.usage.cached_tokens or 0
                    if self._is_whole(text) or sampled > settings.probe_tokens:
                        break
        except GatewayError as exc:
            log.warning("probe failed", extra={"request_id": run.call.request_id, "reason": exc.message})
            return None
        return self._answer(text)

    def _is_whole(self, text: str) -> bool:
        """Whether what is asked for has been said."""
        if BOX in self._settings.ask:
            return boxed(self._settings.ask + text) is not None
        return "\n" in text.lstrip()

    def _answer(self, text: str) -> str:
        """What a probe got; empty where the box was not closed."""
        if BOX in self._settings.ask:
            return boxed(self._settings.ask + text) or ""
        return text.strip().partition("\n")[0]
