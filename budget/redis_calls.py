"""What calls through redis-py need besides: that whoever is cancelled meanwhile notices.

Owns: cancellations that the client loses. Does not own: connections, nor what is said on them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cancellable() -> Iterator[None]:
    """Raises: CancelledError for a cancellation that came inside and was lost.

    redis-py sends with `asyncio.wait_for`, which before Python 3.12 returns as if nothing was asked when the
    cancellation comes in the turn in which the sending is done (CPython 86296).
    """
    task = asyncio.current_task()
    before = 0 if task is None else task.cancelling()
    try:
        yield
    except Exception as exc:  # whatever failed: who was cancelled meanwhile must not go on and mend it
        if task is not None and task.cancelling() > before:
            raise asyncio.CancelledError from exc
        raise
    if task is not None and task.cancelling() > before:
        raise asyncio.CancelledError
