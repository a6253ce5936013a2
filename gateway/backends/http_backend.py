"""vLLM and OpenAI-compatible servers behind the port.

Owns: what a call looks like on the wire, and the backend's refusals. Does not own: connections (http.py),
reading streams (reader.py), measuring capabilities (probe.py).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.events import EventSplitter
from gateway.backends.http import Connection, Pool
from gateway.backends.port import Call, Capabilities, Delta
from gateway.backends.reader import MarkerIds, StreamReader
from gateway.errors import UpstreamError, UpstreamRejected

if TYPE_CHECKING:
    from gateway.config import BackendConfig, ThinkingConfig, Timeouts

MAX_ANSWER_BYTES = 64 * 1024 * 1024
STREAM_INTERVAL_TOKENS = 16
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "embeddings": "/v1/embeddings"}


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

    async def generate(self, call: Call) -> AsyncGenerator[list[Delta], None]:
        """See the port."""
        connection = await self._send(call, self._body(call, stream=True))
        try:
            await self._check_status(connection)
            if not connection.content_type.startswith(b"text/event-stream"):
                raise UpstreamError("The backend answered a stream with something else.")
            splitter, reader = EventSplitter(), self._reader(call)
            while not reader.is_done:
                data = await connection.read()
                out: list[Delta] = []
                failure: UpstreamError | None = None
                try:
                    for event in splitter.feed(data) if data else splitter.finish():
                        reader.read(event, out)
                except UpstreamError as exc:
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

    async def complete(self, call: Call) -> bytes:
        """The whole answer in one piece, as the backend's JSON. Raises: as `generate`."""
        connection = await self._send(call, self._body(call, stream=False))
        try:
            await self._check_status(connection)
            return await connection.read_all(MAX_ANSWER_BYTES)
        finally:
            connection.release()

    async def embed(self, fields: dict[str, msgspec.Raw], trace: tuple[tuple[bytes, bytes], ...]) -> bytes:
        """Pass an embedding request on. Raises: as `generate`."""
        body = msgspec.json.encode({**fields, "model": self.upstream_model})
        connection = await self.pool.send(PATHS["embeddings"], body, extra_headers=trace)
        try:
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

    def _send(self, call: Call, body: bytes) -> Awaitable[Connection]:
        return self.pool.send(PATHS[call.surface], body, extra_headers=call.trace_headers)

    async def _check_status(self, connection: Connection) -> None:
        status = connection.status
        if status == 200:
            return
        body = await connection.read_all(MAX_ANSWER_BYTES)
        if status in {401, 403}:
            raise UpstreamError(f"The backend refused the gateway's own credential (status {status}).")
        if 400 <= status < 500 and status not in {408, 429}:
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
