"""When enough was thought: one rule per class, each fed with what a model said and asked whether to go on.

Owns: rules for one chain of thought (answers that stay the same, confidence, repetition, a minimum) and for samples
of one question (adaptive self-consistency, unanimous windows), and whether probing is worth its tokens. Pure and
usable with any
model: no I/O, no clock, no tokeniser. Does not own: making probes (gateway/modes/probing.py), votes (vote.py).

Sources: Dynasor/Certaindex (arXiv 2412.20993), DEER (2504.15895), DeepConf (2508.15260), adaptive consistency
(2305.11860), ESC (2401.10480), s1 (2501.19393).
"""

from __future__ import annotations

import math
import re
from collections import Counter, deque
from collections.abc import Hashable, Sequence

import msgspec

from budget.vote import normalised

UNSURE = re.compile(r"\b(wait|hold|but|okay|no|hmm)\b", re.IGNORECASE)
MOST_WAITS = 8
FIRST_CONTROLS, CONTROL_EVERY, FORGET_EVERY = 4, 16, 8


class StableAnswer:
    """Stop when so many probes in a row have the same answer, and none of them hesitates (Dynasor, Certaindex).

    Args:
        agree: how many; 2 stops early and often, 8 late and seldom.
    """

    def __init__(self, agree: int = 3) -> None:
        assert agree > 0, "it needs a probe to agree"
        self._agree = agree
        self._last = ""
        self._run = 0

    def feed(self, probed: str) -> bool:
        """Take the answer that a probe got; whether to stop."""
        answer = "" if UNSURE.search(probed) else normalised(probed)
        self._run = self._run + 1 if answer and answer == self._last else int(bool(answer))
        self._last = answer
        return self._run >= self._agree

    def missing(self) -> int:
        """How many more equal answers would stop it."""
        return max(0, self._agree - self._run)


class ProbeWorth:
    """Whether probing can save more tokens than it costs, learned from the chains before.

    A probe is worth making while what it may save, the thinking that is still to be expected after enough equal answers
    times the chance that they come, is more than what the probes until then cost. How long chains get by themselves is
    learned from controls, which are not probed at all: the first few, then every 16th. The chance is that of chains
    which had as many probes already: one that many could not stop hardly will be. Only the last chains count, so that
    a model for which probing was off is tried again.

    Args:
        every: thinking tokens between two probes.
        probe_tokens: in and out, of one probe.
        memory: so many chains are remembered.
    """

    def __init__(self, every: int, probe_tokens: int, *, memory: int = 64) -> None:
        self._every = every
        self._probe_tokens = probe_tokens
        self._probed: deque[tuple[int, bool]] = deque(maxlen=memory)  # probes, and whether the last one stopped it
        self._lengths: deque[int] = deque(maxlen=memory)
        self._begun = 0

    def begin(self) -> bool:
        """Whether one more chain may be probed; else it is a control."""
        self._begun += 1
        return len(self._lengths) >= FIRST_CONTROLS and self._begun % CONTROL_EVERY != 0

    def chance(self, made: int = 0) -> float:
        """That probing ends a chain early which so many probes did not; where little is known of such, as for all."""
        whole = (sum(stopped for _, stopped in self._probed) + 1) / (len(self._probed) + 2)
        like = [stopped for probes, stopped in self._probed if probes > made or (probes == made and not stopped)]
        return (sum(like) + 2 * whole) / (len(like) + 2)

    def to_come(self, thinking: int, room: int) -> float:
        """Tokens that a chain which has thought so much is likely to add; all of `room` where none was as long."""
        longer = [length - thinking for length in self._lengths if length > thinking]
        return min(float(room), math.fsum(longer) / len(longer)) if longer else room

    def is_worth(self, thinking: int, room: int, *, missing: int, made: int = 0) -> bool:
        """Whether to make a probe after so many tokens.

        Args:
            thinking: tokens so far.
            room: most that may come.
            missing: equal answers that would stop it.
            made: probes so far.
        """
        saved = self.to_come(thinking, room) - (missing - 1) * self._every
        return self.chance(made) * saved > missing * self._probe_tokens

    def learn(self, probes: int, *, stopped: bool) -> None:
        """A chain with so many probes has ended."""
        self._probed.append((probes, stopped))

    def learn_length(self, thinking: int) -> None:
        """A chain without a probe has thought so much; now and then the oldest that had some is forgotten."""
        self._lengths.append(thinking)
        if self._probed and self._begun % FORGET_EVERY == 0:
            self._probed.popleft()


class ConfidentAnswer:
    """Stop at a break of the thought where the answer induced there is nearly certain (DEER).

    Args:
        above: the mean probability that is certain enough.
        geometric: take the geometric mean, stricter: one doubtful token spoils it.
        most_checks: afterwards nothing is induced any more.
    """

    def __init__(self, above: float = 0.95, *, geometric: bool = False, most_checks: int = 10) -> None:
        self._above = above
        self._geometric = geometric
        self._left = most_checks

    def may_check(self) -> bool:
        """Whether another answer may be induced."""
        return self._left > 0

    def feed(self, logprobs: Sequence[float]) -> bool:
        """Take the log probability of each token of an induced answer, the likeliest one's; whether to stop."""
        self._left -= 1
        if not logprobs:
            return False
        if self._geometric:
            return math.exp(math.fsum(logprobs) / len(logprobs)) > self._above
        return math.fsum(math.exp(one) for one in logprobs) / len(logprobs) > self._above


