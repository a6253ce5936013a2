"""One HTTP exchange on the ASGI wire, without a framework in between.

Owns: reading a bounded body, the headers the gateway cares for, and writing responses. Does not own: what
they mean (serve.py).
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from gateway.errors import GatewayError, Headers, RequestTooLarge

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# An extension of ASGI that a server may offer (http_server.py): given its `send`, writes a response in one go; or does
# nothing and says False, where it must go the usual way.
WHOLE_RESPONSE = "thinkgate.whole_response"
WholeResponse = Callable[[Send, int, Headers, bytes], bool]
# Another: writes a part of a streamed body at once; or False, likewise.
BODY_PART = "thinkgate.body_part"
BodyPart = Callable[[bytes], bool]

JSON = (b"content-type", b"application/json")
EVENT_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_TRACE = (b"traceparent", b"tracestate")
FAIL_S = 5.0  # nobody watches an exchange that failed: so long its client may take to read why
# Unique, not secret: a random part for the process, a number for the request.
_PROCESS = f"req-{os.urandom(8).hex()}-"
_numbers = itertools.count(1)


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


class Exchange:
    """A request and its response.

    Attributes:
        authorization: the header, or None.
        request_id: the client's `x-request-id` if it is a sane one, else a new one.
        put: writes a part of a body that goes on, if that is possible without waiting (BODY_PART); None: it never is.
        trace: W3C trace context to forward.
        has_body: the request's body was read.
        has_started: the response's status is sent.
        is_complete: the last part of the response is sent, or waits for the client.
        idempotency_key: the header, or None; empty where it stands twice.
        began_s: monotonic time of arrival.
        wait_s: time spent waiting for a backend before the first byte.
    """

    __slots__ = (
        "_body",
        "_content_length",
        "_receive",
        "_send",
        "_server",
        "_whole",
        "authorization",
        "began_s",
        "has_body",
        "has_started",
        "idempotency_key",
        "is_complete",
        "put",
        "request_id",
        "sending_since_s",
        "status",
        "trace",
        "wait_s",
    )

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.began_s = time.perf_counter()
        self._receive = receive
        self._send = self._server = send
        extensions = scope.get("extensions") or {}
        self._whole: WholeResponse | None = extensions.get(WHOLE_RESPONSE)
        put: Callable[[Send, bytes], bool] | None = extensions.get(BODY_PART)
        self.put: BodyPart | None = None if put is None else partial(put, send)
        self.authorization: bytes | None = None
        self.idempotency_key: bytes | None = None
        self._body = b""
        self.trace: tuple[tuple[bytes, bytes], ...] = ()
        self._content_length = -1
        self.has_body = self.has_started = self.is_complete = False
        self.status = 0
        self.wait_s = 0.0
        self.sending_since_s: float | None = None
        request_id = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                self.authorization = value
            elif name == b"x-request-id":
                request_id = value
            elif name == b"content-length":
                self._content_length = int(value) if value.isdigit() else -1
            elif name == b"idempotency-key":
                self.idempotency_key = value if self.idempotency_key is None else b""
            elif name in _TRACE:
                self.trace = (*self.trace, (name, value))
        sane = request_id and _REQUEST_ID.fullmatch(request_id)
        self.request_id = request_id.decode() if sane else f"{_PROCESS}{next(_numbers):x}"

    @property
    def receive(self) -> Receive:
        """For whoever watches for the client's departure once the body is read."""
        return self._receive

    async def body(self, limit_bytes: int) -> bytes:
        """The whole body, also a second time; how long it may take is the watch's business.

        Raises: RequestTooLarge, ClientGone.
        """
        if self.has_body:
            return self._body
        if self._content_length > limit_bytes:
            raise _too_large(limit_bytes)
        message = await self._receive()
        body = self._piece(message, 0, limit_bytes)
        if message.get("more_body"):
            pieces, size = [body], len(body)
            while message.get("more_body"):
                message = await self._receive()
                pieces.append(self._piece(message, size, limit_bytes))
                size += len(pieces[-1])
            body = b"".join(pieces)
        self._body = body
        self.has_body = True
        return body

    @staticmethod
    def _piece(message: Message, size: int, limit_bytes: int) -> bytes:
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        if size + len(piece) > limit_bytes:
            raise _too_large(limit_bytes)
        return piece

    def overhead_s(self) -> float:
        """Time since arrival that was not spent waiting for a backend."""
        return time.perf_counter() - self.began_s - self.wait_s

    def divert(self, wrap: Callable[[Send], Send]) -> None:
        """From now on all of the response passes through `wrap(send)`; nothing takes a short way any more."""
        self._send = wrap(self._send)
        self._whole = self.put = None

    async def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole response."""
        headers.append((b"content-length", b"%d" % len(body)))
        headers.append((b"x-request-id", self.request_id.encode()))
        if self._whole is not None and self._whole(self._server, status, headers, body):
            self.status = status
            self.has_started = self.is_complete = True
            return
        await self.start(status, headers)
        await self.write(body, more=False)

    async def fail(self, error: GatewayError) -> None:
        """A whole error response, or an error event where the response is a stream that has begun."""
        if self.is_complete:
            return
        try:
            async with asyncio.timeout(FAIL_S):
                if self.has_started:
                    await self.write(b"data: %b\n\n" % error.body(), more=False)
                else:
                    await self.respond(error.http_status, [JSON, *error.headers()], error.body())
        except TimeoutError:
            await self.cut()

    async def cut(self) -> None:
        """Close the connection whatever the client has not read yet; ASGI has no word for it, uvicorn a way."""
        transport = getattr(getattr(self._server, "__self__", None), "transport", None)
        if transport is not None:
            transport.abort()
            await asyncio.sleep(0)  # uvicorn learns of it in the next turn of the loop

    async def start(self, status: int, headers: Headers) -> None:
        """Status and headers."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        self.has_started = True

    async def write(self, body: bytes, *, more: bool = True) -> None:
        """A part of the body; waits while the client is slow."""
        self.sending_since_s = time.perf_counter()
        self.is_complete = not more
        await self._send({"type": "http.response.body", "body": body, "more_body": more})
        self.sending_since_s = None


def _too_large(limit_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"The body is larger than {limit_bytes} bytes (server.max_body_bytes).")
