"""Routes: the hot ones as plain handlers, the rest on FastAPI.

Owns: which path goes where, model lists, health, version, metrics, and what unbuilt routes answer.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import Request, Response
from fastapi.responses import JSONResponse

from gateway import __version__
from gateway.api.admin import ROUTERS, admin_methods
from gateway.api.admin_door import authorization_of
from gateway.api.embeddings import serve_embedding
from gateway.api.openapi import document
from gateway.api.route import serve_feedback, serve_route
from gateway.auth import check_model
from gateway.errors import (
    GatewayError,
    MethodNotAllowed,
    ModelNotFound,
    Overloaded,
    RouteNotFound,
    StoreUnavailable,
)
from gateway.serve import serve_completion

if TYPE_CHECKING:
    from gateway.app import Gateway
    from gateway.auth import Key
    from gateway.edge.exchange import Exchange
    from gateway.edge.watch import Watched
    from gateway.record import Record

Handler = Callable[["Gateway", "Exchange", "Record", "Watched"], Awaitable[None]]
NOT_BUILT = {
    "/v1/responses": "use /v1/chat/completions",
    "/v1/messages": "use /v1/chat/completions",
    "/v1/trees": "use /v1/chat/completions with `n`",
    "/v1/audio": "call the backend directly",
    "/v1/images": "call the backend directly",
    "/v1/files": "call the backend directly",
    "/v1/batches": "send single requests",
    "/v1/moderations": "call the backend directly",
}


def chat(gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> Awaitable[None]:
    """POST /v1/chat/completions."""
    return serve_completion(gateway, exchange, "chat", record, watched)


def completions(gateway: Gateway, exchange: Exchange, record: Record, watched: Watched) -> Awaitable[None]:
    """POST /v1/completions."""
    return serve_completion(gateway, exchange, "completions", record, watched)


HOT_ROUTES: dict[str, Handler] = {
    "/v1/chat/completions": chat,
    "/v1/completions": completions,
    "/v1/embeddings": serve_embedding,
    "/v1/route": serve_route,
    "/v1/feedback": serve_feedback,
}


def error_response(exc: GatewayError) -> Response:
    """A `GatewayError` as a FastAPI response."""
    response = Response(exc.body(), exc.http_status, media_type="application/json")
    for name, value in exc.headers():
        response.headers.append(name.decode(), value.decode())
    return response


async def not_found(request: Request, exc: Exception) -> Response:
    """Unknown routes and wrong methods, in the error format of all others."""
    path = request.url.path
    if getattr(exc, "status_code", 404) == 405:
        allow = admin_methods(path) or (getattr(exc, "headers", None) or {}).get("Allow", "GET")
        return error_response(MethodNotAllowed(f"Use {allow} for {path}.", allow=allow))
    for prefix, instead in NOT_BUILT.items():
        if path == prefix or path.startswith(prefix + "/"):
            return error_response(RouteNotFound(f"{prefix} is not built yet: {instead}.", code="not_built"))
    return error_response(RouteNotFound(f"There is no {path} here; see /openapi.json."))


async def _failed(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, GatewayError)
    return error_response(exc)


def add_routes(gateway: Gateway) -> None:
    """Register everything that is not hot."""
    gateway.add_exception_handler(GatewayError, _failed)
    # The documented way to replace it; whether a key is needed may change with a reload.
    gateway.openapi = lambda: document(has_keys=not gateway.serving.keyring.is_open)  # type: ignore[method-assign]
    for router in ROUTERS:
        gateway.include_router(router)
    _add_health(gateway)
    _add_models(gateway)

    @gateway.get("/metrics", include_in_schema=False)
    async def metrics(request: Request) -> Response:
        """Prometheus metrics, on this port for admins only."""
        gateway.admin.tokens.identify(authorization_of(request)).require("admin", "viewer")
        workers = gateway.serving.config.server.workers
        if workers > 1:
            raise RouteNotFound(
                f"One of {workers} workers answers here, and knows its own metrics only: "
                "scrape server.metrics.port, which adds them up."
            )
        return Response(gateway.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_health(gateway: Gateway) -> None:
    @gateway.get("/health/live")
    async def live() -> JSONResponse:
        """The process serves requests."""
        return JSONResponse({"status": "ok"})

    @gateway.get("/health/ready")
    async def ready() -> Response:
        """The store was read, some model has a backend that is up, and no drain began; `down` names the others."""
        if gateway.is_draining:
            return error_response(Overloaded("The server is shutting down."))
        if not gateway.stored.is_loaded:
            return error_response(StoreUnavailable("The store of keys and limits could not be read yet."))
        models = gateway.serving.models.values()
        up = sorted(model.name for model in models if any(slot.is_up for slot in model.slots))
        down = {m.name: "; ".join(slot.failure for slot in m.slots) for m in models if m.name not in up}
        if not up:
            reasons = " ".join(f"{name}: {why}" for name, why in down.items())
            return error_response(Overloaded(f"No backend is up. {reasons}"))
        return JSONResponse({"status": "ok", "models": up, "down": down})

    @gateway.get("/version")
    async def version() -> JSONResponse:
        """The gateway's version."""
        return JSONResponse({"name": "thinkgate", "version": __version__})


def _add_models(gateway: Gateway) -> None:
    def identify(request: Request) -> Key:
        return gateway.serving.keyring.identify(authorization_of(request))

    @gateway.get("/v1/models")
    async def list_models(request: Request) -> JSONResponse:
        """The models this key may use."""
        key = identify(request)
        names = [name for name in gateway.serving.config.models if key.models is None or name in key.models]
        return JSONResponse({"object": "list", "data": [_entry(gateway, name) for name in names]})

    @gateway.get("/v1/models/{model_id:path}")
    async def get_model(model_id: str, request: Request) -> JSONResponse:
        """One model."""
        key = identify(request)
        if model_id not in gateway.serving.config.models:
            raise ModelNotFound(f"The model {model_id!r} does not exist.", param="model")
        check_model(key, model_id)
        return JSONResponse(_entry(gateway, model_id))


def _entry(gateway: Gateway, name: str) -> dict[str, object]:
    """A public name; of several models the smallest window."""
    serving = gateway.serving
    windows = [serving.models[model].window() for model in serving.config.behind(name)]
    return {
        "id": name,
        "object": "model",
        "created": gateway.started_s,
        "owned_by": "thinkgate",
        "max_model_len": min((window for window in windows if window is not None), default=None),
    }
