"""What a backend can do is measured, not believed: the probe against honest, limited and lying servers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress

import pytest

from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Capabilities
from gateway.backends.reader import MarkerIds
from gateway.config.schema import BackendConfig, ThinkingConfig, Timeouts
from gateway.errors import UpstreamError
from tests.gateway.live import ask, live, tree_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Exchange, Reply, Script, json_reply, refusal
from tests.scripted_stream import END_THINK, START_MARKER, THINK, Model, Say, Token, tokens

LONG = Say(thinking=tokens("well " * 63 + "well"), answer=tokens("the answer is 42"))


def backend_of(url: str, *, kind: str = "vllm", model: str = "scripted") -> HttpBackend:
    """A backend that was not probed."""
    entry = BackendConfig.model_validate({"id": "a", "url": url, "kind": kind})
    return HttpBackend(entry, model, ThinkingConfig(), api_key=None, timeouts=Timeouts())


async def measured(scripted: ScriptedBackend, model: Model | None = None, say: Say = LONG) -> Capabilities:
    """What the probe finds out about a model that behaves like this."""
    scripted.default = Script(say=[say], model=model)
    backend = backend_of(scripted.url)
    found = await backend.probe()
    assert backend.capabilities is found
    assert backend.pool.busy() == 0
    return found


async def test_honest_server_can_everything(scripted: ScriptedBackend) -> None:
    """A vLLM with a reasoning parser: the cap binds, with tools too, ids go in and out, the window is known."""
    found = await measured(scripted)
    assert found.cap_binds
    assert found.cap_binds_with_tools
    assert (found.thinking_field, found.token_ids_in, found.token_ids_out) == ("reasoning", True, True)
    assert (found.cached_tokens, found.tools, found.max_model_len) == (True, True, 4096)


async def test_markers_are_learned_from_the_tokenizer(scripted: ScriptedBackend) -> None:
    """Markers that are one token each get their ids; the server is asked, nothing is guessed."""
    backend = backend_of(scripted.url)
    await backend.probe()
    assert backend.markers == MarkerIds(THINK, END_THINK)
    asked = [e.json.get("prompt") for e in scripted.exchanges if e.path == "/tokenize"]
    assert asked[:2] == ["<think>", "</think>"]


LIMITED: list[tuple[str, Model, Say, Callable[[Capabilities], bool]]] = [
    ("ignores the cap", Model(honours_cap=False), LONG, lambda c: c.cap_binds is False),
    ("says why it ignores it", Model(honours_cap=False), LONG, lambda c: "ignored" in c.detail["cap"]),
    ("thinks too little", Model(), Say(thinking=tokens("a b"), answer=tokens("c")), lambda c: c.cap_binds is None),
    ("thinks not at all", Model(), Say(answer=tokens("c")), lambda c: c.cap_binds is None),
    ("gives no ids", Model(gives_ids=False), LONG, lambda c: (c.cap_binds, c.token_ids_out) == (None, False)),
    ("reports no cache", Model(cached_tokens=None), LONG, lambda c: not c.cached_tokens),
    ("older field", Model(field="reasoning_content"), LONG, lambda c: c.thinking_field == "reasoning_content"),
    ("no parser", Model(field="inline", start_marker=START_MARKER), LONG, lambda c: c.thinking_field == "inline"),
    (
        "no parser, opened by the template",
        Model(field="inline"),
        Say(thinking=tokens("a b"), answer=tokens("c")),
        lambda c: c.thinking_field == "inline_opened",
    ),
    (
        "no parser, opened by the template, takes no ids",
        Model(field="inline", takes_ids=False),
        LONG,
        lambda c: (c.thinking_field, c.forcing) == ("inline_opened", None),
    ),
]


@pytest.mark.parametrize(("model", "say", "holds"), [case[1:] for case in LIMITED], ids=[c[0] for c in LIMITED])
async def test_limits_of_a_server_are_found(
    scripted: ScriptedBackend, model: Model, say: Say, holds: Callable[[Capabilities], bool]
) -> None:
    """What a server ignores, does not know or does not report is a capability it lacks, or one that is unknown."""
    assert holds(await measured(scripted, model, say))


async def test_markers_of_several_tokens_are_split_by_text(scripted: ScriptedBackend) -> None:
    """Where a marker is no single token there are no marker ids, and the cap cannot be measured."""
    scripted.routes["/tokenize"] = json_reply({"tokens": [1, 2], "count": 2})
    backend = backend_of(scripted.url)
    found = await backend.probe()
    assert (backend.markers, found.cap_binds) == (None, None)
    assert "markers" in found.detail


async def test_server_that_refuses_tools_can_still_serve(scripted: ScriptedBackend) -> None:
    """A refusal of tools, or of a cap, is a capability less and no failure."""

    def picky(exchange: Exchange) -> Script | Reply:
        if exchange.json.get("tools"):
            return refusal(400, "tools need --enable-auto-tool-choice")
        if "thinking_token_budget" in exchange.json:
            return refusal(400, "no reasoning parser")
        return Script(say=[LONG])

    scripted.default = picky
    found = await backend_of(scripted.url).probe()
    assert (found.tools, found.cap_binds) == (False, False)
    assert "--enable-auto-tool-choice" in found.detail["tools"]
    assert "no reasoning parser" in found.detail["cap"]


async def test_openai_server_is_asked_nothing_of_vllms(scripted: ScriptedBackend) -> None:
    """Another kind of server gets plain OpenAI requests only, and no cap is expected of it."""
    found = await backend_of(scripted.url, kind="openai").probe()
    assert (found.cap_binds, found.token_ids_in) == (False, False)
    fields = {name for call in scripted.calls for name in call.json}
    asked = {"logprobs", "reasoning_effort", "continue_final_message", "add_generation_prompt"}  # whether it knows them
    assert fields <= {"model", "messages", "max_tokens", "chat_template_kwargs", "temperature", *asked}
    assert "/tokenize" not in {exchange.path for exchange in scripted.exchanges}


DOWN: list[tuple[str, dict[str, Reply], str]] = [
    ("lists nothing", {"/v1/models": refusal(500, "boom")}, "does not list its models"),
    ("another model", {"/v1/models": json_reply({"data": [{"id": "other"}]})}, "set upstream_model"),
    ("refuses chat", {"/v1/chat/completions": refusal(400, "no template")}, "no template"),
    ("our key is bad", {"/v1/models": refusal(401, "unauthorized")}, "401"),
    ("no HTTP", {"/v1/models": Reply(raw=b"SSH-2.0\r\n")}, "does not answer"),
    ("breaks off", {"/v1/chat/completions": Reply(raw=b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{")}, "does not"),
    ("HTML", {"/v1/chat/completions": Reply(body=b"<html>", content_type="text/html", status=404)}, "404"),
]


@pytest.mark.parametrize(("routes", "says"), [case[1:] for case in DOWN], ids=[case[0] for case in DOWN])
async def test_server_that_cannot_serve_is_down(scripted: ScriptedBackend, routes: dict[str, Reply], says: str) -> None:
    """A server that does not serve the model is down, and the reason is said in words."""
    scripted.routes |= routes
    with pytest.raises(UpstreamError, match=says):
        await backend_of(scripted.url).probe()


async def test_nobody_there_is_down() -> None:
    """A port that nobody listens on is down."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(UpstreamError, match="does not answer"):
        await backend_of(f"http://127.0.0.1:{port}").probe()


