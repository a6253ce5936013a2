"""Soft limits of a running gateway: the header in every kind of response, and the call to the webhook."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from gateway.config.load import ConfigError
from tests.gateway.live import ASK, CHAT, DEADLINE_S, EMBEDDINGS, INSTANT, MODEL, STREAM, Json, ask, live, tree_of
from tests.gateway.test_embeddings import answer_of
from tests.gateway.test_webhook import Receiver, receiving
from tests.scripted_backend import ScriptedBackend

HEADER = "x-thinkgate-soft-limit"


@pytest.fixture(autouse=True)
def secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable that signs."""
    monkeypatch.setenv("HOOK_SECRET", "hook secret")


def tree(backend: ScriptedBackend, url: str | None, *, amount: int = 1000, soft: float | None = 0.1) -> Json:
    """A limit on anyone with a mark, and a webhook."""
    limit: Json = {"scope": "key:anyone", "unit": "tokens", "amount": amount, "window": "total", "soft": soft}
    return tree_of(backend, limits=[limit], alerts={"webhook_url": url, "secret_env": url and "HOOK_SECRET"})


async def called(receiver: Receiver, count: int) -> list[Json]:
    """The bodies, once there are so many."""
    async with asyncio.timeout(DEADLINE_S):
        while len(receiver.got) < count:
            await asyncio.sleep(0.001)
    return [json.loads(body) for _, body in receiver.got]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (ASK, CHAT),
        (STREAM, CHAT),
        (INSTANT, CHAT),
        ({"model": MODEL, "input": "word " * 60}, EMBEDDINGS),
    ],
)
async def test_every_response_past_the_mark_says_so(scripted: ScriptedBackend, body: Json, path: str) -> None:
    """Streamed or not, plain or not, and embeddings: the header is there, and the webhook is called once."""
    scripted.routes[EMBEDDINGS] = answer_of()
    async with receiving() as receiver, live(tree(scripted, receiver.url)) as running:
        answers = [await ask(running, body, path) for _ in range(2)]
        assert [answer.status for answer in answers] == [200, 200]
        assert all(answer.headers[HEADER].startswith("key:anyone;tokens;0.") for answer in answers)
        ((told),) = await called(receiver, 1)
        assert (told["type"], told["data"]["scope"], told["data"]["soft"]) == ("soft_limit.passed", "key:anyone", 0.1)
        assert told["data"]["used"] >= 100
        assert told["data"]["window_ends_at"] is None
        assert abs(int(receiver.got[0][0]["webhook-timestamp"]) - time.time()) < 60
        async with asyncio.timeout(DEADLINE_S):
            while not (calls := running.gateway.metrics.webhook_calls.cells):  # the receiver had it before we knew
                await asyncio.sleep(0.001)
        assert calls == {("sent",): 1}
        assert running.metric("thinkgate_webhook_calls_total", outcome="sent") == 1


async def test_a_refusal_past_the_mark_says_so_too(scripted: ScriptedBackend) -> None:
    """A limit that refuses may be past its mark as well."""
    async with live(tree(scripted, None, amount=450, soft=0.01)) as running:
        assert (await ask(running)).status == 200
        refused = await ask(running, {**ASK, "thinkgate": {"thinking_tokens": 200}})
        assert (refused.status, HEADER in refused.headers) == (429, True)


async def test_without_marks_nothing_is_said(scripted: ScriptedBackend) -> None:
    """Limits without a mark have no header, whatever of them is used."""
    async with live(tree(scripted, None, soft=None)) as running:
        assert HEADER not in (await ask(running)).headers


async def test_a_webhook_that_is_down_fails_no_request(scripted: ScriptedBackend) -> None:
    """Requests are answered while the call fails and waits to be made again."""
    async with receiving(500) as receiver, live(tree(scripted, receiver.url)) as running:
        assert (await ask(running)).status == 200
        await called(receiver, 1)
        assert (await ask(running)).status == 200


async def test_a_reload_brings_marks_and_webhook(scripted: ScriptedBackend) -> None:
    """Both follow the configuration while requests are served; a secret that is missing leaves the old one in force."""
    from gateway.config.schema import Config

    async with receiving() as receiver, live(tree(scripted, None, soft=None)) as running:
        assert HEADER not in (await ask(running)).headers
        broken = tree(scripted, receiver.url)
        broken["alerts"]["secret_env"] = "UNSET_SECRET"
        with pytest.raises(ConfigError, match="UNSET_SECRET"):
            running.gateway.reload(Config.model_validate(broken))
        assert HEADER not in (await ask(running)).headers
        running.gateway.reload(Config.model_validate(tree(scripted, receiver.url)))
        assert HEADER in (await ask(running)).headers
        assert len(await called(receiver, 1)) == 1
