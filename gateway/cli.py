"""The command line: `thinkgate serve | check | keys | eval | version`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client import start_http_server

from gateway import __version__
from gateway.admin.cli import add_keys_parser, run_keys
from gateway.app import Gateway, clock
from gateway.check import check
from gateway.config.load import ConfigError, load_config
from gateway.eval_route import eval_route
from gateway.judge import load_scorer
from gateway.log import configure
from gateway.metrics_files import registry_of
from gateway.reload import Reloader
from gateway.server import Server, say_ready
from gateway.workers import Source, Workers, metric_folder

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from gateway.config.schema import Config

log = logging.getLogger("thinkgate")


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
        if options.command == "eval":
            return _eval_route(options)
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
    evaluations = commands.add_parser("eval", help="evaluate decisions").add_subparsers(dest="what", required=True)
    route = evaluations.add_parser("route", help="decide again what a log says was decided by text, and compare")
    route.add_argument("--log", type=Path, required=True, help="request lines of the gateway")
    route.add_argument("--scorer", default="builtin", help="as routing.scorer: builtin, or an artefact")
    commands.add_parser("version", help="print the version")
    return parser


def _eval_route(options: argparse.Namespace) -> int:
    scorer = load_scorer(options.scorer)
    if scorer is None:
        raise ConfigError(f"--scorer: {options.scorer!r} is no artefact of this version")
    try:
        with options.log.open("rb") as lines:
            return eval_route(lines, scorer, sys.stdout)
    except OSError as exc:
        raise ConfigError(f"--log: {options.log} cannot be read ({exc.strerror})") from exc


def _serve(options: argparse.Namespace) -> int:
    overrides = {
        name: getattr(options, name) for name in ("host", "port", "workers") if getattr(options, name) is not None
    }
    config = load_config(options.config, overrides=overrides, embedded_path=options.model)
    for key in config.not_built_yet():
        log.warning("configuration key has no effect yet", extra={"key": key})
    if config.server.workers > 1:
        return _serve_with_workers(config, Source(options.config, overrides))
    gateway = Gateway(config)
    _start_metrics(config, gateway.metrics.registry)
    reloader = None if options.config is None else Reloader(gateway, options.config, overrides=overrides)
    server = Server(
        gateway,
        reloader,
        on_ready=lambda port: say_ready(config, port, is_open=gateway.serving.keyring.is_open),
    )
    return server.run_to_the_end()


def _serve_with_workers(config: Config, source: Source) -> int:
    is_open = not config.keys and config.may_be_open()
    with metric_folder() as folder:
        _start_metrics(config, registry_of(folder))
        return Workers(config, source, folder, on_ready=lambda port: say_ready(config, port, is_open=is_open)).run()


def _start_metrics(config: Config, registry: CollectorRegistry) -> None:
    metrics = config.server.metrics
    if metrics.port is None:
        return
    try:
        start_http_server(metrics.port, addr=metrics.host, registry=registry)
    except OSError as exc:
        raise ConfigError(
            f"server.metrics.port: {metrics.host}:{metrics.port} cannot be bound ({exc.strerror}); "
            "set another, or null for none"
        ) from exc


if __name__ == "__main__":
    sys.exit(main())
