"""A completion, in eight steps: edge, identify, resolve, decide, hold, carry out, stream, settle.

Owns: the order of the steps and that every outcome is answered, counted and logged. Each step's rules
live in the module it calls. (Mode is decided before the hold, so that an instant request does not hold
thinking tokens: docs/adr/0007.)
"""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from msgspec import UNSET, UnsetType

from budget.envelope import Envelope
from budget.errors import HoldRefused, StoreUnreachable
from gateway.asides import courses_for
from gateway.attempts import Attempts
from gateway.backends.http_backend import HttpBackend
from gateway.cascade import taken, told
from gateway.ceiling import TEMPLATE_MARGIN_TOKENS
from gateway.degrade import Request, one_step_down, relieved
from gateway.edge.aggregate import Aggregator
from gateway.edge.exchange import EVENT_STREAM, JSON
from gateway.edge.extension import DecisionReport, Report, Spent, UsageReport, encode
from gateway.edge.plain import PlainAnswer
from gateway.edge.sse import ChunkEncoder
from gateway.errors import BudgetStoreUnreachable, DeadlinePassed, Headers, LimitExceeded, Overloaded, UpstreamError
from gateway.fallback import Fallbacks
from gateway.modes.cascade import Cascade, Thought
from gateway.modes.flow import Run
from gateway.modes.instant import instant
from gateway.modes.planned import planned
from gateway.modes.planner import Planner
from gateway.modes.reasoning import reasoning
from gateway.modes.summary import Summaries
from gateway.tally import Tally

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from budget.ledger import Hold
    from gateway.app import Gateway
    from gateway.auth import Key
    from gateway.backends.port import Delta, Surface
    from gateway.edge.exchange import Exchange
    from gateway.edge.extension import CascadeReport
    from gateway.edge.watch import Watched
    from gateway.prepare import Prepared
    from gateway.record import Record

T = TypeVar("T")
BYTES_PER_TOKEN = 4  # about; only for prompts that nobody counted


async def serve_completion(
    gateway: Gateway, exchange: Exchange, surface: Surface, record: Record, watched: Watched
) -> None:
    """Answer one chat or text completion.

    Raises: GatewayError before the first byte; afterwards failures end the stream with an error event.
    """
    state = gateway.serving
    key = state.keyring.identify(exchange.authorization)
    record.key = key.id
    body = await exchange.body(state.config.server.max_body_bytes)
    prepared = state.decisions.prepare(body, surface, key, request_id=exchange.request_id, trace=exchange.trace)
    record.begin(prepared)
    request = Request(body, surface, key, state.models, state.config)
    fallbacks = Fallbacks(request, prepared)
    prepared = relieved(request, prepared)
    while True:  # once, but for a request that goes down the degrade ladder, or to another model
        scopes = scopes_of(key, prepared)
        hold, is_held = gateway.ledger.hold(scopes, prepared.ceiling, mode=prepared.decision.mode), False
        try:
            async with hold:
                is_held = True
                record.is_offline = hold.is_offline
                if prepared.degraded:
                    record.begin(prepared)
                await Answer(gateway, exchange, prepared, key, hold, watched, record).carry_out()
                return
        except (HoldRefused, StoreUnreachable) as exc:
            if is_held:  # it came up later: the answer may have begun, and begins no second time
                raise
            lower = None
            if isinstance(exc, HoldRefused):
                lower = one_step_down(request, prepared, hold, exc) or fallbacks.instead()
            if lower is None:  # that another model could not be held is not what went wrong
                raise fallbacks.failure or refusal(exc, gateway.limit_headers(hold)) from exc
            prepared = lower
        except (Overloaded, UpstreamError) as exc:
            prepared = fallbacks.after(exc, prepared, has_started=exchange.has_started)


def scopes_of(key: Key, prepared: Prepared) -> tuple[str, ...]:
    """Who pays: the key and its owners, the model, and the name that it was asked for by where that is another."""
    named = () if prepared.target is None else (f"model:{prepared.target.name}",)
    return (*key.scopes, prepared.model.scope, *named)


