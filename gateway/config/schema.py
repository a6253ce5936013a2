"""The configuration: one frozen model, validated once, passed down.

Owns: every key of the file (docs/config.md), its default and what a wrong value should have been; those of `limits`
and `store` are in budgets.py, those of `alerts` in alerts.py, those of `routing` in routing.py. Does not own: reading
files and the environment (load.py), nor secrets, which are only named here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gateway.config.alerts import AlertsConfig
from gateway.config.base import NonNegativeInt, Owner, PositiveInt, Section, Variable
from gateway.config.budgets import LimitConfig, StoreConfig
from gateway.config.placing import KvEventsConfig
from gateway.config.planning import PlanConfig
from gateway.config.routing import Routing
from gateway.config.stopping import StopConfig

Mode = Literal["instant", "reasoning", "agentic"]
Effort = Literal["minimal", "low", "medium", "high", "xhigh", "max"]
Port = Annotated[int, Field(ge=0, le=65535)]
LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})


class Metrics(Section):
    """Where Prometheus scrapes; never the public port."""

    host: str = "127.0.0.1"
    port: Port | None = 9464


class Timeouts(Section):
    """How long the gateway waits, for clients and for backends."""

    body_s: float = Field(30, gt=0)
    connect_s: float = Field(5, gt=0)
    first_byte_s: float = Field(300, gt=0)
    idle_s: float = Field(120, gt=0)
    total_s: float = Field(3600, gt=0)
    slow_client_s: float = Field(120, gt=0)
    drain_s: float = Field(30, ge=0)


class Server(Section):
    """The public port and the limits of the process."""

    host: str = "127.0.0.1"
    port: Port = 8080
    workers: PositiveInt = 1
    max_body_bytes: PositiveInt = 10 * 1024 * 1024
    admin_token_env: Variable = "THINKGATE_ADMIN_TOKEN"  # noqa: S105  # the name of a variable
    key_hash_env: Variable = "THINKGATE_KEY_HASH_SECRET"
    metrics: Metrics = Metrics()
    timeouts: Timeouts = Timeouts()
    media_hosts: tuple[str, ...] = ()


class BackendConfig(Section):
    """One upstream server, or the engine in this process."""

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    url: str | None = None
    path: str | None = None
    kind: Literal["vllm", "openai", "embedded"] = "vllm"
    api_key_env: Variable | None = None
    weight: float = Field(1, gt=0)
    cost: float = Field(1, ge=0)
    kv_events: KvEventsConfig | None = None

    @field_validator("url")
    @classmethod
    def _url_is_http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme == "dns+https":
            raise ValueError(
                "dns+https:// is not possible, since certificates are for names: use https:// or dns+http://"
            )
        if parts.scheme not in {"http", "https", "dns+http"} or not parts.hostname or parts.port == 0:
            raise ValueError("must look like http://host:8000, https://host/path or dns+http://service:8000")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("must not carry credentials, a query or a fragment; use api_key_env")
        return url.rstrip("/").removesuffix("/v1")

    @model_validator(mode="after")
    def _kind_has_its_address(self) -> Self:
        if self.kind == "embedded":
            if self.url is not None:
                raise ValueError("an embedded backend has `path`, not `url`")
            if self.path is None:
                raise ValueError("an embedded backend needs `path`: a model folder or Hugging Face id")
        elif self.url is None or self.path is not None:
            raise ValueError(f"a {self.kind} backend needs `url`, and no `path`")
        if self.kv_events is not None and self.kind != "vllm":
            raise ValueError(f"only a vllm backend publishes `kv_events`, not one of kind {self.kind}")
        return self


class ThinkingConfig(Section):
    """How the model thinks, and how much it may."""

    start: str = Field("<think>", min_length=1)
    end: str = Field("</think>", min_length=1)
    default_tokens: NonNegativeInt = 2048
    max_tokens: NonNegativeInt = 16384
    answer_floor_tokens: PositiveInt = 128
    wrap_up: str = "\n\nTime is up: I answer with what I have.\n"
    native: bool = True
    enforce: Literal["auto", "native", "two_phase"] = "auto"
    off: dict[str, object] = Field({"chat_template_kwargs": {"enable_thinking": False}})

    @field_validator("off")
    @classmethod
    def _off_switches_the_template(cls, off: dict[str, object]) -> dict[str, object]:
        if set(off) - {"chat_template_kwargs"} or not isinstance(off.get("chat_template_kwargs", {}), dict):
            raise ValueError("may only hold `chat_template_kwargs`, a mapping for the model's chat template")
        return off

    @model_validator(mode="after")
    def _default_fits(self) -> Self:
        if self.default_tokens > self.max_tokens:
            raise ValueError(f"default_tokens {self.default_tokens} is above max_tokens {self.max_tokens}")
        if self.start == self.end:
            raise ValueError("start and end must differ")
        return self


class AnswerConfig(Section):
    """How long the visible answer may be."""

    default_tokens: PositiveInt = 1024
    max_tokens: PositiveInt = 8192


class Prices(Section):
    """US dollars per million tokens of each kind."""

    prompt: float = Field(0, ge=0)
    cached: float | None = Field(None, ge=0)
    thinking: float | None = Field(None, ge=0)
    answer: float = Field(0, ge=0)


class Architecture(Section):
    """What the eFLOPs meter needs to know of the model."""

    parameters: float = Field(gt=0)
    layers: PositiveInt
    query_heads: PositiveInt
    kv_heads: PositiveInt
    head_dim: PositiveInt


class Target(Section):
    """One model behind a public name that maps to several."""

    model: str


class ModelConfig(Section):
    """One public name, the backends that serve it and what it may spend."""

    upstream_model: str | None = None
    backends: tuple[BackendConfig, ...] = ()
    thinking: ThinkingConfig = Field(default_factory=ThinkingConfig)
    answer: AnswerConfig = AnswerConfig()
    max_n: PositiveInt = 16
    planner: str | None = None
    plan: PlanConfig = Field(default_factory=PlanConfig)
    stop: StopConfig = StopConfig()
    fallback: tuple[str, ...] = ()
    targets: tuple[Target, ...] = ()
    effort_tokens: dict[Effort, NonNegativeInt] = Field(default_factory=dict)
    price_usd_per_mtok: Prices | None = None
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _has_backends(self) -> Self:
        if self.targets:
            if others := sorted(self.model_fields_set - {"targets"}):
                raise ValueError(f"has `targets`, so `{others[0]}` belongs to the models that they name")
            return self
        if not self.backends:
            raise ValueError("needs at least one entry in `backends`, or in `targets`")
        ids = [backend.id for backend in self.backends]
        if len(set(ids)) < len(ids):
            raise ValueError(f"backend ids must be distinct, got {ids}")
        kinds = sorted({backend.kind for backend in self.backends})
        if len(kinds) > 1:
            raise ValueError(
                f"backends must all be of one kind, got {', '.join(kinds)}: give the others a public name of their own"
            )
        return self


class KeyTraits(Section):
    """Whose a key is and what it may ask for, wherever it is kept."""

    user: Owner | None = None
    team: Owner | None = None
    org: Owner | None = None
    models: tuple[str, ...] | None = None
    modes: tuple[Mode, ...] | None = None
    max_thinking_tokens: NonNegativeInt | None = None
    degrade: tuple[Literal["cap", "effort", "instant", "model"], ...] = ()
    tags: tuple[Owner, ...] = ()
    reasoning_field: Literal["upstream", "both"] = "upstream"
    lambda_per_usd: float = Field(0, ge=0, allow_inf_nan=False)
    quality_floor: float = Field(0, ge=0, le=1)
    cascade: Literal["off", "uncertain", "always"] | None = None


class KeyConfig(KeyTraits):
    """One API key of the file. The secret itself never stands in it."""

    id: str = Field(pattern=r"^\S{1,64}$")
    secret_env: Variable | None = None
    secret_sha256: str | None = Field(None, pattern=r"^[0-9a-fA-F]{64}$")

    @model_validator(mode="after")
    def _has_one_secret(self) -> Self:
        if (self.secret_env is None) == (self.secret_sha256 is None):
            raise ValueError("needs exactly one of `secret_env` and `secret_sha256`")
        return self


class IdempotencyConfig(Section):
    """Answers kept for retries with the same `Idempotency-Key`."""

    enabled: bool = True
    ttl_s: float = Field(86400, gt=0)
    max_bytes: PositiveInt = 1024 * 1024
    max_total_bytes: PositiveInt = 256 * 1024 * 1024
    lease_s: float = Field(60, ge=10)


class SearchConfig(Section):
    """Reserved for tree search."""

    scorers: dict[str, object] = Field(default_factory=dict)


class AgenticConfig(Section):
    """Reserved for tools the gateway owns."""

    mcp_servers: dict[str, object] = Field(default_factory=dict)
    tools: dict[str, object] = Field(default_factory=dict)


class Config(Section):
    """The whole file."""

    server: Server = Server()
    models: Annotated[dict[str, ModelConfig], Field(min_length=1)]
    keys: tuple[KeyConfig, ...] = ()
    limits: tuple[LimitConfig, ...] = ()
    alerts: AlertsConfig = AlertsConfig()
    store: StoreConfig = StoreConfig()
    idempotency: IdempotencyConfig = IdempotencyConfig()
    routing: Routing = Routing()
    search: SearchConfig = Field(default_factory=SearchConfig)
    agentic: AgenticConfig = Field(default_factory=AgenticConfig)

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        problems = [
            *self._target_problems(),
            *self._key_problems(),
            *self._limit_problems(),
            *self._server_problems(),
            *self._placement_problems(),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _target_problems(self) -> list[str]:
        own = [name for name, model in self.models.items() if not model.targets]
        return [
            f"models.{name}.targets[{i}].model: {target.model!r} is no model with `backends` ({', '.join(own)})"
            for name, model in self.models.items()
            for i, target in enumerate(model.targets)
            if target.model not in own
        ]

    def behind(self, name: str) -> list[str]:
        """The models that a public name stands for: itself, or its targets."""
        targets = self.models[name].targets if name in self.models else ()
        return [target.model for target in targets] or [name]

    def _key_problems(self) -> list[str]:
        counts = Counter(key.id for key in self.keys)
        problems = [f"keys: id {name!r} stands twice" for name in sorted(counts) if counts[name] > 1]
        problems += [
            f"keys[{i}].models: {name!r} is not under `models` ({', '.join(self.models)})"
            for i, key in enumerate(self.keys)
            for name in key.models or ()
            if name not in self.models
        ]
        return problems

    def _limit_problems(self) -> list[str]:
        problems = []
        keys = dict.fromkeys([key.id for key in self.keys] or ["anyone"])  # for its order, and found at once
        seen: dict[tuple[str, str, str | None], int] = {}
        for i, limit in enumerate(self.limits):
            first = seen.setdefault((limit.scope, limit.unit, limit.window), i)
            if first != i:
                problems.append(f"limits[{i}]: limits {limit.scope} as limits[{first}] does already: keep one of them")
            problems += [f"limits[{i}]{field}: {text}" for field, text in self.problems_of(limit, keys)]
        return problems

    def problems_of(self, limit: LimitConfig, keys: Collection[str]) -> list[tuple[str, str]]:
        """Why a limit cannot be held under this configuration, as (`.field`, text); `keys` are the ids there are."""
        problems = []
        kind, _, name = limit.scope.partition(":")
        known: dict[str, Collection[str]] = {"model": self.models, "key": keys}
        if name not in known.get(kind, [name]):
            problems.append((".scope", f"{name!r} is not under `{kind}s` ({', '.join(known[kind])})"))
        names = [name] if kind == "model" else list(self.models)
        reached = [model for one in names for model in self.behind(one)]
        without = [m for m in reached if m in self.models and self.models[m].price_usd_per_mtok is None]
        if limit.unit == "usd" and without:
            text = f"a usd limit needs models.{without[0]}.price_usd_per_mtok, or it could not be held"
            problems.append(("", text))
        return problems

    def _server_problems(self) -> list[str]:
        problems = []
        embedded = [
            f"models.{name}" for name, m in self.models.items() if any(b.kind == "embedded" for b in m.backends)
        ]
        if self.server.workers > 1 and self.store.kind == "memory":
            problems.append("server.workers: above 1 needs a shared store; the memory store belongs to one process")
        if self.server.workers > 1 and embedded:
            problems.append(f"server.workers: above 1 would load the embedded engine of {embedded[0]} several times")
        metrics = self.server.metrics
        if metrics.port is not None and metrics.port == self.server.port != 0:
            problems.append(
                f"server.metrics.port: {metrics.port} is server.port too: give it another, or null for none"
            )
        if not self.keys and self.store.kind == "memory" and not self.may_be_open():
            problems.append(
                f"server.host: {self.server.host!r} would answer anyone, since no `keys` are configured: "
                "add keys or bind 127.0.0.1"
            )
        return problems

    def _placement_problems(self) -> list[str]:
        told = any(backend.kv_events for model in self.models.values() for backend in model.backends)
        if self.routing.placement.index != "exact" or told:
            return []
        return ["routing.placement.index: exact needs `kv_events` of at least one backend"]

    def may_be_open(self) -> bool:
        """Whether anybody is served as long as there is no key at all."""
        return not self.keys and self.server.host in LOOPBACK_HOSTS

    def not_built_yet(self) -> list[str]:
        """Keys that validate but have no effect in this version; said at the start and by `check`."""
        inert = []
        for name, model in self.models.items():
            inert += [f"models.{name}.architecture"] if model.architecture else []
            if model.planner is not None and model.planner not in self.models:
                inert.append(f"models.{name}.planner ({model.planner} is not under models)")
            elif model.planner is not None and self.models[model.planner].targets:
                inert.append(f"models.{name}.planner ({model.planner} stands for several models)")
            unknown = [other for other in model.fallback if other not in self.models]
            inert += [f"models.{name}.fallback ({other} is not under models)" for other in unknown]
            if self.routing.placement.index != "exact":
                events = [backend.id for backend in model.backends if backend.kv_events is not None]
                inert += [f"models.{name}.backends[{id}].kv_events (placement.index is not exact)" for id in events]
        owned = {f"{kind}:{getattr(key, kind)}" for key in self.keys for kind in ("user", "team", "org")}
        owned |= {f"tag:{tag}" for key in self.keys for tag in key.tags}
        inert += [
            f"limits[{i}].scope ({limit.scope} has no key)"
            for i, limit in enumerate(self.limits if self.store.kind == "memory" else ())  # a store may have its keys
            if limit.scope not in owned and not limit.scope.startswith(("key:", "model:"))
        ]
        inert += ["search.scorers"] if self.search.scorers else []
        inert += [f"agentic.{key}" for key in ("mcp_servers", "tools") if getattr(self.agentic, key)]
        return inert
