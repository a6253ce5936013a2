"""The composition root: what is built is also closed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from gateway.app import Gateway
from gateway.config.schema import Config

PARTS = ["backend 0", "backend 1", "ledger", "records", "lines"]


@pytest.mark.parametrize("failing", PARTS)
async def test_everything_is_closed_whatever_fails(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part that cannot be closed keeps no settlement and no log line of the others back, and is not hushed up."""
    backends = [{"id": name, "url": "http://127.0.0.1:1"} for name in "ab"]
    gateway = Gateway(Config.model_validate({"models": {"m": {"backends": backends}}}))
    closed: list[str] = []

    def close(part: str) -> None:
        closed.append(part)
        if part == failing:
            raise OSError(part)

    def closing(part: str) -> Callable[[], Awaitable[None]]:
        async def closes() -> None:
            close(part)

        return closes

    slots = gateway.serving.models["m"].slots
    owners = [*(slot.backend for slot in slots), gateway.ledger, gateway.stored.records]
    for part, owner in zip(PARTS[:-1], owners, strict=True):
        monkeypatch.setattr(owner, "close", closing(part))
    monkeypatch.setattr(gateway.lines, "close", lambda: close("lines"))
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match=failing)):
        async with gateway._lifespan(gateway):
            assert closed == []
    assert sorted(closed[:2]) == PARTS[:2]
    assert closed[2:] == PARTS[2:]