STRANGE: list[tuple[str, object]] = [
    ("/v1/models", {"data": [{"id": ["odd"]}, {"id": "scripted", "max_model_len": "long"}]}),
    ("/v1/models", {"data": "none"}),
    ("/v1/models", ["scripted"]),
    ("/tokenize", {"tokens": ["x"]}),
    ("/tokenize", "tokens"),
    ("/v1/chat/completions", []),
    ("/v1/chat/completions", "text"),
    ("/v1/chat/completions", {}),
    ("/v1/chat/completions", {"choices": "none"}),
    ("/v1/chat/completions", {"choices": [{"message": "hi"}], "usage": 5}),
    ("/v1/chat/completions", {"choices": [{"message": {"reasoning": ["a"]}, "token_ids": ["x"]}]}),
    ("/v1/chat/completions", {"choices": [{"token_ids": [1]}], "prompt_token_ids": 7}),
]


@pytest.mark.parametrize(("path", "answer"), STRANGE)
async def test_strange_answers_are_answers(scripted: ScriptedBackend, path: str, answer: object) -> None:
    """A server whose answers make no sense can do little, or is down; the probe itself does not fail."""
    scripted.routes[path] = json_reply(answer)
    with suppress(UpstreamError):
        assert not (await backend_of(scripted.url).probe()).cap_binds or path == "/v1/models"


async def test_down_server_says_why_and_comes_up(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that is down for a reason says so in readiness, and is up without a restart once that is mended."""
    monkeypatch.setattr("gateway.slots.PROBE_AGAIN_S", 0.02)
    models = scripted.routes["/v1/models"]
    scripted.routes["/v1/models"] = refusal(500, "still loading")
    async with live(tree_of(scripted), up=0) as gateway:
        record = await gateway.logs.wait("backend down")
        assert "still loading" in vars(record)["reason"]
        ready = await ask(gateway, b"", "/health/ready", method="GET")
        assert (ready.status, "still loading" in ready.error["message"]) == (503, True)
        scripted.routes["/v1/models"] = models
        await gateway.logs.wait("backend up")
        assert (await ask(gateway, b"", "/health/ready", method="GET")).status == 200
        listed = await ask(gateway, b"", "/v1/models/qwen", method="GET")
        assert listed.json["max_model_len"] == 4096


async def test_token_text_is_no_marker(scripted: ScriptedBackend) -> None:
    """Text that looks like a marker but is an ordinary token counts as what it is."""
    odd = Say(thinking=(Token(7777, "</think>"), *tokens("a b c d e f g h")), answer=tokens("x"))
    assert (await measured(scripted, say=odd)).cap_binds
