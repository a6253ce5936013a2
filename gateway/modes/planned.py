"""Reasoning along a plan: the planner is asked, then the mode goes on within the courses that follow from it.

Owns: the order of the two. Does not own: either of them (planner.py, courses.py, chains.py).
"""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.modes.courses import Courses
    from gateway.modes.flow import Batches
    from gateway.modes.planner import Planner


async def planned(source: Batches, courses: Courses, planner: Planner) -> Batches:
    """A mode's deltas, once there is a plan, or a reason to do without. Raises: what `source` raises."""
    async with aclosing(source) as batches:
        if courses.plan is None:
            courses.plan = await planner.plan()
        async for deltas in batches:
            yield deltas
