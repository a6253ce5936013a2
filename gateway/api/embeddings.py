"""Embeddings: passed through, held and settled like everything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from budget.errors import HoldRefused
from budget.ledger import Amounts
from budget.tokens import TokenCounts
from gateway.backends.events import UsageBody
from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import refuse_field
from gateway.edge import JSON
from gateway.errors import LimitExceeded, UpstreamError
from gateway.prepare import find_model
from gateway.request import parse_embedding

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.edge import Exchange
    from gateway.models import Model
    from gateway.record import Record


class _Body(msgspec.Struct):
    data: list[msgspec.Raw]
    usage: UsageBody | None = None


_decoder = msgspec.json.Decoder(_Body)


async def serve_embedding(gateway: Gateway, exchange: Exchange, record: Record) -> None:
    """POST /v1/embeddings. Raises: GatewayError."""
    serving = gateway.serving
    server = serving.config.server
    body = await exchange.body(server.max_body_bytes, server.timeouts.body_s)
    key = serving.keyring.identify(exchange.authorization)
    record.key = key.id
    fields, raw = parse_embedding(body)
    model = find_model(fields.model, serving.models, key)
    prompt = len(bytes(raw["input"]))
    ceiling = Amounts(tokens=prompt, nano_usd=model.prices.ceiling_nano_usd(prompt=prompt, thinking=0, answer=0))
    slot = model.choose()
    try:
        with slot as backend:
            if not isinstance(backend, HttpBackend):
                raise refuse_field("input", backend.kind, "it has no embedding model; use a vllm backend")
            async with gateway.ledger.hold((*key.scopes, model.scope), ceiling) as hold:
                answer = await backend.embed(raw, exchange.trace)
                hold.report(_used(answer, model))
                headers = gateway.limit_headers(hold)
    except HoldRefused as exc:
        raise LimitExceeded(str(exc), kind=exc.kind, retry_after_s=exc.retry_after_s) from exc
    await exchange.respond(200, [JSON, (b"x-thinkgate-backend", slot.config.id.encode()), *headers], answer)


def _used(answer: bytes, model: Model) -> Amounts:
    try:
        usage = _decoder.decode(answer).usage
    except msgspec.DecodeError as exc:
        raise UpstreamError("The backend answered with something that is no embedding.") from exc
    counts = TokenCounts(prompt=usage.prompt_tokens if usage is not None else 0)
    return Amounts(tokens=counts.total(), nano_usd=model.prices.cost_nano_usd(counts))
