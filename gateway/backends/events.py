"""Server-sent events from an OpenAI-compatible server: bytes to events, events to typed chunks.

Owns: event framing over arbitrary chunk borders, the part of a chunk the gateway reads, and cutting
token ids out of an event without decoding the rest of it. O(bytes).
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Struct

from gateway.errors import UpstreamError, UpstreamRejected

MAX_EVENT_BYTES = 16 * 1024 * 1024
DONE = b"[DONE]"
NOT_THE_CLIENTS = frozenset({401, 403, 408, 429})  # our credential, and the backend's own troubles
FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter", "function_call"})
_TOKEN_IDS = b',"token_ids":['
_PROMPT_IDS = b',"prompt_token_ids":['
# Nothing but white space follows a marker that the template wrote; a marker at the end of a message is further away.
TAIL_TOKENS = 3
_TAIL_BYTES = 60


BYTE_ORDER_MARK = "\ufeff".encode()  # may stand at the beginning of a stream of events


class EventSplitter:
    """Cuts a byte stream into event payloads; a payload is what stands after `data: `."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads completed by `data`, in order. Raises: UpstreamError for an endless event."""
        whole = self.whole(data)
        if whole:
            return [whole]
        data = self._tail + data
        if b"\r" in data:
            # A lone CR at the end may be half a CRLF: wait for the rest before deciding.
            keep = b"\r" if data.endswith(b"\r") else b""
            data = data[: len(data) - len(keep)].replace(b"\r\n", b"\n").replace(b"\r", b"\n") + keep
        events = data.split(b"\n\n")
        self._tail = events.pop()
        if len(self._tail) > MAX_EVENT_BYTES:
            raise UpstreamError("The backend sent an event without an end.")
        return [payload for event in events if (payload := _payload(event))]

    def whole(self, data: bytes) -> bytes:
        """The payload of `data` if that is exactly one event of one line, as nearly always; else nothing."""
        if self._tail or not data.startswith(b"data: ") or not data.endswith(b"\n\n"):
            return b""
        payload = data[6:-2]
        return b"" if b"\n" in payload or b"\r" in payload else payload

    def finish(self) -> list[bytes]:
        """What stands after the last blank line, once the stream has ended."""
        tail, self._tail = self._tail.strip(b"\r\n"), b""
        payload = _payload(tail) if tail else b""
        return [payload] if payload else []


def _payload(event: bytes) -> bytes:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]
    lines = event.removeprefix(BYTE_ORDER_MARK).split(b"\n")
    lines = [line[5:].removeprefix(b" ") for line in lines if line.startswith(b"data:")]
    return b"\n".join(lines)


class DeltaBody(Struct):
    """`choices[].delta` of a chat chunk."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class ChoiceBody(Struct):
    """One choice of a chunk, of chat (`delta`) or text completions (`text`)."""

    index: int = 0
    delta: DeltaBody | None = None
    text: str | None = None
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: Any = None
    stop_reason: Any = None


# No answer has as many tokens, and what has more digits than a float can hold breaks sums with it.
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class PromptDetails(Struct):
    """`usage.prompt_tokens_details`."""

    cached_tokens: TokenCount | None = None


class CompletionDetails(Struct):
    """`usage.completion_tokens_details`."""

    reasoning_tokens: TokenCount | None = None


class UsageBody(Struct):
    """`usage`."""

    prompt_tokens: TokenCount = 0
    completion_tokens: TokenCount | None = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ChunkBody(Struct):
    """The part of a chunk that the gateway reads."""

    id: str = ""
    created: int = 0
    choices: list[ChoiceBody] = []
    usage: UsageBody | None = None
    error: Any = None


_decoder = msgspec.json.Decoder(ChunkBody)


def decode_chunk(event: bytes) -> ChunkBody:
    """The typed view of an event.

    Raises: UpstreamError when it is no chunk, or carries an error; UpstreamRejected for an error of the client's:
        vLLM finds some mistakes only after it has begun its stream.
    """
    try:
        chunk = _decoder.decode(event)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamError("The backend sent an event that is not a completion chunk.") from exc
    if chunk.error is not None:
        said = chunk.error if isinstance(chunk.error, dict) else {"message": chunk.error}
        message, code = said.get("message"), said.get("code")
        if isinstance(code, int) and 400 <= code < 500 and code not in NOT_THE_CLIENTS:
            raise UpstreamRejected(code, event)
        raise UpstreamError(f"The backend failed: {message or 'no reason given'}")
    return chunk


def compact(event: bytes) -> bytes:
    """The event without white space between its tokens, which cutting relies on; vLLM's have none.

    Raises: UpstreamError when it is no JSON.
    """
    if b'": ' not in event[:64]:
        return event
    try:
        return msgspec.json.encode(msgspec.json.decode(event))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
        raise UpstreamError("The backend sent an event that is not a completion chunk.") from exc


def with_legal_finish(event: bytes) -> bytes:
    """The event with `finish_reason` stop in place of one that OpenAI does not know, kept as `stop_reason`."""
    if not event:
        return event
    chunk = msgspec.json.decode(event)
    for choice in chunk["choices"]:
        if choice.get("finish_reason") not in FINISH_REASONS:
            choice["stop_reason"], choice["finish_reason"] = choice["finish_reason"], "stop"
    return msgspec.json.encode(chunk)


def cut_token_ids(event: bytes) -> bytes:
    """The event without the choice's `token_ids`.

    Such a byte sequence cannot stand inside a JSON string, where the quotes would be escaped.
    """
    start = event.rfind(_TOKEN_IDS)
    if start < 0:
        return event
    return event[:start] + event[event.index(b"]", start) + 1 :]


def prompt_ids(event: bytes) -> list[int]:
    """The `prompt_token_ids` of an event that `cut_prompt_ids` found some in."""
    start = event.find(_PROMPT_IDS) + len(_PROMPT_IDS)
    return [int(token) for token in event[start : event.find(b"]", start)].split(b",") if token]


def cut_prompt_ids(event: bytes) -> tuple[bytes, int, list[int]]:
    """The event without `prompt_token_ids`, how many there were, and the last few of them.

    Raises: UpstreamError when they are no ids.
    """
    start = event.find(_PROMPT_IDS)
    if start < 0:
        return event, 0, []
    end = event.find(b"]", start)
    ids = event[start + len(_PROMPT_IDS) : end]
    rest = event[end + 1 :].replace(b',"prompt_text":null', b"", 1)
    if not ids:
        return event[:start] + rest, 0, []
    try:
        tail = [int(token) for token in ids[-_TAIL_BYTES:].split(b",")[len(ids) > _TAIL_BYTES :][-TAIL_TOKENS:]]
    except ValueError as exc:
        raise UpstreamError("The backend sent an event that is not a completion chunk.") from exc
    return event[:start] + rest, ids.count(b",") + 1, tail
