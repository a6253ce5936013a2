"""The command line: `thinkgate serve | check | keys | eval | version`."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn
from prometheus_client import start_http_server

from gateway import __version__
from gateway.app import Gateway, clock
from gateway.check import check
from gateway.cli_keys import add_keys_parser, run_keys
from gateway.config_load import ConfigError, load_config
from gateway.http_server import GuardedProtocol, sweep_heads
from gateway.log import configure
from gateway.reload import Reloader

if TYPE_CHECKING:
    from types import FrameType

    from gateway.config import Config

log = logging.getLogger("thinkgate")
CANCELLED_S = 10  # after the drain's time: how long cancelled requests may take to say goodbye
NOT_BUILT = {
    "eval": "the evaluation harness comes with plan-and-budget",
}


class Server(uvicorn.Server):
    """uvicorn, with our drain and reload.

    Args:
        config: uvicorn's.
        gateway: the app it serves.
        reloader: None when there is no file to reload.
    """

    def __init__(self, config: uvicorn.Config, gateway: Gateway, reloader: Reloader | None) -> None:
        super().__init__(config)
        self._gateway = gateway
        self._reloader = reloader

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; the kernel gives up clients that read nothing, also once it has the whole response."""
        await super().startup(sockets)
        patience_ms = int(self._gateway.serving.config.server.timeouts.slow_client_s * 1000)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            for listener in (sock for server in self.servers for sock in server.sockets):
                listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, patience_ms)

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
    async def companions(self) -> AsyncIterator[None]:
        """The tasks that live beside the server: reloading, and the ready line."""
        async with asyncio.TaskGroup() as tasks:
            patience_s = self._gateway.serving.config.server.timeouts.body_s
            running = [
                tasks.create_task(self._announce()),
                tasks.create_task(sweep_heads(self.server_state.connections, patience_s)),
            ]
            if self._reloader is not None:
                asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._reloader.ask)
                running.append(tasks.create_task(self._reloader.run()))
            try:
                yield
            finally:
                for task in running:
                    task.cancel()

    def _is_ready(self) -> bool:
        models = self._gateway.serving.models.values()
        return self.started and all(any(slot.is_up for slot in model.slots) for model in models)

    async def _announce(self) -> None:
        # Ready is a condition over all models and may change with a reload: no single event says it.
        while not self._is_ready():  # noqa: ASYNC110
            await asyncio.sleep(0.1)
        if self.should_exit:
            return
        config = self._gateway.serving.config
        url = f"http://{self.config.host}:{self.servers[0].sockets[0].getsockname()[1]}"
        is_open = self._gateway.serving.keyring.is_open
        auth = "" if is_open else ' -H "Authorization: Bearer $YOUR_KEY"'
        question = {"role": "user", "content": "Name three rivers."}
        body = json.dumps({"model": next(iter(config.models)), "stream": True, "messages": [question]})
        sys.stderr.write(
            f"\nthinkgate {__version__} is ready on {url}/v1 (models: {', '.join(config.models)})\nTry it:\n"
            f"  curl -N {url}/v1/chat/completions -H 'content-type: application/json'{auth} -d '{body}'\n\n"
        )
        sys.stderr.flush()


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    configure()
    try:
        if options.command == "version":
            sys.stdout.write(f"thinkgate {__version__}\n")
            return 0
        if options.command == "check":
            return asyncio.run(check(load_config(options.file), sys.stdout))
        if options.command == "keys":
            return run_keys(options, clock, sys.stdout, sys.stderr)
        if options.command in NOT_BUILT:
            sys.stderr.write(f"thinkgate {options.command} is not built yet: {NOT_BUILT[options.command]}\n")
            return 2
        return _serve(options)
    except ConfigError as exc:
        sys.stderr.write("thinkgate: the configuration cannot be used\n")
        sys.stderr.write("".join(f"  {line}\n" for line in str(exc).split("\n")))
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thinkgate", description="OpenAI-compatible gateway, thinking on a budget.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="run the gateway (without --config: the embedded engine on loopback)")
    serve.add_argument("--config", type=Path, help="configuration file")
    serve.add_argument("--host", help="overrides server.host")
    serve.add_argument("--port", type=int, help="overrides server.port")
    serve.add_argument("--workers", type=int, help="overrides server.workers")
    serve.add_argument("--model", help="without --config: a model folder or Hugging Face id for the embedded engine")
    checker = commands.add_parser("check", help="validate a configuration and probe its backends")
    checker.add_argument("file", type=Path)
    add_keys_parser(commands.add_parser("keys", help="make, list, rotate and revoke keys in the configured store"))
    for name in NOT_BUILT:
        commands.add_parser(name, help="not built yet").add_argument("rest", nargs=argparse.REMAINDER)
    commands.add_parser("version", help="print the version")
    return parser


def _serve(options: argparse.Namespace) -> int:
    overrides = {
        name: getattr(options, name) for name in ("host", "port", "workers") if getattr(options, name) is not None
    }
    config = load_config(options.config, overrides=overrides, embedded_path=options.model)
    for key in config.not_built_yet():
        log.warning("configuration key has no effect yet", extra={"key": key})
    gateway = Gateway(config)
    _start_metrics(config, gateway)
    # Requests make no reference cycles worth finding often; what was imported never dies.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    if sys.platform != "win32":
        import uvloop  # noqa: PLC0415  # not on Windows

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    else:
        runner = asyncio.Runner()
    with runner:
        return runner.run(_run(config, gateway, options.config, overrides))


def _start_metrics(config: Config, gateway: Gateway) -> None:
    metrics = config.server.metrics
    if metrics.port is None:
        return
    try:
        start_http_server(metrics.port, addr=metrics.host, registry=gateway.metrics.registry)
    except OSError as exc:
        raise ConfigError(
            f"server.metrics.port: {metrics.host}:{metrics.port} cannot be bound ({exc.strerror}); "
            "set another, or null for none"
        ) from exc


async def _run(config: Config, gateway: Gateway, path: Path | None, overrides: Mapping[str, object]) -> int:
    server = Server(
        uvicorn.Config(
            gateway,
            host=config.server.host,
            port=config.server.port,
            http=GuardedProtocol,
            loop="none",
            lifespan="on",
            access_log=False,
            log_config=None,
            server_header=False,
            proxy_headers=False,
            backlog=4096,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(config.server.timeouts.drain_s) + CANCELLED_S,
        ),
        gateway,
        None if path is None else Reloader(gateway, path, overrides=overrides),
    )
    async with server.companions():
        await server.serve()
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
