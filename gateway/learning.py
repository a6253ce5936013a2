"""What finished requests and their clients' scores teach about modes.

Owns: which requests may still be scored, and telling the statistics. Does not own: the statistics (router/utility.py).
Per process: a score has to reach the process that served the request. At most MOST_REMEMBERED requests; O(1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gateway.errors import EntryNotFound

if TYPE_CHECKING:
    from gateway.auth import Key
    from gateway.modes.flow import Run
    from gateway.prepare import Prepared
    from router.utility import Mode, Statistics

MOST_REMEMBERED = 10_000


class _Served(NamedTuple):
    key: str
    model: str
    mode: Mode
    level: int


class Learning:
    """Requests whose text was asked, by id.

    Args:
        statistics: where to put what is learnt.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._served: dict[tuple[str, str], _Served] = {}

    def __len__(self) -> int:
        """How many may be scored."""
        return len(self._served)

    def saw(self, prepared: Prepared, key: Key, run: Run, request_id: str) -> None:
        """A request ended; it counts if anything was generated and its difficulty is known."""
        verdict = prepared.decision.verdict
        tokens = run.close_books()[0].completion()
        if verdict is None or verdict.score is None or not tokens:
            return
        served = _Served(key.id, prepared.model.name, prepared.decision.mode, verdict.score.level)
        self._statistics.of(*served[1:]).saw_tokens(tokens // prepared.choices)
        if len(self._served) >= MOST_REMEMBERED:
            del self._served[next(iter(self._served))]
        self._served[key.id, request_id] = served

    def score(self, key: Key, request_id: str, score: float) -> None:
        """What a request was worth, 0 to 1; once. Raises: EntryNotFound."""
        served = self._served.pop((key.id, request_id), None)
        if served is None:
            raise EntryNotFound(
                f"There is no request {request_id!r} of this key that may be scored: its text did not decide its mode, "
                "it was scored before, or it is too long ago.",
                param="request_id",
            )
        self._statistics.of(*served[1:]).saw_score(score)
