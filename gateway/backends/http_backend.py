"""vLLM and OpenAI-compatible servers behind the port.

Owns: what a call looks like on the wire, and the backend's refusals. Does not own: connections (http.py),
reading streams (reader.py), measuring capabilities (probe.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.events import NOT_THE_CLIENTS, EventSplitter
from gateway.backends.http import Connection, Pool
from gateway.backends.port import Call, Capabilities, Delta, Express, Kind, Segment
from gateway.backends.reader import MarkerIds, StreamReader
from gateway.backends.segments import SegmentReader, segment_body, tokenize_body
from gateway.errors import GatewayError, UpstreamError, UpstreamRejected

if TYPE_CHECKING:
    from gateway.config.schema import BackendConfig, ThinkingConfig, Timeouts

MAX_ANSWER_BYTES = 64 * 1024 * 1024
STREAM_INTERVAL_TOKENS = 16
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}
TraceHeaders = tuple[tuple[bytes, bytes], ...]


class _Tokens(msgspec.Struct):
    """The answer of /tokenize."""

    tokens: list[int]


_tokens_decoder = msgspec.json.Decoder(_Tokens)


class HttpBackend:
    """One upstream server that speaks OpenAI's HTTP dialect.

    Args:
        config: its entry in the configuration.
        upstream_model: the model's name there.
        thinking: the model's markers and switches.
        api_key: the gateway's own credential, or None.
        timeouts: how long to wait for what.
    """

    def __init__(
        self,
        config: BackendConfig,
        upstream_model: str,
        thinking: ThinkingConfig,
        *,
        api_key: str | None,
        timeouts: Timeouts,
    ) -> None:
        self.id = config.id
        self.kind: str = config.kind
        self.upstream_model = upstream_model
        self.thinking = thinking
        headers = [("authorization", f"Bearer {api_key}")] if api_key else []
        self.pool = Pool(config.url or "", headers=headers, timeouts=timeouts)
        self.capabilities = Capabilities()
        self.markers: MarkerIds | None = None

    def generate(self, call: Call, express: Express | None = None) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        body, reader = self._body(call, stream=True), self._reader(call)
        splitter = EventSplitter()
        sink = None if express is None else short_way(splitter, reader, express)
        return self._stream(PATHS[call.surface], body, reader, call.trace_headers, splitter, sink)

    def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        reader = SegmentReader(segment.top_logprobs)
        body = segment_body(call, segment)
        return self._stream(PATHS["completions"], body, reader, call.trace_headers, EventSplitter(), None)

    async def _stream(
        self,
        path: str,
        body: bytes,
        reader: StreamReader | SegmentReader,
        trace: TraceHeaders,
        splitter: EventSplitter,
        sink: Callable[[bytes], bool] | None,
    ) -> AsyncGenerator[list[Delta], None]:
        """Deltas as `reader` reads them, and the usage."""
        connection = await self.pool.send(path, body, extra_headers=trace)
        try:
            await self._check_status(connection)
            if not connection.content_type.startswith(b"text/event-stream"):
                raise UpstreamError("The backend answered a stream with something else.")
            connection.divert(sink)
            while not reader.is_done:
                data = await connection.read()
                out: list[Delta] = []
                failure: GatewayError | None = None
                try:
                    for event in splitter.feed(data) if data else splitter.finish():
                        reader.read(event, out)
                except GatewayError as exc:
                    failure = exc  # what came before it was received all the same, so it counts
                if out:
                    yield out
                if failure is not None:
                    raise failure
                if not data and not reader.is_done:
                    raise UpstreamError("The backend ended its stream before it was complete.")
            connection.end()
        finally:
            connection.release()
        yield [Delta(usage=reader.usage)] if reader.usage is not None else []

    def complete(self, call: Call) -> Awaitable[bytes]:
        """The whole answer in one piece, as the backend's JSON. Raises: as `generate`."""
        return self._whole(PATHS[call.surface], self._body(call, stream=False), call.trace_headers)

    def embed(self, fields: dict[str, msgspec.Raw], trace: TraceHeaders) -> Awaitable[bytes]:
        """Pass an embedding request on. Raises: as `generate`."""
        body = msgspec.json.encode({**fields, "model": self.upstream_model})
        return self._whole(PATHS["embeddings"], body, trace)

    async def tokenize(self, call: Call) -> list[int]:
        """See the port."""
        tokens = await self._tokens(tokenize_body(call), call.trace_headers)
        if not tokens:
            raise UpstreamError("The backend rendered a chat as no token at all.")
        return tokens

    async def encode(self, text: str) -> list[int]:
        """See the port."""
        fields = {"model": self.upstream_model, "prompt": text, "add_special_tokens": False}
        return await self._tokens(msgspec.json.encode(fields), ())

    async def _tokens(self, body: bytes, trace: TraceHeaders) -> list[int]:
        try:
            return _tokens_decoder.decode(await self._whole("/tokenize", body, trace)).tokens
        except UpstreamRejected as exc:
            if exc.upstream_status in {404, 405}:  # not the client's fault: it did so when it was probed
                raise UpstreamError("The backend does not render chats as token ids any more.") from exc
            raise
        except msgspec.DecodeError as exc:
            raise UpstreamError("The backend answered /tokenize with something else than token ids.") from exc

    async def _whole(self, path: str, body: bytes, trace: TraceHeaders) -> bytes:
        connection = await self.pool.send(path, body, extra_headers=trace)
        try:
            if connection.status != 200:
                await self._check_status(connection)
            return await connection.read_all(MAX_ANSWER_BYTES)
        finally:
            connection.release()

    async def probe(self) -> Capabilities:
        """See the port; remembers the marker ids it learned."""
        from gateway.backends.probe import measure  # noqa: PLC0415  # probing uses httpx; streams do not

        self.capabilities, self.markers = await measure(self)
        return self.capabilities

    async def close(self) -> None:
        """Close every connection."""
        self.pool.close()

    async def _check_status(self, connection: Connection) -> None:
        status = connection.status
        if status == 200:
            return
        body = await connection.read_all(MAX_ANSWER_BYTES)
        if status in {401, 403}:
            raise UpstreamError(f"The backend refused the gateway's own credential (status {status}).")
        if 400 <= status < 500 and status not in NOT_THE_CLIENTS:
            raise UpstreamRejected(status, body)
        raise UpstreamError(f"The backend answered with status {status}.", retry_after_s=1.0)

    def _reader(self, call: Call) -> StreamReader:
        how = self.capabilities.thinking_field or ""
        is_chat = call.surface == "chat"
        return StreamReader(
            call,
            self.markers if is_chat and self.capabilities.token_ids_out else None,
            expects_ids=self.capabilities.token_ids_out,
            inline=is_chat and how.startswith("inline"),
            opened=how == "inline_opened" and call.thinking.enabled,
        )

    def _body(self, call: Call, *, stream: bool) -> bytes:
        fields: dict[str, Any] = dict(call.fields)
        fields["model"] = call.model
        is_openai = self.kind == "openai"
        total_field = "max_completion_tokens" if is_openai and "max_completion_tokens" in fields else "max_tokens"
        fields[total_field] = call.max_tokens
        if call.n > 1:
            fields["n"] = call.n
        if stream:
            fields["stream"] = True
            fields["stream_options"] = {"include_usage": True}
        # A whole answer needs no ids to be counted where instant mode was measured to be quiet.
        if self.capabilities.token_ids_out and (
            stream or call.wants_token_ids or not self.capabilities.instant_is_quiet
        ):
            fields["return_token_ids"] = True
            if stream and not call.is_live:
                fields["stream_interval"] = STREAM_INTERVAL_TOKENS
        if call.priority and not is_openai:
            fields["priority"] = call.priority
        cap = call.thinking.cap
        if cap is not None and call.surface == "chat" and self.capabilities.cap_binds:
            fields["thinking_token_budget"] = cap
        return msgspec.json.encode(fields)


def short_way(splitter: EventSplitter, reader: StreamReader, express: Express) -> Callable[[bytes], bool]:
    """What deals with one more ordinary token where its bytes arrive; with anything else it does nothing."""

    def sink(data: bytes) -> bool:
        event = splitter.whole(data)
        found = reader.ordinary(event) if event else None
        if found is None:
            return False
        shape, meter, _, token_id, end = found
        is_thinking = shape.kind is Kind.THINKING
        if not express(shape.choice, is_thinking, token_id, b"data: %b%b\n\n" % (event[:end], shape.rest)):
            return False
        meter.feed_plain(token_id)
        return True

    return sink
