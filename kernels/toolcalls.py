"""Tool calls out of the answer text, as it streams.

Owns: Hermes' format in the one spelling that grammar.py lets the model write:
`<tool_call>`, newline, `{"name": "...", "arguments": {...}}`, newline, `</tool_call>`. Markup never
reaches the content. Arguments are handed on as they arrive; a call cut off by the token limit
arrives cut, like everybody else's.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import replace
from enum import Enum, auto

from kernels.params import CallPart
from kernels.stop import held_back

OPENING = "<tool_call>"
CLOSING = "</tool_call>"

_HEADER = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
# A newline cannot stand raw inside a JSON string, so these two lines only occur where a call ends.
_FOOTER = "}\n" + CLOSING


class _State(Enum):
    CONTENT = auto()
    HEADER = auto()
    ARGUMENTS = auto()


class ToolCallParser:
    """Split answer text into content and tool-call pieces.

    Attributes:
        calls: calls begun so far.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._state = _State.CONTENT
        self._held = ""
        self._blank = True

    def push(self, text: str) -> tuple[str, list[CallPart]]:
        """The content and the pieces of calls that `text` settles."""
        self._held += text
        content: list[str] = []
        parts: list[CallPart] = []
        while True:
            before = (self._state, len(self._held))
            if self._state is _State.CONTENT:
                content.append(self._read_content())
            elif self._state is _State.HEADER:
                parts.extend(self._read_header())
            else:
                parts.extend(self._read_arguments())
            if not self._held or before == (self._state, len(self._held)):
                return "".join(content), _joined(parts)

    def finish(self, *, cut: bool) -> str:
        """Content still held back at the end.

        Args:
            cut: the token limit ended the text, so what may be the start of markup counts as markup.
        """
        held, self._held = self._held, ""
        if self._state is not _State.CONTENT or not held.strip():
            return ""
        return held[: len(held) - held_back(held, [OPENING])] if cut else held

    def _read_content(self) -> str:
        """Content up to the next call; white space around calls is layout, not content."""
        at = self._held.find(OPENING)
        if at >= 0:
            content, self._held = self._held[:at], self._held[at + len(OPENING) :]
            self._state = _State.HEADER
        else:
            cut = len(self._held) - held_back(self._held, [OPENING])
            if self._blank and not self._held[:cut].strip():
                return ""
            content, self._held = self._held[:cut], self._held[cut:]
        if self._blank and not content.strip():
            return ""
        self._blank = False
        return content

    def _read_header(self) -> list[CallPart]:
        """The first piece of a call: its id and name."""
        match = _HEADER.match(self._held)
        if match is None:
            return []
        self._held = self._held[match.end() :]
        self._state = _State.ARGUMENTS
        self.calls += 1
        name: str = json.loads(match[1])
        return [CallPart(index=self.calls - 1, id=f"call_{secrets.token_hex(12)}", name=name)]

    def _read_arguments(self) -> list[CallPart]:
        """More of the arguments; the object's own wrapper is held back and dropped."""
        at = self._held.find(_FOOTER)
        if at >= 0:
            arguments, self._held = self._held[:at], self._held[at + len(_FOOTER) :]
            self._state, self._blank = _State.CONTENT, True
        else:
            cut = len(self._held) - held_back(self._held, [_FOOTER])
            arguments, self._held = self._held[:cut], self._held[cut:]
        return [CallPart(index=self.calls - 1, arguments=arguments)] if arguments else []


def _joined(parts: list[CallPart]) -> list[CallPart]:
    """One piece per call: clients expect each index once in a delta."""
    by_index: dict[int, CallPart] = {}
    for part in parts:
        first = by_index.setdefault(part.index, part)
        if first is not part:
            by_index[part.index] = replace(first, arguments=first.arguments + part.arguments)
    return list(by_index.values())
