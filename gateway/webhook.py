"""Calls to the operator's webhook: signed, retried, and never in the way of a request.

Owns: the queue, the signature and the retries. A call is one POST of JSON with the headers of the Standard Webhooks
specification: `webhook-id`, the same for every attempt; `webhook-timestamp`, of the attempt; `webhook-signature`, an
HMAC-SHA256 over both and the body. Does not own: what is worth a call (soft_limits.py). Slow path: httpx.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

import httpx
import msgspec

if TYPE_CHECKING:
    from gateway.config.alerts import AlertsConfig
    from gateway.metrics import CounterCells

log = logging.getLogger("thinkgate.webhook")
MOST_WAITING = 100
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
FINAL = frozenset(range(400, 500)) - {408, 425, 429}  # the receiver will not have it, however often it is sent


Outcome = Literal["sent", "failed", "dropped"]


class _Message(NamedTuple):
    id: str
    body: bytes


class Webhook:
    """The operator's webhook, if there is one.

    Args:
        calls: counts what became of each message: `sent`, `failed` or `dropped`.
        clock: epoch seconds.
        sleep: waits between attempts.
    """

    def __init__(
        self,
        calls: CounterCells,
        *,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._calls = calls
        self._clock = clock
        self._sleep = sleep
        self._waiting: asyncio.Queue[_Message] = asyncio.Queue(MOST_WAITING)
        self._config: AlertsConfig | None = None
        self._client: httpx.AsyncClient | None = None
        self._key = b""

    def configure(self, config: AlertsConfig, key: bytes) -> None:
        """Whom to call from now on, also with what waits already, and the key that signs."""
        self._config = config
        self._key = key

    def send(self, kind: str, data: msgspec.Struct) -> None:
        """Queue a message; it is dropped, and counted, if too many wait. Without a webhook nothing happens."""
        if self._config is None or self._config.webhook_url is None:
            return
        at = datetime.fromtimestamp(round(self._clock()), UTC)
        message = _Message(
            f"msg_{secrets.token_hex(12)}", msgspec.json.encode({"type": kind, "timestamp": at, "data": data})
        )
        try:
            self._waiting.put_nowait(message)
        except asyncio.QueueFull:
            self._drop()

    async def run(self) -> None:
        """Deliver what is queued, one after the other, until cancelled."""
        try:
            while True:
                await self._deliver(await self._waiting.get())
        finally:
            while not self._waiting.empty():
                self._waiting.get_nowait()
                self._drop()
            if self._client is not None:
                await self._client.aclose()

    def _drop(self) -> None:
        self._calls.add("dropped")
        log.warning("webhook call dropped")

    async def _deliver(self, message: _Message) -> None:
        """Count what becomes of a message, also when the gateway ends before that is known."""
        outcome: Outcome = "dropped"
        try:
            outcome = await self._outcome(message)
        finally:
            if outcome == "dropped":
                self._drop()
            else:
                self._calls.add(outcome)

    async def _outcome(self, message: _Message) -> Outcome:
        """Try until it is taken, refused for good or tried often enough."""
        pause_s, attempt = FIRST_PAUSE_S, 1
        while (config := self._config) is not None and config.webhook_url is not None:
            why = await self._attempt(message, config.webhook_url, config.timeout_s)
            if why is None:
                return "sent"
            log.warning("webhook call failed", extra={"attempt": attempt, "reason": why.text})
            if why.is_final or attempt >= config.attempts:
                return "failed"
            await self._sleep(pause_s)
            pause_s, attempt = min(2 * pause_s, LONGEST_PAUSE_S), attempt + 1
        return "dropped"

    async def _attempt(self, message: _Message, url: str, timeout_s: float) -> _Failure | None:
        """One POST; None if it was taken."""
        now_s = int(self._clock())
        headers = {
            "content-type": "application/json",
            "webhook-id": message.id,
            "webhook-timestamp": str(now_s),
            "webhook-signature": signature(self._key, message.id, now_s, message.body),
        }
        try:
            async with asyncio.timeout(timeout_s):
                if self._client is None:
                    # It reads the CA bundle: tens of milliseconds, in which no stream must stand still.
                    self._client = await asyncio.to_thread(httpx.AsyncClient, trust_env=False)
                answer = await self._client.post(url, content=message.body, headers=headers, timeout=timeout_s)
        except (httpx.HTTPError, TimeoutError) as exc:
            return _Failure(type(exc).__name__, is_final=False)
        except Exception:  # a bug must not end what runs beside it
            log.exception("webhook call failed")
            return _Failure("a bug", is_final=True)
        if answer.is_success:
            return None
        return _Failure(f"status {answer.status_code}", is_final=answer.status_code in FINAL)


class _Failure(NamedTuple):
    text: str
    is_final: bool


def signature(key: bytes, id: str, timestamp_s: int, body: bytes) -> str:
    """The value of `webhook-signature`: version 1, and the HMAC-SHA256 in base64."""
    signed = b"%b.%d.%b" % (id.encode(), timestamp_s, body)
    return f"v1,{base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()}"
