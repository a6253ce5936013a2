"""`Idempotency-Key` over a live gateway: sent again, a request is answered as before and charged once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest

from budget.records.memory import MemoryRecords
from gateway.config.schema import Config
from tests.gateway.live import (
    ASK,
    COMPLETIONS,
    EMBEDDINGS,
    INSTANT,
    MODEL,
    STREAM,
    Answer,
    Client,
    Json,
    Live,
    ask,
    key_headers,
    live,
    tree_of,
)
from tests.gateway.test_edge import key_of, limits_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script, json_reply, refusal
from tests.scripted_stream import Say, tokens

KEY = {"idempotency-key": "order-17"}
REQUEST_LIMIT = limits_of(("key:ada", "requests", 10, "day"))
KINDS: list[tuple[str, str, Json]] = [
    ("stream", "/v1/chat/completions", {**STREAM, "stream_options": {"include_usage": True}}),
    ("instant stream", "/v1/chat/completions", {**INSTANT, "stream": True}),
    ("whole", "/v1/chat/completions", ASK),
    ("plain", "/v1/chat/completions", INSTANT),
    ("text", COMPLETIONS, {"model": MODEL, "prompt": "six", "stream": True}),
    ("embedding", EMBEDDINGS, {"model": MODEL, "input": "six"}),
]


def key_and(secret: str, key: str = "order-17") -> dict[str, str]:
    """Headers with an API key and an idempotency key."""
    return {**key_headers(secret), "idempotency-key": key}


def became(gateway: Live, outcome: str) -> float:
    """How many requests became that."""
    return gateway.metric("thinkgate_idempotency_total", outcome=outcome)


def of_the_answer(answer: Answer) -> dict[str, str]:
    """The headers that a replay repeats."""
    names = ("content-type", "cache-control", "x-request-id", "x-thinkgate-mode", "x-thinkgate-backend")
    return {name: answer.headers[name] for name in names if name in answer.headers}


@pytest.fixture
async def limited(scripted: ScriptedBackend) -> AsyncIterator[Live]:
    """A gateway with two keys, one of them with a limit that shows what was charged."""
    keys = [key_of("ada", "ada-secret"), key_of("bob", "bob-secret")]
    async with live(tree_of(scripted, keys=keys, limits=REQUEST_LIMIT)) as running:
        scripted.routes[EMBEDDINGS] = json_reply({"data": [[0.5]], "usage": {"prompt_tokens": 4, "total_tokens": 4}})
        scripted.forget()
        yield running


@pytest.mark.parametrize(("path", "body"), [kind[1:] for kind in KINDS], ids=[kind[0] for kind in KINDS])
async def test_the_same_request_is_replayed_and_charged_once(
    limited: Live, scripted: ScriptedBackend, path: str, body: Json
) -> None:
    """Byte for byte the same body with the first's headers, no call upstream, no charge, and a line that says so."""
    first = await ask(limited, body, path, headers=key_and("ada-secret"))
    asked = len(scripted.exchanges)
    again = await ask(limited, body, path, headers=key_and("ada-secret"))
    assert (first.status, again.status, again.body) == (200, 200, first.body)
    assert first.body.endswith(b"data: [DONE]\n\n") == ("stream" in body)
    assert of_the_answer(again) == of_the_answer(first)
    assert ("idempotent-replayed" in first.headers, again.headers["idempotent-replayed"]) == (False, "true")
    assert not [name for name in again.headers if name.startswith("x-ratelimit-") or "overhead" in name]
    assert len(scripted.exchanges) == asked
    other = await ask(limited, body, path, headers=key_headers("ada-secret"))
    assert other.headers["x-ratelimit-remaining-requests"] == "8"
    await limited.assert_settled()
    once, replay, _ = limited.request_lines()
    assert (replay["replayed"], replay["key"], sum(replay["tokens"].values())) == (True, "ada", 0)
    assert once["cost_nano_usd"] > 0
    assert "cost_nano_usd" not in replay
    assert "replayed" not in once
    assert (became(limited, "stored"), became(limited, "replayed")) == (1, 1)


async def test_another_body_is_refused(limited: Live, scripted: ScriptedBackend) -> None:
    """The same key with another body is a 422 that no client should retry, also while the first request runs."""
    gate = Gate()
    scripted.queue(Script(gates={-1: gate}))
    async with Client(limited.port) as client:
        client.send(STREAM, headers=key_and("ada-secret"))
        await gate.wait()
        during = await ask(limited, ASK, headers=key_and("ada-secret"))
        gate.open()
        assert (await client.answer()).status == 200
    after = await ask(limited, ASK, headers=key_and("ada-secret"))
    for answer in (during, after):
        assert (answer.status, answer.headers["x-should-retry"]) == (422, "false")
        assert (answer.error["type"], answer.error["code"]) == ("invalid_request_error", "idempotency_mismatch")
    assert len(scripted.calls) == 1
    assert became(limited, "mismatch") == 2


