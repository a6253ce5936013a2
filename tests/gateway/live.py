"""A gateway on a port of 127.0.0.1 in the test's own event loop, and a client that can behave badly.

Not a test client: real sockets, uvicorn with the settings of `thinkgate serve`, and scripted backends behind it.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import socket
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import uvicorn

from budget.accounts import CalendarAccount
from budget.ledger import Amounts
from budget.ledgers.memory import MemoryLedger
from gateway.app import Gateway
from gateway.backends.http import Pool
from gateway.backends.http_backend import HttpBackend
from gateway.config.schema import Config
from gateway.edge.http_server import GuardedProtocol
from gateway.edge.watch import Watched
from gateway.slots import Slot
from tests.scripted_backend import ScriptedBackend

Json = dict[str, Any]
CHAT, COMPLETIONS, EMBEDDINGS = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
DEADLINE_S = 10.0
MODEL = "qwen"
ASK: Json = {"model": MODEL, "messages": [{"role": "user", "content": "what is 6 times 7"}]}
STREAM: Json = {**ASK, "stream": True}
INSTANT: Json = {**ASK, "thinkgate": {"mode": "instant"}}


def tree_of(*backends: ScriptedBackend, **more: Any) -> Json:
    """A configuration with one model over these backends, called a, b, and so on; `more` is added at the top."""
    entries = [{"id": chr(ord("a") + i), "url": backend.url, "kind": "vllm"} for i, backend in enumerate(backends)]
    model: Json = {
        "upstream_model": "scripted",
        "backends": entries,
        "thinking": {"default_tokens": 32, "max_tokens": 256, "answer_floor_tokens": 16},
        "answer": {"default_tokens": 64, "max_tokens": 20000},
        "price_usd_per_mtok": {"prompt": 1, "cached": 0.5, "thinking": 4, "answer": 2},
    }
    model |= more.pop("model", {})
    return {"models": {MODEL: model}, "routing": {"scorer": "none"}, **more}


class LogEvents(logging.Handler):
    """The records of the gateway's loggers, which a test can wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.records.append(record)
        self._changed.set()

    async def wait(self, message: str, count: int = 1) -> logging.LogRecord:
        """Until the message was logged so often; the last of those records."""
        async with asyncio.timeout(DEADLINE_S):
            while len(found := [r for r in self.records if r.getMessage() == message]) < count:
                self._changed.clear()
                await self._changed.wait()
        return found[count - 1]


class ClientProtocol(GuardedProtocol):
    """The server's, which says when a client's connection takes no more for now."""

    blocked: asyncio.Event

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        super().pause_writing()
        self.blocked.set()


@dataclass(slots=True)
class Live:
    """A running gateway.

    Attributes:
        gateway: the app, in this process.
        port: where it listens.
        logs: what its loggers said.
        lines: request lines; complete after `finish_lines`.
        server: uvicorn.
        blocked: set once a client does not read what it is sent.
    """

    gateway: Gateway
    port: int
    logs: LogEvents
    lines: io.StringIO
    server: uvicorn.Server
    blocked: asyncio.Event

    def slot(self, number: int = 0) -> Slot:
        """One backend's slot."""
        return self.gateway.serving.models[MODEL].slots[number]

    def pool(self, number: int = 0) -> Pool:
        """One backend's connections."""
        backend = self.slot(number).backend
        assert isinstance(backend, HttpBackend)
        return backend.pool

    def metric(self, name: str, **labels: str) -> float:
        """The value of one series; 0 if there is none."""
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0

    def settled_tokens(self) -> int:
        """What the model's account has settled so far."""
        ledger = self.gateway.ledger
        assert isinstance(ledger, MemoryLedger)
        (account,) = ledger.accounts([f"model:{MODEL}"])
        assert isinstance(account, CalendarAccount)
        return sum(page.settled for page in account.books.values())

    def request_lines(self) -> list[Json]:
        """The log lines of requests so far."""
        self.gateway.lines.close()
        return [json.loads(line) for line in self.lines.getvalue().splitlines()]

    def watched(self) -> Watched:
        """The one request being served."""
        (watched,) = self.gateway.watch._running.values()
        return watched

    async def idle(self) -> None:
        """Until no request is served any more."""
        async with asyncio.timeout(DEADLINE_S):
            while tasks := set(self.server.server_state.tasks):
                await asyncio.wait(tasks)

    async def assert_settled(self) -> None:
        """Nothing is held, in flight or open upstream once every request has ended."""
        await self.idle()
        assert self.gateway.ledger.held() == Amounts()
        assert len(self.gateway.watch) == 0
        for model in self.gateway.serving.models.values():
            for slot in model.slots:
                assert slot.in_flight == 0
                assert isinstance(slot.backend, HttpBackend)
                assert slot.backend.pool.busy() == 0

    async def stop(self) -> None:
        """End it as a test wants it ended: at once."""
        for listener in self.server.servers:
            listener.close()
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        for task in list(self.server.server_state.tasks):
            task.cancel()
        await self.idle()
        await self.server.lifespan.shutdown()


