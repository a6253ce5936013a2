"""Instant mode: answer at once.

The template's no-think switch is in the call already; thinking that still appears is, the cap being 0,
cut and counted as wasted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.modes.flow import flow

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from gateway.backends.port import Delta
    from gateway.modes.flow import Run


def instant(run: Run) -> AsyncGenerator[list[Delta], None]:
    """The answer's deltas. Raises: whatever the backend raises."""
    return flow(run)