async def test_two_at_once_run_once(limited: Live, scripted: ScriptedBackend) -> None:
    """Of identical requests at the same time one runs; the others are told to come back, and then get its answer."""
    gate = Gate()
    scripted.queue(Script(gates={-1: gate}))
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(Client(limited.port)) for _ in range(5)]
        for client in clients:
            client.send(ASK, headers=key_and("ada-secret"))
        await gate.wait()
        waiting = {asyncio.create_task(client.answer()) for client in clients}
        refused: set[asyncio.Task[Answer]] = set()
        async with asyncio.timeout(5):
            while len(refused) < len(clients) - 1:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                refused |= done
        gate.open()
        (running,) = waiting
        first = await running
    for answer in [task.result() for task in refused]:
        assert (answer.status, answer.error["code"]) == (409, "idempotency_running")
        assert (answer.headers["retry-after"], "x-should-retry" in answer.headers) == ("1", False)
    assert (await ask(limited, ASK, headers=key_and("ada-secret"))).body == first.body
    assert len(scripted.calls) == 1
    assert became(limited, "running") == 4


async def test_keys_do_not_meet(limited: Live, scripted: ScriptedBackend) -> None:
    """An Idempotency-Key belongs to one API key, one route and its exact spelling."""
    answers = [
        await ask(limited, ASK, headers=key_and("ada-secret")),
        await ask(limited, ASK, headers=key_and("bob-secret")),
        await ask(limited, ASK, headers=key_and("ada-secret", "Order-17")),
        await ask(limited, {"model": MODEL, "prompt": "six"}, COMPLETIONS, headers=key_and("ada-secret")),
    ]
    assert [answer.status for answer in answers] == [200] * 4
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4
    assert (len(scripted.calls), became(limited, "stored")) == (4, 4)


