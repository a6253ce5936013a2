"""One serving process: uvicorn with our drain, reload and bounds, and what runs beside it.

Owns: the order of starting and stopping, and what is said when the gateway is ready. Does not own: the command line
(cli.py), several processes (workers.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING

import uvicorn

from gateway import __version__
from gateway.edge.http_server import GuardedProtocol, sweep_heads

if TYPE_CHECKING:
    from types import FrameType

    from gateway.app import Gateway
    from gateway.config.schema import Config
    from gateway.reload import Reloader

log = logging.getLogger("thinkgate.server")

CANCELLED_S = 10  # after the drain's time: how long cancelled requests may take to say goodbye
BACKLOG = 4096


class Server(uvicorn.Server):
    """uvicorn, with our drain and reload.

    Args:
        gateway: the app it serves.
        reloader: None when there is no file to reload.
        on_listening: told once that it answers requests, whether or not a backend is up.
        on_ready: told once that every model has a backend, with the port.
        beside: what else runs as long as it serves.
    """

    def __init__(
        self,
        gateway: Gateway,
        reloader: Reloader | None,
        *,
        on_ready: Callable[[int], None],
        on_listening: Callable[[], None] = lambda: None,
        beside: Sequence[Coroutine[None, None, None]] = (),
    ) -> None:
        server = gateway.serving.config.server
        super().__init__(
            uvicorn.Config(
                gateway,
                host=server.host,
                port=server.port,
                http=GuardedProtocol,
                loop="none",
                lifespan="on",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                backlog=BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=int(server.timeouts.drain_s) + CANCELLED_S,
            )
        )
        self._gateway = gateway
        self._reloader = reloader
        self._on_ready = on_ready
        self._on_listening = on_listening
        self._beside = beside
        self._is_broken = False

    def run_to_the_end(self, sockets: list[socket.socket] | None = None) -> int:
        """Serve until a signal says otherwise; returns the exit status.

        Args:
            sockets: bound; without them host and port of the configuration are.
        """
        # Requests make no reference cycles worth finding often; what was imported never dies.
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        if sys.platform != "win32":
            import uvloop  # noqa: PLC0415  # not on Windows

            runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        else:
            runner = asyncio.Runner()
        with runner:
            runner.run(self._serve_with_companions(sockets))
        return self.exit_status()

    def exit_status(self) -> int:
        """0 when it served and was told to end; 1 otherwise."""
        return 0 if self.started and not self._is_broken else 1

    async def _serve_with_companions(self, sockets: list[socket.socket] | None) -> None:
        async with self._companions():
            await self.serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; the kernel gives up clients that read nothing, also once it has the whole response."""
        await super().startup(sockets)
        patience_ms = int(self._gateway.serving.config.server.timeouts.slow_client_s * 1000)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listener in (sock for server in self.servers for sock in server.sockets):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)
        if self.started:
            self._on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop accepting; running requests may finish within the drain time."""
        self._gateway.is_draining = True
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # uvicorn would raise them again after the drain: we exit with 0

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain; what still runs when the drain's time is over is told so and settled."""
        patience_s = self._gateway.serving.config.server.timeouts.drain_s
        timer = asyncio.get_running_loop().call_later(patience_s, self._gateway.watch.cancel_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()

    @contextlib.asynccontextmanager
    async def _companions(self) -> AsyncIterator[None]:
        """The tasks that live beside the server: reloading, the ready line, and what else there is."""
        async with asyncio.TaskGroup() as tasks:
            patience_s = self._gateway.serving.config.server.timeouts.body_s
            sweep = sweep_heads(self.server_state.connections, patience_s)
            work = [self._tell_ready(), self._end_with_the_app(), sweep, *self._beside]
            if self._reloader is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reloader.ask)
                work.append(self._reloader.run())
            running = [tasks.create_task(each) for each in work]
            try:
                yield
            finally:
                for task in running:
                    task.cancel()

    async def _end_with_the_app(self) -> None:
        """An app whose background work broke probes, sweeps and settles no more: better end, and be started anew."""
        while not self.started:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0.1)
        await self.lifespan.shutdown_event.wait()
        if not self.should_exit:
            log.critical("background work has failed, see above: the process ends")
            self._is_broken = self._gateway.is_draining = self.should_exit = True

    def _is_ready(self) -> bool:
        return self.started and self._gateway.is_ready()

    async def _tell_ready(self) -> None:
        # Ready is a condition over all models and may change with a reload: no single event says it.
        while not self._is_ready():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if not self.should_exit:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])


def say_ready(config: Config, port: int, *, is_open: bool) -> None:
    """Say where the gateway is, with a line to paste.

    Args:
        config: in force.
        port: that was bound.
        is_open: anyone is answered.
    """
    host = config.server.host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    auth = "" if is_open else ' -H "Authorization: Bearer $YOUR_KEY"'
    question = {"role": "user", "content": "Name three rivers."}
    body = json.dumps({"model": next(iter(config.models)), "stream": True, "messages": [question]})
    sys.stderr.write(
        f"\nthinkgate {__version__} is ready on {url}/v1 (models: {', '.join(config.models)})\nTry it:\n"
        f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json'{auth} -d '{body}'\n\n"
    )
    sys.stderr.flush()
