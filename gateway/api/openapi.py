"""The OpenAPI document, declared by hand: the hot routes have no framework to derive it from.

Owns: routes, parameters, headers and statuses. Does not own: schemas (schemas.py). Tests hold it against the
running server and against the structs that check requests.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from gateway import __version__
from gateway.api.admin_openapi import SCHEME, admin_document
from gateway.api.schemas import event, ref, schemas

Json = dict[str, Any]
DESCRIPTION = """
An OpenAI-compatible gateway in front of vLLM that puts thinking on a budget: a cap on thinking tokens that is
verified and enforced, reservations before every call and settlement after it, limits per key, team and organisation.
"""
INTEGER = {"type": "integer", "minimum": 0}
DURATION = {"type": "string", "pattern": r"^(never|\d+ms|(\d+h)?(\d+m)?\d+s)$", "examples": ["12ms", "6m0s"]}
HEADERS: dict[str, tuple[str, Json]] = {
    "x-request-id": ("Yours, if it has at most 128 letters, digits and `._:-`; else a new one.", {"type": "string"}),
    "x-thinkgate-mode": ("The mode that was chosen.", {"enum": ["instant", "reasoning"]}),
    "x-thinkgate-backend": ("Id of the backend that served it.", {"type": "string"}),
    "x-thinkgate-overhead-ms": ("Time the gateway itself took before the first byte.", {"type": "number"}),
    "x-thinkgate-budget-remaining-tokens": ("What the tightest token limit has left.", INTEGER),
    "x-thinkgate-budget": ("`offline`: held without the budget store.", {"const": "offline"}),
    "x-ratelimit-limit-requests": ("The tightest limit of requests.", INTEGER),
    "x-ratelimit-remaining-requests": ("What is left of it.", INTEGER),
    "x-ratelimit-reset-requests": ("Until its window ends.", DURATION),
    "x-ratelimit-limit-tokens": ("The tightest limit of tokens.", INTEGER),
    "x-ratelimit-remaining-tokens": ("What is left of it.", INTEGER),
    "x-ratelimit-reset-tokens": ("Until its window ends.", DURATION),
    "retry-after": ("Seconds until a retry may succeed.", INTEGER),
    "retry-after-ms": ("The same in milliseconds.", INTEGER),
    "x-should-retry": ("`false`: a retry is of no use.", {"const": "false"}),
    "idempotent-replayed": ("This is the first answer to the same `Idempotency-Key`.", {"const": "true"}),
    "www-authenticate": ("The challenge.", {"const": "Bearer"}),
}
ALWAYS = ("x-request-id",)
LIMITS = tuple(name for name in HEADERS if name.startswith(("x-ratelimit-", "x-thinkgate-budget")))
RETRY = ("retry-after", "retry-after-ms", "x-should-retry")
ERRORS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "400": ("BadRequest", "Malformed, of a wrong type, contradictory, or not honourable here.", ()),
    "401": ("Unauthenticated", "No key, an unknown key or a revoked one.", ("www-authenticate",)),
    "403": ("Forbidden", "The key may not use this model or mode.", ()),
    "404": ("NotFound", "No model, key, limit or token of that name.", ()),
    "409": ("Conflicting", "What would be changed is the file's, taken, or no longer as it was.", ("x-should-retry",)),
    "413": ("TooLarge", "The body is larger than `server.max_body_bytes`.", ()),
    "422": ("Mismatched", "The `Idempotency-Key` was used with another body.", ("x-should-retry",)),
    "431": ("HeadTooLarge", "The request's headers are larger than 64 KiB.", ()),
    "429": ("LimitExceeded", "A rate, a budget that is spent, or one that others hold.", (*RETRY, *LIMITS)),
    "4XX": ("BackendRefused", "The backend's own refusal of the request, with its status and error.", ()),
    "500": ("Failed", "A bug of ours; the log has the request id.", ("x-should-retry",)),
    "502": ("BadGateway", "The backend answered badly or broke off.", RETRY),
    "503": ("Unavailable", "No backend or store that is up, or the server is draining.", RETRY),
    "504": ("TimedOut", "The envelope's seconds or a timeout ran out.", RETRY),
}
STILL_RUNNING = ("StillRunning", "The first request with this `Idempotency-Key` has not ended.", RETRY)
OF_COMPLETIONS = {**ERRORS, "409": STILL_RUNNING}
SPENT = {"tokens": 1042, "thinking_tokens": 64, "nano_usd": 0}
THINKGATE = {
    "mode": "reasoning",
    "mode_reason": "asked by thinkgate.thinking_tokens",
    "capped": True,
    "cap": {"tokens": 64, "source": "request", "enforcement": "native", "hit": True},
    "tokens": {
        "prompt": 42,
        "cached": 0,
        "thinking": 64,
        "answer": 118,
        "planner": 0,
        "probe": 0,
        "injected": 2,
        "wasted": 0,
    },
    "hold": SPENT,
    "settled": {"tokens": 226, "thinking_tokens": 64, "nano_usd": 0},
    "cost_usd": 0.0,
    "backend": "a",
    "request_id": "req-5f0c1d2e3f4a5b6c-1",
}
USAGE = {
    "prompt_tokens": 42,
    "completion_tokens": 184,
    "total_tokens": 226,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 64},
}
HEAD = {"created": 1795410662, "model": "qwen3"}
CHAT_REQUEST = {
    "model": "qwen3",
    "messages": [{"role": "user", "content": "What is 17 times 25?"}],
    "max_completion_tokens": 800,
    "thinkgate": {"thinking_tokens": 64, "envelope": {"seconds": 20}},
}
CHAT_RESPONSE = {
    **HEAD,
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "425", "reasoning": "17 times 25 is 17 times 100 over 4."},
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
    "thinkgate": THINKGATE,
}
TEXT_REQUEST = {"model": "qwen3", "prompt": "Three rivers: the", "max_tokens": 16}
INSTANT = {**THINKGATE, "mode": "instant", "mode_reason": "a raw prompt", "capped": False}
TEXT_RESPONSE = {
    **HEAD,
    "id": "cmpl-1",
    "object": "text_completion",
    "choices": [{"index": 0, "text": " Rhine, the Rhone and the Po", "finish_reason": "length"}],
    "usage": USAGE,
    "thinkgate": {**INSTANT, "cap": {"tokens": 0, "source": "mode", "enforcement": "native", "hit": False}},
}
EMBEDDING_REQUEST = {"model": "bge", "input": ["a river", "a mountain"]}
EMBEDDING_RESPONSE = {
    "object": "list",
    "model": "bge",
    "data": [{"object": "embedding", "index": i, "embedding": [0.25, -0.5]} for i in range(2)],
    "usage": {"prompt_tokens": 6, "total_tokens": 6},
    "thinkgate": {
        "tokens": {**dict.fromkeys(THINKGATE["tokens"], 0), "prompt": 6},  # type: ignore[call-overload]  # a dict
        "hold": {"tokens": 24, "thinking_tokens": 0, "nano_usd": 0},
        "settled": {"tokens": 6, "thinking_tokens": 0, "nano_usd": 0},
        "cost_usd": 0.0,
        "backend": "a",
        "request_id": "req-5f0c1d2e3f4a5b6c-2",
    },
}
ROUTE_REQUEST = {"model": "qwen3", "messages": [{"role": "user", "content": "Tell me a joke about rivers."}]}
TEXT_DECISION = {
    "mode": "instant",
    "by": "text",
    "on_uncertain": "reasoning",
    "scorer": "557585ba0d22",
    "probability": 0.0213,
    "level": 1,
    "features": {"length": 0.44, "words": 0.32, "is_short": 1.0},
}
ROUTE = {
    "object": "thinkgate.route",
    "model": "qwen3",
    "mode": "instant",
    "mode_reason": "the text: thinking pays with 0.0213",
    "by_text": True,
    "text": TEXT_DECISION,
    "cap": {"tokens": 0, "source": "mode", "enforcement": "switch", "hit": False},
    "hold": {"tokens": 1361, "thinking_tokens": 0, "nano_usd": 0},
    "cascade": None,
    "target": None,
    "request_id": "req-5f0c1d2e3f4a5b6c-3",
}
FEEDBACK = {"request_id": "req-5f0c1d2e3f4a5b6c-3", "score": 1.0}
ACCEPTED = {"object": "thinkgate.feedback", "accepted": True}
MODEL = {"id": "qwen3", "object": "model", "created": 1795410662, "owned_by": "thinkgate", "max_model_len": 32768}


@cache  # FastAPI takes a twentieth of a second to describe its routes
def document(*, has_keys: bool = True) -> Json:
    """The whole document; not to be changed by who reads it.

    Args:
        has_keys: keys are configured; without any, everybody may call everything.
    """
    admin_paths, admin_schemas = admin_document({status: name for status, (name, *_) in ERRORS.items()})
    return {
        "openapi": "3.1.0",
        "jsonSchemaDialect": "https://json-schema.org/draft/2020-12/schema",
        "info": {"title": "thinkgate", "version": __version__, "description": DESCRIPTION.strip()},
        "security": [{"bearer": []}] if has_keys else [],
        "paths": {**_completions(), **_route(), **_models(), **_health(), **admin_paths},
        "components": {
            "schemas": schemas() | admin_schemas,
            "headers": {
                name: {"description": text, "schema": schema, "required": name in ALWAYS}
                for name, (text, schema) in HEADERS.items()
            },
            "responses": {
                name: _error(text, (*ALWAYS, *headers)) for name, text, headers in (*ERRORS.values(), STILL_RUNNING)
            },
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer", "description": "A key of the file or of the store."},
                SCHEME: {"type": "http", "scheme": "bearer", "description": "An admin token."},
            },
        },
    }


def _headers(names: tuple[str, ...]) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _json(schema: str, example: Json | None = None) -> Json:
    content: Json = {"schema": ref(schema)}
    if example is not None:
        content["examples"] = {"example": {"value": example}}
    return {"application/json": content}


def _error(description: str, headers: tuple[str, ...]) -> Json:
    return {"description": description, "headers": _headers(headers), "content": _json("Error")}


def _errors() -> Json:
    """Errors of the hot routes, which always say the request's id."""
    return {status: {"$ref": f"#/components/responses/{name}"} for status, (name, *_) in OF_COMPLETIONS.items()}