def refusal(exc: HoldRefused | StoreUnreachable, limit_headers: Headers) -> LimitExceeded | BudgetStoreUnreachable:
    """The ledger's refusal as the client sees it."""
    if isinstance(exc, StoreUnreachable):
        return BudgetStoreUnreachable(str(exc))
    error = LimitExceeded(str(exc), kind=exc.kind, retry_after_s=exc.retry_after_s)
    error.limit_headers = limit_headers
    return error


class Answer:
    """One request between its hold and its settlement."""

    def __init__(
        self,
        gateway: Gateway,
        exchange: Exchange,
        prepared: Prepared,
        key: Key,
        hold: Hold,
        watched: Watched,
        record: Record,
    ) -> None:
        self._gateway = gateway
        self._exchange = exchange
        self._prepared = prepared
        self._key = key
        self._watched = watched
        self._record = record
        ask, draft = prepared.ask, prepared.draft
        bounds = ask.envelope
        most_output = (prepared.call.max_tokens + prepared.slack) * prepared.choices
        most_prompt = prepared.ceiling.tokens - most_output - prepared.aside.tokens()
        self._run = Run(
            model=prepared.model,
            call=prepared.call if draft is None else draft.call,
            tally=Tally(
                prepared.model.prices,
                most_prompt=most_prompt,
                most_output=most_output,
                likely_prompt=max(1, most_prompt - TEMPLATE_MARGIN_TOKENS) // BYTES_PER_TOKEN,
            ),
            hold=hold,
            envelope=Envelope()
            if bounds is None
            else Envelope(
                tokens=bounds.tokens,
                nano_usd=bounds.nano_usd,
                deadline_s=None if bounds.seconds is None else exchange.began_s + bounds.seconds,
            ),
            clock=time.perf_counter,
            choices=prepared.choices,
            enforcer=prepared.enforcer,
            slack=prepared.slack if draft is None else 0,
            tenant=key.salt or key.id,
        )
        self._summaries = None if ask.summary is None else Summaries(self._run, ask.summary)
        self._cascaded = record.cascade = told(prepared.decision, draft)
        self._cascade = None
        if draft is not None:
            thought = Thought(prepared.call, prepared.slack, self._thought)
            self._cascade = Cascade(self._run, draft, thought, self._judged)
        if self._run.envelope.deadline_s is not None:
            watched.bound(self._run.envelope.deadline_s)
        self._run.deadline_s = watched.deadline_s

    async def carry_out(self) -> None:
        """Run the mode and answer; whatever happens, the hold is told what was used."""
        try:
            if self._prepared.is_plain():
                await self._plain()
            elif self._prepared.ask.stream:
                await self._stream()
            else:
                await self._whole()
        finally:
            if self._cascade is not None:
                self._cascade.close()
            self._run.close_books()
            self._record.finish(self._run)
            if self._prepared.decision.verdict is not None:
                self._gateway.learning.saw(self._prepared, self._key, self._run, self._exchange.request_id)

    def _deltas(self) -> AsyncGenerator[list[Delta], None]:
        if self._cascade is not None:
            return self._cascade.deltas()
        return instant(self._run) if self._prepared.decision.mode == "instant" else self._thought()

    def _judged(self, report: CascadeReport) -> None:
        """What became of the draft, before the response begins."""
        self._cascaded = self._record.cascade = report
        if report.outcome == "accepted":
            self._prepared = taken(self._prepared, report)
            self._record.begin(self._prepared)

    def _thought(self) -> AsyncGenerator[list[Delta], None]:
        run, prepared = self._run, self._prepared
        planning = prepared.planning
        courses = run.courses = courses_for(prepared.ask, planning, run)  # only now: a draft is not led
        deltas = reasoning(run, prepared.stops)
        if planning is not None and courses is not None:
            deltas = planned(deltas, courses, Planner(run, planning.planner, prepared.model.config.plan))
        return deltas if self._summaries is None else self._summaries.deltas(deltas)

    async def _plain(self) -> None:
        """The non-streamed instant path: the backend's own JSON, completed."""
        run, prepared = self._run, self._prepared
        body, attempts = await self._complete()
        answer = PlainAnswer(body, run.slot.backend.markers)  # type: ignore[union-attr]  # _complete placed it
        answer.count(run.tally)
        attempts.ended(run.tally.usage, run.tally.output())
        answer.require(prepared.choices)
        usage, extension = self._closing()
        if run.counts is not None and run.slot is not None and run.counts.output() > run.most_output:
            run.slot.note_overrun()
        model = prepared.model
        rendered = answer.render(
            None if model.name == model.upstream else model.name,
            usage=usage,
            extension=extension,
            wants_token_ids=prepared.ask.wants_token_ids,
        )
        await self._exchange.respond(200, [JSON, *self._headers()], rendered)

    async def _complete(self) -> tuple[bytes, Attempts]:
        attempts = Attempts(self._prepared.model, self._prepared.call)
        await attempts.admit(self._run.tenant, self._run.deadline_s)
        while True:
            slot = self._run.slot = attempts.next()
            with slot as backend:
                waited_from = time.perf_counter()
                try:
                    assert isinstance(backend, HttpBackend)
                    body = await backend.complete(self._prepared.call)
                except (UpstreamError, DeadlinePassed) as exc:
                    attempts.failed(slot, exc, has_begun=False)
                except asyncio.CancelledError:
                    self._gateway.metrics.unreported.add(self._prepared.model.name)
                    raise
                else:
                    attempts.began(slot)
                    return body, attempts
                finally:
                    attempts.leave()
                    self._exchange.wait_s += time.perf_counter() - waited_from

    async def _whole(self) -> None:
        """Everything else that does not stream: read as a stream, put together here."""
        ask, prepared = self._prepared.ask, self._prepared
        aggregator = Aggregator(
            prepared.call.surface,
            exclude_thinking=ask.exclude_thinking,
            both_fields=self._both_fields(),
            wants_token_ids=ask.wants_token_ids,
        )
        waited_from = time.perf_counter()
        try:
            async with aclosing(self._deltas()) as batches:
                async for deltas in batches:
                    aggregator.add(deltas)
        except asyncio.CancelledError:
            aggregator.add(self._end_at_deadline())
        self._exchange.wait_s += time.perf_counter() - waited_from
        usage, extension = self._closing()
        prefix = "chatcmpl" if prepared.call.surface == "chat" else "cmpl"
        body = aggregator.body(
            f"{prefix}-{self._exchange.request_id}",
            self._gateway.epoch_s(),
            prepared.model.name,
            usage=encode(usage),
            extension=encode(extension),
        )
        await self._exchange.respond(200, [JSON, *self._headers()], body)

    async def _stream(self) -> None:
        """Server-sent events; the status goes out with the first batch, so that early errors have their own."""
        exchange, ask, call = self._exchange, self._prepared.ask, self._prepared.call
        prefix = "chatcmpl" if call.surface == "chat" else "cmpl"
        encoder = ChunkEncoder(
            call.surface,
            self._prepared.model.name,
            call.model,
            stream_id=f"{prefix}-{exchange.request_id}",
            created=self._gateway.epoch_s(),
            exclude_thinking=ask.exclude_thinking,
            both_fields=self._both_fields(),
            wants_token_ids=ask.wants_token_ids,
        )
        waited_from = time.perf_counter()
        chunk = b""
        if self._summaries is None and not self._prepared.stops.texts:
            self._run.deliver = encoder.short_way(exchange.put)
        try:
            async with aclosing(self._deltas()) as batches:
                async for deltas in batches:
                    chunk = encoder.encode(deltas)
                    if not exchange.has_started:
                        await self._begin(waited_from)
                    if chunk:
                        if exchange.put is None or not exchange.put(chunk):
                            await exchange.write(chunk)
                        chunk = b""
        except asyncio.CancelledError:
            # A write that is cancelled has not written: it was waiting for the client.
            chunk += encoder.encode(self._end_at_deadline())
            if not exchange.has_started:
                await self._begin(waited_from)
            await exchange.write(chunk)
        usage, extension = self._closing()
        await exchange.write(
            encoder.finish(encode(extension), encode(usage) if ask.include_usage else None), more=False
        )

    async def _begin(self, waited_from_s: float) -> None:
        self._exchange.wait_s += time.perf_counter() - waited_from_s
        await self._exchange.start(200, [*EVENT_STREAM, *self._id_header(), *self._headers()])

    def _end_at_deadline(self) -> list[Delta]:
        """The finishes of a call whose time is over, if anything arrived. Else raises on."""
        watched = self._watched
        if not watched.is_at_deadline() or not self._run.tally.output():
            raise asyncio.CancelledError
        why = "envelope.seconds" if watched.reason == "envelope" else "timeout"
        watched.go_on()
        drafted = [] if self._cascade is None else self._cascade.rest()
        return [*drafted, *self._run.end(why)]

    def _both_fields(self) -> bool:
        both = self._prepared.ask.both_fields
        return self._key.both_fields if both is None else both

    def _closing(self) -> tuple[UsageReport, Report]:
        """`usage` and `thinkgate`, once everything is counted."""
        run, prepared = self._run, self._prepared
        counts, settled = run.close_books()
        prepared.cap.hit = run.tally.capped
        if run.slot is not None and not prepared.is_plain():
            prepared.cap.tell(run.enforced, run.overrun)
        report = Report(
            mode=prepared.decision.mode,
            mode_reason=prepared.decision.reason,
            capped=run.tally.capped,
            cap=prepared.cap,
            tokens=counts,
            hold=Spent.of(run.hold.ceiling),
            settled=Spent.of(settled),
            cost_usd=settled.nano_usd / 1e9,
            backend=run.slot.config.id if run.slot is not None else "",
            request_id=self._exchange.request_id,
        )
        self._tell_more(report)
        return UsageReport.of(counts), report

    def _tell_more(self, report: Report) -> None:
        """What only some requests have to tell."""
        run, prepared = self._run, self._prepared
        verdict, summaries = prepared.decision.verdict, self._summaries
        report.ended_by = _or_unset(run.ended_by)
        report.counted = "estimated" if run.tally.is_estimated else UNSET
        report.summary = UNSET if summaries is None else summaries.outcome
        report.degraded = prepared.degraded or UNSET
        report.target = _or_unset(prepared.target)
        report.cascade = _or_unset(self._cascaded)
        report.plan = UNSET if run.courses is None else _or_unset(run.courses.report())
        report.decision = UNSET if verdict is None else DecisionReport.of(verdict)

    def _id_header(self) -> Headers:
        return [(b"x-request-id", self._exchange.request_id.encode())]

    def _headers(self) -> Headers:
        """What the client may know beside the body."""
        run, exchange = self._run, self._exchange
        overhead_s = exchange.overhead_s()
        self._record.first_byte(time.perf_counter() - exchange.began_s, overhead_s)
        headers: Headers = [
            (b"x-thinkgate-mode", self._prepared.decision.mode.encode()),
            (b"x-thinkgate-backend", run.slot.config.id.encode() if run.slot is not None else b""),
            (b"x-thinkgate-overhead-ms", b"%.3f" % (overhead_s * 1000)),
        ]
        if self._prepared.degraded:
            steps = ",".join(taken.step for taken in self._prepared.degraded)
            headers.append((b"x-thinkgate-degraded", steps.encode()))
        return headers + self._gateway.limit_headers(run.hold)


def _or_unset(value: T | None) -> T | UnsetType:
    return UNSET if value is None else value
