"""Whether a backend is let through, going by how its calls ended; and how often a call may be tried again. Pure.

Owns: the circuit breaker of one backend (closed, open, half-open with one probe), who is an outlier among the backends
of a model, slow start, and the retry budget. Time is passed in, in seconds of any clock that only goes forward.
O(1) per call. Does not own: probes and lost connections (gateway/slots.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

State = Literal["closed", "open", "half_open"]


class Outcomes:
    """How calls ended of late: older ones weigh less, by half every `half_life_s`."""

    def __init__(self, half_life_s: float = 5.0) -> None:
        self._half_life_s = half_life_s
        self._at_s = 0.0
        self._failed = self._total = 0.0

    def add(self, now_s: float, *, failed: bool) -> None:
        """One more."""
        self._age(now_s)
        self._failed += failed
        self._total += 1

    def share(self, now_s: float) -> tuple[float, float]:
        """The part of them that failed, and how many there are to say so."""
        self._age(now_s)
        return (self._failed / self._total if self._total else 0.0), self._total

    def _age(self, now_s: float) -> None:
        if now_s > self._at_s:
            factor = 0.5 ** ((now_s - self._at_s) / self._half_life_s)
            self._failed, self._total, self._at_s = self._failed * factor, self._total * factor, now_s


class Breaker:
    """Lets calls through to one backend, or not.

    It opens after `failures` in a row, or when at least half of at least `enough` recent calls failed; after a pause,
    twice as long each time up to `most_s`, it lets a single call through as a probe, and that call's end decides.

    Args:
        failures: in a row.
        pause_s: the first one.
        most_s: the longest.
        enough: recent calls that say something about the share of failures.
    """

    def __init__(self, failures: int = 5, *, pause_s: float = 2.0, most_s: float = 60.0, enough: float = 8.0) -> None:
        self._failures, self._pause_s, self._most_s, self._enough = failures, pause_s, most_s, enough
        self.outcomes = Outcomes()
        self._in_a_row = 0
        self._opened = 0  # times, since it was last closed for good
        self._until_s: float | None = None
        self._probe_until_s: float | None = None

    def state(self, now_s: float) -> State:
        """Closed: calls pass. Open: none does. Half-open: one may, as a probe."""
        if self._until_s is None:
            return "closed"
        return "open" if now_s < self._until_s else "half_open"

    def allows(self, now_s: float) -> bool:
        """Whether a call may be placed there now."""
        if self._until_s is None:
            return True
        return now_s >= self._until_s and (self._probe_until_s is None or now_s >= self._probe_until_s)

    def placed(self, now_s: float) -> None:
        """A call was placed there; in a half-open breaker it is the probe, for as long as a pause lasts."""
        if self._until_s is not None and now_s >= self._until_s:
            self._probe_until_s = now_s + self._pause_s * 10

    def left(self, placed_s: float) -> None:
        """A call ended that was placed then; if it was the probe and proved nothing, another one may be tried."""
        if self._proves(placed_s):
            self._probe_until_s = None

    def succeeded(self, now_s: float, placed_s: float) -> None:
        """A call answered; one that was placed before the pause was over proves nothing."""
        self.outcomes.add(now_s, failed=False)
        self._in_a_row = 0
        if self.state(now_s) == "half_open" and self._proves(placed_s):
            self.outcomes = Outcomes()
            self._until_s = self._probe_until_s = None
            self._opened = 0

    def failed(self, now_s: float, placed_s: float) -> None:
        """A call failed, by the backend's fault; as before, one of an earlier time does not open it anew."""
        self.outcomes.add(now_s, failed=True)
        self._in_a_row += 1
        state = self.state(now_s)
        if state == "half_open" and self._proves(placed_s):
            self.open(now_s)
        elif state == "closed":
            share, total = self.outcomes.share(now_s)
            if self._in_a_row >= self._failures or (total >= self._enough and share >= 0.5):
                self.open(now_s)

    def _proves(self, placed_s: float) -> bool:
        return self._until_s is None or placed_s >= self._until_s

    def open(self, now_s: float) -> None:
        """Let nobody through for a pause."""
        self._until_s = now_s + min(self._pause_s * 2**self._opened, self._most_s)
        self._probe_until_s = None
        self._opened = min(self._opened + 1, 30)
        self._in_a_row = 0


def outliers(shares: Sequence[tuple[float, float]], *, enough: float = 8.0, worse: float = 0.2) -> list[int]:
    """Positions of backends that fail clearly more often than their peers: outlier ejection. O(backends).

    A backend is one when at least `enough` recent calls say that it fails `worse` more than the mean of the others.
    At most half of the backends are: when most of them fail, the fault is elsewhere.

    Args:
        shares: per backend, the part of recent calls that failed and how many there were.
        enough: calls.
        worse: share.
    """
    if len(shares) < 2:
        return []
    total = sum(share for share, _ in shares)
    found = [
        i
        for i, (share, calls) in enumerate(shares)
        if calls >= enough and share - (total - share) / (len(shares) - 1) >= worse
    ]
    found.sort(key=lambda i: -shares[i][0])
    return found[: len(shares) // 2]


def slow_start(up_for_s: float, over_s: float) -> float:
    """The part of its weight that a backend counts for, from a tenth up to all of it after `over_s`: it is cold."""
    return 1.0 if up_for_s >= over_s else max(0.1, up_for_s / over_s)


class RetryBudget:
    """How many calls may be tried again: a part of the first tries, and a few beside.

    So that when everything fails, the backends get hardly more calls than before. (As in Finagle.)

    Args:
        share: of the first tries.
        per_s: that are free.
        most: that can be saved up; what there is at the beginning.
    """

    def __init__(self, share: float = 0.2, *, per_s: float = 2.0, most: float = 20.0) -> None:
        self._share, self._per_s, self._most = share, per_s, most
        self._left = most
        self._at_s: float | None = None

    def tried(self) -> None:
        """A first try."""
        self._left = min(self._most, self._left + self._share)

    def take(self, now_s: float) -> bool:
        """Whether one more may be tried again; it is taken then."""
        if self._at_s is not None and now_s > self._at_s:
            self._left = min(self._most, self._left + (now_s - self._at_s) * self._per_s)
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True