def _plain_errors(statuses: tuple[str, ...]) -> Json:
    return {status: _error(*ERRORS[status][1:]) for status in statuses}


def _completions() -> Json:
    mode = ("x-thinkgate-mode",)
    return {
        "/v1/chat/completions": _post(
            "createChatCompletion", "Chat, streamed or not.", "ChatCompletion", CHAT_REQUEST, CHAT_RESPONSE, mode
        ),
        "/v1/completions": _post(
            "createCompletion",
            "Text completion; a raw prompt cannot switch thinking on.",
            "Completion",
            TEXT_REQUEST,
            TEXT_RESPONSE,
            mode,
        ),
        "/v1/embeddings": _post(
            "createEmbedding",
            "Embeddings, passed on to the backend.",
            "Embedding",
            EMBEDDING_REQUEST,
            EMBEDDING_RESPONSE,
        ),
    }


def _route() -> Json:
    """What explains a decision, and what says what one was worth; neither spends anything."""
    text = "Explains what a chat completion with this body would be, without carrying it out."
    score = "Scores a finished request whose mode its text decided, once."
    return {
        "/v1/route": _told("explainRoute", text, "ChatCompletionRequest", ROUTE_REQUEST, "Route", ROUTE),
        "/v1/feedback": _told("giveFeedback", score, "Feedback", FEEDBACK, "FeedbackAccepted", ACCEPTED),
    }


