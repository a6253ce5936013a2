"""The HTTP edge over real sockets: bodies, ids, keys, methods, limits, and what their refusals look like."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import pytest

from tests.gateway.live import (
    ASK,
    CHAT,
    COMPLETIONS,
    EMBEDDINGS,
    INSTANT,
    STREAM,
    Client,
    Json,
    Live,
    ask,
    key_headers,
    live,
    tree_of,
)
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script, json_reply

DURATION = re.compile(r"(\d+h)?(\d+m)?\d+s|\d+ms")
FLAWED: list[tuple[bytes, str | None, str]] = [
    (b"", None, "invalid_json"),
    (b"{", None, "invalid_json"),
    (b"[]", None, "invalid_json"),
    (b"\xff{}", None, "invalid_json"),
    (b'{"model":"qwen"}', "messages", "missing_required_parameter"),
    (b'{"model":"qwen","messages":[]}', "messages", "invalid_value"),
    (b'{"model":"qwen","messages":[{"role":"user"}],"n":true}', "n", "invalid_type"),
    (b'{"model":"qwen","messages":[{"role":"user"}],"priority":0}', "priority", "unknown_parameter"),
    (b'{"model":"qwen","messages":[{"role":"user"}],"thinkgate":{"x":1}}', "thinkgate.x", "unknown_parameter"),
    (b"[" * 200 + b"]" * 200, None, "nested_too_deep"),
]


def key_of(name: str, secret: str, **more: Any) -> Json:
    """An entry of `keys`."""
    return {"id": name, "secret_sha256": hashlib.sha256(secret.encode()).hexdigest(), **more}


def limits_of(*limits: tuple[str, str, float, str | None]) -> list[Json]:
    """Entries of `limits`."""
    return [
        {"scope": scope, "unit": unit, "amount": amount, "window": window} for scope, unit, amount, window in limits
    ]


async def test_declared_length_above_the_limit_is_refused_unread(scripted: ScriptedBackend) -> None:
    """A content-length above server.max_body_bytes is a 413 before any of the body is sent."""
    async with live(tree_of(scripted, server={"max_body_bytes": 1000})) as gateway, Client(gateway.port) as client:
        client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 1001\r\n\r\n")
        answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_chunked_body_is_refused_when_it_grows_too_large(scripted: ScriptedBackend) -> None:
    """A body without a declared length is a 413 as soon as it is longer than the limit, before its end."""
    async with live(tree_of(scripted, server={"max_body_bytes": 1000})) as gateway, Client(gateway.port) as client:
        client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(3):
            client.write(b"190\r\n" + b" " * 400 + b"\r\n")
        answer = await client.answer()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_largest_body_is_taken(scripted: ScriptedBackend) -> None:
    """A body of exactly server.max_body_bytes is served, in one piece or in many."""
    async with live(tree_of(scripted, server={"max_body_bytes": 1000})) as gateway:
        body = b'{"model":"qwen","messages":[{"role":"user","content":"hi"}]}'.ljust(1000)
        assert (await ask(gateway, body)).status == 200
        async with Client(gateway.port) as client:
            client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ntransfer-encoding: chunked\r\n\r\n")
            client.write(b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
            assert (await client.answer()).status == 200


@pytest.mark.parametrize("sent", [b"", b'{"model":'])
@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
async def test_body_that_trickles_is_given_up(scripted: ScriptedBackend, path: str, sent: bytes) -> None:
    """A body that is not there within server.timeouts.body_s is a 504, even if not one byte of it came."""
    tree = tree_of(scripted, server={"timeouts": {"body_s": 0.05}})
    async with live(tree) as gateway, Client(gateway.port) as client:
        client.write(b"POST %b HTTP/1.1\r\nhost: g\r\ncontent-length: 90\r\n\r\n%b" % (path.encode(), sent))
        answer = await client.answer()
    assert (answer.status, answer.error["type"], answer.error["code"]) == (504, "timeout", "body_timeout")


async def test_client_that_leaves_inside_its_body_is_forgotten(gateway: Live, scripted: ScriptedBackend) -> None:
    """A connection that closes before its body is complete holds nothing and reaches no backend."""
    async with Client(gateway.port) as client:
        client.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 90\r\n\r\n{")
        client.leave()
    assert (await ask(gateway, INSTANT)).status == 200
    await gateway.assert_settled()
    assert len(scripted.calls) == 1


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
async def test_sane_request_id_is_echoed(gateway: Live, path: str) -> None:
    """The client's x-request-id comes back on every hot route, on success and on refusal."""
    answer = await ask(gateway, {"model": "nobody", "input": "x"}, path, headers={"x-request-id": "my:id-1._"})
    assert answer.headers["x-request-id"] == "my:id-1._"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "a\u00e9", "<script>"])
