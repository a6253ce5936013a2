"""`/v1/route`, which explains a decision without carrying it out, and `/v1/feedback`, which says what one was worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from gateway.ask.hear import hear
from gateway.ask.request import check_json, decode_fields
from gateway.cascade import told
from gateway.edge.exchange import JSON
from gateway.edge.extension import DecisionReport, Feedback, RouteReport, Spent, encode

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.edge.exchange import Exchange
    from gateway.edge.watch import Watched
    from gateway.record import Record


_feedback = msgspec.json.Decoder(Feedback)


async def serve_route(gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> None:  # noqa: ARG001  # a handler's signature
    """POST /v1/route: what a chat completion with this body would be. Raises: GatewayError."""
    state = gateway.serving
    key = state.keyring.identify(exchange.authorization)
    record.key = key.id
    body = await exchange.body(state.config.server.max_body_bytes)
    prepared = state.decisions.prepare(body, "chat", key, request_id=exchange.request_id, trace=exchange.trace)
    record.begin(prepared)
    decision = prepared.decision
    verdict = decision.verdict
    if verdict is None:
        heard = hear(body, "chat", state.config)
        read = state.judge.reader(heard.messages, heard.media_parts)
        verdict = None if read is None else read(key, prepared.model)
    report = RouteReport(
        model=prepared.model.name,
        mode=decision.mode,
        mode_reason=decision.reason,
        by_text=decision.verdict is not None,
        text=None if verdict is None else DecisionReport.of(verdict),
        cap=prepared.cap,
        hold=Spent.of(prepared.ceiling),
        cascade=told(decision, prepared.draft),
        target=prepared.target,
        request_id=exchange.request_id,
    )
    await exchange.respond(200, [JSON], encode(report))


async def serve_feedback(gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> None:  # noqa: ARG001  # a handler's signature
    """POST /v1/feedback: what an answer was worth. Raises: GatewayError."""
    state = gateway.serving
    key = state.keyring.identify(exchange.authorization)
    record.key = key.id
    body = await exchange.body(state.config.server.max_body_bytes)
    check_json(body)
    said = decode_fields(body, _feedback)
    gateway.learning.score(key, said.request_id, said.score)
    await exchange.respond(200, [JSON], msgspec.json.encode({"object": "thinkgate.feedback", "accepted": True}))
