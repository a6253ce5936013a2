"""The process: it drains when told to end, reloads when told to, and lets go of clients that do not read."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from tests.e2e.processes import Child, free_port, running
from tests.gateway.live import INSTANT, STREAM, Client, Json, Live, ask, key_headers, tree_of
from tests.gateway.test_edge import key_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Say, Token

pytestmark = pytest.mark.e2e  # every test starts a gateway process of its own

START_S, END_S = 40, 15


@asynccontextmanager
async def process(tree: Json, folder: Path, *, port: int | None = None) -> AsyncIterator[tuple[Child, int]]:
    """`thinkgate serve` with this configuration, once it is ready; its port stands on the command line only."""
    path, port = folder / "thinkgate.yaml", port or free_port()
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "gateway.cli", "serve", "--config", str(path), "--port", str(port)]
    with running(command, folder / "gateway.log", os.environ) as child:
        await asyncio.to_thread(child.wait_ready, f"http://127.0.0.1:{port}/health/ready", within_s=START_S)
        yield child, port


def quiet(tree: Json, **timeouts: float) -> Json:
    """Without a port for metrics, and with these timeouts."""
    return {**tree, "server": {"metrics": {"port": None}, "timeouts": timeouts}}


def log_of(child: Child) -> list[Json]:
    """The process's JSON lines."""
    return [json.loads(line) for line in child.output().splitlines() if line.startswith("{")]


async def ends(child: Child) -> int:
    """The exit status, once the process has ended."""
    return await asyncio.to_thread(child._process.wait, END_S)


async def refuses(port: int) -> bool:
    """Whether nobody accepts connections any more."""
    try:
        async with Client(port):
            return False
    except ConnectionRefusedError:
        return True


async def until_refused(port: int) -> None:
    """Poll the other process until it listens no more."""
    async with asyncio.timeout(END_S):
        while not await refuses(port):
            await asyncio.sleep(0.02)


@pytest.mark.timeout(60)
async def test_running_stream_survives_a_reload_and_the_end(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """SIGHUP puts a changed file in force, SIGTERM refuses what is new and ends with 0: neither drops a stream."""
    tree = quiet(tree_of(scripted))
    async with process(tree, tmp_path) as (child, port), Client(port) as client:
        scripted.forget()
        gate = Gate()
        scripted.queue(Script(gates={4: gate}))
        client.send(STREAM)
        await gate.wait()
        (tmp_path / "thinkgate.yaml").write_text(yaml.safe_dump({**tree, "keys": [key_of("ada", "good")]}))
        os.kill(child.pid, signal.SIGHUP)
        async with asyncio.timeout(END_S):
            while (await ask(port, INSTANT)).status != 401:
                await asyncio.sleep(0.02)
        assert (await ask(port, INSTANT, headers=key_headers("good"))).status == 200
        os.kill(child.pid, signal.SIGTERM)
        await until_refused(port)
        assert child.is_running()
        gate.open()
        answer = await client.answer()
        assert answer.payloads()[-1] == "[DONE]"
        assert answer.chunks()[-1]["thinkgate"]["settled"]["tokens"] > 0
        assert await client.closed() == b""
        assert await ends(child) == 0
    events = [line["event"] for line in log_of(child)]
    assert events.count("configuration reloaded") == 1
    streamed = [line for line in log_of(child) if line["event"] == "request" and line["stream"]]
    assert [(line["status"], line.get("error")) for line in streamed] == [(200, None)]


@pytest.mark.timeout(60)
async def test_drain_has_an_end(scripted: ScriptedBackend, tmp_path: Path) -> None:
    """What still runs after drain_s is told so, its upstream is closed and settled, and SIGINT ends with status 0."""
    tree = quiet(tree_of(scripted), drain_s=0.2, slow_client_s=0.5)
    async with process(tree, tmp_path) as (child, port), Client(port) as begun, Client(port) as waiting:
        await assert_unread_answer_is_dropped(scripted, port)
        scripted.forget()
        gates = [Gate(), Gate()]
        scripted.queue(Script(gates={4: gates[0]}), Script(gates={-1: gates[1]}))
        for client, gate in zip((begun, waiting), gates, strict=True):
            client.send(STREAM)
            await gate.wait()
        os.kill(child.pid, signal.SIGINT)
        broken, refused = await begun.answer(), await waiting.answer()
        assert broken.chunks()[-1]["error"]["code"] == "server_is_overloaded"
        assert "[DONE]" not in broken.payloads()
        assert (refused.status, refused.error["code"]) == (503, "server_is_overloaded")
        assert "retry-after" in refused.headers
        for call in scripted.calls:
            await call.wait_closed()
        assert await ends(child) == 0
    lines = [line for line in log_of(child) if line["event"] == "request"]
    assert [line.get("ended_by") for line in lines] == [None, "drain", "drain"]


async def assert_unread_answer_is_dropped(scripted: ScriptedBackend, port: int) -> None:
    """A whole answer that its client never reads is dropped with its connection after slow_client_s."""
    if sys.platform != "linux":
        return  # TCP_USER_TIMEOUT and /proc/net/tcp are Linux's
    others = established(port)
    scripted.queue(Script(say=[Say(answer=[Token(5000, " " + "x" * 5000)] * 4000)]))
    async with Client(port, receive_buffer_bytes=4096) as client:
        client.send({**INSTANT, "max_tokens": 5000})
        answer = await client.head()
        assert answer.status == 200
        async with asyncio.timeout(END_S):
            while established(port) > others:
                await asyncio.sleep(0.02)
        assert len(await client.closed()) < int(answer.headers["content-length"])


def established(port: int) -> int:
    """How many connections the listener of this port has, as the kernel counts them."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return sum(row[1].endswith(f":{port:04X}") and row[3] == "01" for row in rows)


async def test_draining_gateway_takes_nothing_new(gateway: Live, scripted: ScriptedBackend) -> None:
    """While it drains, requests on open connections are 503 with retry-after, readiness fails, liveness does not."""
    gate = Gate()
    scripted.queue(Script(gates={4: gate}))
    async with Client(gateway.port) as running_client, Client(gateway.port) as idle:
        running_client.send(STREAM)
        await gate.wait()
        gateway.gateway.is_draining = True
        idle.send(INSTANT)
        refused = await idle.answer()
        assert (refused.status, refused.error["code"]) == (503, "server_is_overloaded")
        assert refused.headers["retry-after"] == "1"
        assert (await ask(gateway, b"", "/health/ready", method="GET")).status == 503
        assert (await ask(gateway, b"", "/health/live", method="GET")).status == 200
        gate.open()
        assert (await running_client.answer()).payloads()[-1] == "[DONE]"
