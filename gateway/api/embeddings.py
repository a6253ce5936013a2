"""Embeddings: passed through, held and settled like everything else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts
from budget.tokens import TokenCounts
from gateway.ask.request import RawFields, parse_embedding
from gateway.attempts import Attempts
from gateway.backends.events import UsageBody
from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import refuse_field
from gateway.edge.exchange import JSON
from gateway.edge.extension import EmbeddingReport, Spent, encode
from gateway.errors import DeadlinePassed, UpstreamError
from gateway.serve import refusal
from gateway.targets import find_model

if TYPE_CHECKING:
    from budget.ledger import Hold
    from gateway.app import Gateway
    from gateway.edge.exchange import Exchange
    from gateway.edge.watch import Watched
    from gateway.errors import Headers
    from gateway.models import Model
    from gateway.record import Record
    from gateway.slots import Slot

_fields_decoder = msgspec.json.Decoder(RawFields)
_usage_decoder = msgspec.json.Decoder(UsageBody | None)


async def serve_embedding(gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> None:
    """POST /v1/embeddings. Raises: GatewayError."""
    serving = gateway.serving
    key = serving.keyring.identify(exchange.authorization)
    record.key = key.id
    body = await exchange.body(serving.config.server.max_body_bytes)
    typed, raw = parse_embedding(body)
    model = find_model(typed.model, serving.models, key, serving.config)
    record.model = model.name
    prompt = len(bytes(raw["input"]))
    ceiling = Amounts(tokens=prompt, nano_usd=model.prices.ceiling_nano_usd(prompt=prompt, thinking=0, answer=0))
    hold = gateway.ledger.hold((*key.scopes, model.scope), ceiling)
    try:
        async with hold:
            record.is_offline = hold.is_offline
            slot, answer = await _embed(model, raw, exchange, key.salt or key.id, watched.deadline_s)
            rendered = _account(answer, model, slot, hold, exchange, record)
            await exchange.respond(
                200, [JSON, *_headers(slot, exchange, record), *gateway.limit_headers(hold)], rendered
            )
    except (HoldRefused, StoreUnreachable) as exc:
        raise refusal(exc, gateway.limit_headers(hold)) from exc


async def _embed(
    model: Model, raw: RawFields, exchange: Exchange, tenant: str, deadline_s: float
) -> tuple[Slot, bytes]:
    """The answer of the best backend that can be reached, and which it was."""
    attempts = Attempts(model, None)
    await attempts.admit(tenant, deadline_s)
    while True:
        slot = attempts.next()
        with slot as backend:
            if not isinstance(backend, HttpBackend):
                raise refuse_field("input", backend.kind, "it has no embedding model; use a vllm backend")
            waited_from = time.perf_counter()
            try:
                answer = await backend.embed(raw, exchange.trace)
            except (UpstreamError, DeadlinePassed) as exc:
                attempts.failed(slot, exc, has_begun=False)
            else:
                attempts.began(slot)
                return slot, answer
            finally:
                attempts.leave()
                exchange.wait_s += time.perf_counter() - waited_from


def _account(answer: bytes, model: Model, slot: Slot, hold: Hold, exchange: Exchange, record: Record) -> bytes:
    """The client's body: the backend's, its vectors as they came, with the public name and `thinkgate`.

    Raises: UpstreamError when it is no embedding.
    """
    try:
        fields: dict[str, Any] = _fields_decoder.decode(answer)
        usage = _usage_decoder.decode(fields.get("usage", b"null"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamError("The backend answered with something that is no embedding.") from exc
    if not bytes(fields.get("data", b"")).startswith(b"["):
        raise UpstreamError("The backend answered with something that is no embedding.")
    # Without the backend's own count, the bound that was held is charged: too much rather than too little.
    counts = TokenCounts(prompt=hold.ceiling.tokens if usage is None else usage.prompt_tokens)
    settled = Amounts(tokens=counts.total(), nano_usd=model.prices.cost_nano_usd(counts))
    hold.report(settled)
    record.backend, record.counts, record.nano_usd = slot.config.id, counts, settled.nano_usd
    report = EmbeddingReport(
        tokens=counts,
        hold=Spent.of(hold.ceiling),
        settled=Spent.of(settled),
        cost_usd=settled.nano_usd / 1e9,
        backend=slot.config.id,
        request_id=exchange.request_id,
    )
    if usage is None:
        report.counted = "estimated"
    if model.name != model.upstream:
        fields["model"] = model.name
    fields["thinkgate"] = Raw(encode(report))
    return msgspec.json.encode(fields)


def _headers(slot: Slot, exchange: Exchange, record: Record) -> Headers:
    overhead_s = exchange.overhead_s()
    record.first_byte(time.perf_counter() - exchange.began_s, overhead_s)
    return [
        (b"x-thinkgate-backend", slot.config.id.encode()),
        (b"x-thinkgate-overhead-ms", b"%.3f" % (overhead_s * 1000)),
    ]
