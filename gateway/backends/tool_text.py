"""Tool calls in raw answer text: how the answer is made, and the calls out of it as it streams.

Owns: what a completions API, which knows no tools, is asked for (`answer_plan`), and reading its text as content
and OpenAI's tool-call deltas (`ToolReader`). Tags never reach the content. Does not own: what one call may look
like (tool_calls.py), JSON Schema (tool_schemas.py). Pure; O(text), whatever the borders of the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from gateway.backends.tool_calls import CLOSING, OPENING, TAG, Calls, JsonCall, XmlCall, held_at, is_begun
from gateway.backends.tool_schemas import Json, array_of_calls

Read = tuple[str, list[Json]]
_NO_PARAMETERS: Json = {"type": "object", "properties": {}, "additionalProperties": False}
_TAUGHT = re.compile(r"<tool_call>\s*(?:\[?\s*\{\s*[\"']|<function=)")
_JOINED_TAG = re.compile(r"(</?tool_call)>+")
# A closing brace too many is a common slip: it is layout between calls, like commas and an array's brackets.
_LAYOUT = re.compile(r"[\s\[\]},]*")
# Names are bounded, so that what is held back is.
_FUNCTION = re.compile(r"<function=([^<>\n]{1,256})>")
_BEGUN_FUNCTION = re.compile(r"<function=[^<>\n]{0,256}\Z")


class ToolsNotParsable(Exception):
    """The client's tools cannot be honoured on raw text.

    Attributes:
        message: one sentence for the client: what is wrong and the remedy.
        param: the request field at fault.
    """

    def __init__(self, message: str, *, param: str) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class ToolReader(Protocol):
    """One choice's answer text, read as it arrives: content, and OpenAI's tool-call deltas."""

    def push(self, text: str) -> Read:
        """The content and the pieces of calls that `text` settles, one piece per call."""

    def finish(self, *, cut: bool) -> Read:
        """What was held back; `cut`: the token limit ended the text, so a call stays cut and begun markup goes."""

    def finish_reason(self, reason: str) -> str:
        """The choice's finish reason, after `finish`, for the one that the backend gave the text."""


@dataclass(frozen=True, slots=True)
class ToolPlan:
    """How the answer to a request with tools is made, and read.

    Attributes:
        how: `text`: as it is; `named`: the whole text is the arguments of `name`; `required`: it is an array of
            calls; `auto`: text and blocks of calls.
        structured_outputs: vLLM's field of that name for the completions API, where the answer is forced.
        schemas: the parameters of each function.
        parallel: more than the first call is wanted.
    """

    how: Literal["text", "named", "required", "auto"] = "text"
    structured_outputs: Json | None = None
    name: str = ""
    schemas: Mapping[str, Json] = field(default_factory=dict)
    parallel: bool = True

    def reader(self) -> ToolReader:
        """A reader for one choice."""
        if self.how in ("text", "named"):
            return _WholeReader(self.name)
        return _BlockReader(self.schemas, only_first=not self.parallel, is_inside=self.how == "required")


def tool_format_of(prompt_text: str) -> str | None:
    """The format of calls that a prompt, rendered with tools, teaches; None: none that can be read."""
    return "hermes" if _TAUGHT.search(prompt_text) else None


