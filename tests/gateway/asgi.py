"""Requests to a gateway through its ASGI door: no socket, no server, and a backend that answers from memory."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.app import Gateway
from gateway.backends.port import Call, Capabilities, Delta, Express, Kind, Segment, Usage
from gateway.config.schema import Config
from tests.gateway.still import HOLDS_CAPS

Json = dict[str, Any]


@dataclass(slots=True)
class Answered:
    """A response."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def json(self) -> Json:
        """The body, decoded."""
        decoded: Json = json.loads(self.body)
        return decoded

    @property
    def error(self) -> Json:
        """The inside of an error body."""
        error: Json = json.loads(self.body)["error"]
        return error


class Echo:
    """A backend that thinks a word and answers with what it was asked."""

    kind = "vllm"

    def __init__(self, id: str = "a") -> None:
        self.id = id

    async def generate(self, call: Call, express: Express | None = None) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        asked = json.loads(bytes(call.fields["messages"]))[-1]["content"]
        yield [Delta(prompt_tokens=9, text="hm", kind=Kind.THINKING, thinking=1, token_ids=[7])]
        yield [Delta(text=str(asked), answer=2, injected=1, token_ids=[16, 8, 2], finish_reason="stop", capped=True)]
        yield [Delta(usage=Usage(prompt_tokens=9, completion_tokens=4))]

    async def tokenize(self, call: Call) -> list[int]:
        """See the port: a token per byte of the messages."""
        return list(bytes(call.fields["messages"]))

    async def encode(self, text: str) -> list[int]:
        """See the port: a token per byte."""
        return list(text.encode())

    async def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        yield [Delta(text="so", token_ids=[8, 2], finish_reason="stop")]

    async def probe(self) -> Capabilities:
        """See the port."""
        return HOLDS_CAPS

    async def close(self) -> None:
        """See the port."""


def gateway_of(config: Config, *, is_up: bool = True) -> tuple[Gateway, io.StringIO]:
    """A gateway whose backends are all `Echo`es, and what it will log."""
    lines = io.StringIO()
    if "scorer" not in config.routing.model_fields_set:  # what is asked is of no concern: structure alone decides
        config = config.model_copy(update={"routing": config.routing.model_copy(update={"scorer": "none"})})
    gateway = Gateway(config, log_stream=lines)
    for model in gateway.serving.models.values():
        for slot in model.slots:
            slot.backend = Echo(slot.config.id)
            slot.capabilities = HOLDS_CAPS if is_up else None
    return gateway, lines


async def ask(
    gateway: Gateway,
    body: Json | bytes,
    path: str = "/v1/chat/completions",
    *,
    method: str = "POST",
    headers: Mapping[str, str] | None = None,
) -> Answered:
    """One request, whose path may have a query, and its whole response."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    messages = iter([{"type": "http.request", "body": data, "more_body": False}, {"type": "http.disconnect"}])
    answered = Answered()

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answered.status = message["status"]
            answered.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        else:
            answered.body += message.get("body", b"")

    path, _, query = path.partition("?")
    named = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "headers": named,
        "server": ("127.0.0.1", 80),
        "client": ("127.0.0.1", 1),
    }
    await gateway(scope, receive, send)
    return answered