@asynccontextmanager
async def live(tree: Json, *, up: int | None = None) -> AsyncIterator[Live]:
    """A gateway with this configuration, once `up` of its backends (default: all) were probed."""
    # What is asked here is of no concern: unless a test says so, structure alone decides.
    config = Config.model_validate({"routing": {"scorer": "none"}, **tree})
    lines = io.StringIO()
    gateway = Gateway(config, log_stream=lines)
    logs = LogEvents()
    logger = logging.getLogger("thinkgate")
    logger.addHandler(logs)
    level = logger.level
    logger.setLevel(logging.INFO)
    blocked = asyncio.Event()
    settings = uvicorn.Config(
        gateway,
        host="127.0.0.1",
        port=0,
        http=type("Protocol", (ClientProtocol,), {"blocked": blocked}),
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
    )
    settings.load()
    server = uvicorn.Server(settings)
    server.lifespan = settings.lifespan_class(settings)
    try:
        await server.startup()
        wanted = sum(len(model.backends) for model in config.models.values()) if up is None else up
        if wanted:
            await logs.wait("backend up", wanted)
        running = Live(gateway, server.servers[0].sockets[0].getsockname()[1], logs, lines, server, blocked)
        try:
            yield running
            await running.assert_settled()
        finally:
            await running.stop()
    finally:
        logger.removeHandler(logs)
        logger.setLevel(level)


@dataclass(slots=True)
class Answer:
    """A response, as far as it was read."""

    status: int
    headers: dict[str, str]
    body: bytes = b""

    @property
    def json(self) -> Json:
        """The body, decoded."""
        decoded: Json = json.loads(self.body)
        return decoded

    @property
    def error(self) -> Json:
        """The inside of an error body."""
        error: Json = self.json["error"]
        return error

    def payloads(self) -> list[str]:
        """What stands after `data: ` in each event."""
        events = self.body.decode().split("\n\n")
        assert events.pop() == ""
        return [event.removeprefix("data: ") for event in events]

    def chunks(self) -> list[Json]:
        """The events that are JSON, decoded."""
        return [json.loads(payload) for payload in self.payloads() if payload != "[DONE]"]


@dataclass(slots=True)
class Client:
    """One connection to a gateway.

    Args:
        port: the gateway's.
        receive_buffer_bytes: the socket's buffer, small for a client that will not read.
    """

    port: int
    receive_buffer_bytes: int | None = None
    _reader: asyncio.StreamReader = field(init=False)
    _writer: asyncio.StreamWriter = field(init=False)
    _is_chunked: bool = False
    _left: int = 0
    _pending: bytes = b""

    async def __aenter__(self) -> Self:
        """Connect."""
        sock = socket.socket()
        sock.setblocking(False)
        if self.receive_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer_bytes)
        try:
            await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        except OSError:
            sock.close()
            raise
        limit = 2**16 if self.receive_buffer_bytes is None else self.receive_buffer_bytes
        self._reader, self._writer = await asyncio.open_connection(sock=sock, limit=limit)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Leave, if that has not happened."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()

    def write(self, data: bytes) -> None:
        """Raw bytes."""
        self._writer.write(data)

    def send(
        self,
        body: Json | bytes,
        path: str = CHAT,
        *,
        method: str = "POST",
        headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    ) -> None:
        """One whole request."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        more = headers.items() if isinstance(headers, Mapping) else headers
        lines = [f"{method} {path} HTTP/1.1", "host: gateway", f"content-length: {len(data)}"]
        lines += ["content-type: application/json", *(f"{name}: {value}" for name, value in more)]
        self.write("\r\n".join([*lines, "", ""]).encode() + data)

    async def head(self) -> Answer:
        """Status and headers."""
        async with asyncio.timeout(DEADLINE_S):
            raw = await self._reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines if line)
        self._is_chunked = headers.get("transfer-encoding") == "chunked"
        self._left = int(headers.get("content-length", 0))
        return Answer(int(first.split(" ")[1]), headers)

    async def piece(self) -> bytes:
        """The next piece of the body; empty at its end. Raises: IncompleteReadError when it breaks off."""
        async with asyncio.timeout(DEADLINE_S):
            if self._is_chunked:
                size = int(await self._reader.readuntil(b"\r\n"), 16)
                return (await self._reader.readexactly(size + 2))[:-2]
            size, self._left = self._left, 0
            return await self._reader.readexactly(size)

    async def event(self) -> str | None:
        """The payload of the next event; None at the end of the body."""
        while b"\n\n" not in self._pending:
            piece = await self.piece()
            if not piece:
                return None
            self._pending += piece
        one, _, self._pending = self._pending.partition(b"\n\n")
        return one.decode().removeprefix("data: ")

    async def chunk(self) -> Json:
        """The next event, decoded."""
        payload = await self.event()
        assert payload is not None
        decoded: Json = json.loads(payload)
        return decoded

    def received(self) -> bytes:
        """What has arrived and was not read."""
        arrived: bytes = bytes(self._reader._buffer)  # type: ignore[attr-defined]  # no other way to not wait
        return self._pending + arrived

    async def answer(self) -> Answer:
        """The whole response."""
        answer = await self.head()
        while piece := await self.piece():
            answer.body += piece
        return answer

    def leave(self, how: Literal["close", "reset"] = "close") -> None:
        """Close the connection, with FIN or with RST."""
        if how == "reset":
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._writer.transport.abort()
        else:
            self._writer.close()

    async def closed(self) -> bytes:
        """What is left to read until the gateway closes the connection."""
        async with asyncio.timeout(DEADLINE_S):
            with suppress(ConnectionResetError):
                return await self._reader.read()
        return b""


async def ask(
    at: Live | int,
    body: Json | bytes = ASK,
    path: str = CHAT,
    *,
    method: str = "POST",
    headers: Mapping[str, str] | Sequence[tuple[str, str]] = (),
) -> Answer:
    """One request on a connection of its own, and its whole response."""
    async with Client(at if isinstance(at, int) else at.port) as client:
        client.send(body, path, method=method, headers=headers)
        return await client.answer()


def key_headers(secret: str) -> dict[str, str]:
    """An Authorization header."""
    return {"authorization": f"Bearer {secret}"}
