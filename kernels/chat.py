"""Chat messages to a prompt, through the model's own template.

Owns: making OpenAI messages fit the template: content parts joined, tool calls and tool results rendered
in Hermes' format where the template does not know them. Does not own: tokens, thinking.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from kernels.errors import RequestRefused
from kernels.templates import TOOLS_SYSTEM
from kernels.toolcalls import CLOSING, OPENING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kernels.params import Json
    from kernels.tokens import Tokens

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})
# What apply_chat_template takes besides the variables of a template.
_RESERVED = frozenset(
    [
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


def render_chat(tokens: Tokens, messages: Sequence[Json], tools: Sequence[Json], kwargs: Json) -> str:
    """The prompt for the next assistant turn.

    Args:
        tokens: the model's tokenizer, which holds the template.
        messages: OpenAI messages.
        tools: OpenAI tool definitions the model may see.
        kwargs: further variables of the template.

    Raises: RequestRefused naming the message or variable at fault.
    """
    template = tokens.chat_template
    if template is None:
        raise RequestRefused("This model has no chat template: use /v1/completions.", param="messages")
    reserved = sorted(_RESERVED & kwargs.keys())
    if reserved:
        param = f"chat_template_kwargs.{reserved[0]}"
        raise RequestRefused(f"`{param}` is set by the server, not by a request.", param=param)
    # A template that speaks another tool format would teach the model what nobody parses.
    knows_tools = "tools" in template and OPENING in template
    turns = [_turn(i, message, knows_tools=knows_tools) for i, message in enumerate(messages)]
    if not turns:
        raise RequestRefused("`messages` must hold at least one message.", param="messages")
    if not knows_tools:
        turns = _with_tool_results(turns)
        if tools:
            turns = _with_tools(turns, tools)
    try:
        rendered: str = tokens.tokenizer.apply_chat_template(
            turns,
            tools=list(tools) if tools and knows_tools else None,
            tokenize=False,
            add_generation_prompt=True,
            **kwargs,
        )
    except (TemplateError, TypeError, KeyError, ValueError) as exc:
        reason = f"The model's chat template does not take these messages: {exc}"
        raise RequestRefused(reason, param="messages") from exc
    return rendered


def _turn(i: int, message: Json, *, knows_tools: bool) -> Json:
    """One message as a template expects it: text content, arguments as objects."""
    role = message.get("role")
    if role not in ROLES:
        raise RequestRefused(f"`messages[{i}].role` must be one of {sorted(ROLES)}.", param=f"messages[{i}].role")
    turn = {**message, "role": "system" if role == "developer" else role}
    turn["content"] = _text(i, message.get("content"), is_required=role != "assistant")
    thought = message.get("reasoning") or message.get("reasoning_content")
    if thought is not None:
        turn["reasoning"] = turn["reasoning_content"] = thought
    calls = message.get("tool_calls")
    if not calls:
        turn.pop("tool_calls", None)
    elif knows_tools:
        turn["tool_calls"] = [{**call, "function": _function(i, j, call)} for j, call in enumerate(calls)]
    else:
        del turn["tool_calls"]
        written = [_written(_function(i, j, call)) for j, call in enumerate(calls)]
        turn["content"] = "\n".join(filter(None, [turn["content"], *written]))
    return turn


def _text(i: int, content: Any, *, is_required: bool) -> str:  # noqa: ANN401 - whatever the client sent
    """The text of a message's content."""
    param = f"messages[{i}].content"
    if content is None and not is_required:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestRefused(f"`{param}` must be text or a list of parts.", param=param)
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in {"text", "refusal"} or not isinstance(text, str):
            raise RequestRefused(f"`{param}`: this model takes text parts only, not {kind!r}.", param=param)
        texts.append(text)
    return "\n".join(texts)


def _function(i: int, j: int, call: Any) -> Json:  # noqa: ANN401 - whatever the client sent
    """Name and arguments of a call in the history."""
    param = f"messages[{i}].tool_calls[{j}].function"
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RequestRefused(f"`{param}` must hold `name` and `arguments`.", param=param)
    arguments = function.get("arguments") or "{}"
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError as exc:
        raise RequestRefused(f"`{param}.arguments` is not JSON.", param=f"{param}.arguments") from exc
    return {"name": function["name"], "arguments": parsed}


def _written(function: Json) -> str:
    """A call as the model would have written it."""
    return f"{OPENING}\n{json.dumps(function, ensure_ascii=False)}\n{CLOSING}"


def _with_tool_results(turns: list[Json]) -> list[Json]:
    """Tool messages as user turns, for a template that knows no such role; neighbours share one turn."""
    out: list[Json] = []
    was_tool = False
    for turn in turns:
        is_tool = turn["role"] == "tool"
        if is_tool:
            result = f"<tool_response>\n{turn['content']}\n</tool_response>"
            if was_tool:
                out[-1]["content"] += "\n" + result
            else:
                out.append({"role": "user", "content": result})
        else:
            out.append(turn)
        was_tool = is_tool
    return out


def _with_tools(turns: list[Json], tools: Sequence[Json]) -> list[Json]:
    """The tools in the system message, for a template that has no place for them."""
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    instruction = TOOLS_SYSTEM.format(tools=listed)
    if turns[0]["role"] == "system":
        first = {**turns[0], "content": f"{turns[0]['content']}\n\n{instruction}"}
        return [first, *turns[1:]]
    return [{"role": "system", "content": instruction}, *turns]
