"""Requests that differ in their messages only are decided once (docs/adr/0010).

Owns: what the shape of a chat request is, what is kept by shape and for how long. Does not own: deciding
(prepare.py). O(body bytes); at most MOST_SHAPES decisions are kept, and nothing of any message.

The shape of a body is every byte before its first `[` and after its last `]`, kept only where what is between is
the value of `messages`. Another body with the same bytes around a JSON array can then only mean the same, but for
its messages: those are checked each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Raw
from msgspec.structs import replace

from gateway.ask.fields import check_media
from gateway.ask.request import check_text, parse_messages
from gateway.prepare import Prepared, ceiling_of, decide, hear

if TYPE_CHECKING:
    from gateway.auth import Key
    from gateway.backends.port import Capabilities, Surface
    from gateway.config.schema import Config
    from gateway.models import Model

MOST_SHAPES = 256
MOST_SHAPE_BYTES = 512
# Numbers, switches and fixed words: no field that may hold a text of the client's own, so none is kept, and none that
# every request is likely to have another value of.
SHAPING = frozenset(
    (
        "messages",
        "model",
        "stream",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logprobs",
        "top_logprobs",
        "reasoning_effort",
        "reasoning",
        "thinking",
        "thinking_config",
        "enable_thinking",
        "thinking_budget",
        "thinking_token_budget",
        "include_reasoning",
        "thinkgate",
        "return_token_ids",
        "service_tier",
    )
)
NO_MESSAGES = Raw(b"[]")
Shape = tuple[str, bytes, bytes]


class _Kept(NamedTuple):
    """The decision about an earlier request, without its messages, and what it followed from beside the shape."""

    prepared: Prepared
    key: Key
    found: list[Capabilities | None]


class Decisions:
    """`prepare` under one configuration, remembering.

    Args:
        config: what is in force.
        models: by public name.
    """

    def __init__(self, config: Config, models: Mapping[str, Model]) -> None:
        self._config = config
        self._models = models
        self._kept: dict[Shape, _Kept] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def prepare(
        self, body: bytes, surface: Surface, key: Key, *, request_id: str, trace: tuple[tuple[bytes, bytes], ...]
    ) -> Prepared:
        """See `gateway.prepare.prepare`. Raises: the same."""
        shape: Shape | None = None
        begin, end = body.find(b"["), body.rfind(b"]") + 1
        if surface == "chat" and 0 < begin < end and begin + len(body) - end <= MOST_SHAPE_BYTES:
            shape = key.id, body[:begin], body[end:]
            kept = self._kept.get(shape)
            if kept is not None:
                prepared = self._again(kept, body, body[begin:end], key, request_id, trace)
                if prepared is not None:
                    return prepared
        heard = hear(body, surface, self._models, self._config)
        prepared = decide(
            heard, len(body), surface, key, self._models, self._config, request_id=request_id, trace=trace
        )
        # Nothing that begins with a bracket and ends with one is as long: so this is the place.
        if (
            shape is not None
            and not heard.media_parts
            and heard.raw.keys() <= SHAPING
            and bytes(heard.raw["messages"]) == body[begin:end]
        ):
            self._keep(shape, prepared, key)
        return prepared

    def _again(
        self,
        kept: _Kept,
        body: bytes,
        messages: bytes,
        key: Key,
        request_id: str,
        trace: tuple[tuple[bytes, bytes], ...],
    ) -> Prepared | None:
        """The same decision for other messages; None where it must be made anew, or refused in words."""
        known = kept.prepared
        if kept.key is not key or kept.found != _found(known.model):
            return None
        check_text(body)
        parsed = parse_messages(messages)
        if parsed is None or check_media(parsed, self._config.server.media_hosts):
            return None
        call, cap = known.call, known.cap
        most = call.max_tokens + known.slack
        return replace(
            known,
            call=replace(
                call, request_id=request_id, fields={**call.fields, "messages": Raw(messages)}, trace_headers=trace
            ),
            cap=replace(cap),  # the answer fills it in
            ceiling=ceiling_of(known.ask, known.model, cap.tokens, most, known.aside, body_bytes=len(body)),
        )

    def _keep(self, shape: Shape, prepared: Prepared, key: Key) -> None:
        call = prepared.call
        fields = {name: value.copy() for name, value in call.fields.items()}  # a view would keep its whole body
        fields["messages"] = NO_MESSAGES
        bare = replace(call, request_id="", fields=fields, trace_headers=())
        self._kept.pop(shape, None)
        if len(self._kept) >= MOST_SHAPES:
            del self._kept[next(iter(self._kept))]  # the oldest, so that using one writes nothing
        self._kept[shape] = _Kept(replace(prepared, call=bare, cap=replace(prepared.cap)), key, _found(prepared.model))


def _found(model: Model) -> list[Capabilities | None]:
    """What the model's backends can do at the moment."""
    return [slot.capabilities for slot in model.slots]
