"""Composition root: every part is built here, once, and passed down.

Owns: the `Gateway` (an ASGI app: hot routes plain, the rest FastAPI), start and drain, and swapping the
configuration while requests run.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from fastapi import FastAPI

from gateway import __version__
from gateway.admin.store import open_ledger, open_records
from gateway.admin.stored import Stored
from gateway.api.admin import Admin
from gateway.api.admin_door import REQUEST_ID
from gateway.api.routes import HOT_ROUTES, Handler, add_routes, not_found
from gateway.auth import Keyring
from gateway.backends.http_backend import HttpBackend
from gateway.config.load import key_hash_secret, secret_sha256s, webhook_secret
from gateway.edge.exchange import ClientGone, Exchange, Message, Receive, Scope, Send
from gateway.edge.watch import Watch
from gateway.errors import GatewayError, Headers, MethodNotAllowed, Overloaded
from gateway.idempotency import serve_once
from gateway.judge import Judge, load_scorer, priors_of
from gateway.learning import Learning
from gateway.log import LineWriter
from gateway.metrics import Metrics
from gateway.models import Model, build_models
from gateway.names import Names
from gateway.outcomes import Outcomes
from gateway.record import Record
from gateway.shapes import Decisions
from gateway.slots import Slot
from gateway.soft_limits import SoftLimits
from gateway.webhook import Webhook
from router.utility import Statistics

if TYPE_CHECKING:
    from budget.ledger import Hold, Ledger
    from gateway.config.schema import Config

log = logging.getLogger("thinkgate")
OFFLINE = (b"x-thinkgate-budget", b"offline")
SWEEP_S = 1.0
MEET_S = 0.02
clock = time.time  # seconds since 1970: handed down from here


@dataclass(frozen=True, slots=True)
class Serving:
    """What a reload swaps, all at once; a running request keeps the one it began with."""

    config: Config
    keyring: Keyring
    models: dict[str, Model]
    decisions: Decisions
    judge: Judge


def serving(
    config: Config,
    stored: Stored,
    statistics: Statistics,
    *,
    known: dict[str, Model] | None = None,
    names: Names | None = None,
) -> Serving:
    """What a configuration puts in force; backends that stay the same are taken over from `known`.

    Raises: ConfigError when a secret or credential is missing.
    """
    keyring = Keyring(config, secret_sha256s(config), stored)
    models = build_models(config, known, names)
    statistics.believe(priors_of(config.routing.priors))
    judge = Judge(config.routing, statistics, load_scorer(config.routing.scorer))
    return Serving(config, keyring, models, Decisions(config, models, judge), judge)


class Gateway(FastAPI):
    """The ASGI app.

    Args:
        config: a validated configuration.
        log_stream: where the request lines go.
        patience_s: how long the start may wait for store and backends before anybody can connect.

    Raises: ConfigError when a secret or credential is missing, or the store cannot be used.
    """

    def __init__(self, config: Config, *, log_stream: IO[str] = sys.stdout, patience_s: float = 0.0) -> None:
        super().__init__(
            title="thinkgate",
            version=__version__,
            lifespan=self._lifespan,
            docs_url=None,
            redoc_url=None,
            exception_handlers={404: not_found, 405: not_found},
        )
        self.lines = LineWriter(log_stream)
        self.stored = Stored(
            open_records(config.store, clock=clock),
            clock=clock,
            hash_secret=key_hash_secret(config),
            is_new=config.store.kind == "memory",
            on_limits=self._join_limits,
            on_read=self._store_was_read,
        )
        self.statistics = Statistics(priors_of(config.routing.priors))
        self.learning = Learning(self.statistics)
        self.names = Names()
        self.serving = serving(config, self.stored, self.statistics, names=self.names)
        self.admin = Admin(self.stored, lambda: self.serving.config, lambda: self.ledger)
        self.ledger: Ledger = open_ledger(config.store, self.admin.limits.in_force(config), clock=clock)
        self.watch = Watch(config.server.timeouts)
        self.is_draining = False
        self.metrics = Metrics(
            self.ledger.held,
            lambda: len(self.watch),
            lambda: self.serving.models,
            figures=self.ledger.figures,
            before_scrape=self.lines.flush,
        )
        self._webhook = Webhook(self.metrics.webhook_calls, clock=clock)
        self._webhook.configure(config.alerts, webhook_secret(config))
        self._soft = SoftLimits(lambda passed: self._webhook.send("soft_limit.passed", passed), clock=clock)
        self._soft.set_marks(self.admin.limits.soft_marks(config))
        self.outcomes = Outcomes(
            self.stored.records,
            lambda: self.serving.config.idempotency,
            clock=time.perf_counter,
            became=self.metrics.idempotency.add,
        )
        self._patience_s = patience_s
        self.started_s = self._epoch_s = int(time.time())
        self._slots: dict[int, tuple[Slot, asyncio.Task[None]]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        add_routes(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hot routes first, without a framework; everything else through FastAPI."""
        if scope["type"] == "http":
            route = HOT_ROUTES.get(scope["path"])
            if route is not None:
                await self._hot(route, scope, receive, send)
                return
            request_id = scope[REQUEST_ID] = Exchange(scope, receive, send).request_id
            send = with_request_id(request_id, send)
        await super().__call__(scope, receive, send)

    async def _hot(self, route: Handler, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        record = Record(exchange, scope["path"], self.metrics)
        watched = self.watch.over(exchange)
        try:
            self._admit(scope)
            with watched:
                if exchange.idempotency_key is None:
                    await route(self, exchange, record, watched)
                else:
                    await serve_once(route, self, exchange, record, watched)
        except GatewayError as exc:
            await self._fail(exchange, record, exc)
        except ClientGone:
            record.ended_by = watched.reason or "disconnect"
            self.metrics.disconnects.add(scope["path"])
            await exchange.cut()
        except Exception:  # a bug of ours: the client still gets an error in the usual form
            log.exception("request failed", extra={"request_id": exchange.request_id})
            await self._fail(exchange, record, GatewayError("The gateway failed; its log has the request id."))
        finally:
            record.ended_by = record.ended_by or watched.reason
            record.close(time.time())
            self.lines.write(record)

    def _admit(self, scope: Scope) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"Use POST for {scope['path']}.", allow="POST")
        if self.is_draining:
            raise Overloaded("The server is shutting down.")

    async def _fail(self, exchange: Exchange, record: Record, error: GatewayError) -> None:
        record.error = error.code or error.type
        self.metrics.refusals.add(record.error)
        await exchange.fail(error)

    def epoch_s(self) -> int:
        """Seconds since 1970, refreshed once a second."""
        return self._epoch_s

    def limit_headers(self, hold: Hold) -> Headers:
        """`x-ratelimit-*`, the remaining budget, what is past its soft mark, and that it was held without the store."""
        headers: Headers = self._soft.headers(hold) if self._soft.marks else []
        if hold.is_offline:
            headers.append(OFFLINE)
        requests, tokens = hold.remaining("requests"), hold.remaining("tokens")
        if requests is not None:
            headers += [
                (b"x-ratelimit-limit-requests", b"%d" % requests.limit),
                (b"x-ratelimit-remaining-requests", b"%d" % requests.remaining),
                (b"x-ratelimit-reset-requests", duration(requests.reset_s)),
            ]
        if tokens is not None:
            left = b"%d" % tokens.remaining
            headers += [
                (b"x-ratelimit-limit-tokens", b"%d" % tokens.limit),
                (b"x-ratelimit-remaining-tokens", left),
                (b"x-ratelimit-reset-tokens", duration(tokens.reset_s)),
                (b"x-thinkgate-budget-remaining-tokens", left),
            ]
        return headers

    def reload(self, config: Config) -> None:
        """Put a new configuration in force; running requests end under the old one.

        Raises: ConfigError when a secret or credential is missing; then the old one stays in force.
        """
        known, names = self.serving.models, self.names
        new = serving(config, self.stored, self.statistics, known=known, names=names)
        secret = webhook_secret(config)
        self._put_limits(config)
        self._webhook.configure(config.alerts, secret)
        self.serving = new
        self._watch_slots()

    def _join_limits(self) -> None:
        self._put_limits(self.serving.config)

    def _put_limits(self, config: Config) -> None:
        self.ledger.set_limits(self.admin.limits.in_force(config))
        self._soft.set_marks(self.admin.limits.soft_marks(config))

    def _store_was_read(self, is_read: bool) -> None:
        self.metrics.store_stale = not is_read
        if not is_read:
            self.metrics.store_failures.add()

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await self.stored.follow()
            work = (
                self.watch.run(),
                self._sweep(),
                self.ledger.run(),
                self.stored.keep_up(),
                self.outcomes.keep_up(),
                self._webhook.run(),
                self._follow_names(),
            )
            await self._look_names_up()
            background = [tasks.create_task(each) for each in work]
            self._watch_slots()
            await self._meet_backends()
            try:
                yield
            finally:
                for task in background:
                    task.cancel()
                await self._close()

    def is_ready(self) -> bool:
        """Whether the store was read and every model has a backend that is up."""
        models = self.serving.models.values()
        return self.stored.is_loaded and all(any(slot.is_up for slot in model.slots) for model in models)

    async def _meet_backends(self) -> None:
        """Before anybody connects, if whoever starts this wants so; some may be down for long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience_s):
                while not self.is_ready():  # noqa: ASYNC110  # over all models: no single event says it
                    await asyncio.sleep(MEET_S)

    async def _close(self) -> None:
        """Let go of everything, each whatever the others do: first backends, then the ledger with its settlements."""
        async with contextlib.AsyncExitStack() as last_comes_first:
            last_comes_first.callback(self.lines.close)
            last_comes_first.push_async_callback(self.stored.records.close)
            last_comes_first.push_async_callback(self.ledger.close)
            for slot, task in self._slots.values():
                task.cancel()
                last_comes_first.push_async_callback(slot.backend.close)

    def _watch_slots(self) -> None:
        """Keep a probing task for every slot in use; close the backends of slots that are gone."""
        assert self._tasks is not None
        wanted = {id(slot): (slot, model) for model in self.serving.models.values() for slot in model.slots}
        for key in [key for key in self._slots if key not in wanted]:
            slot, task = self._slots.pop(key)
            task.cancel()
            self._tasks.create_task(_close_when_idle(slot))
        for key, (slot, model) in wanted.items():
            if key not in self._slots:
                self._slots[key] = (slot, self._tasks.create_task(_keep(slot, model)))

    async def _follow_names(self) -> None:
        """Take up addresses that came and let go of those that went; running requests end where they are."""
        while True:
            await asyncio.sleep(self.serving.config.routing.placement.dns_s)
            if await self._look_names_up():
                self._watch_slots()

    async def _look_names_up(self) -> bool:
        is_other = await self.names.refresh(self.serving.config)
        if is_other:  # under the configuration of now: it may have been reloaded meanwhile
            known, names = self.serving.models, self.names
            self.serving = serving(self.serving.config, self.stored, self.statistics, known=known, names=names)
        return is_other

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._epoch_s = int(time.time())
            for slot, _ in list(self._slots.values()):
                if isinstance(slot.backend, HttpBackend):
                    slot.backend.pool.sweep()


async def _keep(slot: Slot, model: Model) -> None:
    """Keep a slot up, and hear what it says of its load and its cache."""
    placing = model.placing
    async with asyncio.TaskGroup() as both:
        both.create_task(slot.keep_up())
        both.create_task(slot.follow_events())
        if model.kind == "vllm":
            most_waiting = model.admission.config.backend_waiting
            both.create_task(slot.follow_load(placing.config.poll_s, most_waiting, lambda: placing.bytes_per_token))


async def _close_when_idle(slot: Slot) -> None:
    """Let its calls end, which may still take too long: nobody else looks after it any more."""
    while slot.in_flight:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SWEEP_S):
                await slot.drained()
        if isinstance(slot.backend, HttpBackend):
            slot.backend.pool.sweep()
    await slot.backend.close()


def with_request_id(request_id: str, send: Send) -> Send:
    """`send` that adds `x-request-id` to the response."""

    async def send_with_id(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
        await send(message)

    return send_with_id


def duration(seconds: float) -> bytes:
    """As OpenAI writes it: `12ms`, `6m0s`, `1h0m0s`, never too early; `never` for a window without an end."""
    if seconds < 1:
        return b"%dms" % math.ceil(seconds * 1000)
    if seconds <= 59:
        return b"%ds" % math.ceil(seconds)
    if seconds == float("inf"):
        return b"never"
    minutes, rest = divmod(math.ceil(seconds), 60)
    if minutes < 60:
        return b"%dm%ds" % (minutes, rest)
    return b"%dh%dm%ds" % (minutes // 60, minutes % 60, rest)
