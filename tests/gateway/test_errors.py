"""Every error a client can see: status, type, code, body and the headers that say whether to try again."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

import gateway
from gateway.backends.http import UpstreamUnreachable
from gateway.errors import (
    BudgetStoreUnreachable,
    ConflictingChange,
    DeadlinePassed,
    EntryNotFound,
    GatewayError,
    HeadTooLarge,
    IdempotencyMismatch,
    InvalidRequest,
    LimitExceeded,
    MethodNotAllowed,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    RequestTooLarge,
    RouteNotFound,
    StillRunning,
    StoreUnavailable,
    Unauthenticated,
    UpstreamError,
    UpstreamRejected,
)
from tests.gateway.asgi import ask, gateway_of
from tests.gateway.still import CHAT, config_of

NO_RETRY = {"x-should-retry": "false"}
NEXT = {"retry-after": "1", "retry-after-ms": "1000"}
SOON = {"retry-after": "2", "retry-after-ms": "1500"}

# error, status, type, code, headers: docs/api.md, "Errors".
TABLE: list[tuple[GatewayError, int, str, str | None, dict[str, str]]] = [
    (GatewayError("x"), 500, "server_error", None, NO_RETRY),
    (InvalidRequest("x"), 400, "invalid_request_error", "invalid_value", {}),
    (InvalidRequest("x", code="invalid_type"), 400, "invalid_request_error", "invalid_type", {}),
    (HeadTooLarge("x"), 431, "invalid_request_error", "headers_too_large", {}),
    (RequestTooLarge("x"), 413, "invalid_request_error", "request_too_large", {}),
    (ModelNotFound("x"), 404, "invalid_request_error", "model_not_found", {}),
    (EntryNotFound("x"), 404, "invalid_request_error", "not_found", {}),
    (ConflictingChange("x"), 409, "invalid_request_error", "conflict", NO_RETRY),
    (StillRunning(), 409, "invalid_request_error", "idempotency_running", NEXT),
    (IdempotencyMismatch(), 422, "invalid_request_error", "idempotency_mismatch", NO_RETRY),
    (StoreUnavailable("x", retry_after_s=1.5), 503, "service_unavailable_error", "store_unavailable", SOON),
    (RouteNotFound("x"), 404, "invalid_request_error", "unknown_url", {}),
    (RouteNotFound("x", code="not_built"), 404, "invalid_request_error", "not_built", {}),
    (MethodNotAllowed("x", allow="POST"), 405, "invalid_request_error", "method_not_allowed", {"allow": "POST"}),
    (Unauthenticated("x"), 401, "invalid_request_error", "invalid_api_key", {"www-authenticate": "Bearer"}),
    (PermissionDenied("x"), 403, "permission_denied", "permission_denied", {}),
    (LimitExceeded("x", kind="rate", retry_after_s=1.5), 429, "rate_limit_exceeded", "rate", SOON),
    (LimitExceeded("x", kind="budget_held", retry_after_s=1.5), 429, "rate_limit_exceeded", "budget_held", SOON),
    (LimitExceeded("x", kind="budget_spent"), 429, "insufficient_quota", "budget_exceeded", NO_RETRY),
    (
        LimitExceeded("x", kind="budget_spent", retry_after_s=1.5),
        429,
        "insufficient_quota",
        "budget_exceeded",
        NO_RETRY,
    ),
    (
        Overloaded("x"),
        503,
        "service_unavailable_error",
        "server_is_overloaded",
        NEXT,
    ),
    (BudgetStoreUnreachable("x"), 503, "service_unavailable_error", "budget_store_unreachable", NEXT),
    (Overloaded("x", retry_after_s=1.5), 503, "service_unavailable_error", "server_is_overloaded", SOON),
    (UpstreamError("x"), 502, "upstream_error", "upstream_error", {}),
    (UpstreamError("x", retry_after_s=1.5), 502, "upstream_error", "upstream_error", SOON),
    (UpstreamUnreachable("x"), 502, "upstream_error", "upstream_error", {}),
    (DeadlinePassed("x"), 504, "timeout", "deadline_passed", {}),
    (DeadlinePassed("x", code="body_timeout"), 504, "timeout", "body_timeout", {}),
    (UpstreamRejected(422, b"?"), 422, "invalid_request_error", None, {}),
]


def classes() -> Iterator[type[GatewayError]]:
    """Every error class, wherever in the gateway it is defined."""
    for module in pkgutil.walk_packages(gateway.__path__, "gateway."):
        importlib.import_module(module.name)
    todo: list[type[GatewayError]] = [GatewayError]
    while todo:
        yield (one := todo.pop())
        todo.extend(one.__subclasses__())


def headers_of(error: GatewayError) -> dict[str, str]:
    """Its headers, as text."""
    return {name.decode(): value.decode() for name, value in error.headers()}


def test_the_table_has_every_error() -> None:
    """A new error class is not complete without its row here."""
    assert {type(row[0]) for row in TABLE} == set(classes())


@pytest.mark.parametrize(("error", "status", "type_", "code", "headers"), TABLE, ids=lambda value: str(value)[:24])
def test_an_error_is_answered_as_its_row_says(
    error: GatewayError, status: int, type_: str, code: str | None, headers: dict[str, str]
) -> None:
    """Status, type, code and retry headers are those of the documented table, in OpenAI's error body."""
    body = json.loads(error.body())
    assert error.http_status == status
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert (body["error"]["type"], body["error"]["code"]) == (type_, code)
    assert body["error"]["message"] == error.message
    assert headers_of(error) == headers