def _told(operation: str, summary: str, takes: str, request: Json, gives: str, response: Json) -> Json:
    answer = {
        "description": "The answer.",
        "headers": _headers((*ALWAYS, "idempotent-replayed")),
        "content": _json(gives, response),
    }
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [_request_id(), _idempotency_key()],
            "requestBody": {"required": True, "content": _json(takes, request)},
            "responses": {"200": answer, **_errors()},
        }
    }


def _post(
    operation: str, summary: str, name: str, request: Json, response: Json, headers: tuple[str, ...] = ()
) -> Json:
    streams = name != "Embedding"
    content = _json(name if streams else "EmbeddingList", response)
    if streams:
        content["text/event-stream"] = {"schema": event(f"{name}Chunk")}
    served = (*ALWAYS, "idempotent-replayed", *headers, "x-thinkgate-backend", "x-thinkgate-overhead-ms", *LIMITS)
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [_request_id(), _idempotency_key()],
            "requestBody": {"required": True, "content": _json(f"{name}Request", request)},
            "responses": {
                "200": {"description": "The answer.", "headers": _headers(served), "content": content},
                **_errors(),
            },
        }
    }


def _request_id() -> Json:
    return {
        "name": "x-request-id",
        "in": "header",
        "required": False,
        "description": "An id of your own for this request.",
        "schema": {"type": "string"},
    }


def _idempotency_key() -> Json:
    return {
        "name": "Idempotency-Key",
        "in": "header",
        "required": False,
        "description": "Sent again with the same body, the request is answered as before, and charged once.",
        "schema": {"type": "string", "pattern": "^[ -~]{1,255}$"},
    }


def _get(
    operation: str, summary: str, schema: str, example: Json, errors: tuple[str, ...] = (), **more: object
) -> Json:
    answer = {"description": "The answer.", "content": _json(schema, example)}
    return {
        "get": {
            "operationId": operation,
            "summary": summary,
            "responses": {"200": answer, **_plain_errors(errors)},
            **more,
        }
    }


def _models() -> Json:
    name = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
    return {
        "/v1/models": _get(
            "listModels", "The models this key may use.", "ModelList", {"object": "list", "data": [MODEL]}, ("401",)
        ),
        "/v1/models/{model_id}": _get(
            "getModel", "One model.", "Model", MODEL, ("401", "403", "404"), parameters=[name]
        ),
    }


def _health() -> Json:
    ready = {"status": "ok", "models": ["qwen3"], "down": {}}
    open_to_all: Json = {"security": []}
    return {
        "/health/live": _get("isLive", "The process serves requests.", "Live", {"status": "ok"}, **open_to_all),
        "/health/ready": _get("isReady", "Some model can be served.", "Ready", ready, ("503",), **open_to_all),
        "/version": _get(
            "version", "The version.", "Version", {"name": "thinkgate", "version": __version__}, **open_to_all
        ),
    }
