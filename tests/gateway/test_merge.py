"""Several streams of deltas as one: order, errors, and how they end together."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing

import pytest

from gateway.backends.port import Delta
from gateway.modes.merge import merged
from tests.gateway.test_cancellation import cancelled_at

TURNS = 50


class Broken(Exception):
    """What a stream may fail with."""


class Streams:
    """Streams that note what became of them.

    Attributes:
        given: batches given so far, by stream.
        ended: streams that have ended, in whatever way.
    """

    def __init__(self) -> None:
        self.given: dict[int, int] = {}
        self.ended: list[int] = []

    async def stream(
        self, index: int, batches: int, end: Exception | asyncio.Event | None = None
    ) -> AsyncGenerator[list[Delta], None]:
        """So many batches, then an error, a wait, or nothing more."""
        try:
            for number in range(batches):
                await asyncio.sleep(0)
                self.given[index] = number + 1
                yield [Delta(index=index, text=str(number))]
            if isinstance(end, Exception):
                raise end
            if end is not None:
                await end.wait()
        finally:
            self.ended.append(index)
            await asyncio.sleep(0)  # closing may take a turn, too


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """An error that nobody retrieved, or a generator that nobody closed, fails the test here."""
    yield
    gc.collect(1)


async def texts(streams: Sequence[AsyncGenerator[list[Delta], None]]) -> list[tuple[int, str]]:
    """Everything that comes out."""
    async with aclosing(merged(streams)) as batches:
        return [(delta.index, delta.text) async for batch in batches for delta in batch]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_each_stream_keeps_its_order(count: int) -> None:
    """All batches come, those of one stream in their order, and streams side by side."""
    streams = Streams()
    out = await texts([streams.stream(i, 5) for i in range(count)])
    for i in range(count):
        assert [text for index, text in out if index == i] == list("01234")
    assert {index for index, _ in out[:count]} == set(range(count))
    assert sorted(streams.ended) == list(range(count))


async def test_a_stream_waits_for_the_reader() -> None:
    """What is not read is not asked for: a few batches are under way, however many there are."""
    streams = Streams()
    async with aclosing(merged([streams.stream(i, 1000) for i in range(3)])) as batches:
        await anext(batches)
        for _ in range(TURNS):
            await asyncio.sleep(0)
        assert sum(streams.given.values()) <= 1 + 3 + 3  # read, in the inbox, in each stream's hand
    assert sorted(streams.ended) == [0, 1, 2]


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("batches", [0, 1, 4])
async def test_the_first_failure_is_raised_as_it_is(failing: int, batches: int) -> None:
    """No group around it; what the stream gave before comes first; the others are closed though they hang."""
    streams, hangs = Streams(), asyncio.Event()
    ends = [Broken("here") if i == failing else hangs for i in range(3)]
    out: list[int] = []

    async def read() -> None:
        async with aclosing(merged([streams.stream(i, batches, end) for i, end in enumerate(ends)])) as source:
            async for batch in source:
                out.extend(delta.index for delta in batch)

    with pytest.raises(Broken, match="here"):
        await read()
    assert out.count(failing) == batches
    assert sorted(streams.ended) == [0, 1, 2]


async def test_several_failures_are_one() -> None:
    """Streams that fail together leave no error behind that nobody reads."""
    streams = Streams()
    with pytest.raises(Broken):
        await texts([streams.stream(i, 2, Broken(str(i))) for i in range(3)])
    assert sorted(streams.ended) == [0, 1, 2]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("after", range(7))
async def test_a_reader_that_leaves_closes_all_of_them(count: int, after: int) -> None:
    """Closing between any two batches ends the streams, before the closing is over, and raises nothing."""
    streams, before = Streams(), asyncio.all_tasks()
    read = 0
    async with aclosing(merged([streams.stream(i, 3, asyncio.Event()) for i in range(count)])) as batches:
        while read < min(after, 3 * count):
            await anext(batches)
            read += 1
    assert len(streams.ended) == len(streams.given)
    assert asyncio.all_tasks() == before


async def test_a_reader_that_fails_closes_all_of_them() -> None:
    """Its own error is what comes out."""
    streams = Streams()

    async def read() -> None:
        async with aclosing(merged([streams.stream(i, 3) for i in range(3)])) as batches:
            async for _ in batches:
                raise Broken("reader")

    with pytest.raises(Broken, match="reader"):
        await read()
    assert sorted(streams.ended) == [0, 1, 2]


@pytest.mark.parametrize("end", [None, Broken])
@pytest.mark.parametrize("count", [1, 3])
async def test_cancelled_at_every_await(count: int, end: Callable[[], Exception] | None) -> None:
    """The reader's cancellation ends the streams and stays a cancellation, wherever it comes."""
    before = asyncio.all_tasks()
    for number in range(1, 100):
        streams, was_cancelled = Streams(), False

        def cancel() -> None:
            nonlocal was_cancelled
            was_cancelled = True
            task = asyncio.current_task()
            assert task is not None
            task.cancel()

        async def work(streams: Streams = streams, cancel: Callable[[], None] = cancel, number: int = number) -> None:
            ends = [end() if end is not None and i == 1 else None for i in range(count)]
            await cancelled_at(texts([streams.stream(i, 3, e) for i, e in enumerate(ends)]), number, cancel)

        task = asyncio.get_running_loop().create_task(work())
        await asyncio.wait([task])
        assert len(streams.ended) >= len(streams.given)
        assert asyncio.all_tasks() == before
        if not was_cancelled:
            break
        # An error that was already on its way may come out instead.
        assert task.cancelled() or isinstance(task.exception(), Broken)
    assert not was_cancelled
    assert number > 4
