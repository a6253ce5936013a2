"""Following a vLLM server's KV events over ZeroMQ, for as long as the backend is in use.

Owns: the sockets, catching up after a connection or a hole, and going on whatever arrives. Does not own: what the
events mean, nor whether one is missing (kv_events.py).

ZeroMQ connects again by itself, and says so only to a monitor: each time it does, the server may be another one. So the
last batch taken is asked for again. If it is the same, so is the server; if not, everything begins anew.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

if TYPE_CHECKING:
    from gateway.config.placing import KvEventsConfig
    from gateway.kv_events import KvIndex

log = logging.getLogger("thinkgate.kv")
END = -1  # the number of the message after the last that is replayed
MOST_BYTES = 64 * 1024 * 1024
MOST_WAITING = 100_000  # messages; vLLM keeps as many
HEARTBEAT_MS, SILENT_MS = 5_000, 15_000
RECONNECT_MS, RECONNECT_MOST_MS = 100, 5_000
REPLAY_S = 5.0  # without a message
AGAIN_S = 5.0


class KvFeed:
    """Keeps one index up to date.

    Args:
        index: what the events are for.
        config: where they come from, host filled in.
        replay_s: how long a replay may say nothing.
    """

    def __init__(self, index: KvIndex, config: KvEventsConfig, *, replay_s: float = REPLAY_S) -> None:
        self._index = index
        self._config = config
        self._replay_s = replay_s

    async def run(self) -> None:
        """Follow, until cancelled; a failure is logged, and it begins again."""
        while True:
            try:
                await self._follow()
            except zmq.ZMQError as exc:
                log.warning("kv events not followed", extra={"endpoint": self._config.endpoint, "reason": str(exc)})
            except Exception:  # a bug here must not take the backend down
                log.exception("kv events not followed", extra={"endpoint": self._config.endpoint})
                self._index.lose("the gateway failed")
            finally:
                self._index.disconnected()
            await asyncio.sleep(AGAIN_S)

    async def _follow(self) -> None:
        socket = self._socket(zmq.SUB)
        monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            socket.subscribe(self._config.topic)
            poller = zmq.asyncio.Poller()
            for each in (monitor, socket):
                poller.register(each, zmq.POLLIN)
            socket.connect(self._config.endpoint)
            while True:
                ready = dict(await poller.poll())
                if monitor in ready:
                    event = (await recv_monitor_message(monitor))["event"]
                    await self._connected() if event == zmq.EVENT_HANDSHAKE_SUCCEEDED else self._index.disconnected()
                elif socket in ready:
                    await self._heard(await socket.recv_multipart())
        finally:
            socket.disable_monitor()
            monitor.close(linger=0)
            socket.close(linger=0)

    async def _connected(self) -> None:
        """The server may be another one than before. Without a replay its next batch tells."""
        if self._config.replay is None:
            return
        index = self._index
        is_caught_up = await self._catch_up()
        if not is_caught_up and not index.is_new():
            index.start_over()
            is_caught_up = await self._catch_up()
        if not is_caught_up:
            index.lose("nothing is replayed")
        index.is_live = True

    async def _heard(self, frames: list[bytes]) -> None:
        index, message = self._index, _message(frames)
        if message is None:
            index.counts["malformed"] += 1
            return
        if not index.take(*message):
            index.counts["gaps"] += 1
            if self._config.replay is None or not (await self._catch_up() and index.take(*message)):
                index.lose("batches are missing", message[0])
                index.take(*message)
        index.is_live = True

    async def _catch_up(self) -> bool:
        """Have everything replayed from the last batch that was taken; whether that worked."""
        index = self._index
        while True:
            begin = index.asks_from()
            try:
                is_whole = await self._replay(begin)
            except TimeoutError:
                return False
            if is_whole or index.asks_from() == begin:
                return is_whole
            # A ROUTER drops what a slow reader does not take in time: go on where that was.

    async def _replay(self, begin: int) -> bool:
        """Take up what a server kept, from this batch on, up to its end. Raises: TimeoutError.

        Returns: whether the first one was the last that was taken, where there was one, and none was missing.
        """
        assert self._config.replay is not None
        index, is_checked = self._index, self._index.is_new()
        socket = self._socket(zmq.DEALER)
        try:
            socket.connect(self._config.replay)
            await socket.send_multipart([b"", begin.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(self._replay_s):
                    message = _message(await socket.recv_multipart())
                if message is None:
                    return False
                if message[0] == END:
                    index.caught_up()
                    return is_checked
                if not is_checked and not index.is_last(*message):
                    return False
                if is_checked and not index.take(*message, is_replay=True):
                    return False
                is_checked = True
        finally:
            socket.close(linger=0)

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.RCVHWM, MOST_WAITING)
        socket.setsockopt(zmq.MAXMSGSIZE, MOST_BYTES)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MOST_MS)
        return socket


def _message(frames: list[bytes]) -> tuple[int, bytes] | None:
    """The number and the batch at the end of a message; None if it is none."""
    if len(frames) < 2 or len(frames[-2]) != 8:
        return None
    return int.from_bytes(frames[-2], "big", signed=True), frames[-1]
