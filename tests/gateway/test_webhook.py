"""Calls to the operator's webhook."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import pytest
from pydantic import ValidationError

from gateway.config.alerts import AlertsConfig
from gateway.config.load import ConfigError, webhook_secret
from gateway.config.schema import Config
from gateway.metrics import CounterCells
from gateway.webhook import FINAL, LONGEST_PAUSE_S, MOST_WAITING, Webhook
from tests.gateway.live import DEADLINE_S

KEY = b"sixteen letters."
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class News(msgspec.Struct):
    """Something to tell."""

    what: str = "it happened"


@dataclass(slots=True)
class Receiver:
    """A server that answers with these statuses, then 200; None: it closes the connection without an answer."""

    statuses: list[int | None] = field(default_factory=list)
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    url: str = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One call."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        self.got.append((headers, await reader.readexactly(int(headers["content-length"]))))
        status = self.statuses.pop(0) if self.statuses else 200
        if status is not None:
            extra = "location: http://127.0.0.1:1/\r\n" if status == 302 else ""
            writer.write(f"HTTP/1.1 {status} Said\r\ncontent-length: 0\r\n{extra}connection: close\r\n\r\n".encode())
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()


@asynccontextmanager
async def receiving(*statuses: int | None) -> AsyncIterator[Receiver]:
    """A receiver on a port of its own."""
    receiver = Receiver(list(statuses))
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    async with server:
        receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
        yield receiver


class Calling:
    """A webhook that runs, with a clock that stands still and sleeps that are only noted."""

    def __init__(self, **config: Any) -> None:
        self.counts = CounterCells("calls", "Calls.", ("outcome",))
        self.slept: list[float] = []
        self.now_s = 1_700_000_000.9
        self.webhook = Webhook(self.counts, clock=lambda: self.now_s, sleep=self._sleep)
        self.webhook.configure(AlertsConfig(secret_env="S", **config), KEY)

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds

    async def deliver(self, *, messages: int = 1) -> dict[str, float]:
        """Send so many, wait for all of them, and say what became of them."""
        for _ in range(messages):
            self.webhook.send("news", News())
        async with asyncio.timeout(DEADLINE_S):
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(self.webhook.run())
                while sum(self.counts.cells.values()) < messages:
                    await asyncio.sleep(0.001)
                running.cancel()
        return {labels[0]: count for labels, count in self.counts.cells.items()}


async def test_a_call_is_signed_as_standard_webhooks_say() -> None:
    """Id, timestamp and body are what the signature was made over, with the bytes of the secret."""
    async with receiving() as receiver:
        assert await Calling(webhook_url=receiver.url).deliver() == {"sent": 1}
    ((headers, body),) = receiver.got
    assert json.loads(body) == {"type": "news", "timestamp": "2023-11-14T22:13:21Z", "data": {"what": "it happened"}}
    assert headers["webhook-timestamp"] == "1700000000"
    signed = f"{headers['webhook-id']}.1700000000.".encode() + body
    expected = base64.b64encode(hmac.digest(KEY, signed, hashlib.sha256)).decode()
    assert headers["webhook-signature"] == f"v1,{expected}"
    assert headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [500, 503, 429, 408, 302, None])
async def test_a_call_that_fails_is_made_again_with_the_same_id(status: int | None) -> None:
    """Each attempt comes later than the last, with a fresh timestamp, and says which message it is."""
    async with receiving(status, status) as receiver:
        calling = Calling(webhook_url=receiver.url)
        assert await calling.deliver() == {"sent": 1}
    assert calling.slept == [1.0, 2.0]
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1
    assert len({headers["webhook-timestamp"] for headers, _ in receiver.got}) == 3
    assert len({headers["webhook-signature"] for headers, _ in receiver.got}) == 3


async def test_all_calls_share_a_client_made_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Making one reads the CA bundle, so it happens once, and in a thread."""
    made_in: list[threading.Thread] = []
    make = httpx.AsyncClient

    def made(**options: Any) -> httpx.AsyncClient:
        made_in.append(threading.current_thread())
        return make(**options)

    monkeypatch.setattr("gateway.webhook.httpx.AsyncClient", made)
    async with receiving(500) as receiver:
        calling = Calling(webhook_url=receiver.url)
        assert await calling.deliver(messages=2) == {"sent": 2}
    assert len(receiver.got) == 3
    assert len(made_in) == 1
    assert made_in[0] is not threading.current_thread()


async def test_a_call_under_way_at_the_end_is_counted() -> None:
    """What the gateway was still trying to send when it ended is dropped, once, like what waited behind it."""
    calling = Calling(webhook_url="http://127.0.0.1:1/hook")
    calling.webhook._sleep = asyncio.Event().wait  # type: ignore[assignment]  # a pause without an end
    calling.webhook.send("news", News())
    calling.webhook.send("news", News())
    async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as tasks:
        running = tasks.create_task(calling.webhook.run())
        while calling.webhook._waiting.qsize() == 2:
            await asyncio.sleep(0)
        running.cancel()
    assert calling.counts.cells == {("dropped",): 2}


