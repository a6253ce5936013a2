"""Following a publisher over real ZeroMQ sockets: late, with holes, restarted, silent, talking nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from gateway.config.placing import KvEventsConfig
from gateway.kv_events import KvIndex
from gateway.kv_feed import KvFeed
from tests.gateway.test_kv_events import CLEARED, batch, chain, stored

END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """What a vLLM server does: numbers batches from 0, publishes them, replays those that it kept.

    Args:
        folder: of its sockets.
        kept: how many batches it keeps.
    """

    def __init__(self, folder: Path, kept: int = 100) -> None:
        self.config = KvEventsConfig(endpoint=f"ipc://{folder}/events", replay=f"ipc://{folder}/replay")
        self._context = zmq.asyncio.Context()
        self._pub, self._router = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self._pub.setsockopt(zmq.XPUB_VERBOSE, 1)
        self._pub.bind(self.config.endpoint)
        assert self.config.replay is not None
        self._router.bind(self.config.replay)
        self._batches: list[tuple[int, bytes]] = []
        self._kept, self._number = kept, 0
        self.asked: list[int] = []
        self.answers = True

    async def subscribed(self) -> None:
        """Until somebody follows."""
        while (await self._pub.recv())[:1] != b"\x01":
            pass

    async def publish(self, payload: bytes, *, is_lost: bool = False) -> None:
        """The next batch; a lost one reaches nobody, but is kept."""
        self._batches = [*self._batches, (self._number, payload)][-self._kept :]
        if not is_lost:
            await self._pub.send_multipart([b"", self._number.to_bytes(8, "big"), payload])
        self._number += 1

    async def say(self, *frames: bytes) -> None:
        """Anything."""
        await self._pub.send_multipart(list(frames))

    async def replay(self) -> None:
        """Answer who asks for what was missed, until cancelled."""
        while True:
            client, _, start = await self._router.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for number, payload in self._batches if self.answers else ():
                if number >= self.asked[-1]:
                    await self._router.send_multipart([client, b"", b"", number.to_bytes(8, "big"), payload])
            if self.answers:
                await self._router.send_multipart([client, b"", b"", END, b""])

    def close(self) -> None:
        """It died."""
        self._context.destroy(linger=0)


@asynccontextmanager
async def publishing(folder: Path, kept: int = 100) -> AsyncIterator[Publisher]:
    """A publisher that lives for a while."""
    publisher = Publisher(folder, kept)
    replay = asyncio.get_running_loop().create_task(publisher.replay())
    try:
        yield publisher
    finally:
        replay.cancel()
        with suppress(asyncio.CancelledError, zmq.ZMQError):
            await replay
        publisher.close()


@asynccontextmanager
async def following(config: KvEventsConfig, replay_s: float = 30.0) -> AsyncIterator[KvIndex]:
    """An index that is kept up to date meanwhile."""
    index = KvIndex("a")
    feed = asyncio.get_running_loop().create_task(KvFeed(index, config, replay_s=replay_s).run())
    try:
        yield index
    finally:
        feed.cancel()
        with suppress(asyncio.CancelledError):
            await feed
        assert not index.is_live


async def until(holds: Callable[[], bool]) -> None:
    """Give way until something has come to pass; the test's own limit of time ends what never does."""
    while not holds():
        await asyncio.sleep(0)


async def test_who_comes_late_is_told_what_was_published_before(tmp_path: Path) -> None:
    """Batches from before the connection are replayed, later ones arrive by themselves, and all is believed."""
    async with publishing(tmp_path) as publisher:
        await publisher.publish(batch(stored([1])))
        async with following(publisher.config) as index:
            await until(lambda: index.is_live)
            assert (index.exact.overlap(chain(1)), index.is_believed) == (1, True)
            await publisher.publish(batch(stored([2], parent=1), ts=2.0))
            await until(lambda: index.exact.overlap(chain(1, 2)) == 2)
        assert publisher.asked == [0]


async def test_a_hole_is_closed_by_a_replay(tmp_path: Path) -> None:
    """A batch that was lost on its way is asked for, from the last one that arrived."""
    async with publishing(tmp_path) as publisher, following(publisher.config) as index:
        await publisher.subscribed()
        await until(lambda: index.is_live)
        await publisher.publish(batch(stored([1])))
        await publisher.publish(batch(stored([2]), ts=2.0), is_lost=True)
        await publisher.publish(batch(stored([3]), ts=3.0))
        await until(lambda: index.exact.overlap(chain(3)) == 1)
        assert (index.exact.overlap(chain(2)), index.is_believed, index.counts["gaps"]) == (1, True, 1)
        assert publisher.asked == [0, 0]


