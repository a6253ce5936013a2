"""What every test shares: one event loop, a scripted upstream, and time according to what a test talks to."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.scripted_backend import ScriptedBackend

# Triton decides whether its own functions are compiled or interpreted when it is imported, whoever does that first.
with pytest.MonkeyPatch.context() as patched, contextlib.suppress(ImportError):
    patched.setenv("TRITON_INTERPRET", "1")
    importlib.import_module("triton.language")

E2E = Path(__file__).parent / "e2e"
E2E_TIMEOUT_S = 600


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Async tests run on uvloop, as the gateway does."""
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedBackend]:
    """An upstream server on 127.0.0.1 that says what the test tells it to."""
    async with ScriptedBackend() as backend:
        yield backend


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything under e2e/ and give it minutes; skip GPU tests where there is no GPU."""
    for item in items:
        if E2E in item.path.parents:
            item.add_marker(pytest.mark.e2e)
        if item.get_closest_marker("e2e") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu and not _has_gpu():
        for item in on_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def _has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())
