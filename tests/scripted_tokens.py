"""The tiny tokenizer of the scripted upstream: text to token ids and back.

Owns: tokens, their ids and texts. An id is a function of its text alone, so that the same text has the same
ids everywhere; the other way needs a memory of the texts that were met, which the server keeps.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BOS, EOS, THINK, END_THINK, NEWLINE = 1, 2, 15, 16, 198
FIRST_BYTE = 300  # ids of single bytes
FIRST_WORD = 1000
WORDS = 1 << 30  # so many that two words of a test do not meet in one id
LOGPROB = -0.5  # of a sampled token; that of the next best is one lower, and so on
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Token:
    """One sampled token: `text` as a detokeniser hands it out (empty inside a character), `delta` as is.

    Where `delta` is given it is what the chat endpoint sends instead of the text, as a parser would. `logprob` is what
    is told of it where that is asked for.
    """

    id: int
    text: str
    delta: Mapping[str, Any] | None = None
    logprob: float = LOGPROB


END_OF_SEQUENCE = Token(EOS, "")
START_MARKER = (Token(THINK, "<think>"),)
END_MARKER = (Token(END_THINK, "</think>"),)
SPECIAL = {"\n": (Token(NEWLINE, "\n"),), "<|im_start|>": (Token(BOS, ""),), "<|im_end|>": (END_OF_SEQUENCE,)}
NAMES = {BOS: "<|im_start|>", EOS: "<|im_end|>"}  # of tokens that are not in the text


def word(text: str, delta: Mapping[str, Any] | None = None) -> Token:
    """The token of one word."""
    return Token(FIRST_WORD + zlib.crc32(text.encode()) % WORDS, text, delta)


def tokens(text: str, logprob: float = LOGPROB) -> tuple[Token, ...]:
    """A token per word, each with the space before it; equal words get equal ids."""
    words = text.split(" ")
    parts = [words[0], *(f" {one}" for one in words[1:])] if text else []
    return tuple(replace(word(part), logprob=logprob) for part in parts)


def byte_tokens(text: str) -> tuple[Token, ...]:
    """A token per UTF-8 byte; a character's text comes with its last byte, as from a detokeniser."""
    made: list[Token] = []
    for character in text:
        *head, last = character.encode()
        made += [Token(FIRST_BYTE + byte, "") for byte in head]
        made.append(Token(FIRST_BYTE + last, character))
    return tuple(made)


def tool_call_tokens(
    name: str, arguments: str, *, index: int = 0, call_id: str = "chatcmpl-tool-1"
) -> tuple[Token, ...]:
    """A tool call in the markup of the hermes parser; the chat endpoint sends it parsed, completions as it is."""

    def call(**more: Any) -> Json:
        return {"tool_calls": [{"index": index, **more}]}

    head = call(id=call_id, type="function", function={"name": name})
    body = [word(one.text, call(function={"arguments": one.text})) for one in tokens(arguments)]
    return (
        *(word("<tool_call>", {}), Token(NEWLINE, "\n", {})),
        *(word('{"name":', {}), word(f' "{name}",', head), word(' "arguments": ', {})),
        *body,
        *(word("}", {}), Token(NEWLINE, "\n", {}), word("</tool_call>", {})),
    )


def encode(text: str, special: Mapping[str, Sequence[Token]]) -> list[Token]:
    """The tokens of a text: those in `special` where their text stands, else a token per word."""
    known = {**SPECIAL, **special}
    found: list[Token] = []
    for piece in re.split("(" + "|".join(map(re.escape, known)) + ")", text):
        found += known.get(piece) or (token for token in tokens(piece) if token.text)
    return found


def decode(ids: Iterable[int], texts: Mapping[int, str]) -> str:
    """The text of token ids; half a character and an unknown id become the replacement character."""
    raw = bytearray()
    for token in ids:
        is_byte = FIRST_BYTE <= token < FIRST_BYTE + 256
        raw += bytes([token - FIRST_BYTE]) if is_byte else texts.get(token, "\ufffd").encode()
    return raw.decode(errors="replace")


def is_text(prompt: object) -> bool:
    """Whether a prompt of the completions endpoint has text in it, not only token ids."""
    return isinstance(prompt, str) or (isinstance(prompt, list) and any(isinstance(item, str) for item in prompt))


def starts_with(ids: Sequence[int], at: int, marker: Sequence[Token]) -> bool:
    """Whether the ids of `marker` stand in `ids` from `at` on."""
    return list(ids[at : at + len(marker)]) == [token.id for token in marker]
