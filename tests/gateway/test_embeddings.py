"""Embeddings: passed through with their vectors as they came, held, settled and told about like the rest."""

from __future__ import annotations

from typing import Any

import pytest

from tests.gateway.live import ASK, EMBEDDINGS, MODEL, Client, Json, Live, ask, live, tree_of
from tests.gateway.test_edge import key_of, limits_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Reply, json_reply, refusal

INPUT: Json = {"model": MODEL, "input": "six times seven"}
VECTORS = '[{"object":"embedding","index":0,"embedding":[0.10,-2e-3,1.0E+2]}]'


def answer_of(**more: Any) -> Reply:
    """What vLLM answers; numbers are written as no encoder of ours would write them."""
    fields = ['"id":"embd-1"', '"object":"list"', '"model":"scripted"', f'"data":{VECTORS}']
    usage = more.get("usage", '{"prompt_tokens":4,"total_tokens":4}')
    fields += [f'"usage":{usage}'] if usage is not None else []
    return Reply(body=("{" + ", ".join(fields) + "}\n").encode())


async def test_vectors_pass_as_they_came(gateway: Live, scripted: ScriptedBackend) -> None:
    """The backend's numbers reach the client byte for byte, with the public model name and `thinkgate` beside them."""
    scripted.routes[EMBEDDINGS] = answer_of()
    answer = await ask(gateway, {**INPUT, "encoding_format": "float", "unknown": [1]}, EMBEDDINGS)
    assert answer.status == 200
    assert VECTORS.encode() in answer.body
    assert (answer.json["model"], answer.json["usage"]["prompt_tokens"]) == (MODEL, 4)
    assert scripted.exchanges[0].json == {**INPUT, "model": "scripted", "encoding_format": "float", "unknown": [1]}


async def test_extension_has_no_mode(gateway: Live, scripted: ScriptedBackend) -> None:
    """`thinkgate` says tokens, cost, hold, settlement, backend and id; nothing thinks here, so no mode and no cap."""
    scripted.routes[EMBEDDINGS] = answer_of()
    answer = await ask(gateway, INPUT, EMBEDDINGS)
    extension = answer.json["thinkgate"]
    assert set(extension) == {"tokens", "hold", "settled", "cost_usd", "backend", "request_id"}
    assert extension["tokens"]["prompt"] == extension["settled"]["tokens"] == 4
    assert extension["hold"]["tokens"] >= 4
    assert (extension["settled"]["nano_usd"], extension["cost_usd"]) == (4000, 4e-06)
    assert extension["backend"] == answer.headers["x-thinkgate-backend"] == "a"
    assert extension["request_id"] == answer.headers["x-request-id"]
    await gateway.assert_settled()
    line = gateway.request_lines()[0]
    assert (line["model"], line["backend"], line["tokens"]["prompt"], line["cost_nano_usd"]) == (MODEL, "a", 4, 4000)
    assert gateway.metric("thinkgate_tokens_total", model=MODEL, mode="", kind="prompt") == 4


@pytest.mark.parametrize("usage", [None, "null"])
async def test_answer_without_usage_is_charged_its_bound(
    gateway: Live, scripted: ScriptedBackend, usage: str | None
) -> None:
    """A backend that does not count is charged what was held, and the response says that this is an estimate."""
    scripted.routes[EMBEDDINGS] = answer_of(usage=usage)
    extension = (await ask(gateway, INPUT, EMBEDDINGS)).json["thinkgate"]
    assert extension["counted"] == "estimated"
    assert extension["settled"] == extension["hold"]


@pytest.mark.parametrize(
    "reply",
    [
        Reply(body=b"<html>"),
        json_reply([]),
        json_reply({}),
        json_reply({"data": 5}),
        refusal(500, "boom"),
        refusal(401, "no"),
    ],
)
async def test_no_embedding_is_a_bad_gateway(gateway: Live, scripted: ScriptedBackend, reply: Reply) -> None:
    """Whatever is no list of embeddings is a 502, and nothing stays held."""
    scripted.routes[EMBEDDINGS] = reply
    answer = await ask(gateway, INPUT, EMBEDDINGS)
    assert (answer.status, answer.error["type"]) == (502, "upstream_error")


async def test_refusal_passes_through(gateway: Live, scripted: ScriptedBackend) -> None:
    """A backend's own 4xx about the input comes back with its status and error."""
    scripted.routes[EMBEDDINGS] = refusal(400, "input is too long", param="input")
    answer = await ask(gateway, INPUT, EMBEDDINGS)
    assert (answer.status, answer.error["message"]) == (400, "input is too long")


async def test_unreachable_backend_is_replaced(scripted: ScriptedBackend) -> None:
    """Embeddings go to another backend when one cannot be reached, and are 503 when none can."""
    scripted.routes[EMBEDDINGS] = answer_of()
    async with ScriptedBackend() as gone, live(tree_of(gone, scripted)) as gateway:
        gone.stop()
        gateway.slot(1).in_flight += 1  # so that the first is chosen first
        answer = await ask(gateway, INPUT, EMBEDDINGS)
        gateway.slot(1).in_flight -= 1
        assert answer.headers["x-thinkgate-backend"] == "b"
        assert not gateway.slot(0).is_up
        scripted.stop()
        refused = await ask(gateway, INPUT, EMBEDDINGS)
        assert (refused.status, refused.headers["retry-after"]) == (503, "2")


async def test_limits_hold_for_embeddings(scripted: ScriptedBackend) -> None:
    """They draw on the same limits as completions, and keys are held to their models."""
    scripted.routes[EMBEDDINGS] = answer_of()
    tree = tree_of(
        scripted, limits=limits_of(("key:ada", "tokens", 20, "day")), keys=[key_of("ada", "good", models=[MODEL])]
    )
    tree["models"]["other"] = tree["models"][MODEL]
    headers = {"authorization": "Bearer good"}
    async with live(tree) as gateway:
        first = await ask(gateway, INPUT, EMBEDDINGS, headers=headers)
        assert first.headers["x-ratelimit-limit-tokens"] == "20"
        await ask(gateway, INPUT, EMBEDDINGS, headers=headers)
        third = await ask(gateway, {**INPUT, "input": "a much longer text"}, EMBEDDINGS, headers=headers)
        assert (third.status, third.error["code"]) == (429, "budget_exceeded")
        assert (await ask(gateway, {**INPUT, "model": "other"}, EMBEDDINGS, headers=headers)).status == 403


async def test_embeddings_wait_apart_from_completions(gateway: Live, scripted: ScriptedBackend) -> None:
    """A slow embedding is in flight at its backend until it is done, and holds up nobody."""
    gate = Gate()
    scripted.routes[EMBEDDINGS] = Reply(body=answer_of().body, gate=gate)
    async with Client(gateway.port) as client:
        client.send(INPUT, EMBEDDINGS)
        await gate.wait()
        assert gateway.slot().in_flight == 1
        assert (await ask(gateway, ASK)).status == 200
        gate.open()
        assert (await client.answer()).status == 200
