"""Request bodies, right and wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import strategies as st

from gateway.ask.request import parse_chat, parse_completion, parse_embedding
from gateway.errors import InvalidRequest

Json = dict[str, Any]
CHAT: Json = {"model": "qwen", "messages": [{"role": "user", "content": "hi"}]}
TEXT: Json = {"model": "qwen", "prompt": "hi"}
PARSERS = [parse_chat, parse_completion, parse_embedding]
TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def chat(**more: Any) -> bytes:
    """A chat request with these fields added."""
    return json.dumps({**CHAT, **more}).encode()


def chat_raw(field: bytes) -> bytes:
    """A chat request with one more field, as bytes."""
    return chat()[:-1] + b"," + field + b"}"


def refused(body: bytes, parse: Any = parse_chat) -> InvalidRequest:
    """The error that a body is answered with."""
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    return caught.value


def error_of(body: bytes, parse: Any) -> InvalidRequest | None:
    """The error that a body is answered with, if it is."""
    try:
        parse(body)
    except InvalidRequest as error:
        return error
    return None
