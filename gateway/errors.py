"""Every error a client can see, and the HTTP status, type and code each one becomes.

Owns: the tree below and its translation to the OpenAI error body. No other module knows a status.
Source of the table: docs/api.md, "Errors".

    GatewayError
    ├── InvalidRequest            400  malformed, wrong type, contradiction, not honourable here
    │   ├── RequestTooLarge       413
    │   ├── HeadTooLarge          431
    │   ├── IdempotencyMismatch   422  the Idempotency-Key was used with another body
    │   └── ModelNotFound         404
    ├── RouteNotFound             404
    ├── EntryNotFound             404  of the admin API, and of feedback
    ├── ConflictingChange         409  what would be changed is the file's, taken, or no longer as it was
    ├── StillRunning              409  the first request with this Idempotency-Key has not ended
    ├── MethodNotAllowed          405
    ├── Unauthenticated           401
    ├── PermissionDenied          403
    ├── LimitExceeded             429  the ledger refused: rate, budget spent, budget held
    ├── Overloaded                503  no healthy backend, queue full, draining
    ├── StoreUnavailable          503  the store of keys, limits and kept answers cannot be reached
    ├── BudgetStoreUnreachable    503  nothing can be held, so nothing is spent
    ├── UpstreamRejected          4xx  the backend's own refusal of this request, passed through
    ├── UpstreamError             502  the backend answered badly or broke off
    └── DeadlinePassed            504
"""

from __future__ import annotations

import math
from typing import ClassVar

import msgspec

Headers = list[tuple[bytes, bytes]]