def answer_plan(tools: Sequence[Json], tool_choice: object, parallel: bool, tool_format: str | None) -> ToolPlan:
    """How to make the answer to a request with the client's tools. Raises: ToolsNotParsable.

    Args:
        tools: the client's `tools`, `tool_choice` (None: "auto") and `parallel_tool_calls` next.
        tool_choice: as it came.
        parallel: false: the first call is the only one.
        tool_format: what the model's template teaches, by `tool_format_of`.
    """
    is_auto = tool_choice is None or tool_choice == "auto"
    if tool_choice == "none" or (is_auto and not tools):
        return ToolPlan()
    schemas = _parameters(tools)
    if is_auto and tool_format != "hermes":
        remedy = "name a function or say 'required' in `tool_choice`, or ask without a thinking cap"
        raise ToolsNotParsable(f"This model's calls cannot be told from its text here: {remedy}.", param="tools")
    if is_auto:
        return ToolPlan(how="auto", schemas=schemas, parallel=parallel)
    if tool_choice == "required" and schemas:
        try:
            forced = {"json": array_of_calls(schemas, most=None if parallel else 1)}
        except RecursionError:
            raise ToolsNotParsable("`tools` holds parameters that are nested too deeply.", param="tools") from None
        return ToolPlan(how="required", structured_outputs=forced, schemas=schemas, parallel=parallel)
    function = tool_choice.get("function") if isinstance(tool_choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in schemas:
        what = f"function {name!r}" if isinstance(name, str) else repr(tool_choice)[:100]
        wanted = "'none', 'auto', 'required' with tools, or {'type': 'function', 'function': {'name': one of `tools`}}"
        raise ToolsNotParsable(f"`tool_choice` cannot be {what}: it must be {wanted}.", param="tool_choice")
    return ToolPlan(how="named", structured_outputs={"json": schemas[name]}, name=name, schemas=schemas)


def _parameters(tools: Sequence[object]) -> dict[str, Json]:
    """The parameters of each function by its name. Raises: ToolsNotParsable."""
    schemas: dict[str, Json] = {}
    for i, tool in enumerate(tools):
        is_function = isinstance(tool, dict) and tool.get("type", "function") == "function"
        function = tool.get("function") if isinstance(tool, dict) and is_function else None
        if not isinstance(function, dict):
            raise _malformed(f"tools[{i}]", "{'type': 'function', 'function': ...}")
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not name or name in schemas:
            raise _malformed(f"tools[{i}].function.name", "a name of its own")
        if schema is not None and not isinstance(schema, dict):
            raise _malformed(f"tools[{i}].function.parameters", "a JSON Schema of an object")
        schemas[name] = schema or _NO_PARAMETERS
    return schemas


def _malformed(param: str, rule: str) -> ToolsNotParsable:
    return ToolsNotParsable(f"`{param}` must be {rule}.", param=param)


class _Content:
    """The content since the last `take`, without white space that is only layout around calls."""

    def __init__(self) -> None:
        self._ready: list[str] = []
        self._blank: list[str] = []
        self._is_beside_call = False
        self._tail = ""

    def write(self, text: str) -> None:
        bare = text.strip()
        if not bare:
            self._blank.append(text)
            return
        begin = len(text) - len(text.lstrip())
        # Between two pieces of content, what stood around a call keeps them apart.
        blank = "" if self._is_beside_call and not self._tail else "".join((*self._blank, text[:begin]))
        # What is left beside a block that was no call could make up a tag: its last character stays out.
        joined = _JOINED_TAG.sub(r"\1", self._tail + blank + bare)
        self._ready.append(joined[len(self._tail) :])
        self._tail = joined[-len(CLOSING) :]
        self._blank = [text[begin + len(bare) :]]
        self._is_beside_call = False

    def drop_layout(self) -> None:
        """A call stands here."""
        self._is_beside_call = True

    def take(self, *, is_last: bool = False) -> str:
        if is_last and not self._is_beside_call:
            self._ready += self._blank
        ready, self._ready = "".join(self._ready), []
        return ready


class _WholeReader:
    """The whole text is the arguments of the named function, or content if there is none."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._calls = Calls()

    def push(self, text: str) -> Read:
        if not self._name:
            return text, []
        if not self._calls.made:
            self._calls.begin(self._name)
        self._calls.add(text)
        return "", self._calls.take()

    def finish(self, *, cut: bool) -> Read:  # noqa: ARG002 - cut or whole, all was handed on
        return self.push("")

    def finish_reason(self, reason: str) -> str:
        return reason


class _BlockReader:
    """Text and blocks of calls; `is_inside`: the text begins inside a block, as a forced array of calls does."""

    def __init__(self, schemas: Mapping[str, Json], *, only_first: bool, is_inside: bool) -> None:
        self._schemas = schemas
        self._calls = Calls(only_first=only_first)
        self._content = _Content()
        self._is_inside = is_inside
        self._has_call = False
        self._layout: list[str] = []
        self._item: JsonCall | XmlCall | None = None
        self._held = ""

    def push(self, text: str) -> Read:
        text, at, before = self._held + text, 0, None
        while at < len(text) and before != (at, self._is_inside, self._item):
            before = (at, self._is_inside, self._item)
            if self._item is not None:
                at = self._item.read(text, at)
                self._settle_item()
            else:
                at = self._read_block(text, at) if self._is_inside else self._read_content(text, at)
        self._held = text[at:]
        return self._content.take(), self._calls.take()

    def finish(self, *, cut: bool) -> Read:
        held, self._held = self._held, ""
        if cut:
            self._layout = []
        if self._item is not None:
            self._item.finish(held, cut=cut)
            self._settle_item()
        elif not cut:
            self._refuse(held)
        return self._content.take(is_last=True), self._calls.take()

    def finish_reason(self, reason: str) -> str:
        return "tool_calls" if reason == "stop" and self._calls.made else reason

    def _read_content(self, text: str, at: int) -> int:
        tag = TAG.search(text, at)
        end = tag.start() if tag else len(text) - held_at(text, at, (OPENING, CLOSING))
        self._content.write(text[at:end])
        self._is_inside = tag is not None and tag[0] == OPENING
        return tag.end() if tag else end

    def _read_block(self, text: str, at: int) -> int:
        """What stands before a call or after it."""
        end = at
        if layout := _LAYOUT.match(text, at):
            self._layout.append(layout[0])
            end = layout.end()
        if text.startswith("{", end):
            self._item = JsonCall(self._calls)
        elif function := _FUNCTION.match(text, end):
            self._item = XmlCall(self._calls, function[1].strip(), self._schemas.get(function[1].strip(), {}))
            return function.end()
        elif tag := TAG.match(text, end):
            self._refuse("")
            self._is_inside, self._has_call = tag[0] == OPENING, False
            return tag.end()
        elif not (is_begun(text, end, (OPENING, CLOSING, "<function=")) or _BEGUN_FUNCTION.match(text, end)):
            self._refuse("")
            self._is_inside = self._has_call = False
        return end

    def _settle_item(self) -> None:
        if (item := self._item) is None:
            return
        if item.has_begun:
            self._has_call = True
            self._content.drop_layout()
        if item.is_over:
            self._item = None
            self._refuse(item.refused)

    def _refuse(self, text: str) -> None:
        """What is no call is content, with the layout before it unless that is a call's."""
        self._content.write("".join(([] if self._has_call else self._layout) + [text]))
        self._layout = []
