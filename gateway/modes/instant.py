"""Instant mode: answer at once. The template's no-think switch is in the call; thinking that still
appears is counted as thinking and, the cap being 0, cut.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.modes.reasoning import capped_flow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.backends.port import Delta
    from gateway.modes.flow import Run


def instant(run: Run) -> AsyncIterator[list[Delta]]:
    """The answer's deltas. Raises: whatever the backend raises."""
    return capped_flow(run)
