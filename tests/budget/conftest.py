"""Fixtures of the ledger tests: each kind of place in turn."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.budget.places import PLACES, SHARED, LeasedPlace, Place


@pytest.fixture(params=sorted(PLACES))
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Place]:
    """Fresh books of each kind."""
    opened = PLACES[request.param](tmp_path)
    yield opened
    await opened.close()


@pytest.fixture(params=SHARED)
async def shared(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[LeasedPlace]:
    """Fresh books of each kind that several processes share."""
    opened = PLACES[request.param](tmp_path)
    assert isinstance(opened, LeasedPlace)
    yield opened
    await opened.close()
