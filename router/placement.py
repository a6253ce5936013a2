"""Which backend serves a request. Pure; O(backends of the model).

Filter (usable) -> score (load per weight) -> pick (random among the least loaded), so that no constant
tie-break sends everything to one backend.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """One backend as placement sees it.

    Attributes:
        id: the backend.
        is_usable: up, probed, and able to do what the request needs.
        in_flight: calls counted at decision time, not yet released.
        weight: capacity relative to the model's other backends.
    """

    id: str
    is_usable: bool
    in_flight: int
    weight: float


@dataclass(frozen=True, slots=True)
class Placement:
    """The chosen backend's place in the sequence of candidates, and why."""

    position: int
    reason: str


def place(candidates: Sequence[Candidate], choose: Callable[[Sequence[int]], int]) -> Placement | None:
    """The least loaded usable backend; None when there is none.

    Args:
        candidates: the model's backends.
        choose: picks one of several positions, e.g. `random.choice`.
    """
    usable = [i for i, candidate in enumerate(candidates) if candidate.is_usable]
    if not usable:
        return None
    if len(usable) == 1:
        return Placement(usable[0], "the only usable backend")
    loads = {i: (candidates[i].in_flight + 1) / candidates[i].weight for i in usable}
    least = min(loads.values())
    return Placement(choose([i for i in usable if loads[i] <= least * 1.001]), "least calls in flight by weight")
