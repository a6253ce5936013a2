"""Configurations and models at rest: no server, no socket; every backend is up as far as the gateway knows."""

from __future__ import annotations

import json
from typing import Any

from gateway.auth import ANYONE, Key
from gateway.backends.port import Capabilities, Surface
from gateway.config.schema import Config
from gateway.models import Model, build_models
from gateway.prepare import Prepared, prepare

Json = dict[str, Any]
HOLDS_CAPS = Capabilities(cap_binds=True, cap_binds_with_tools=True, token_ids_out=True, thinking_field="reasoning")
CHAT: Json = {"model": "qwen", "messages": [{"role": "user", "content": "hi"}]}
TEXT: Json = {"model": "qwen", "prompt": "hi"}


def key(**changes: Any) -> Key:
    """A key with these restrictions."""
    return Key(**{"id": "ada", "scopes": ("key:ada",), **changes})


def config_of(model: Json | None = None, **top: Any) -> Config:
    """A configuration with one model, `qwen`, called `up/qwen` at its backend."""
    entry: Json = {
        "upstream_model": "up/qwen",
        "backends": [{"id": "a", "url": "http://127.0.0.1:1"}],
        "thinking": {"default_tokens": 500, "max_tokens": 1000, "answer_floor_tokens": 50},
        "answer": {"default_tokens": 200, "max_tokens": 800},
        "max_n": 8,
        **(model or {}),
    }
    return Config.model_validate({"models": {"qwen": entry, **top.pop("models", {})}, **top})


def models_of(config: Config, capabilities: Capabilities | None = HOLDS_CAPS) -> dict[str, Model]:
    """Its models, with every backend measured to do this; None for down."""
    models = build_models(config)
    for model in models.values():
        for slot in model.slots:
            slot.capabilities = capabilities
    return models


def prepared(
    body: Json,
    *,
    config: Config | None = None,
    capabilities: Capabilities | None = HOLDS_CAPS,
    key: Key = ANYONE,
    surface: Surface = "chat",
) -> Prepared:
    """What a request with these fields becomes."""
    config = config or config_of()
    return prepare(
        json.dumps({**(CHAT if surface == "chat" else TEXT), **body}).encode(),
        surface,
        key,
        models_of(config, capabilities),
        config,
        request_id="req-1",
        trace=((b"traceparent", b"00-1"),),
    )


def sent(request: Prepared) -> Json:
    """The client's fields as they will ride along to the backend."""
    return {name: json.loads(bytes(value)) for name, value in request.call.fields.items()}
