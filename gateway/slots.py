"""One backend of one model over time: probed until it is up, suspected, lost, trusted again.

Owns: its health, measured capabilities, calls in flight and what placement knows about it; the loop that probes it
until it is up and again when it was lost. Does not own: which backend is best (router/placement.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Backend, Capabilities
from gateway.config.placing import PlacementConfig
from gateway.errors import GatewayError
from gateway.kv_events import KvIndex
from gateway.load import read_load
from gateway.placing import Standing
from router.health import Breaker
from router.hedging import FirstBytes

if TYPE_CHECKING:
    from gateway.config.schema import BackendConfig

log = logging.getLogger("thinkgate.models")
PROBE_AGAIN_S = 2.0
TRUST_AGAIN_S = 60.0
MOST_TRIED = 1024
TRUST_AGAIN_MOST_S = 3600.0
SILENT_POLLS = 30


class Tried:
    """The last MOST_TRIED demands that were found right, by digest."""

    def __init__(self) -> None:
        self._digests: dict[bytes, None] = {}

    def has(self, demand: bytes) -> bool:
        """Whether it was found right before."""
        return hashlib.sha256(demand).digest() in self._digests

    def add(self, demand: bytes) -> None:
        """Remember one; the oldest is forgotten."""
        self._digests[hashlib.sha256(demand).digest()] = None
        if len(self._digests) > MOST_TRIED:
            del self._digests[next(iter(self._digests))]


class Slot:
    """One backend of one model.

    Attributes:
        backend: None until it could be built (the embedded engine loads in the background).
        capabilities: as measured; None while it is down.
        in_flight: calls that were placed here and have not ended.
        failure: why it is down, for humans.
        lies: how often it did not hold a cap that it was measured to hold.
        tried: what answers asked for that the backend found right.
        breaker: lets calls through, or not, by how the last ones ended.
        first_bytes: how long calls waited for theirs here, where calls are hedged.
        up_since_s: when it was found to be up, on the slot's clock.
        standing: what placement knows about it.
        became_free: called when it may have room for one more.
    """

    def __init__(
        self,
        config: BackendConfig,
        build: Callable[[], Backend],
        placement: PlacementConfig | None = None,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.config = config
        self.backend = build()
        self.clock = clock
        self.breaker = Breaker()
        self.first_bytes = FirstBytes()
        self.up_since_s = clock()
        self.became_free: Callable[[], None] = lambda: None
        placement = placement or PlacementConfig()
        tells = placement.index == "exact" and config.kv_events is not None
        self.standing = Standing(config.id, placement, KvIndex(config.id) if tells else None)
        self.capabilities: Capabilities | None = None
        self.in_flight = 0
        self.failure = "not probed yet"
        self.suspect = asyncio.Event()
        self.lies = 0
        self.tried = Tried()
        self._probe_again_s = 0.0
        self._drained: asyncio.Event | None = None

    @property
    def is_up(self) -> bool:
        """Probed, and not lost since."""
        return self.capabilities is not None

    def mark_down(self, why: str) -> None:
        """Take it out of placement until a probe succeeds again."""
        if self.is_up:
            log.warning("backend lost", extra={"backend": self.config.id, "reason": why})
        self.standing.forget()  # whoever answers next there may have been started anew
        self.capabilities = None
        self.failure = why
        self.suspect.set()

    def distrust(self, *, instant: bool = False) -> None:
        """It let thinking go past what it was measured to hold: held another way from now on, until probed again.

        Args:
            instant: it thought in instant mode; else past a cap.
        """
        found = self.capabilities
        if found is None or not (found.instant_is_quiet if instant else found.cap_binds):
            return
        self.lies += 1
        pause_s = min(TRUST_AGAIN_S * 2 ** (self.lies - 1), TRUST_AGAIN_MOST_S)
        log.error("backend ignored its cap", extra={"backend": self.config.id, "not_trusted_s": pause_s})
        if instant:
            found = dataclasses.replace(found, instant_is_quiet=False)
        else:
            detail = {**found.detail, "cap": f"ignored in service, {self.lies} times"}
            found = dataclasses.replace(found, cap_binds=False, cap_binds_with_tools=False, detail=detail)
        self.capabilities = found
        if isinstance(self.backend, HttpBackend):
            self.backend.capabilities = found
        self._probe_again_s = pause_s
        self.suspect.set()

    def note_overrun(self) -> None:
        """It generated more than it was asked for, unwatched: from now on it is watched, until probed again."""
        if self.capabilities is not None and self.capabilities.limit_binds:
            log.error("backend ignored max_tokens", extra={"backend": self.config.id})
            self.capabilities = dataclasses.replace(self.capabilities, limit_binds=False)

    def __enter__(self) -> Backend:
        """Count a call here, from the decision to its end."""
        self.in_flight += 1
        return self.backend

    def __exit__(self, *_: object) -> None:
        """The call has ended."""
        self.in_flight -= 1
        if self.standing.limit is not None:
            self.became_free()
        if self._drained is not None and not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Wait until no call is in flight; for a slot that gets no new ones."""
        if self.in_flight:
            self._drained = asyncio.Event()
            await self._drained.wait()

    async def follow_load(self, poll_s: float, most_waiting: int, bytes_per_token: Callable[[], float]) -> None:
        """Ask what it says of its own load, every `poll_s`, while it is up; more seldom while it says nothing."""
        pause_s = poll_s
        while isinstance(self.backend, HttpBackend):
            await asyncio.sleep(pause_s)
            pause_s = poll_s
            if not self.is_up:
                continue
            load = None
            try:
                load = await read_load(self.backend.pool)
                pause_s = poll_s if load is not None else poll_s * SILENT_POLLS
            except GatewayError as exc:
                log.debug("load not read", extra={"backend": self.config.id, "reason": exc.message})
            if load is None:
                self.standing.unhear()  # its calls will tell
            else:
                self.standing.hear(load, bytes_per_token(), self.in_flight, most_waiting)
            self.became_free()

    async def follow_events(self) -> None:
        """Keep its index up to date by its KV events, if they are followed."""
        where, index = self.config.kv_events, self.standing.kv
        if where is None or index is None:
            return
        from gateway.kv_feed import KvFeed  # noqa: PLC0415  # pyzmq is an extra: without `exact` nobody needs it

        await KvFeed(index, where.at(urlsplit(self.config.url or "").hostname or "")).run()

    async def _wait_down(self, pause_s: float) -> None:
        """Wait before a backend that is not trusted is probed again, or until it is lost altogether."""
        self.suspect.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self.suspect.wait()

    async def keep_up(self) -> None:
        """Probe until it is up; wait until it is suspected; for ever."""
        while True:
            try:
                was_up = self.is_up
                self.capabilities = await self.backend.probe()
                if not was_up:
                    self.up_since_s = self.clock()
                self.failure = ""
                self.suspect.clear()
                log.info("backend up", extra={"backend": self.config.id})
                await self.suspect.wait()
                if self.is_up:
                    await self._wait_down(self._probe_again_s)
            except GatewayError as exc:
                if self.failure != exc.message:
                    log.warning("backend down", extra={"backend": self.config.id, "reason": exc.message})
                self.failure = exc.message
                await asyncio.sleep(PROBE_AGAIN_S)
            except Exception as exc:  # a bug in one backend must not take the others down
                log.exception("probe failed", extra={"backend": self.config.id})
                self.capabilities = None
                self.failure = f"{type(exc).__name__} in the gateway while probing; see its log"
                await asyncio.sleep(PROBE_AGAIN_S * 5)
