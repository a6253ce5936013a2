"""One tool call in a model's text, in the spellings that models use.

Owns: JSON (Hermes) with its keys in any order and arguments as text, and XML (Qwen3-Coder); where a call ends, and
handing on its arguments as they arrive. Does not own: the text around (tool_text.py).
Pure; O(text), whatever the borders of the pieces.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Sequence
from typing import TypeGuard

from gateway.backends.markers import held_back
from gateway.backends.tool_schemas import Json, has_type, property_of

OPENING, CLOSING = "<tool_call>", "</tool_call>"
_ARGUMENTS = frozenset({"arguments", "parameters"})
_PYTHON = {"True": "true", "False": "false", "None": "null"}
_NOT_JSON = object()
TAG = re.compile(r"</?tool_call>")
_STRUCTURE = re.compile(r'["{}\[\]<]')
_IN_STRING = re.compile(r'["\\\x00-\x1f]')
_BEGUN_CALL = re.compile(
    r'\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")'
    r'(?:\s*,\s*"(?:arguments|parameters)"\s*:\s*("(?:[^"\\]|\\u[0-9a-fA-F]{4}|\\[^u])*))?'
)
_PARAMETER = re.compile(r"<parameter=([^<>\n]{1,256})>|</function>|</?tool_call>")
_BEGUN_PARAMETER = re.compile(r"<[^<>\n]{0,270}\Z")
# Without its own closing tag, a value ends where the next line is markup.
_VALUE_END = re.compile(r"</parameter>|\n(?=<parameter=|</function>|</tool_call>)")
_VALUE_ENDS = ("</parameter>", "\n<parameter=", "\n</function>", "\n</tool_call>")


class Calls:
    """The pieces of calls since the last `take`.

    Attributes:
        made: calls begun so far, of those that are wanted.
    """

    def __init__(self, *, only_first: bool = False) -> None:
        self.made = 0
        self._only_first = only_first
        self._is_kept = False
        self._pieces: list[tuple[Json, list[str]]] = []

    def begin(self, name: str) -> None:
        """A new call; what is added belongs to it."""
        self._is_kept = not (self._only_first and self.made)
        if self._is_kept:
            head = {"index": self.made, "id": f"call_{secrets.token_hex(12)}", "type": "function"}
            self._pieces.append(({**head, "function": {"name": name}}, []))
            self.made += 1

    def add(self, arguments: str) -> None:
        """More of its arguments."""
        if self._is_kept and arguments:
            if not self._pieces:
                self._pieces.append(({"index": self.made - 1, "function": {}}, []))
            self._pieces[-1][1].append(arguments)

    def take(self) -> list[Json]:
        """One delta per call."""
        pieces, self._pieces = self._pieces, []
        for delta, arguments in pieces:
            delta["function"]["arguments"] = "".join(arguments)
        return [delta for delta, _ in pieces]


class JsonCall:
    """One call as a JSON object; its arguments are handed on as they arrive if its name came before them.

    Args:
        calls: where its pieces go.

    Attributes:
        is_over: the object ended, or a tag broke it off.
        has_begun: it is a call, so far as one can tell.
        refused: the text, if it turned out to be no call.
    """

    def __init__(self, calls: Calls) -> None:
        self.is_over = self.has_begun = False
        self.refused = ""
        self._calls = calls
        self._parts: list[str] = []
        self._depth = 0
        self._in_string = False
        self._may_stream = True
        self._streams = False

    def read(self, text: str, at: int) -> int:
        """Read `text` from `at`; where it stopped, at the end of the call or of what is certain."""
        while not self.is_over:
            found = (_IN_STRING if self._in_string else _STRUCTURE).search(text, at)
            end = found.start() if found else len(text)
            self._take(text[at:end])
            if found is None:
                return end
            at = end + (self._read_string(text, end) if self._in_string else self._read_structure(text, end))
            if at == end:
                break
        return at

    def finish(self, held: str, *, cut: bool) -> None:
        """The text is over before the call is."""
        self.is_over = True
        text = "".join((*self._parts, held))
        if self.has_begun or not cut:
            self.refused = "" if self.has_begun else text
        elif (begun := _BEGUN_CALL.match(text)) and _is_name(name := _decoded(begun[1])):
            self.has_begun = True
            self._calls.begin(name)
            arguments = _decoded(f'{begun[2]}"') if begun[2] else ""
            self._calls.add(_encodable(arguments) if isinstance(arguments, str) else "")

    def _take(self, text: str) -> None:
        if self._streams:
            self._calls.add(text)
        elif not self.has_begun:
            self._parts.append(text)

    def _read_string(self, text: str, at: int) -> int:
        """How many characters to go on; 0: more text must decide, or the call is over."""
        char = text[at]
        if char == "\\":
            if at + 1 == len(text):
                return 0
            self._take(text[at : at + 2])
            return 2
        # A line cannot end inside a string: if a closing tag follows, the model forgot to close the string.
        if char == "\n" and CLOSING.startswith(text[at + 1 : at + 1 + len(CLOSING)]):
            if text.startswith(CLOSING, at + 1):
                self._conclude()
            return 0
        self._in_string = char != '"'
        # Otherwise the client could not parse what the model meant.
        self._take(json.dumps(char)[1:-1] if self._in_string and self._streams else char)
        return 1

    def _read_structure(self, text: str, at: int) -> int:
        """As `_read_string`."""
        char = text[at]
        if char == "<":
            if TAG.match(text, at):
                self._conclude()
                return 0
            if is_begun(text, at, (OPENING, CLOSING)):
                return 0
        elif char in "{[":
            if self._depth == 1 and self._may_stream:
                self._may_stream = False  # once is enough for what models write, and keeps the time linear
                self._begin_stream(is_object=char == "{")
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
        self._in_string = char == '"'
        self._take(char)
        self._streams = self._streams and self._depth > 1
        if self._depth == 0:
            self._conclude()
        return 1

    def _begin_stream(self, *, is_object: bool) -> None:
        head = _decoded("".join(self._parts) + "null}")
        if is_object and isinstance(head, dict) and [*head][-1] in _ARGUMENTS and _is_name(name := head.get("name")):
            self._calls.begin(name)
            self.has_begun = self._streams = True

    def _conclude(self) -> None:
        self.is_over = True
        if self.has_begun:
            return
        text = "".join(self._parts)
        call = _decoded(text)
        if not isinstance(call, dict) or not _is_name(name := call.get("name")):
            self.refused = text
            return
        self.has_begun = True
        self._calls.begin(name)
        given = call.get("arguments", call.get("parameters"))
        said = _encodable(given) if isinstance(given, str) else _encoded(given)
        self._calls.add("{}" if given is None or not said.strip() else said)


class XmlCall:
    """One call as Qwen3-Coder writes it, from behind `<function=NAME>` on; attributes as of `JsonCall`.

    Args:
        calls: where its pieces go, one per parameter.
        name: of the function.
        schema: of its parameters; it tells text from other values.
    """

    refused = ""
    has_begun = True

    def __init__(self, calls: Calls, name: str, schema: Json) -> None:
        self.is_over = False
        self._calls = calls
        self._schema = schema
        self._key: str | None = None
        self._value: list[str] = []
        self._before_key = "{"
        calls.begin(name)

    def read(self, text: str, at: int) -> int:
        """As of `JsonCall`."""
        before = -1
        while not self.is_over and at != before:
            before = at
            at = self._read_between(text, at) if self._key is None else self._read_value(text, at)
        return at

    def finish(self, held: str, *, cut: bool) -> None:
        """As of `JsonCall`."""
        if self._key is not None:
            self._value.append("" if cut else held)
            self._end_value(cut=cut)
        self.is_over = True
        if not cut:
            self._end()

    def _read_between(self, text: str, at: int) -> int:
        found = _PARAMETER.search(text, at)
        if found is None:
            begun = _BEGUN_PARAMETER.search(text, at)
            return begun.start() if begun else len(text)
        if found[1] is not None:
            self._key = found[1].strip()
            return found.end()
        self._end()
        return found.end() if found[0] == "</function>" else found.start()

    def _read_value(self, text: str, at: int) -> int:
        found = _VALUE_END.search(text, at)
        if found is None:
            end = len(text) - held_at(text, at, _VALUE_ENDS)
            self._value.append(text[at:end])
            return end
        self._value += (text[at : found.start()], "\n" if found[0] == "\n" else "")
        self._end_value(cut=False)
        return found.end()

    def _end_value(self, *, cut: bool) -> None:
        value = "".join(self._value).removeprefix("\n").removesuffix("\n")
        typed = _typed(value, property_of(self._schema, self._key or ""), self._schema)
        said = _encoded(typed)
        self._calls.add(f"{self._before_key}{_encoded(self._key)}: {said[:-1] if cut and typed is value else said}")
        self._key, self._value, self._before_key = None, [], ", "

    def _end(self) -> None:
        self.is_over = True
        self._calls.add("{}" if self._before_key == "{" else "}")


def held_at(text: str, at: int, markers: Sequence[str]) -> int:
    """How much of the end of `text`, from `at` on, may be the beginning of a marker."""
    return min(len(text) - at, max(held_back(text, marker) for marker in markers))


def is_begun(text: str, at: int, markers: Sequence[str]) -> bool:
    """Whether the text from `at` on is the beginning of a marker that is not complete yet."""
    return any(len(text) - at < len(marker) and marker.startswith(text[at:]) for marker in markers)


def _is_name(name: object) -> TypeGuard[str]:
    # Half a surrogate pair, which JSON can spell and UTF-8 cannot, is not printable either.
    return isinstance(name, str) and bool(name.strip()) and name.isprintable()


def _decoded(text: str) -> object:
    """The value of a JSON text, line ends within strings let through, or `_NOT_JSON`."""
    try:
        value = json.loads(text, strict=False)
        json.dumps(value, allow_nan=False)  # refuses NaN, and numbers beyond what floats hold
    except (ValueError, RecursionError):
        return _NOT_JSON
    return value


def _encoded(value: object) -> str:
    return _encodable(json.dumps(value, ensure_ascii=False))


def _encodable(text: str) -> str:
    """The text without halves of surrogate pairs."""
    return text.encode("utf-8", "replace").decode()


def _typed(value: str, schema: object, root: Json) -> object:
    """The text of a parameter as a value of a type that its schema names; the text itself if it is none."""
    typed = _decoded(_PYTHON.get(value.strip(), value))
    return typed if has_type(typed, schema, root) else value