@pytest.mark.parametrize("body", [ASK, STREAM, INSTANT])
async def test_strange_request_id_is_replaced(gateway: Live, given: str, body: Json) -> None:
    """An x-request-id that is too long or has other characters is not echoed: a new one is made."""
    async with Client(gateway.port) as client:
        client.send(body, headers={"x-request-id": given})
        answer = await client.answer()
    assert answer.status == 200
    assert re.fullmatch(r"req-[0-9a-f]{16}-[0-9a-f]+", answer.headers["x-request-id"])
    assert answer.headers["x-request-id"].encode() in answer.body


async def test_connection_serves_one_request_after_the_other(gateway: Live) -> None:
    """A connection is kept after an answer, after a refusal and after a stream, pipelined or not."""
    async with Client(gateway.port) as client:
        for body, status in ((ASK, 200), ({"model": 1}, 400), (STREAM, 200), (INSTANT, 200)):
            client.send(body)
            assert (await client.answer()).status == status
        client.send(INSTANT)
        client.send(ASK)
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]


@pytest.mark.parametrize(("body", "param", "code"), FLAWED)
async def test_flawed_body_is_named(gateway: Live, body: bytes, param: str | None, code: str) -> None:
    """A body that cannot be a request is a 400 that names the field at fault and says what is wrong."""
    answer = await ask(gateway, body)
    error = answer.error
    assert (answer.status, error["type"], error["param"], error["code"]) == (
        400,
        "invalid_request_error",
        param,
        code,
    )
    assert error["message"]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
async def test_wrong_method_is_told_the_right_one(gateway: Live, path: str, method: str) -> None:
    """A hot route answers other methods with 405 and an allow header, in the usual error form."""
    answer = await ask(gateway, b"", path, method=method)
    assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, "POST", "method_not_allowed")


async def test_unknown_routes_and_models_are_told_apart(gateway: Live) -> None:
    """An unknown route, one that is not built and an unknown model are 404s with a code of their own."""
    assert (await ask(gateway, b"", "/v2/chat", method="GET")).error["code"] == "unknown_url"
    assert (await ask(gateway, b"", "/v1/responses")).error["code"] == "not_built"
    answer = await ask(gateway, {**ASK, "model": "nobody"})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "headers",
    [{}, key_headers("wrong"), {"authorization": "Basic abc"}, {"authorization": "Bearer"}, {"x-api-key": "good"}],
)
async def test_without_a_good_key_nothing_is_read(scripted: ScriptedBackend, headers: Mapping[str, str]) -> None:
    """No key, a bad one and another scheme are 401 on every route that spends, before the body is looked at."""
    async with live(tree_of(scripted, keys=[key_of("ada", "good")])) as gateway:
        scripted.forget()
        for path in (CHAT, COMPLETIONS, EMBEDDINGS):
            answer = await ask(gateway, b"no json", path, headers=headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await ask(gateway, b"", "/v1/models", method="GET", headers=headers)).status == 401
    assert scripted.exchanges == []


async def test_key_is_held_to_its_models_and_modes(scripted: ScriptedBackend) -> None:
    """A key that may not use a model or a mode gets a 403 that says so; what it may use works."""
    tree = tree_of(scripted, keys=[key_of("ada", "good", models=["qwen"], modes=["instant"])])
    tree["models"]["other"] = tree["models"]["qwen"]
    async with live(tree) as gateway:
        headers = key_headers("good")
        other = await ask(gateway, {**ASK, "model": "other"}, headers=headers)
        reasoning = await ask(gateway, {**ASK, "reasoning_effort": "low"}, headers=headers)
        assert [(a.status, a.error["code"]) for a in (other, reasoning)] == [(403, "permission_denied")] * 2
        assert "reasoning" in reasoning.error["message"]
        assert (await ask(gateway, INSTANT, headers=headers)).status == 200
        listed = await ask(gateway, b"", "/v1/models", method="GET", headers=headers)
        assert [entry["id"] for entry in listed.json["data"]] == ["qwen"]


@pytest.mark.parametrize("body", [ASK, STREAM, INSTANT])
async def test_limits_are_told_on_success(scripted: ScriptedBackend, body: Json) -> None:
    """An answer carries the tightest limits of requests and tokens, what is left of them and when they reset."""
    limits = limits_of(
        ("key:anyone", "requests", 5, "hour"),
        ("model:qwen", "tokens", 90000, "day"),
        ("key:anyone", "tokens", 10**9, "day"),
    )
    async with live(tree_of(scripted, limits=limits)) as gateway:
        headers = (await ask(gateway, body)).headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("5", "4")
    assert headers["x-ratelimit-limit-tokens"] == "90000"
    assert 0 < int(headers["x-ratelimit-remaining-tokens"]) < 90000
    assert headers["x-thinkgate-budget-remaining-tokens"] == headers["x-ratelimit-remaining-tokens"]
    assert DURATION.fullmatch(headers["x-ratelimit-reset-requests"])
    assert DURATION.fullmatch(headers["x-ratelimit-reset-tokens"])


