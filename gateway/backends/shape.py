"""The bytes that every ordinary event of a stream has in common, learned from its first one.

Owns: recognising "one more token, like the last" without decoding JSON. Whatever differs in any way from
what was learned is not recognised and takes the careful path. O(event bytes), in C.
"""

from __future__ import annotations

from typing import NamedTuple

from gateway.backends.port import Kind

_TEXT_AT = {Kind.ANSWER: b'"delta":{"content":', Kind.THINKING: b'"delta":{"reasoning":'}
_AFTER_TEXT = b'},"logprobs":null,'
_IDS_AT = b',"token_ids":['
_END = b"]}]}"
MOST_DIGITS = 12  # of a token id


class Shape(NamedTuple):
    """An ordinary event is `before`, a JSON string, `between`, one token id, and the closing brackets.

    Attributes:
        choice: index of the choice.
        kind: of the text.
        before: up to the text.
        between: from the end of the text to the token id.
        rest: what follows the text once the id is cut out.
    """

    choice: int
    kind: Kind
    before: bytes
    between: bytes
    rest: bytes

    def match(self, event: bytes) -> tuple[bytes, int, int] | None:
        """The text as JSON, the token id and where the text ends; None if the event is not ordinary.

        The quotes are counted, so that nothing but one JSON string can stand where the text does; a text
        with an escaped quote is left to the careful path.
        """
        _, _, before, between, _ = self
        if not event.startswith(before):
            return None
        at = event.rfind(between)
        text = event[len(before) : at]
        token = event[at + len(between) : -len(_END)]
        if at < len(before) or text.count(b'"') != 2 or not text.startswith(b'"') or not text.endswith(b'"'):
            return None
        is_id = len(token) <= MOST_DIGITS and token.isdigit()
        return (text, int(token), at) if is_id and event.endswith(_END) else None


def learn(event: bytes, choice: int, kind: Kind) -> Shape | None:
    """The shape of an event that was found to be ordinary; None if it has another form than vLLM's."""
    text_at = event.find(_TEXT_AT[kind])
    after_text, ids_at = event.rfind(_AFTER_TEXT), event.rfind(_IDS_AT)
    if text_at < 0 or not text_at < after_text < ids_at:
        return None
    between = event[after_text : ids_at + len(_IDS_AT)]
    before = event[: text_at + len(_TEXT_AT[kind])]
    shape = Shape(choice, kind, before, between, event[after_text:ids_at] + _END[1:])
    return shape if shape.match(event) is not None else None
