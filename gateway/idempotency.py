"""`Idempotency-Key`: a request that is sent again is answered as the first was, and charged once.

Owns: the header, what is kept of an answer, and its replay. Does not own: claims (outcomes.py), nor how a request is
answered (serve.py).

An answer is kept before its last part is sent, so whoever has all of it can count on the replay. What ends otherwise
gives its claim back. A record's name is a digest of API key, route and `Idempotency-Key`.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

import msgspec

from gateway.errors import Headers, InvalidRequest
from gateway.outcomes import Outcome

if TYPE_CHECKING:
    from gateway.api.routes import Handler
    from gateway.app import Gateway
    from gateway.edge.exchange import Exchange, Message, Send
    from gateway.edge.watch import Watched
    from gateway.outcomes import Claim, Outcomes
    from gateway.record import Record

ROOT = "idempotency/"
REPLAYED = (b"idempotent-replayed", b"true")
# Headers that say how things stood when the first answer began.
OF_THE_MOMENT = (b"x-ratelimit-", b"x-thinkgate-budget-remaining-", b"x-thinkgate-overhead-ms")
_SANE = re.compile(rb"[\x20-\x7e]{1,255}")


class Capture:
    """Keeps what a handler sends. A failure is raised, not sent, so whatever it sends to the end is an answer.

    Args:
        outcomes: where to.
        claim: what it answers.
        max_bytes: a larger body is not kept.
    """

    def __init__(self, outcomes: Outcomes, claim: Claim, max_bytes: int) -> None:
        self._outcomes = outcomes
        self._claim = claim
        self._max_bytes = max_bytes
        self._status = self._size = 0
        self._headers: Headers = []
        self._pieces: list[bytes] = []

    def through(self, send: Send) -> Send:
        """`send`, watched while the claim is open."""

        async def forward(message: Message) -> None:
            is_last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if is_last and self._claim.is_open:
                self._take(message)
                await self._keep()
            await send(message)
            # What was cancelled while it waited for the client is not sent, and will come again.
            if not is_last:
                self._take(message)

        return forward

    def _take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._status = message["status"]
            self._headers = [pair for pair in message["headers"] if not pair[0].startswith(OF_THE_MOMENT)]
            return
        piece: bytes = message["body"]
        self._size += len(piece)
        if self._size > self._max_bytes:
            self._pieces.clear()
        else:
            self._pieces.append(piece)

    async def _keep(self) -> None:
        if self._size > self._max_bytes:
            self._claim.became = "too_large"
            return
        outcome = Outcome(self._claim.asked, self._status, self._headers, b"".join(self._pieces))
        await self._outcomes.keep(self._claim, outcome)


async def serve_once(route: Handler, gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> None:
    """A hot route for a request with an `Idempotency-Key`: carried out once, replayed afterwards.

    Raises: IdempotencyMismatch, StillRunning, StoreUnavailable; InvalidRequest for a bad header; whatever the route
        raises.
    """
    serving = gateway.serving
    rules = serving.config.idempotency
    if not rules.enabled:
        await route(gateway, exchange, record, watched)
        return
    key = serving.keyring.identify(exchange.authorization)
    record.key = key.id
    given = exchange.idempotency_key or b""
    if not _SANE.fullmatch(given):
        raise InvalidRequest("The header Idempotency-Key must stand once, with 1 to 255 printable ASCII characters.")
    body = await exchange.body(serving.config.server.max_body_bytes)
    async with gateway.outcomes.claimed(_name(key.id, record.route, given), body) as found:
        if isinstance(found, Outcome):
            record.replayed = True
            await exchange.start(found.status, [*found.headers, REPLAYED])
            await exchange.write(found.body, more=False)
        else:
            exchange.divert(Capture(gateway.outcomes, found, rules.max_bytes).through)
            await route(gateway, exchange, record, watched)


def _name(key_id: str, route: str, given: bytes) -> str:
    """The name of the record: the same for the same three, and telling nothing of them."""
    return ROOT + hashlib.sha256(msgspec.msgpack.encode((key_id, route, given))).hexdigest()