async def test_a_hole_that_cannot_be_closed_costs_trust_until_the_cache_is_cleared(tmp_path: Path) -> None:
    """What the server no longer keeps is lost: nothing is believed until everything is cleared."""
    async with publishing(tmp_path, kept=1) as publisher, following(publisher.config) as index:
        await publisher.subscribed()
        await until(lambda: index.is_live)
        await publisher.publish(batch(stored([1])))
        await until(lambda: len(index.exact) == 1)
        await publisher.publish(batch(stored([2])), is_lost=True)
        await publisher.publish(batch(stored([3])), is_lost=True)
        await publisher.publish(batch(stored([4])))
        await until(lambda: index.exact.overlap(chain(4)) == 1)
        assert (len(index.exact), index.is_believed, index.counts["lost"]) == (1, False, 1)
        await publisher.publish(batch(CLEARED))
        await until(lambda: index.is_believed)
        assert len(index.exact) == 0


async def test_without_a_replay_a_hole_costs_trust_at_once(tmp_path: Path) -> None:
    """Where nothing is replayed, an index follows from batch 0 and is lost with the first hole."""
    async with publishing(tmp_path) as publisher:
        async with following(publisher.config.model_copy(update={"replay": None})) as index:
            await publisher.subscribed()
            await publisher.publish(batch(stored([1])))
            await until(lambda: index.is_believed)
            await publisher.publish(batch(stored([2])), is_lost=True)
            await publisher.publish(batch(stored([3])))
            await until(lambda: index.exact.overlap(chain(3)) == 1)
            assert (len(index.exact), index.is_believed) == (1, False)
        assert publisher.asked == []


async def test_a_restarted_server_has_nothing_and_is_followed_again(tmp_path: Path) -> None:
    """While a server is away nothing is asked; the one that answers next begins with an empty index."""
    async with publishing(tmp_path) as publisher, following(publisher.config) as index:
        await publisher.subscribed()
        await until(lambda: index.is_live)
        await publisher.publish(batch(stored([1])))
        await until(lambda: len(index.exact) == 1)
        publisher.close()
        await until(lambda: not index.is_live)
        async with publishing(tmp_path) as other:
            await other.publish(batch(stored([7]), ts=7.0))
            await until(lambda: index.is_live)
            assert [index.exact.overlap(chain(block)) for block in (1, 7)] == [0, 1]
            assert (index.is_believed, index.counts["restarts"]) == (True, 1)


async def test_the_same_server_after_a_lost_connection_keeps_its_index(tmp_path: Path) -> None:
    """Where the last batch is replayed as it was, what was known stays, and what was missed is added."""
    async with publishing(tmp_path) as publisher:
        payloads = [batch(stored([1])), batch(stored([2]), ts=2.0)]
        await publisher.publish(payloads[0])
        async with following(publisher.config) as index:
            await until(lambda: index.is_live)
            publisher.close()
            await until(lambda: not index.is_live)
            async with publishing(tmp_path) as same:
                for payload in payloads:
                    await same.publish(payload)
                await until(lambda: index.is_live)
                assert [index.exact.overlap(chain(block)) for block in (1, 2)] == [1, 1]
                assert index.counts["restarts"] == 0


async def test_a_replay_that_says_nothing_is_not_waited_for_forever(tmp_path: Path) -> None:
    """A server whose replay is silent is followed all the same, without trust."""
    async with publishing(tmp_path) as publisher:
        publisher.answers = False
        async with following(publisher.config, replay_s=0.01) as index:
            await publisher.subscribed()
            await until(lambda: index.is_live)
            assert not index.is_believed
            await publisher.publish(batch(stored([1])))
            await until(lambda: index.exact.overlap(chain(1)) == 1)


@pytest.mark.parametrize("frames", [(b"",), (b"", b"short", b""), (b"", bytes(8), b"\xff"), (b"", b"\xff" * 8, b"x")])
async def test_nonsense_ends_nothing(tmp_path: Path, frames: tuple[bytes, ...]) -> None:
    """Whatever somebody publishes, the feed goes on."""
    async with publishing(tmp_path) as publisher, following(publisher.config) as index:
        await publisher.subscribed()
        await until(lambda: index.is_live)
        await publisher.say(*frames)
        await publisher.publish(batch(stored([1])))
        await publisher.publish(batch(CLEARED, stored([2])))
        await until(lambda: index.exact.overlap(chain(2)) == 1)
        assert index.is_live
