"""The door of the admin API.

Owns: who is let in, before anything of a request's body is read; how large that may be; and what every error becomes.
Does not own: the routes (admin.py).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute

from budget.errors import BudgetError
from gateway.ask.complaint import MAX_ECHO_CHARACTERS, invalid_model
from gateway.ask.request import check_text
from gateway.errors import DeadlinePassed, GatewayError, InvalidRequest, RequestTooLarge, StoreUnavailable

if TYPE_CHECKING:
    from gateway.admin.admins import Actor
    from gateway.api.admin import Admin
    from gateway.app import Gateway

log = logging.getLogger("thinkgate.admin")
REQUEST_ID, ACTOR = "thinkgate.request_id", "thinkgate.actor"  # in an ASGI scope
MOST_BODY_BYTES = 65_536
HEALTH = "readLedger"  # tells whether the store can be reached, also when it cannot
Answer = TypeVar("Answer")


def authorization_of(request: Request) -> bytes | None:
    """The header as it arrived."""
    given = request.headers.get("authorization")
    return None if given is None else given.encode("latin-1")


class AdminRoute(APIRoute):
    """A route that lets in admins only, and answers errors as every other route does."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, behind the door."""
        handler = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            gateway: Gateway = request.app
            request.scope[ACTOR] = gateway.admin.tokens.identify(
                authorization_of(request),
                address="" if request.client is None else request.client.host,
                request_id=request.scope.get(REQUEST_ID, ""),
            )
            _check_query(request, has_parameters=bool(self.dependant.query_params))
            body = await _body(request, gateway.serving.config.server.timeouts.body_s)
            _check_json(body)
            if self.operation_id != HEALTH:
                await _mapped(gateway.stored.refresh())  # what another replica has just changed is known, too
            response = await _mapped(handler(_as_json(request, body)))
            response.headers["cache-control"] = "no-store"
            return response

        return guarded


def _check_query(request: Request, *, has_parameters: bool) -> None:
    """Raises: InvalidRequest for what FastAPI would pass over: parameters of a route without any, and said twice."""
    said = [name for name, _ in request.query_params.multi_items()]
    if said and not has_parameters:
        raise InvalidRequest(f"`{said[0]}` is not a known parameter.", param=said[0], code="unknown_parameter")
    twice = next((name for name in said if said.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"`{twice}` stands twice.", param=twice)


async def _body(request: Request, patience_s: float) -> bytes:
    """The whole body. Raises: RequestTooLarge, DeadlinePassed, InvalidRequest."""
    body, has_more = b"", True
    try:
        async with asyncio.timeout(patience_s):
            while has_more:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise InvalidRequest("The body broke off.")
                body += message.get("body", b"")
                has_more = message.get("more_body", False)
                if len(body) > MOST_BODY_BYTES:
                    raise RequestTooLarge(f"The body is larger than {MOST_BODY_BYTES} bytes.")
    except TimeoutError as exc:
        raise DeadlinePassed(f"The body did not arrive within {patience_s:g} seconds.") from exc
    return body


def _check_json(body: bytes) -> None:
    """Raises: InvalidRequest for what Python's own decoder refuses, or takes though it is none or ambiguous."""
    if not body:
        return
    check_text(body)
    try:
        msgspec.json.decode(body)
        json.loads(body, object_pairs_hook=_each_once)
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The body is not valid JSON: {exc}.", code="invalid_json") from exc


def _each_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Raises: InvalidRequest for a field that stands twice, of which the last would win."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0][:MAX_ECHO_CHARACTERS]
        raise InvalidRequest(f"`{twice}` stands twice.", param=twice, code="invalid_json")
    return fields


def _as_json(request: Request, body: bytes) -> Request:
    """The request with its body read, which is JSON whatever its content type says: as on every other route."""
    headers = [header for header in request.scope["headers"] if header[0] != b"content-type"]
    scope = {**request.scope, "headers": [*headers, (b"content-type", b"application/json")]}

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    return Request(scope, receive)


async def _mapped(work: Awaitable[Answer]) -> Answer:
    """Raises: GatewayError for whatever goes wrong."""
    try:
        return await work
    except GatewayError:
        raise
    except BudgetError as exc:  # of the records or of the ledger: what their callers can mend, they have
        log.warning("store cannot be reached", extra={"reason": str(exc)})
        raise StoreUnavailable("The store cannot be reached: try again; the log says why.") from exc
    except RequestValidationError as exc:
        raise invalid_model(exc.errors(), skip=1) from exc
    except Exception as exc:  # a bug of ours: the client still gets an error in the usual form
        log.exception("admin request failed")
        raise GatewayError("The gateway failed; its log says why.") from exc


def asked(request: Request) -> tuple[Actor, Admin]:
    """Who asks, and what for."""
    gateway: Gateway = request.app
    return request.scope[ACTOR], gateway.admin


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route that answers these beside the errors that every route of the admin API has."""
    return {status: {} for status in statuses}
