"""Writes of one turn go out together."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from gateway.edge.coalesce import MOST_HELD_BYTES, CoalescedTransport

pytestmark = pytest.mark.anyio


class Wire:
    """A transport that remembers what happened to it."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def write(self, data: bytes) -> None:
        """Remember."""
        self.events.append(data)

    def close(self) -> None:
        """Remember."""
        self.events.append("close")

    def abort(self) -> None:
        """Remember."""
        self.events.append("abort")

    def is_closing(self) -> bool:
        """A method that is not about writing."""
        return "close" in self.events


def coalesced() -> tuple[CoalescedTransport, Wire]:
    """A wrapped wire."""
    wire: Any = Wire()
    return CoalescedTransport(wire, asyncio.get_running_loop()), wire


async def test_writes_of_one_turn_are_one_write_after_it() -> None:
    """Head and body of a response become one system call, in order, once the turn's other work is done."""
    transport, wire = coalesced()
    transport.write(b"head")
    transport.write(b"body")
    assert wire.events == []
    await asyncio.sleep(0)
    assert wire.events == [b"headbody"]
    transport.write(b"next")
    await asyncio.sleep(0)
    assert wire.events == [b"headbody", b"next"]


async def test_large_writes_are_not_held() -> None:
    """What is held is bounded, so that flow control sees large responses at once."""
    transport, wire = coalesced()
    transport.write(b"a")
    transport.write(b"b" * MOST_HELD_BYTES)
    assert wire.events == [b"a" + b"b" * MOST_HELD_BYTES]


async def test_close_sends_what_is_held_first() -> None:
    """Nothing that was written is lost by closing."""
    transport, wire = coalesced()
    transport.write(b"last")
    transport.close()
    await asyncio.sleep(0)
    assert wire.events == [b"last", "close"]
    assert transport.is_closing()


async def test_abort_drops_what_is_held() -> None:
    """A connection that is cut sends nothing more."""
    transport, wire = coalesced()
    transport.write(b"never")
    transport.abort()
    await asyncio.sleep(0)
    assert wire.events == ["abort"]


async def test_nothing_is_written_to_a_connection_that_was_lost_meanwhile() -> None:
    """The peer may close in the very turn in which something was held back: that is dropped without an error."""
    transport, wire = coalesced()
    transport.write(b"never")
    wire.close()
    await asyncio.sleep(0)
    assert wire.events == ["close"]