async def test_attempts_end() -> None:
    """After as many attempts as configured the message is given up, and the next one has its turn."""
    async with receiving(500, 500, 500) as receiver:
        calling = Calling(webhook_url=receiver.url, attempts=3)
        assert await calling.deliver(messages=2) == {"failed": 1, "sent": 1}
    assert len(receiver.got) == 4


async def test_pauses_have_a_limit() -> None:
    """They double up to a minute."""
    async with receiving(*[500] * 9) as receiver:
        calling = Calling(webhook_url=receiver.url, attempts=9)
        assert await calling.deliver() == {"failed": 1}
    assert calling.slept == [1, 2, 4, 8, 16, 32, LONGEST_PAUSE_S, LONGEST_PAUSE_S]


@pytest.mark.parametrize("status", [400, 401, 404, 410])
async def test_what_the_receiver_will_not_have_is_not_sent_again(status: int) -> None:
    """A 4xx that is about the message is final."""
    async with receiving(status) as receiver:
        assert await Calling(webhook_url=receiver.url).deliver() == {"failed": 1}
    assert (len(receiver.got), status in FINAL) == (1, True)


async def test_a_receiver_that_is_not_there_fails_the_call_only() -> None:
    """A refused connection is an attempt like any other."""
    async with receiving() as receiver:
        url = receiver.url
    assert await Calling(webhook_url=url, attempts=2).deliver() == {"failed": 1}


async def test_a_full_queue_drops_and_counts() -> None:
    """Telling never waits: what is too much is dropped, and so is what still waits at the end."""
    calling = Calling(webhook_url="http://127.0.0.1:1/hook")
    for _ in range(MOST_WAITING + 3):
        calling.webhook.send("news", News())
    assert calling.counts.cells["dropped",] == 3
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(calling.webhook.run())
        await asyncio.sleep(0)
        running.cancel()
    assert calling.counts.cells["dropped",] >= MOST_WAITING


async def test_without_a_webhook_nothing_is_kept() -> None:
    """Messages to nobody are neither queued nor counted, also after the webhook was taken away."""
    calling = Calling(webhook_url="http://127.0.0.1:1/hook")
    calling.webhook.send("news", News())
    calling.webhook.configure(AlertsConfig(), b"")
    calling.webhook.send("news", News())
    assert await calling.deliver(messages=1) == {"dropped": 1}


def config_of(**alerts: Any) -> Config:
    """A configuration that calls somebody."""
    model = {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]}
    return Config.model_validate({"models": {"m": model}, "alerts": alerts})


@pytest.mark.parametrize(("secret", "key"), [(" plain text\n", b"plain text"), (SECRET, KEY)])
def test_a_secret_is_base64_after_its_mark_or_else_text(secret: str, key: bytes) -> None:
    """Secrets of the Standard Webhooks form and any other text both sign; without a webhook there is none."""
    alerting = config_of(webhook_url="http://host/x", secret_env="S")
    assert webhook_secret(alerting, env={"S": secret}) == key
    assert webhook_secret(config_of(), env={"S": secret}) == b""


@pytest.mark.parametrize("text", ["not base64!", "YWJj\nZA", "YWJjZA", ""])
def test_a_marked_secret_that_is_no_base64_is_refused(text: str) -> None:
    """It would sign what no receiver can verify: the variable and the remedy are named, the secret is not."""
    alerting = config_of(webhook_url="http://host/x", secret_env="HOOK")
    with pytest.raises(ConfigError, match=r"alerts\.secret_env: .* HOOK .*openssl rand") as caught:
        webhook_secret(alerting, env={"HOOK": f"whsec_{text}"})
    assert not text or text not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"webhook_url": "ftp://host/x", "secret_env": "S"}, "must look like"),
        ({"webhook_url": "http:///x", "secret_env": "S"}, "must look like"),
        ({"webhook_url": "https://me:word@host/x", "secret_env": "S"}, "credentials"),
        ({"webhook_url": "https://host/x#y", "secret_env": "S"}, "fragment"),
        ({"webhook_url": "https://host/x"}, "go together"),
        ({"secret_env": "S"}, "go together"),
        ({"webhook_url": "https://host/x", "secret_env": "not a name"}, "name of an environment variable"),
        ({"attempts": 0}, "greater than 0"),
    ],
)
def test_alerts_that_cannot_work_are_refused(config: dict[str, Any], problem: str) -> None:
    """An address is http(s), without credentials, and calls are signed."""
    with pytest.raises(ValidationError, match=problem):
        AlertsConfig(**config)
