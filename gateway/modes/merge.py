"""Several streams of deltas as one, in the order they come.

Owns: running them side by side and ending them together, whichever way the reader ends.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from gateway.backends.port import Delta

Batch = list["Delta"]


async def merged(streams: Sequence[AsyncGenerator[Batch, None]]) -> AsyncGenerator[Batch, None]:
    """Batches of all streams; a stream waits while the reader is busy, so nothing piles up.

    Raises: what the first failing stream raises; the others are closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for batch in only:
                yield batch
        return
    inbox: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(maxsize=len(streams))
    try:
        async with asyncio.TaskGroup() as tasks:
            for stream in streams:
                tasks.create_task(_pump(stream, inbox))
            running = len(streams)
            while running:
                item = await inbox.get()
                if item is None:
                    running -= 1
                elif isinstance(item, Exception):
                    raise item
                else:
                    yield item
    except BaseExceptionGroup as group:
        # A task group wraps what its body raised; the reader closing us (GeneratorExit) is such a case.
        raise group.exceptions[0] from None


async def _pump(stream: AsyncGenerator[Batch, None], inbox: asyncio.Queue[Batch | Exception | None]) -> None:
    """Hand on a stream's batches, then its error or None. A task never fails: that would cancel the reader."""
    end: Exception | None = None
    try:
        async with aclosing(stream) as batches:
            async for batch in batches:
                await inbox.put(batch)
    except Exception as exc:  # noqa: BLE001  # handed to the reader, who raises it
        end = exc
    await inbox.put(end)
