"""Deltas to server-sent events: what the client of a stream sees.

Owns: the shape and order of chunks: events that need no change pass as they came, the last chunk with a
finish_reason waits for the usage and carries `thinkgate`, usage goes out only when asked for. O(1) per delta.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.port import Delta, Kind
from gateway.backends.reader import build_chunk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.backends.port import Surface

DONE = b"data: [DONE]\n\n"


class _Identity(msgspec.Struct):
    id: str = ""
    created: int = 0


_identity_decoder = msgspec.json.Decoder(_Identity)


class ChunkEncoder:
    """Encodes one stream.

    Args:
        surface: chat or text completions.
        model: public name, which replaces `upstream`.
        upstream: the backend's name for it.
        stream_id: id of the stream, unless the backend gives one.
        created: epoch seconds, likewise.
        exclude_thinking: leave thinking text out.
        both_fields: emit thinking under both names.
        wants_token_ids: the client asked for ids.
    """

    __slots__ = (
        "_both",
        "_created",
        "_exclude",
        "_held",
        "_id",
        "_ids",
        "_is_transparent",
        "_model",
        "_new_name",
        "_old_name",
        "_seen",
        "_surface",
        "_wire_seen",
    )

    def __init__(
        self,
        surface: Surface,
        model: str,
        upstream: str,
        *,
        stream_id: str,
        created: int,
        exclude_thinking: bool = False,
        both_fields: bool = False,
        wants_token_ids: bool = False,
    ) -> None:
        self._surface = surface
        self._model = model
        same = model == upstream
        self._old_name = b"" if same else b'"model":' + msgspec.json.encode(upstream)
        self._new_name = b"" if same else b'"model":' + msgspec.json.encode(model)
        self._id = stream_id
        self._created = created
        self._exclude = exclude_thinking
        self._both = both_fields
        self._ids = wants_token_ids
        self._held = b""
        self._seen: set[int] = set()
        self._wire_seen = False
        self._is_transparent = same and not exclude_thinking and not both_fields

    def encode(self, deltas: Sequence[Delta]) -> bytes:
        """The events of one batch; empty when nothing of it may go out yet."""
        out = []
        for delta in deltas:
            if self._is_transparent and delta.wire and delta.finish_reason is None and self._wire_seen:
                out.append(b"data: %b\n\n" % delta.wire)
                continue
            if delta.usage is not None:
                continue
            chunk = self._chunk(delta)
            if not chunk:
                continue
            if delta.finish_reason is not None:
                chunk, self._held = self._held, chunk
                if not chunk:
                    continue
            out.append(b"data: %b\n\n" % chunk)
        return out[0] if len(out) == 1 else b"".join(out)

    def short_way(self, put: Callable[[bytes], bool] | None) -> Callable[[bytes], bool] | None:
        """What writes an upstream event for this client by `put`, once the first was encoded; None if it cannot."""
        if put is None or self._exclude or self._both:
            return None
        old, new = self._old_name, self._new_name
        return put if not old else lambda event: put(event.replace(old, new, 1))

    def finish(self, extension: bytes, usage: bytes | None) -> bytes:
        """The held chunk with the `thinkgate` object, the usage chunk if asked for, and the end."""
        out = []
        if self._held:
            out.append(b'data: %b,"thinkgate":%b}\n\n' % (self._held.rstrip()[:-1], extension))
        if usage is not None:
            out.append(b"data: %b\n\n" % self._usage_chunk(usage))
        out.append(DONE)
        return b"".join(out)

    def _chunk(self, delta: Delta) -> bytes:
        wire = delta.wire
        if wire:
            if not self._wire_seen:
                self._wire_seen = True
                identity = _identity_decoder.decode(wire)
                self._id, self._created = identity.id or self._id, identity.created or self._created
            if delta.kind is Kind.THINKING and (self._exclude or (self._both and delta.text)):
                return self._build(delta)
            return wire.replace(self._old_name, self._new_name, 1) if self._old_name else wire
        is_empty = not (delta.text or delta.finish_reason or delta.tool_calls is not None or delta.logprobs is not None)
        if is_empty and delta.prompt_token_ids is None and not (self._ids and delta.token_ids):
            return b""
        return self._build(delta)

    def _build(self, delta: Delta) -> bytes:
        is_thinking, text = delta.kind is Kind.THINKING, delta.text
        # Where the backend gives the role itself, it may come with a thought.
        has_role = delta.index not in self._seen and (not self._wire_seen or b'"role":' in delta.wire)
        if is_thinking and self._exclude:
            if delta.finish_reason is None and delta.prompt_token_ids is None and not (has_role and delta.wire):
                return b""
            # With the text go its ids and logprobs, which spell it.
            text = ""
            delta = Delta(
                delta.index,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
                prompt_token_ids=delta.prompt_token_ids,
            )
        if self._surface == "completions":
            return self._build_completion(delta, text)
        fields: dict[str, Any] = {}
        if has_role:
            self._seen.add(delta.index)
            fields["role"] = "assistant"
        if text:
            fields["reasoning" if is_thinking else "content"] = text
            if is_thinking and self._both:
                fields["reasoning_content"] = text
        return build_chunk(self._id, self._created, self._model, delta, fields, ids=self._ids)

    def _build_completion(self, delta: Delta, text: str) -> bytes:
        choice: dict[str, Any] = {
            "index": delta.index,
            "text": text,
            "logprobs": delta.logprobs,
            "finish_reason": delta.finish_reason,
        }
        if delta.stop_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._ids:
            choice["prompt_token_ids"] = delta.prompt_token_ids
            choice["token_ids"] = delta.token_ids
        return msgspec.json.encode({**self._head("text_completion"), "choices": [choice]})

    def _usage_chunk(self, usage: bytes) -> bytes:
        name = "chat.completion.chunk" if self._surface == "chat" else "text_completion"
        return msgspec.json.encode({**self._head(name), "choices": [], "usage": msgspec.Raw(usage)})

    def _head(self, name: str) -> dict[str, Any]:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}
