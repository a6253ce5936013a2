"""Which of the client's fields reach a backend, and as what.

Owns: the fields the gateway consumes, the ones a backend cannot honour, media addresses, and the
template switches of a mode. Does not own: parsing (request.py), dialects (resolve.py). O(fields + parts).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import msgspec
from msgspec import Raw

from gateway.backends.port import refuse_field
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from gateway.ask.request import MediaUrl, Message, RawFields
    from gateway.config.schema import ThinkingConfig

CONSUMED = frozenset(
    (
        "model",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "reasoning_effort",
        "reasoning",
        "thinking",
        "thinking_config",
        "enable_thinking",
        "thinking_budget",
        "thinking_token_budget",
        "chat_template_kwargs",
        "include_reasoning",
        "thinkgate",
        "return_token_ids",
        "service_tier",
    )
)
# Characters that urlsplit drops or keeps where a backend's parser may read another host.
_ODD = re.compile(r"[\x00-\x20\x7f\\]")
OPENAI_KEEPS = ("service_tier", "reasoning_effort", "max_completion_tokens")
NOT_ON_VLLM = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "prediction": "leave it out",
    "web_search_options": "leave it out",
    "audio": "leave it out",
    "store": "nothing is stored here: leave it out",
}


def upstream_fields(
    raw: RawFields, switches: Switches, *, kind: str, mode: str, salt: str | None = None
) -> dict[str, Raw]:
    """The fields that ride along to a backend of `kind`, template switches and the tenant's salt included.

    Raises: InvalidRequest for a known field that such a backend cannot honour.
    """
    fields = {name: value for name, value in raw.items() if name not in CONSUMED}
    if kind == "openai":
        fields.update({name: raw[name] for name in OPENAI_KEEPS if name in raw})
    elif not NOT_ON_VLLM.keys().isdisjoint(fields):
        for name in NOT_ON_VLLM.keys() & fields.keys():
            if bytes(fields[name]) not in {b"null", b"false"}:
                raise refuse_field(name, kind, NOT_ON_VLLM[name])
    if "messages" in raw:
        kwargs = switches.encoded(mode, raw.get("chat_template_kwargs"))
        if kwargs is not None:
            fields["chat_template_kwargs"] = kwargs
    if salt is not None and kind in {"vllm", "embedded"}:
        fields["cache_salt"] = Raw(b'"%b"' % salt.encode())
    return fields


class Switches:
    """The template switches of a model's modes, encoded once.

    Args:
        thinking: where `off` says how thinking is switched off.
    """

    def __init__(self, thinking: ThinkingConfig) -> None:
        off = thinking.off.get("chat_template_kwargs", {})
        self._kwargs: dict[str, dict[str, Any]] = {
            "instant": off if isinstance(off, dict) else {},
            "reasoning": dict(thinking_on(thinking.off, native=thinking.native)),
        }
        self._alone = {mode: _raw_object(kwargs) for mode, kwargs in self._kwargs.items()}

    def encoded(self, mode: str, asked: Raw | None) -> Raw | None:
        """`chat_template_kwargs` for a mode: the client's own, less its thinking switches, and the mode's."""
        if asked is None:
            return self._alone[mode]
        kwargs = dict(msgspec.json.decode(asked) or {})
        for name in ("enable_thinking", "thinking"):
            kwargs.pop(name, None)
        return _raw_object({**kwargs, **self._kwargs[mode]})


def _raw_object(kwargs: dict[str, Any]) -> Raw | None:
    return Raw(msgspec.json.encode(kwargs)) if kwargs else None


def thinking_on(off: dict[str, object], *, native: bool) -> dict[str, object]:
    """The template's switches in a mode that thinks: the opposite of each switch in `thinking.off`.

    For a model that does not think by itself they stay as they are: its chain is opened behind the template.
    """
    kwargs = off.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        return {}
    return {k: not v for k, v in kwargs.items() if isinstance(v, bool)} if native else kwargs


def check_media(messages: Sequence[Message], allowed_hosts: Collection[str]) -> int:
    """Refuse media that a backend would fetch from somewhere the operator did not allow.

    Returns: how many parts are not text.
    Raises: InvalidRequest naming the part.
    """
    media_parts = 0
    for i, message in enumerate(messages):
        if message.content is None or isinstance(message.content, str):
            continue
        for j, part in enumerate(message.content):
            media_parts += part.type != "text"
            for name in ("image_url", "audio_url", "video_url"):
                media: MediaUrl | str | None = getattr(part, name)
                if media is not None:
                    url = media if isinstance(media, str) else media.url
                    _check_url(url, f"messages[{i}].content[{j}].{name}", allowed_hosts)
    return media_parts


def _check_url(url: str, param: str, allowed_hosts: Collection[str]) -> None:
    if url[:5].lower() == "data:":
        return
    try:
        parts = urlsplit(url) if not _ODD.search(url) else None
        host = None if parts is None else parts.hostname
    except ValueError:
        parts, host = None, None
    if parts is None or parts.scheme not in {"http", "https"} or host not in allowed_hosts or "@" in parts.netloc:
        raise InvalidRequest(f"`{param}`: media may only come as data: URLs or from server.media_hosts.", param=param)


def check_choices(n: int, prompts: int, max_n: int) -> None:
    """Raises: InvalidRequest when `n` times the number of prompts is above the model's max_n."""
    if n * prompts > max_n:
        field = "n" if n > 1 else "prompt"
        raise InvalidRequest(f"`{field}`: at most {max_n} choices fit in one request.", param=field)


def check_continued(messages: Raw | None, thinking: ThinkingConfig) -> None:
    """Refuse to go on from a message that ends inside its thinking: no cap would hold what follows.

    Raises: InvalidRequest naming the message.
    """
    told = [] if messages is None else msgspec.json.decode(messages)
    last = told[-1] if told else {}
    content = last.get("content") if last.get("role") == "assistant" else None  # a user may well speak of markers
    parts = content if isinstance(content, list) else [{"text": content}]
    text = "".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
    if text.rfind(thinking.start) > text.rfind(thinking.end):
        raise InvalidRequest(
            f"The message that is to be gone on from ends inside its thinking: close it with `{thinking.end}`.",
            param=f"messages[{len(told) - 1}].content",
        )
