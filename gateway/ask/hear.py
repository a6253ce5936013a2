"""From a body's bytes to what it asks for: step three of the request, before anything is decided.

Owns: `Heard`. Does not own: dialects (resolve.py), what follows (prepare.py). O(body bytes).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from gateway.ask.fields import check_media
from gateway.ask.request import Message, RawFields, parse_chat, parse_completion
from gateway.ask.resolve import Ask, resolve_chat, resolve_completion, split_suffix

if TYPE_CHECKING:
    from gateway.auth import Key
    from gateway.backends.port import Surface
    from gateway.config.schema import Config
    from gateway.models import Model
    from router.judge import Verdict
    from router.utility import Mode, TargetArm


class Heard(NamedTuple):
    """What a body says.

    Attributes:
        ask: the request.
        raw: its top-level fields as they came.
        media_parts: how many parts are not text.
        messages: of a chat.
        read: asks the text which mode it deserves, for a key and a model; None where it cannot be asked.
        pick: weighs models for a key, in one mode or in any it may have; None where nothing is known of them.
    """

    ask: Ask
    raw: RawFields
    media_parts: int
    messages: Sequence[Message] = ()
    read: Callable[[Key, Model], Verdict] | None = None
    pick: Callable[[Key, Sequence[Model], Mode | None], Sequence[TargetArm]] | None = None


def hear(body: bytes, surface: Surface, config: Config) -> Heard:
    """Parse and resolve. Raises: InvalidRequest."""
    if surface == "chat":
        chat, raw = parse_chat(body)
        name, suffix = split_suffix(chat.model, config.models)
        media_parts = check_media(chat.messages, config.server.media_hosts)
        if media_parts:  # what was checked is what is sent, also where a key stands twice
            raw["messages"] = msgspec.Raw(msgspec.json.encode(msgspec.json.decode(raw["messages"])))
        return Heard(resolve_chat(chat, name, suffix), raw, media_parts, chat.messages)
    text, raw = parse_completion(body)
    name, suffix = split_suffix(text.model, config.models)
    return Heard(resolve_completion(text, name, suffix), raw, 0)
