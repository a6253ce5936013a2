"""From token ids to text, byte by byte, so that no client ever sees half a character.

Owns: the bytes of each token and the buffer for a character that is spread over several. Bytes that can
never become a character turn into U+FFFD, as in `bytes.decode(errors="replace")`; bytes that still may
become one are kept back, and dropped when the text ends there.
"""

from __future__ import annotations

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection


class TokenBytes:
    """The bytes of every token of one vocabulary.

    Args:
        decode: bytes of a token sequence.
        size: tokens in the vocabulary; ids beyond it (padding rows of the model) have no bytes.
        special: tokens that are part of the format and not of the text.
    """

    def __init__(self, decode: Callable[[list[int]], bytes], size: int, special: Collection[int]) -> None:
        self._decode = decode
        self._size = size
        self._special = frozenset(special)

    def of(self, token_id: int) -> bytes:
        """All bytes of a token, special or not."""
        return self._decode([token_id]) if 0 <= token_id < self._size else b""

    def shown(self, token_id: int) -> bytes:
        """The bytes of a token that belong to the text: none for special tokens."""
        return b"" if token_id in self._special else self.of(token_id)


class TextStream:
    """Whole characters out of bytes that arrive in any portions."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, data: bytes) -> str:
        """The characters that `data` completes."""
        return self._decoder.decode(data)

    def drop_partial(self) -> None:
        """Forget the bytes of an unfinished character: the text ends here."""
        self._decoder.reset()
