"""The models this gateway serves, and their backends.

Owns: what is the same for all backends of a model, and which slots a configuration keeps. Does not own: one backend's
health (slots.py), which backend serves a call (placing.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from importlib.util import find_spec
from typing import TYPE_CHECKING

from budget.cap import Bounds
from budget.price import PriceTable
from budget.stopping import ProbeWorth
from gateway.admission import Admission
from gateway.ask.fields import Switches
from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Backend
from gateway.config.load import ConfigError, backend_api_key
from gateway.enforcement import How, Needs, enforcement
from gateway.errors import Overloaded
from gateway.modes.probing import usual_tokens
from gateway.names import Names
from gateway.placing import Placing, Prompt
from gateway.prompt_ids import PromptIds
from gateway.slots import Slot
from router.health import RetryBudget
from router.hedging import Hedging

if TYPE_CHECKING:
    from budget.chain import Forcing
    from gateway.backends.port import Call
    from gateway.config.routing import Routing
    from gateway.config.schema import BackendConfig, Config, ModelConfig

log = logging.getLogger("thinkgate.models")
NO_ZMQ = "routing.placement.index: exact needs more packages: install thinkgate with the extra `kv-events`"


class Model:
    """One public name.

    Attributes:
        upstream: its name at the backends.
        kind: of all its backends.
        thinking: how it thinks.
        switches: its template's switches for each mode.
        prices: what its tokens cost.
        retries: how many calls may be tried again on another backend.
        hedging: how many may be tried on two at once; None: none.
        admission: where calls wait while all backends are full.
        prompt_ids: token ids of prompts, where an index follows KV events; else None.
        probes: what is known of probing it; None: it is not probed.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        slots: list[Slot],
        routing: Routing,
        *,
        admission: Admission | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.name = name
        self.config = config
        self.clock = clock
        self.retries = RetryBudget(routing.retries.share, most=routing.retries.burst)
        self.retried = 0
        self.upstream = config.upstream_model or name
        self.slots = slots
        self.kind = config.backends[0].kind
        share = routing.hedging.share
        self.hedging = Hedging(share) if share and len(slots) > 1 and self.kind != "embedded" else None
        self.thinking = config.thinking
        if self.kind == "openai" and "off" not in config.thinking.model_fields_set:
            # An unknown server may refuse template switches it never heard of.
            self.thinking = config.thinking.model_copy(update={"off": {}})
        self.scope = f"model:{name}"
        self.placing = Placing(self.upstream, routing.placement)
        self.admission = admission or Admission(name, slots, routing.queue, clock)
        self.admission.use(slots, routing.queue)
        follows = len(slots) > 1 and any(slot.standing.kv is not None for slot in slots)
        self.prompt_ids = PromptIds(slots, routing.placement.tokens_wait_s, clock) if follows else None
        self.switches = Switches(self.thinking)
        stop = config.stop
        self.probes = None if stop.rule == "off" else ProbeWorth(stop.every, usual_tokens(stop))
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

        Because its thinking comes as marked text within the content, or because it generates more than it is asked for;
        or because nobody would see when it begins, and a try that is not seen to begin cannot be hedged.
        """
        if self.hedging is not None:
            return True
        for slot in self.slots:
            found = slot.capabilities
            if found is not None and (not found.limit_binds or (found.thinking_field or "").startswith("inline")):
                return True
        return False

    def prompt(self, call: Call | None) -> Prompt | None:
        """A call as placement sees it; None where there is nothing to choose from."""
        return None if len(self.slots) == 1 else self.placing.prompt(call)

    def choose(self, without: Collection[Slot] = (), prompt: Prompt | None = None) -> Slot:
        """The slot for the next call. Raises: Overloaded when none is usable."""
        slots = self.slots
        if len(slots) == 1 and slots[0].capabilities is not None and not without:
            return slots[0]
        slot = self.placing.choose(slots, without, prompt, self.clock())
        if slot is None:
            reasons = "; ".join(f"{slot.config.id}: {slot.failure or 'unreachable'}" for slot in slots)
            log.info("no backend for request", extra={"model": self.name, "reason": reasons})
            raise Overloaded(f"No backend of {self.name!r} is up at the moment: try again soon.", retry_after_s=2.0)
        return slot


def build_models(config: Config, known: dict[str, Model] | None = None, names: Names | None = None) -> dict[str, Model]:
    """Models of a configuration; a backend whose entry did not change is taken over from `known`.

    `names` knows the addresses of `dns+http://` entries; without it each is one backend under its name.

    Raises: ConfigError when a backend's credential is unset, or a package is missing.
    """
    if config.routing.placement.index == "exact" and find_spec("zmq") is None:
        raise ConfigError(NO_ZMQ)
    models = {}
    for name, entry in config.models.items():
        if entry.targets:
            continue  # a name for others
        old = known.get(name) if known else None
        slots = []
        for backend in (names or Names()).expanded(entry.backends):
            kept = None if old is None else next((s for s in old.slots if _same(old, s, backend, entry, config)), None)
            if kept is None:
                slots.append(Slot(backend, _builder(name, backend, entry, config), config.routing.placement))
                if old is not None:
                    _trust(slots[-1], old, entry)
            else:
                slots.append(kept)
        models[name] = Model(name, entry, slots, config.routing, admission=None if old is None else old.admission)
    return models


def _same(old: Model, slot: Slot, backend: BackendConfig, entry: ModelConfig, config: Config) -> bool:
    return (
        slot.config == backend
        and old.placing.config == config.routing.placement
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
