"""One tokenizer: text to ids, ids to bytes, markers to tokens.

Owns: tokenisation that several threads may use at once, and which tokens are format and not text.
Does not own: chat templates (chat.py), the network (model.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import llguidance.hf

from kernels.detokenize import TokenBytes
from kernels.errors import ModelUnusable
from kernels.thinking import Marker
from kernels.toolcalls import CLOSING, OPENING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Markers and wrap-ups come from the configuration, so there are few; a bound keeps it that way.
_MOST_MARKERS = 64
# UTF-8 takes four bytes at most, so an unfinished character has three.
_MOST_UNFINISHED = 3


class Tokens:
    """The vocabulary of a model.

    Args:
        tokenizer: a fast transformers tokenizer.
        eos: the model's end-of-sequence tokens.

    Attributes:
        tokenizer, eos: as given.
        size: tokens in the vocabulary; the model's logits may have padding rows beyond.
        grammar_tokenizer: the same vocabulary for llguidance.
        tool_marker_ids: opening and closing marker of tool calls, where llguidance matches them only
            by id; None: they are ordinary text.

    Raises: ModelUnusable if the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, eos: Sequence[int]) -> None:  # noqa: ANN401 - no common type in transformers
        if not getattr(tokenizer, "is_fast", False):
            raise ModelUnusable("the model needs a fast tokenizer (tokenizer.json)")
        self.tokenizer = tokenizer
        self.eos = tuple(eos)
        # Encoding through transformers sets truncation on the shared tokenizer: two threads collide.
        self._backend = tokenizer.backend_tokenizer
        self.grammar_tokenizer = llguidance.hf.from_tokenizer(tokenizer, eos_token=list(eos) or None)
        self.size: int = self.grammar_tokenizer.vocab_size
        by_id = self.grammar_tokenizer.is_special_token
        tool_ids = self._ids_of(OPENING, CLOSING)
        self.tool_marker_ids = tool_ids if tool_ids is not None and all(map(by_id, tool_ids)) else None
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        decode = self.grammar_tokenizer.decode_bytes
        self._all = TokenBytes(decode, self.size, ())
        # Tool markers are parsed out of the text, so they must be in it.
        self._text = TokenBytes(decode, self.size, special.difference(tool_ids or ()))
        self._markers: dict[str, Marker] = {}

    @property
    def chat_template(self) -> str | None:
        """The jinja source; None if the model has none."""
        template: str | None = self.tokenizer.chat_template
        return template

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text; the text of a special token becomes that token."""
        return cast("list[int]", self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return b"".join(map(self._all.of, token_ids)).decode("utf-8", "replace")

    def bytes_of(self, token_id: int) -> bytes:
        """All bytes of a token."""
        return self._all.of(token_id)

    def tail(self, token_ids: Sequence[int]) -> bytes:
        """The last bytes of token ids, special tokens included: enough to hold an unfinished character."""
        tail = b""
        for token_id in reversed(token_ids):
            if len(tail) >= _MOST_UNFINISHED:
                break
            tail = self._all.of(token_id) + tail
        return tail

    def shown(self, *, skip_special_tokens: bool) -> Callable[[int], bytes]:
        """The function from a token to those of its bytes that belong to the text."""
        return self._text.shown if skip_special_tokens else self._all.shown

    def marker(self, text: str) -> Marker:
        """A piece of text with its tokens, tokenised once."""
        marker = self._markers.get(text)
        if marker is None:
            marker = Marker(text, tuple(self.encode(text)) if text else ())
            if len(self._markers) < _MOST_MARKERS:
                self._markers[text] = marker
        return marker

    def _ids_of(self, *texts: str) -> tuple[int, int] | None:
        """The ids of two texts, if each is one token of the vocabulary."""
        first, second = (self.encode(text) for text in texts)
        return (first[0], second[0]) if len(first) == len(second) == 1 else None
