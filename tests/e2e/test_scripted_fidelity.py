"""The scripted upstream of the unit tests says things in the shape in which a real vLLM says them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from tests.e2e.servers import Vllm
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import Say, tokens

# What only a real server has: these may be missing from the scripted one.
OPTIONAL = {
    "multimodal_tokens",
    "routed_experts",
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "metrics",
}
OPTIONAL |= {"prompt_text", "kv_transfer_params", "ec_transfer_params", "permission", "prompt_logprobs"}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 17+25?"}],
    "max_tokens": 12,
    "thinking_token_budget": 5,
    "logit_bias": {"2": -100},
    "seed": 7,
}


@pytest.fixture(scope="module")
def scripted_url() -> Iterator[str]:
    """The scripted backend in a thread of its own, because these tests block."""
    backend = ScriptedBackend(name="smollm2")
    backend.default = Script(say=[Say(thinking=tokens("a b c d e f"), answer=tokens("g h"), ends=False)])
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(backend):
        yield backend.url


def ask(url: str, path: str, fields: dict[str, Any] | None) -> tuple[int, str]:
    """Status and body of a call."""
    body = None if fields is None else json.dumps({"model": "smollm2", **fields}).encode()
    request = urllib.request.Request(url + path, data=body, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def shape(value: Any) -> Any:
    """Keys in order, without values; of a list its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items() if key not in OPTIONAL}
    if isinstance(value, list):
        return [shape(value[0])] if value and isinstance(value[0], dict) else []
    return None


def shapes(text: str) -> list[tuple[str, Any]]:
    """The distinct event shapes of a stream, each at its first appearance, [DONE] included."""
    assert text.endswith("data: [DONE]\n\n")
    found: dict[str, Any] = {}
    for event in text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        described = shape(json.loads(event.removeprefix("data: ")))
        found.setdefault(json.dumps(described), described)
    return sorted(found.items())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True, "n": 2, "temperature": 1.0}),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_have_the_shape_of_the_real_ones(
    vllm_server: Vllm, scripted_url: str, path: str, fields: dict[str, Any], stream: bool
) -> None:
    """Events and bodies have the same keys in the same order, and streams have the same kinds of event."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    status, real = ask(vllm_server.url, path, {**fields, **options})
    _, scripted = ask(scripted_url, path, {**fields, **options})
    assert status == 200, real
    if stream:
        assert shapes(scripted) == shapes(real)
    else:
        assert shape(json.loads(scripted)) == shape(json.loads(real))
        assert list(shape(json.loads(scripted))) == list(shape(json.loads(real)))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "nope"}),
        ("/v1/chat/completions/unknown", {}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
        ("/version", None),
        ("/v1/models", None),
    ],
)
def test_other_answers_have_the_status_and_shape_of_the_real_ones(
    vllm_server: Vllm, scripted_url: str, path: str, fields: dict[str, Any] | None
) -> None:
    """Errors and small routes answer with the same status and keys."""
    real_status, real = ask(vllm_server.url, path, fields)
    scripted_status, scripted = ask(scripted_url, path, fields)
    assert scripted_status == real_status
    assert shape(json.loads(scripted)) == shape(json.loads(real))