@pytest.mark.parametrize("path", [CHAT, EMBEDDINGS])
async def test_rate_is_refused_until_its_window_ends(scripted: ScriptedBackend, path: str) -> None:
    """Requests above a limit per minute are 429 `rate_limit_exceeded` with retry-after and the limit's headers."""
    scripted.routes[EMBEDDINGS] = json_reply({"data": [], "usage": {"prompt_tokens": 1}})
    async with live(tree_of(scripted, limits=limits_of(("model:qwen", "requests", 1, "minute")))) as gateway:
        body = {**INSTANT, "input": "x"}
        assert (await ask(gateway, body, path)).status == 200
        answer = await ask(gateway, body, path)
    assert (answer.status, answer.error["type"], answer.error["code"]) == (429, "rate_limit_exceeded", "rate")
    assert "model:qwen" in answer.error["message"]
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert 1 <= int(answer.headers["retry-after-ms"]) <= 60_000
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert DURATION.fullmatch(answer.headers["x-ratelimit-reset-requests"])
    assert "x-should-retry" not in answer.headers


@pytest.mark.parametrize(("unit", "amount"), [("tokens", 10), ("thinking_tokens", 1), ("usd", 0.0000001)])
async def test_spent_budget_is_not_retried(scripted: ScriptedBackend, unit: str, amount: float) -> None:
    """A budget that cannot cover the request is 429 `insufficient_quota`, names its scope and forbids a retry."""
    async with live(tree_of(scripted, limits=limits_of(("model:qwen", unit, amount, "month")))) as gateway:
        answer = await ask(gateway)
    assert (answer.status, answer.error["type"], answer.error["code"]) == (
        429,
        "insufficient_quota",
        "budget_exceeded",
    )
    assert "model:qwen" in answer.error["message"]
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert answer.headers.get("x-ratelimit-limit-tokens") == ("10" if unit == "tokens" else None)


@pytest.mark.parametrize(
    ("limit", "code"),
    [(("model:qwen", "tokens", 600, "day"), "budget_held"), (("key:anyone", "concurrency", 1, None), "rate")],
)
async def test_budget_held_by_others_comes_back(
    scripted: ScriptedBackend, limit: tuple[str, str, float, str | None], code: str
) -> None:
    """While another request holds what is left, a request is 429 with retry-after; afterwards it is served."""
    gate = Gate()
    async with live(tree_of(scripted, limits=limits_of(limit))) as gateway, Client(gateway.port) as client:
        scripted.queue(Script(gates={-1: gate}))
        client.send(INSTANT)
        await gate.wait()
        refused = await ask(gateway, INSTANT)
        assert (refused.status, refused.error["type"], refused.error["code"]) == (429, "rate_limit_exceeded", code)
        assert refused.headers["retry-after"] == "1"
        gate.open()
        assert (await client.answer()).status == 200
        assert (await ask(gateway, INSTANT)).status == 200


async def test_our_own_bug_is_answered_in_the_usual_form(gateway: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that nobody foresaw is a 500 with an error body and the request's id, and one log record."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(gateway.gateway.ledger, "hold", broken)
    answer = await ask(gateway, headers={"x-request-id": "mine"})
    assert (answer.status, answer.error["type"], answer.headers["x-request-id"]) == (500, "server_error", "mine")
    assert answer.headers["x-should-retry"] == "false"
    record = await gateway.logs.wait("request failed")
    assert record.exc_info is not None
    assert vars(record)["request_id"] == "mine"


async def test_every_request_has_its_line(gateway: Live) -> None:
    """Each request, refused ones too, is one line with its id, status and what it used, and never its prompt."""
    await ask(gateway, {**INSTANT, "messages": [{"role": "user", "content": "a secret prompt"}]})
    await ask(gateway, {**ASK, "model": "nobody"})
    await ask(gateway, b"", method="GET")
    lines = gateway.request_lines()
    assert [(line["status"], line.get("error")) for line in lines] == [
        (200, None),
        (404, "model_not_found"),
        (405, "method_not_allowed"),
    ]
    assert lines[0]["tokens"]["answer"] > 0
    assert (lines[0]["model"], lines[0]["mode"], lines[0]["backend"]) == ("qwen", "instant", "a")
    assert "secret" not in gateway.lines.getvalue()
