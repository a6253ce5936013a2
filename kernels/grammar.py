"""Constrained decoding with llguidance: grammars for formatted answers and tool calls, and their masks.

Owns: what an answer may look like. The model writes JSON on one line (`", "` and `": "` between items):
free white space is where small models get lost for ever. Schemas are never fetched from anywhere.
"""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLMatcher, LLParserLimits

from kernels.errors import GenerationFailed, RequestRefused
from kernels.toolcalls import CLOSING, OPENING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.params import AnswerFormat, Json

_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_MOST_CALLS = 16
# A client's schema must not occupy a core for long; the library's own limits are ten times these.
_LEXER_FUEL = 200_000
_LEXER_STATES = 50_000
_GRAMMAR_SIZE = 50_000


def _with_layout(schema: Json, *, lenient: bool) -> Json:
    """The schema with our layout in place of whatever llguidance options it carries itself."""
    return {**schema, "x-guidance": {**_LAYOUT, "lenient": lenient}}


def format_grammar(asked: AnswerFormat) -> str | None:
    """Grammar of answers in a format; None if any will do. Raises: RequestRefused naming `response_param`."""
    if asked.response_schema is not None:
        return schema_grammar(asked.response_schema, asked.response_param)
    regex = asked.response_regex
    if regex is None and asked.response_choices:
        regex = "|".join(map(_spelled_out, asked.response_choices))
    if regex is None:
        return None
    grammar: str = LLMatcher.grammar_from_regex(regex)
    _check(grammar, asked.response_param, "format")
    return grammar


def _spelled_out(text: str) -> str:
    """A regular expression of just this text: by code points, no character of it can mean anything else."""
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def schema_grammar(schema: Json, param: str = "response_format") -> str:
    """Grammar of JSON values that match `schema`. Raises: RequestRefused naming `param`."""
    grammar: str = LLMatcher.grammar_from_json_schema(_with_layout(schema, lenient=False))
    _check(grammar, param)
    return grammar


def tools_grammar(
    tools: Sequence[Json],
    *,
    is_required: bool,
    is_parallel: bool,
    marker_ids: tuple[int, int] | None,
    response_schema: Json | None,
) -> str:
    """Grammar of answers with calls of `tools` in Hermes' format.

    Args:
        tools: the functions that may be called: `name`, `parameters`, `strict`.
        is_required: the answer must be calls; else it may be text, or text and then calls.
        is_parallel: several calls are fine.
        marker_ids: opening and closing marker, where they are single tokens that llguidance only
            matches by id; None: they are ordinary text.
        response_schema: what the text must be if there are no calls.

    Raises: RequestRefused naming the tool whose parameters are no usable JSON Schema.
    """
    opening, closing = json.dumps(OPENING), json.dumps(CLOSING)
    if marker_ids is not None:
        opening, closing = (f"<[{token_id}]>" for token_id in marker_ids)
    rest = " rest" if is_parallel else ""
    lines = ["%llguidance {}"]
    if is_required:
        lines.append(f"start: item{rest}")
    elif response_schema is not None:
        lines.append(f"start: %json {json.dumps(_with_layout(response_schema, lenient=False))} | item{rest}")
    else:
        lines.append(f"start: TEXT | TEXT item{rest}" if marker_ids else f"start: TEXT | opened body{rest}")
        lines.append("TEXT: /(.|\\n)*/")
        # Lazy: the text ends at the first marker, so a marker always begins a call.
        lines.append("" if marker_ids else f"opened[lazy]: TEXT {opening}")
    lines.append(f'rest: ("\\n" item){{0,{_MOST_CALLS - 1}}}')
    lines.append(f"item: {opening} body")
    lines.append(f"body: ({' | '.join(f'call_{i}' for i in range(len(tools)))}) {closing}")
    for i, tool in enumerate(tools):
        schema = _with_layout(tool.get("parameters") or {"type": "object"}, lenient=not tool.get("strict"))
        _check(LLMatcher.grammar_from_json_schema(schema), f"tools[{i}].function.parameters")
        head = '\n{"name": ' + json.dumps(tool["name"]) + ', "arguments": '
        lines.append(f'call_{i}: {json.dumps(head)} %json {json.dumps(schema)} "}}\\n"')
    grammar: str = LLMatcher.grammar_from_lark("\n".join(lines))
    _check(grammar, "tools" if response_schema is None else "response_format")
    return grammar


def _limits() -> LLParserLimits:
    return LLParserLimits(
        initial_lexer_fuel=_LEXER_FUEL, max_lexer_states=_LEXER_STATES, max_grammar_size=_GRAMMAR_SIZE
    )


def _check(grammar: str, param: str, what: str = "JSON Schema") -> None:
    """Raises: RequestRefused if llguidance cannot use `grammar`."""
    is_error, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    if is_error:
        raise RequestRefused(f"`{param}` is not a {what} that can be enforced: {messages[0][:300]}", param=param)


class Constraint:
    """The grammar's state for one choice.

    Args:
        tokenizer: an llguidance.LLTokenizer.
        grammar: from this module.

    Raises: GenerationFailed if the grammar is too large to follow.
    """

    def __init__(self, tokenizer: Any, grammar: str) -> None:  # noqa: ANN401 - llguidance has no stubs
        self._matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=_limits())
        self._raise_error()

    def fork(self) -> Constraint:
        """A second state of the same grammar, where this one is."""
        twin = copy.copy(self)
        twin._matcher = self._matcher.deep_copy()
        return twin

    @property
    def is_complete(self) -> bool:
        """Nothing but the end of the sequence may follow."""
        return self._matcher.is_stopped()

    def allowed(self, size: int) -> torch.Tensor:
        """Which tokens may come next: [size] bool on the CPU."""
        mask = torch.zeros(size, dtype=torch.bool)
        # One byte per token; bytearray, since torch wants a writable buffer.
        allowed = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        self._raise_error()
        shared = min(size, allowed.numel())
        mask[:shared] = allowed[:shared] != 0
        return mask

    def take(self, token_id: int) -> None:
        """Follow one token of the answer."""
        self._matcher.consume_token(token_id)
        self._raise_error()

    def _raise_error(self) -> None:
        if self._matcher.is_error():
            raise GenerationFailed(f"the grammar of the answer failed: {self._matcher.get_error()[:300]}")
