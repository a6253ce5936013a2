"""Reload the configuration when its file changes or SIGHUP arrives, without dropping a stream.

Owns: noticing a change (also of the directory's symbolic link, as a ConfigMap swaps it) and what happens
when the new file is bad: the old configuration stays in force, the log and a metric say so.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gateway.config.load import ConfigError, load_config

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.config.schema import Config

log = logging.getLogger("thinkgate.reload")
POLL_S = 1.0
FIXED = ("host", "port", "workers", "metrics", "timeouts", "key_hash_env")


class Reloader:
    """Watches one configuration file for one gateway.

    Args:
        gateway: what to reload.
        path: the file.
        overrides: what the command line said of `server`; it still wins.
    """

    def __init__(self, gateway: Gateway, path: Path, *, overrides: Mapping[str, object] | None = None) -> None:
        self._gateway = gateway
        self._path = path
        self._overrides = overrides
        self._asked = asyncio.Event()
        self._seen = self._fingerprint()

    def ask(self) -> None:
        """Reload now, whether the file changed or not (SIGHUP)."""
        self._asked.set()

    async def run(self) -> None:
        """Watch, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(POLL_S):
                    await self._asked.wait()
            except TimeoutError:
                pass
            was_asked = self._asked.is_set()
            self._asked.clear()
            fingerprint = await asyncio.to_thread(self._fingerprint)
            if was_asked or fingerprint != self._seen:
                self._seen = fingerprint
                await self._reload()

    async def _reload(self) -> None:
        metrics = self._gateway.metrics
        try:
            # In a thread: with thousands of keys, parsing and validation take seconds, and streams would stand still.
            config = await asyncio.to_thread(load_config, self._path, overrides=self._overrides)
            self._refuse_fixed(config)
            self._gateway.reload(config)
        except ConfigError as exc:
            # The problems are the operator's: a traceback would say nothing.
            log.error("configuration refused, the old one stays in force", extra={"problems": str(exc).split("\n")})  # noqa: TRY400
            metrics.reload_failed = True
        except Exception:  # a bug in a reload must not end the streams that run
            log.exception("reload failed, the old configuration stays in force")
            metrics.reload_failed = True
        else:
            metrics.reload_failed = False
            log.info("configuration reloaded", extra={"models": sorted(config.models), "keys": len(config.keys)})
        metrics.reloads.add("refused" if metrics.reload_failed else "accepted")

    def _refuse_fixed(self, config: Config) -> None:
        """What a running process cannot change is said, not ignored. Raises: ConfigError."""
        old, new = self._gateway.serving.config.server, config.server
        changed = [f"server.{name}" for name in FIXED if getattr(old, name) != getattr(new, name)]
        if self._gateway.serving.config.store != config.store:
            changed.append("store")
        if changed:
            raise ConfigError(f"{', '.join(changed)}: cannot change while running: restart instead")

    def _fingerprint(self) -> str:
        """Identity of the file's content and of what the link in its directory points to."""
        try:
            content = self._path.read_bytes()
        except OSError:
            return ""
        return hashlib.sha256(content + str(self._path.resolve()).encode()).hexdigest()