class GatewayError(Exception):
    """Root of everything that is answered with an error body.

    Attributes:
        message: one sentence for the client: what is wrong and the remedy.
        param: the request field at fault, if one is.
        code: machine-readable detail, stable across releases.
        retry_after_s: when a retry may succeed; None if the error says nothing about it.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None
    is_retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code if code is not None else self.default_code
        self.retry_after_s = retry_after_s

    @property
    def http_status(self) -> int:
        """The status to answer with, if nothing was sent yet."""
        return self.status

    def body(self) -> bytes:
        """The OpenAI error body, as JSON."""
        return msgspec.json.encode({"error": self.fields()})

    def fields(self) -> dict[str, str | None]:
        """The inside of the error body; also what an SSE error event carries."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def headers(self) -> Headers:
        """Headers that tell the OpenAI SDK whether and when to retry."""
        headers: Headers = []
        if self.retry_after_s is not None:
            retry_ms = max(1, math.ceil(self.retry_after_s * 1000))  # never too early
            headers.append((b"retry-after", b"%d" % -(-retry_ms // 1000)))
            headers.append((b"retry-after-ms", b"%d" % retry_ms))
        elif not self.is_retryable and self.http_status in {408, 409, 429, *range(500, 600)}:
            headers.append((b"x-should-retry", b"false"))
        return headers


class InvalidRequest(GatewayError):
    """The request is malformed, contradicts itself or asks for what this model cannot do."""

    status = 400
    type = "invalid_request_error"
    default_code = "invalid_value"


class RequestTooLarge(InvalidRequest):
    """The body exceeds server.max_body_bytes."""

    status = 413
    default_code = "request_too_large"


class HeadTooLarge(InvalidRequest):
    """The request's headers are too large."""

    status = 431
    default_code = "headers_too_large"


class IdempotencyMismatch(InvalidRequest):
    """The Idempotency-Key was used with another body."""

    status = 422
    default_code = "idempotency_mismatch"

    def __init__(self) -> None:
        super().__init__("This Idempotency-Key was used with another body: take a new one for a new request.")

    def headers(self) -> Headers:
        """It stays so, whatever status a client retries."""
        return [(b"x-should-retry", b"false")]


class ModelNotFound(InvalidRequest):
    """No model of that public name is configured."""

    status = 404
    default_code = "model_not_found"


class RouteNotFound(GatewayError):
    """No such route, or one that is not built yet; the message names what to use instead."""

    status = 404
    type = "invalid_request_error"
    default_code = "unknown_url"


class EntryNotFound(GatewayError):
    """The admin API knows no key, limit or token of that name, or no request of that id can be scored."""

    status = 404
    type = "invalid_request_error"
    default_code = "not_found"


class ConflictingChange(GatewayError):
    """What would be changed belongs to the file, is taken or revoked, or was changed at the same time."""

    status = 409
    type = "invalid_request_error"
    default_code = "conflict"


class StillRunning(GatewayError):
    """The first request with this Idempotency-Key has not ended."""

    status = 409
    type = "invalid_request_error"
    default_code = "idempotency_running"
    is_retryable = True

    def __init__(self) -> None:
        super().__init__("The first request with this Idempotency-Key still runs: try again.", retry_after_s=1.0)


class MethodNotAllowed(GatewayError):
    """The route exists, the method does not."""

    status = 405
    type = "invalid_request_error"
    default_code = "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow

    def headers(self) -> Headers:
        """The Allow header that RFC 9110 asks for."""
        return [(b"allow", self.allow.encode()), *super().headers()]


class Unauthenticated(GatewayError):
    """No key, an unknown key or a revoked one."""

    status = 401
    type = "invalid_request_error"
    default_code = "invalid_api_key"

    def headers(self) -> Headers:
        """The challenge that RFC 9110 asks for."""
        return [(b"www-authenticate", b"Bearer"), *super().headers()]


class PermissionDenied(GatewayError):
    """The key is good but may not use this model or mode."""

    status = 403
    type = "permission_denied"
    default_code = "permission_denied"


class LimitExceeded(GatewayError):
    """The ledger refused the hold.

    Args:
        kind: `rate` (per second or minute), `budget_spent` (nothing left in this window) or
            `budget_held` (what is left is held by other requests and may come back).
    """

    status = 429
    is_retryable = True

    def __init__(self, message: str, *, kind: str, retry_after_s: float | None = None) -> None:
        code = {"budget_spent": "budget_exceeded", "budget_held": "budget_held"}.get(kind, kind)
        spent = kind == "budget_spent"
        super().__init__(message, code=code, retry_after_s=None if spent else retry_after_s)
        self.kind = kind
        self.limit_headers: Headers = []

    def fields(self) -> dict[str, str | None]:
        """As the root's, with the type that tells a spent budget from a passing rate."""
        spent = self.kind == "budget_spent"
        return {**super().fields(), "type": "insufficient_quota" if spent else "rate_limit_exceeded"}

    def headers(self) -> Headers:
        """Retry headers and the `x-ratelimit-*` of the tightest limits."""
        retry = [(b"x-should-retry", b"false")] if self.kind == "budget_spent" else super().headers()
        return [*retry, *self.limit_headers]


class Overloaded(GatewayError):
    """No healthy backend, a full queue, or a server that is draining."""

    status = 503
    type = "service_unavailable_error"
    default_code = "server_is_overloaded"
    is_retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class StoreUnavailable(GatewayError):
    """The store of keys, limits and kept answers cannot be reached."""

    status = 503
    type = "service_unavailable_error"
    default_code = "store_unavailable"
    is_retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class BudgetStoreUnreachable(GatewayError):
    """The ledger's store does not answer: without a hold nothing is spent."""

    status = 503
    type = "service_unavailable_error"
    default_code = "budget_store_unreachable"
    is_retryable = True

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message, retry_after_s=retry_after_s)


class UpstreamRejected(GatewayError):
    """The backend refused this request with a 4xx of its own: status and body pass through."""

    type = "invalid_request_error"

    def __init__(self, status: int, upstream_body: bytes) -> None:
        super().__init__(f"The backend refused the request with status {status}.")
        self.upstream_status = status
        self.upstream_body = upstream_body

    @property
    def http_status(self) -> int:
        """The backend's own status."""
        return self.upstream_status

    def body(self) -> bytes:
        """The backend's own body if it is an error object, else one that says so."""
        try:
            parsed = msgspec.json.decode(self.upstream_body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return super().body()
        if not isinstance(parsed, dict):
            return super().body()
        error = parsed.get("error")
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return self.upstream_body
        detail = parsed.get("detail") or parsed.get("message")
        said = f" It says: {detail}" if isinstance(detail, str) else ""
        return msgspec.json.encode({"error": {**self.fields(), "message": self.message + said}})


class UpstreamError(GatewayError):
    """The backend could not be reached, answered badly, or broke off."""

    status = 502
    type = "upstream_error"
    default_code = "upstream_error"
    is_retryable = True


class DeadlinePassed(GatewayError):
    """The envelope's seconds, or a configured timeout, ran out before an answer."""

    status = 504
    type = "timeout"
    default_code = "deadline_passed"
    is_retryable = True