class SlidingConfidence:
    """Abort a sample whose confidence over a window falls below that of good ones (DeepConf). O(1) per token.

    Args:
        below: as `threshold` finds it.
        window: tokens; before so many nothing is aborted.

    Attributes:
        least: the lowest mean of a window so far; infinite before the first.
    """

    def __init__(self, below: float, window: int = 2048) -> None:
        self._below = below
        self._window = window
        self._held: deque[float] = deque()
        self._sum = 0.0
        self.least = math.inf

    def feed(self, top_logprobs: Sequence[float]) -> bool:
        """Take the log probabilities of the likeliest tokens at one place; whether to abort."""
        confidence = -math.fsum(top_logprobs) / len(top_logprobs) if top_logprobs else 0.0
        self._held.append(confidence)
        self._sum += confidence
        if len(self._held) > self._window:
            self._sum -= self._held.popleft()
        if len(self._held) == self._window:
            self.least = min(self.least, self._sum / self._window)
        return self.least < self._below


def threshold(least: Sequence[float], *, keeps: float = 0.1) -> float:
    """The confidence below which samples are aborted, so that so large a part of the warm-up would have been kept.

    Args:
        least: `SlidingConfidence.least` of each warm-up sample, 16 of them as published.
        keeps: 0.1 is the strict variant (the 90th percentile), 0.9 the lenient one.
    """
    ranked = sorted(least)
    at = (1 - keeps) * (len(ranked) - 1)
    below = int(at)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (at - below) * (ranked[above] - ranked[below])


class RepetitionGuard:
    """Stop thinking that goes in circles: its end is one stretch of tokens over and over.

    Args:
        times: how often a stretch stands there.
        longest: the longest stretch that is looked for, in tokens.
        least: tokens that all its repetitions have together, at least: a short one may well stand thrice.
    """

    def __init__(self, times: int = 4, longest: int = 64, least: int = 48) -> None:
        self._times, self._longest, self._least = times, longest, least
        self._tail: deque[int] = deque(maxlen=max(times * longest, least + longest))
        self._fresh = 0

    def feed(self, ids: Sequence[int]) -> bool:
        """Take the next tokens; whether to stop. Looked at every 16 tokens, so O(longest / 16) per token."""
        self._tail.extend(ids)
        self._fresh += len(ids)
        if self._fresh < 16:
            return False
        self._fresh = 0
        tail = list(self._tail)
        return any(self._repeats(tail, length) for length in range(1, self._longest + 1))

    def _repeats(self, tail: list[int], length: int) -> bool:
        """Whether the tail is one stretch of that length often enough."""
        span = max(self._times * length, self._least)
        return len(tail) >= span and tail[-span + length :] == tail[-span:-length]


class MinimumThinking(msgspec.Struct, frozen=True):
    """The opposite lever: thinking that ends too early is made to go on with "Wait" (s1).

    Attributes:
        least: thinking tokens.
        most_waits: it is not asked more often, whatever it has thought.
    """

    least: int
    most_waits: int = MOST_WAITS

    def goes_on(self, thinking: int, waits: int) -> bool:
        """Whether thinking that ends after so many tokens, and so many times "Wait", must go on."""
        return thinking < self.least and waits < self.most_waits


class AdaptiveConsistency:
    """Stop sampling when the leading answer is the majority with enough certainty (adaptive self-consistency).

    Args:
        sure: the probability, under a Beta posterior of the two leading answers, that the first has the majority.
    """

    def __init__(self, sure: float = 0.95) -> None:
        self._sure = sure
        self._counts: Counter[Hashable] = Counter()

    def feed(self, answer: Hashable) -> bool:
        """Take one more sample's answer; whether to stop."""
        self._counts[answer] += 1
        first, second = [*(count for _, count in self._counts.most_common(2)), 0][:2]
        return majority_chance(first, second) >= self._sure


def majority_chance(first: int, second: int) -> float:
    """P(p > 1/2) where p has the distribution Beta(first + 1, second + 1): a binomial sum, exact. O(first + second)."""
    trials = first + second + 1
    favourable = sum(math.comb(trials, i) for i in range(first + 1))
    return favourable / (1 << trials)


class UnanimousWindow:
    """Stop sampling when all answers of one window are the same (ESC).

    Args:
        size: answers in a window; windows do not overlap.
    """

    def __init__(self, size: int = 5) -> None:
        self._size = size
        self._window: list[Hashable] = []

    def feed(self, answer: Hashable) -> bool:
        """Take one more sample's answer; whether to stop."""
        if len(self._window) == self._size:
            self._window = []
        self._window.append(answer)
        return len(self._window) == self._size and len(set(self._window)) == 1
