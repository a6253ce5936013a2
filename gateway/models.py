"""The models this gateway serves, their backends, and which of those are up.

Owns: one `Slot` per backend with its health, measured capabilities and calls in flight; the loop that
probes backends until they are up and again when they were lost. Does not own: which backend is best
(router/placement.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import random
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from budget.cap import Bounds
from budget.price import PriceTable
from gateway.ask.fields import Switches
from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Backend, Capabilities
from gateway.config.load import backend_api_key
from gateway.enforcement import How, Needs, enforcement
from gateway.errors import GatewayError, Overloaded
from router.placement import Candidate, place

if TYPE_CHECKING:
    from budget.chain import Forcing
    from gateway.config.schema import BackendConfig, Config, ModelConfig

log = logging.getLogger("thinkgate.models")
PROBE_AGAIN_S = 2.0
TRUST_AGAIN_S = 60.0
MOST_TRIED = 1024
TRUST_AGAIN_MOST_S = 3600.0


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
    """

    def __init__(self, config: BackendConfig, build: Callable[[], Backend]) -> None:
        self.config = config
        self.backend = build()
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
        if self._drained is not None and not self.in_flight:
            self._drained.set()

    async def drained(self) -> None:
        """Wait until no call is in flight; for a slot that gets no new ones."""
        if self.in_flight:
            self._drained = asyncio.Event()
            await self._drained.wait()

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
                self.capabilities = await self.backend.probe()
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


class Model:
    """One public name.

    Attributes:
        upstream: its name at the backends.
        kind: of all its backends.
        thinking: how it thinks.
        switches: its template's switches for each mode.
        prices: what its tokens cost.
    """

    def __init__(self, name: str, config: ModelConfig, slots: list[Slot]) -> None:
        self.name = name
        self.config = config
        self.upstream = config.upstream_model or name
        self.slots = slots
        self.kind = config.backends[0].kind
        self.thinking = config.thinking
        if self.kind == "openai" and "off" not in config.thinking.model_fields_set:
            # An unknown server may refuse template switches it never heard of.
            self.thinking = config.thinking.model_copy(update={"off": {}})
        self.scope = f"model:{name}"
        self.switches = Switches(self.thinking)
        price = config.price_usd_per_mtok
        self.prices = (
            PriceTable()
            if price is None
            else PriceTable.from_usd_per_mtok(price.prompt, price.answer, cached=price.cached, thinking=price.thinking)
        )

    def bounds(
        self, key_max: int | None, total_max: int | None, answer_floor: int | None, *, forced: int = 0
    ) -> Bounds:
        """What limits a cap on this model; `forced` tokens are kept back for ending the thinking by force."""
        thinking = self.thinking
        return Bounds(
            model_max=thinking.max_tokens,
            key_max=key_max,
            total_max=total_max,
            window=self.window(),
            answer_floor=thinking.answer_floor_tokens if answer_floor is None else answer_floor,
            forced=forced,
            default=thinking.default_tokens,
            effort_tokens=self.config.effort_tokens,  # type: ignore[arg-type]  # a Literal is a str
        )

    def enforcement(self, needs: Needs) -> tuple[How, str, Forcing | None]:
        """How the backends that are up hold a cap; the first that cannot speaks for all, and says why.

        If none is up, placement will say so.
        """
        how: tuple[How, str, Forcing | None] = ("native", "", None)
        for slot in self.slots:
            if slot.capabilities is not None:
                way, why = enforcement(slot.capabilities, needs, self.thinking.enforce, self.kind)
                how = (way, why, slot.capabilities.forcing)
                if way == "none":
                    break
        return how

    def window(self) -> int | None:
        """The smallest context window of the backends that are up; None if none of them says."""
        up = [slot.capabilities.max_model_len for slot in self.slots if slot.capabilities is not None]
        return min((length for length in up if length is not None), default=None)

    def must_be_read(self) -> bool:
        """Whether whole answers of a backend cannot be passed on as they are, but are read token by token.

        Because its thinking comes as marked text within the content, or because it generates more than it is asked for.
        """
        for slot in self.slots:
            found = slot.capabilities
            if found is not None and (not found.limit_binds or (found.thinking_field or "").startswith("inline")):
                return True
        return False

    def choose(self, without: Collection[Slot] = ()) -> Slot:
        """The slot for the next call. Raises: Overloaded when none is usable."""
        slots = self.slots
        if len(slots) == 1 and slots[0].capabilities is not None and not without:
            return slots[0]
        placement = place(
            [
                Candidate(slot.config.id, slot.is_up and slot not in without, slot.in_flight, slot.config.weight)
                for slot in slots
            ],
            random.choice,
        )
        if placement is None:
            reasons = "; ".join(f"{slot.config.id}: {slot.failure or 'unreachable'}" for slot in slots)
            log.info("no backend for request", extra={"model": self.name, "reason": reasons})
            raise Overloaded(f"No backend of {self.name!r} is up at the moment: try again soon.", retry_after_s=2.0)
        return slots[placement.position]


def build_models(config: Config, known: dict[str, Model] | None = None) -> dict[str, Model]:
    """Models of a configuration; a backend whose entry did not change is taken over from `known`.

    Raises: ConfigError when a backend's credential is unset.
    """
    models = {}
    for name, entry in config.models.items():
        old = known.get(name) if known else None
        slots = []
        for backend in entry.backends:
            kept = next((s for s in old.slots if _same(old, s, backend, entry)), None) if old is not None else None
            if kept is None:
                slots.append(Slot(backend, _builder(name, backend, entry, config)))
                if old is not None:
                    _trust(slots[-1], old, entry)
            else:
                slots.append(kept)
        models[name] = Model(name, entry, slots)
    return models


def _same(old: Model, slot: Slot, backend: BackendConfig, entry: ModelConfig) -> bool:
    return (
        slot.config == backend
        and old.config.upstream_model == entry.upstream_model
        and old.config.thinking == entry.thinking
    )


def _trust(slot: Slot, old: Model, entry: ModelConfig) -> None:
    """Until it is probed again, the same server under other settings can do what it could before."""
    for known in old.slots:
        is_same_server = (known.config.kind, known.config.url) == (slot.config.kind, slot.config.url)
        reads_alike = (old.thinking.start, old.thinking.end) == (entry.thinking.start, entry.thinking.end)
        if not (is_same_server and reads_alike and old.config.upstream_model == entry.upstream_model):
            continue
        if isinstance(slot.backend, HttpBackend) and isinstance(known.backend, HttpBackend):
            slot.capabilities = known.capabilities
            slot.backend.capabilities, slot.backend.markers = known.backend.capabilities, known.backend.markers


def _builder(name: str, backend: BackendConfig, entry: ModelConfig, config: Config) -> Callable[[], Backend]:
    def build() -> Backend:
        if backend.kind == "embedded":
            from gateway.backends.embedded import EmbeddedBackend  # noqa: PLC0415  # torch only where it is used

            return EmbeddedBackend(
                id=backend.id, path=backend.path or "", thinking=entry.thinking, on_progress=log.info
            )
        return HttpBackend(
            backend,
            entry.upstream_model or name,
            entry.thinking,
            api_key=backend_api_key(backend.api_key_env, where=f"models.{name}.backends[{backend.id}]"),
            timeouts=config.server.timeouts,
        )

    return build