async def test_who_may_not_ask_gets_no_replay(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Authentication and the size of bodies come first: a key that was revoked is a 401, a body too large a 413."""
    monkeypatch.setenv("THINKGATE_ADMIN_TOKEN", "root-secret")
    root = key_headers("root-secret")
    async with live(tree_of(scripted, server={"max_body_bytes": 1000})) as gateway:
        made = await ask(gateway, {"id": "eve"}, "/admin/v1/keys", headers=root)
        secret: str = made.json["secret"]
        assert (await ask(gateway, ASK, headers=key_and(secret))).status == 200
        assert (await ask(gateway, b" " * 1001, headers=key_and(secret))).status == 413
        assert (await ask(gateway, ASK, headers=key_and("wrong"))).status == 401
        revoked = await ask(gateway, b"", "/admin/v1/keys/eve", method="DELETE", headers=root)
        assert revoked.status == 200
        assert (await ask(gateway, ASK, headers=key_and(secret))).status == 401
        assert became(gateway, "replayed") == 0


@pytest.mark.parametrize(
    "headers",
    [
        [("idempotency-key", "")],
        [("idempotency-key", "x" * 256)],
        [("idempotency-key", "a\tb")],
        [("idempotency-key", "\u00fcber")],
        [("idempotency-key", "a"), ("idempotency-key", "a")],
    ],
    ids=["empty", "long", "tab", "not ascii", "twice"],
)
async def test_bad_keys_are_refused(gateway: Live, scripted: ScriptedBackend, headers: list[tuple[str, str]]) -> None:
    """A key that is empty, too long, not printable ASCII or there twice is a 400 that names the header."""
    answer = await ask(gateway, ASK, headers=headers)
    assert (answer.status, "Idempotency-Key" in answer.error["message"]) == (400, True)
    assert scripted.calls == []


async def test_longest_key_is_taken(gateway: Live) -> None:
    """255 printable characters are a key."""
    headers = {"idempotency-key": "a ~" * 85}
    first = await ask(gateway, ASK, headers=headers)
    assert (await ask(gateway, ASK, headers=headers)).body == first.body


async def test_refusals_are_not_kept(scripted: ScriptedBackend) -> None:
    """What is refused before anything is spent gives the key back: a retry, also with another body, runs anew."""
    keys = [key_of("ada", "ada-secret")]
    limits = limits_of(("key:ada", "tokens", 1000, "day"))
    async with live(tree_of(scripted, keys=keys, limits=limits)) as gateway:
        scripted.forget()
        headers = key_and("ada-secret")
        assert (await ask(gateway, {"model": "none"}, headers=headers)).status == 400
        assert (await ask(gateway, {**ASK, "max_tokens": 5000}, headers=headers)).status == 429
        scripted.queue(refusal(400, "no"), refusal(500, "dead"))
        assert (await ask(gateway, INSTANT, headers=headers)).status == 400
        assert (await ask(gateway, INSTANT, headers=headers)).status == 502
        assert (await ask(gateway, INSTANT, headers=headers)).status == 200
        assert (became(gateway, "released"), became(gateway, "stored")) == (4, 1)


async def test_a_stream_that_broke_off_is_not_kept(limited: Live, scripted: ScriptedBackend) -> None:
    """A backend that dies in the middle of a stream: the error event is not replayed, the retry gets a whole stream."""
    talks = Say(answer=tokens("word " * 20))
    scripted.queue(Script(say=[talks], dies_after=5), Script(say=[talks]))
    broken = await ask(limited, STREAM, headers=key_and("ada-secret"))
    assert "upstream_error" in broken.payloads()[-1]
    whole = await ask(limited, STREAM, headers=key_and("ada-secret"))
    assert (whole.payloads()[-1], "idempotent-replayed" in whole.headers) == ("[DONE]", False)
    assert (await ask(limited, STREAM, headers=key_and("ada-secret"))).body == whole.body


@pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])
async def test_who_left_may_ask_anew(limited: Live, scripted: ScriptedBackend, body: Json) -> None:
    """A client that left is charged for what came, gives the key back, and its retry runs anew at its own charge."""
    gate = Gate()
    scripted.queue(Script(say=[Say(answer=tokens("word " * 50))], gates={5: gate}))
    async with Client(limited.port) as client:
        client.send(body, headers=key_and("ada-secret"))
        await gate.wait()
        client.leave()
        await scripted.calls[0].wait_closed()
    await limited.idle()
    again = await ask(limited, body, headers=key_and("ada-secret"))
    assert (again.status, "idempotent-replayed" in again.headers) == (200, False)
    await limited.assert_settled()
    left, answered = limited.request_lines()
    assert left["ended_by"] == "disconnect"
    assert 0 < left["cost_nano_usd"] < answered["cost_nano_usd"]
    assert (became(limited, "released"), became(limited, "stored")) == (1, 1)


@pytest.mark.parametrize("body", [STREAM, ASK], ids=["stream", "whole"])
async def test_what_is_too_large_is_not_kept(scripted: ScriptedBackend, body: Json) -> None:
    """An answer above `idempotency.max_bytes` reaches its client; the key is given back, and a retry runs anew."""
    async with live(tree_of(scripted, idempotency={"max_bytes": 300})) as gateway:
        scripted.forget()
        first, again = [await ask(gateway, body, headers=KEY) for _ in range(2)]
        assert (first.status, again.status, len(scripted.calls)) == (200, 200, 2)
        assert len(first.body) > 300
        assert became(gateway, "too_large") == 2
        assert await claims(gateway) == 0


async def test_the_largest_answer_is_kept(scripted: ScriptedBackend) -> None:
    """`idempotency.max_bytes` is the size of the body, the last byte included."""
    async with live(tree_of(scripted)) as gateway:
        same_id = {"x-request-id": "req-1"}
        size = len((await ask(gateway, STREAM, headers=same_id)).body)
        for max_bytes, wanted in ((size - 1, "too_large"), (size, "stored")):
            gateway.gateway.reload(Config.model_validate(tree_of(scripted, idempotency={"max_bytes": max_bytes})))
            answer = await ask(gateway, STREAM, headers={"idempotency-key": wanted, **same_id})
            assert (len(answer.body), became(gateway, wanted)) == (size, 1)


async def test_old_answers_make_room(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond `idempotency.max_total_bytes` the oldest answers go, and their requests would run anew."""
    monkeypatch.setattr("gateway.outcomes.TICK_S", 0.01)
    async with live(tree_of(scripted, idempotency={"max_total_bytes": 5000})) as gateway:
        scripted.forget()
        for number in range(6):
            await ask(gateway, ASK, headers={"idempotency-key": str(number)})
        async with asyncio.timeout(5):
            while not became(gateway, "evicted"):
                await asyncio.sleep(0.01)
        assert "idempotent-replayed" in (await ask(gateway, ASK, headers={"idempotency-key": "5"})).headers
        assert "idempotent-replayed" not in (await ask(gateway, ASK, headers={"idempotency-key": "0"})).headers


async def test_it_can_be_off(scripted: ScriptedBackend) -> None:
    """With `idempotency.enabled: false` the header has no effect, and nothing is kept."""
    async with live(tree_of(scripted, idempotency={"enabled": False})) as gateway:
        scripted.forget()
        answers = [await ask(gateway, body, headers=KEY) for body in (ASK, ASK, INSTANT)]
        assert [answer.status for answer in answers] == [200] * 3
        assert len(scripted.calls) == 3
        assert await claims(gateway) == 0


async def claims(gateway: Live) -> int:
    """How many claims and outcomes the store of a gateway has."""
    records = gateway.gateway.stored.records
    assert isinstance(records, MemoryRecords)
    return len(records._ending)