@pytest.mark.parametrize("error", [row[0] for row in TABLE], ids=lambda error: type(error).__name__)
def test_the_sdk_never_retries_in_vain(error: GatewayError) -> None:
    """OpenAI's SDK retries 408, 409, 429 and 5xx by itself: an error that will not pass tells it not to."""
    would_retry = error.http_status in {408, 409, 429} or error.http_status >= 500
    told_not_to = headers_of(error).get("x-should-retry") == "false"
    lasting = not error.is_retryable or getattr(error, "kind", "") == "budget_spent"
    says_so_anyway = isinstance(error, IdempotencyMismatch)  # to clients that retry more than the SDK
    assert told_not_to == ((would_retry and lasting) or says_so_anyway)


def test_an_error_names_its_param_and_keeps_its_cause() -> None:
    """`param` goes into the body, null where no field is at fault."""
    assert json.loads(InvalidRequest("x", param="n").body())["error"]["param"] == "n"
    assert json.loads(InvalidRequest("x").body())["error"]["param"] is None
    assert str(InvalidRequest("what is wrong")) == "what is wrong"


@pytest.mark.parametrize(
    ("seconds", "retry_after", "retry_after_ms"),
    [
        (0.0, "1", "1"),
        (0.0001, "1", "1"),
        (0.25, "1", "250"),
        (1.0, "1", "1000"),
        (1.001, "2", "1001"),
        (60, "60", "60000"),
    ],
)
def test_retry_headers_are_never_too_early(seconds: float, retry_after: str, retry_after_ms: str) -> None:
    """Whole seconds are rounded up, and zero is not sent: clients would hammer."""
    assert headers_of(Overloaded("x", retry_after_s=seconds)) == {
        "retry-after": retry_after,
        "retry-after-ms": retry_after_ms,
    }


def test_limits_travel_with_a_refusal() -> None:
    """A 429 carries the `x-ratelimit-*` it was refused by, beside its retry headers."""
    for kind, more in (("rate", SOON), ("budget_spent", NO_RETRY)):
        error = LimitExceeded("x", kind=kind, retry_after_s=1.5)
        error.limit_headers = [(b"x-ratelimit-remaining-tokens", b"0")]
        assert headers_of(error) == {**more, "x-ratelimit-remaining-tokens": "0"}


# ---------------------------------------------------------------------------------- the backend's refusals


