"""A scripted upstream server on 127.0.0.1: speaks like vLLM, lies on request, and remembers everything.

    async def test_x(scripted):
        scripted.queue(Script(say=[Say(thinking=tokens("let me see"), answer=tokens("42"))]))
        ...
        assert scripted.calls[0].json["thinking_token_budget"] == 5

What is not scripted is answered by `scripted.default`. No test waits for time: a `Gate` holds a stream at
an event until the test opens it, and every `Exchange` has events for what happened to it.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self

import httptools

from tests.scripted_script import END, NOT_FOUND, Exchange, Reply, Script, json_reply, refusal
from tests.scripted_stream import Json, Model, Say, Stream, dump, prompt_ids, prompts_of, tokens, wants_thinking

CALLS = frozenset({"/v1/chat/completions", "/v1/completions"})


class ScriptedBackend:
    """The server; an async context manager, and the fixture `scripted`.

    Attributes:
        name: the model it serves; another name is refused as vLLM does.
        model: how the model behaves.
        default: answers calls that nothing was queued for.
        routes: answers by path, before anything else, e.g. `{"/v1/embeddings": json_reply(...)}`.
        drops_reused: a second request on a connection is not answered: the connection is closed instead,
            as when the server's keep-alive ended a moment before.
        exchanges: every request, in order of arrival.
    """

    def __init__(self, *, name: str = "scripted", model: Model | None = None, version: str = "0.32.0") -> None:
        self.name = name
        self.model = model or Model()
        self.default: Script | Reply | Callable[[Exchange], Script | Reply] = Script(
            say=[Say(thinking=tokens("well " * 63 + "well"), answer=tokens("the answer is 42"))]
        )
        self.routes: dict[str, Reply] = {
            "/version": json_reply({"version": version}),
            "/health": Reply(),
            "/metrics": Reply(content_type="text/plain"),
            "/v1/models": json_reply({"object": "list", "data": [self._card(name)]}),
        }
        self.drops_reused = False
        self.exchanges: list[Exchange] = []
        self.connections: list[_Connection] = []
        self._queue: deque[Script | Reply] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0

    @property
    def url(self) -> str:
        """Where it listens, as a backend's `url`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def calls(self) -> list[Exchange]:
        """The chat and completions calls among the exchanges."""
        return [exchange for exchange in self.exchanges if exchange.path in CALLS]

    def queue(self, *answers: Script | Reply) -> None:
        """Answer the next calls with these, in order."""
        self._queue.extend(answers)

    def forget(self) -> None:
        """Forget what was asked so far, e.g. by a probe at start-up."""
        self.exchanges.clear()

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    def stop(self) -> None:
        """Stop listening and cut every connection, as a killed process does."""
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for connection in self.connections:
            connection.cut("reset")

    @staticmethod
    def _card(name: str) -> Json:
        card = {"id": name, "object": "model", "created": 1795410662, "owned_by": "vllm"}
        return {**card, "root": name, "parent": None, "max_model_len": 4096}

    # -- called by connections
    def answer(self, exchange: Exchange, connection: _Connection) -> None:
        """Start answering one request."""
        self.exchanges.append(exchange)
        task = asyncio.get_running_loop().create_task(connection.play(exchange, self._answer_for(exchange)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _answer_for(self, exchange: Exchange) -> Script | Reply:
        if exchange.path in self.routes or exchange.path not in CALLS | {"/tokenize"}:
            return self.routes.get(exchange.path, NOT_FOUND)
        try:
            request = exchange.json
        except ValueError:
            return refusal(400, "1 validation error:\n  JSON decode error", "Bad Request", "body.1")
        if request.get("model") not in {self.name, None}:
            return refusal(404, f"The model `{request['model']}` does not exist.", "NotFoundError", "model")
        if exchange.path == "/tokenize":
            ids = prompt_ids(request)
            return json_reply({"count": len(ids), "max_model_len": 4096, "tokens": ids, "token_strs": None})
        chosen = self._queue.popleft() if self._queue else self.default
        return chosen(exchange) if callable(chosen) else chosen


class _Connection(asyncio.Protocol):
    """One connection of the gateway's."""

    def __init__(self, backend: ScriptedBackend) -> None:
        self._backend = backend
        self._running: Exchange | None = None
        self._served = 0
        self._writable = asyncio.Event()
        self._writable.set()
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._headers: dict[str, str] = {}
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]  # TCP gives a Transport
        self.number = len(self._backend.connections)
        self._backend.connections.append(self)

    def data_received(self, data: bytes) -> None:
        if self._served and self._backend.drops_reused:
            self._transport.close()
            return
        self._parser.feed_data(data)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._writable.set()
        if self._running is not None:
            self._running.closed.set()

    def on_url(self, url: bytes) -> None:
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._served += 1
        method = self._parser.get_method().decode()
        path = self._path.decode().partition("?")[0]
        self._running = Exchange(method, path, self._headers, self._body, self.number)
        self._reset()
        self._backend.answer(self._running, self)

    def cut(self, how: Literal["close", "reset"]) -> None:
        """Break the connection off, with FIN or with RST."""
        if self._transport.is_closing():
            return
        sock = self._transport.get_extra_info("socket")
        if how == "reset" and sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
        else:
            self._transport.close()

    async def play(self, exchange: Exchange, answer: Script | Reply) -> None:
        """Write one answer to its end."""
        if isinstance(answer, Reply):
            finished = await self._reply(answer)
        else:
            finished = await self._script(exchange, answer)
        if finished and not exchange.closed.is_set():
            self._running = None
            exchange.done.set()

    async def _reply(self, reply: Reply) -> bool:
        if reply.gate is not None:
            await reply.gate.hold()
        if reply.raw is not None:
            self._transport.write(reply.raw)
            self._transport.close()
            return True
        length = ("content-length", str(len(reply.body)))
        self._head(reply.status, reply.content_type, [*reply.headers, length])
        self._transport.write(reply.body)
        return True

    def _head(self, status: int, content_type: str, headers: Sequence[tuple[str, str]]) -> None:
        lines = [f"HTTP/1.1 {status} Scripted", "server: uvicorn", f"content-type: {content_type}"]
        lines += [f"{name}: {value}" for name, value in headers]
        self._transport.write("\r\n".join([*lines, "", ""]).encode())

    async def _script(self, exchange: Exchange, script: Script) -> bool:
        stream = self._generate(exchange, script)
        await _stand(script, -1)
        if not exchange.json.get("stream"):
            return await self._reply(Reply(body=dump(stream.body())))
        self._head(200, "text/event-stream; charset=utf-8", [("transfer-encoding", "chunked")])
        pending: list[bytes] = []
        for number, one in enumerate(_replaced(stream.events(), script)):
            if number == script.dies_after:
                await self._write(b"".join(pending), script)
                self.cut(script.dies_by)
                return False
            if number in script.gates:
                await self._write(b"".join(pending), script)
                pending.clear()
                await script.gates[number].hold()
            pending.append(one)
            exchange.events_sent = number + 1
            if len(pending) >= script.events_per_write:
                await self._write(b"".join(pending), script)
                pending.clear()
        await self._write(b"".join(pending), script)
        await _stand(script, END)
        if self._transport.is_closing():
            return False
        self._transport.write(b"0\r\n\r\n")
        return True

    def _generate(self, exchange: Exchange, script: Script) -> Stream:
        request, model = exchange.json, script.model or self._backend.model
        thinks = wants_thinking(request) or not model.honours_off if script.thinks is None else script.thinks
        choices = (request.get("n") or 1) * len(prompts_of(request))
        say = [script.say[min(index, len(script.say) - 1)] for index in range(choices)]
        exchange.choices = [model.generate(request, i, one, thinks=thinks) for i, one in enumerate(say)]
        return Stream(
            model=model,
            request=request,
            surface="chat" if exchange.path == "/v1/chat/completions" else "completions",
            choices=exchange.choices,
            call_id=f"chatcmpl-{len(self._backend.exchanges)}",
            tokens_per_event=script.tokens_per_event,
        )

    async def _write(self, data: bytes, script: Script) -> None:
        size = script.bytes_per_write or len(data)
        for start in range(0, len(data), size or 1):
            piece = data[start : start + size]
            if not self._transport.is_closing():
                self._transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await asyncio.sleep(0)  # let the other side see the pieces apart
            await self._writable.wait()


async def _stand(script: Script, where: int) -> None:
    if where in script.gates:
        await script.gates[where].hold()


def _replaced(events: Iterator[bytes], script: Script) -> Iterator[bytes]:
    for number, one in enumerate(events):
        chosen = script.replace.get(number, one)
        if chosen is not None:
            yield chosen.replace(b"\n", script.newline)
