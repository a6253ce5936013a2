"""A running gateway in front of the scripted backend."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.gateway.live import Live, live, tree_of
from tests.scripted_backend import ScriptedBackend


@pytest.fixture
async def gateway(scripted: ScriptedBackend) -> AsyncIterator[Live]:
    """A gateway without keys and limits; when the test is over, nothing may be held or open."""
    async with live(tree_of(scripted)) as running:
        scripted.forget()
        yield running