def test_the_backends_own_error_passes_through() -> None:
    """A 4xx about the request keeps its status and its body, byte for byte."""
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":"input_tokens","code":400}}'
    error = UpstreamRejected(400, body)
    assert (error.http_status, error.body()) == (400, body)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"detail":"Not Found"}', " It says: Not Found"),
        (b'{"message":"no such adapter"}', " It says: no such adapter"),
        (b'{"detail":[{"loc":["body"]}]}', ""),
        (b'{"error":"text"}', ""),
        (b'{"error":{}}', ""),
        (b'{"error":{"message":null}}', ""),
        (b"[]", ""),
        (b"null", ""),
        (b"<html>", ""),
        (b"", ""),
        (b"\xff\xfe", ""),
        (b'{"detail":"\xff"}', ""),
        (b"[" * 100_000, ""),
    ],
)
def test_a_backends_other_words_become_an_error_body(body: bytes, said: str) -> None:
    """A refusal in another shape is put into OpenAI's, with what can be quoted of it."""
    error = json.loads(UpstreamRejected(404, body).body())["error"]
    assert error["message"] == f"The backend refused the request with status 404.{said}"
    assert set(error) == {"message", "type", "param", "code"}


# ------------------------------------------------------------------------------------- on the wire


@pytest.mark.parametrize(
    ("how", "status", "type_", "code", "param", "header"),
    [
        ({"body": b"{"}, 400, "invalid_request_error", "invalid_json", None, None),
        ({"body": {**CHAT, "n": "two"}}, 400, "invalid_request_error", "invalid_type", "n", None),
        ({"body": {**CHAT, "cache_salt": "x"}}, 400, "invalid_request_error", "unknown_parameter", "cache_salt", None),
        (
            {"body": {**CHAT, "enable_thinking": False, "thinking_budget": 5}},
            400,
            "invalid_request_error",
            "contradictory_parameters",
            "thinking_budget",
            None,
        ),
        ({"headers": {}}, 401, "invalid_request_error", "invalid_api_key", None, "www-authenticate"),
        (
            {"headers": {"authorization": "Bearer sk-eve"}},
            401,
            "invalid_request_error",
            "invalid_api_key",
            None,
            "www-authenticate",
        ),
        ({"body": {**CHAT, "model": "other"}}, 403, "permission_denied", "permission_denied", "model", None),
        ({"body": {**CHAT, "model": "qwen:instant"}}, 403, "permission_denied", "permission_denied", "model", None),
        ({"body": {**CHAT, "model": "gpt"}}, 404, "invalid_request_error", "model_not_found", "model", None),
        ({"path": "/v1/nothing", "method": "GET"}, 404, "invalid_request_error", "unknown_url", None, None),
        ({"path": "/v1/responses"}, 404, "invalid_request_error", "not_built", None, None),
        ({"method": "GET"}, 405, "invalid_request_error", "method_not_allowed", None, "allow"),
        ({"path": "/v1/models"}, 405, "invalid_request_error", "method_not_allowed", None, "allow"),
        ({"body": b" " * 3000}, 413, "invalid_request_error", "request_too_large", None, None),
        ({"body": {**CHAT, "max_tokens": 900}}, 429, "insufficient_quota", "budget_exceeded", None, "x-should-retry"),
        ({"is_up": False}, 503, "service_unavailable_error", "server_is_overloaded", None, "retry-after"),
    ],
)
async def test_a_request_that_goes_wrong_is_answered_by_the_table(
    how: dict[str, Any], status: int, type_: str, code: str, param: str | None, header: str | None
) -> None:
    """From bytes to response: each case of the documented table has its status, type, code, param and header."""
    how = {"body": {**CHAT, "max_tokens": 300}, "headers": {"authorization": "Bearer sk-ada"}, **how}
    config = config_of(
        server={"max_body_bytes": 2000},
        models={"other": {"backends": [{"id": "b", "url": "http://127.0.0.1:2"}]}},
        keys=[
            {
                "id": "ada",
                "secret_sha256": hashlib.sha256(b"sk-ada").hexdigest(),
                "models": ["qwen"],
                "modes": ["reasoning"],
            }
        ],
        limits=[{"scope": "key:ada", "unit": "tokens", "amount": 1000, "window": "day"}],
    )
    gateway, _ = gateway_of(config, is_up=how.pop("is_up", True))
    try:
        answered = await ask(gateway, **how)
    finally:
        gateway.lines.close()
    assert answered.status == status, answered.body
    assert answered.headers["content-type"] == "application/json"
    assert (answered.error["type"], answered.error["code"], answered.error["param"]) == (type_, code, param)
    assert answered.error["message"]
    if header is not None:
        assert header in answered.headers
