"""Deltas to one JSON body: the answer to a request that does not stream.

Owns: putting choices together from their parts. O(size of the answer).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.port import Delta, Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.backends.port import Surface


@dataclass(slots=True)
class _Choice:
    answer: list[str] = field(default_factory=list)
    thinking: list[str] = field(default_factory=list)
    tool_calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    logprobs: dict[str, list[Any]] = field(default_factory=dict)
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] | None = None
    finish_reason: str | None = None
    stop_reason: Any = None


class Aggregator:
    """Collects one answer.

    Args:
        surface: chat or text completions.
        exclude_thinking: leave thinking text out.
        both_fields: give thinking under both names.
        wants_token_ids: the client asked for ids.
    """

    def __init__(
        self,
        surface: Surface,
        *,
        exclude_thinking: bool = False,
        both_fields: bool = False,
        wants_token_ids: bool = False,
    ) -> None:
        self._surface = surface
        self._exclude = exclude_thinking
        self._both = both_fields
        self._ids = wants_token_ids
        self._choices: dict[int, _Choice] = {}
        self._thinking_field = "reasoning"

    def add(self, deltas: Sequence[Delta]) -> None:
        """Take the next deltas."""
        for delta in deltas:
            if delta.usage is not None:
                continue
            choice = self._choices.setdefault(delta.index, _Choice())
            if delta.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = delta.finish_reason, delta.stop_reason
            if self._ids and delta.prompt_token_ids is not None:
                choice.prompt_token_ids = delta.prompt_token_ids
            # With hidden text go its ids and logprobs, which spell it.
            if not (self._exclude and delta.kind is Kind.THINKING):
                self._take(choice, delta)

    def _take(self, choice: _Choice, delta: Delta) -> None:
        if delta.kind is Kind.THINKING and b'"reasoning_content":' in delta.wire:
            self._thinking_field = "reasoning_content"
        if delta.text:
            (choice.thinking if delta.kind is Kind.THINKING else choice.answer).append(delta.text)
        if delta.tool_calls is not None:
            _merge_tool_calls(choice.tool_calls, _objects(delta.tool_calls))
        if delta.logprobs is not None:
            _merge_logprobs(choice.logprobs, _objects(delta.logprobs))
        if self._ids:
            choice.token_ids += delta.token_ids

    def body(self, answer_id: str, created: int, model: str, *, usage: bytes, extension: bytes) -> bytes:
        """The whole answer as JSON."""
        is_chat = self._surface == "chat"
        shape = self._chat_choice if is_chat else self._text_choice
        whole: dict[str, Any] = {
            "id": answer_id,
            "object": "chat.completion" if is_chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [shape(index, choice) for index, choice in sorted(self._choices.items())],
            "usage": msgspec.Raw(usage),
        }
        if self._ids and is_chat:  # all choices have one prompt; vLLM puts its ids here
            prompts = [c.prompt_token_ids for c in self._choices.values() if c.prompt_token_ids is not None]
            whole["prompt_token_ids"] = prompts[0] if prompts else None
        return msgspec.json.encode({**whole, "thinkgate": msgspec.Raw(extension)})

    def _chat_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        content = "".join(choice.answer)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if choice.tool_calls and not content else content,
        }
        thinking = "" if self._exclude else "".join(choice.thinking)
        if thinking:
            names = ("reasoning", "reasoning_content") if self._both else (self._thinking_field,)
            message.update(dict.fromkeys(names, thinking))
        if choice.tool_calls:
            message["tool_calls"] = [call for _, call in sorted(choice.tool_calls.items())]
        return self._with_end({"index": index, "message": message, "logprobs": choice.logprobs or None}, choice)

    def _text_choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        return self._with_end(
            {"index": index, "text": "".join(choice.answer), "logprobs": choice.logprobs or None}, choice
        )

    def _with_end(self, shaped: dict[str, Any], choice: _Choice) -> dict[str, Any]:
        shaped["finish_reason"] = choice.finish_reason
        if choice.stop_reason is not None:
            shaped["stop_reason"] = choice.stop_reason
        if self._ids:
            shaped["token_ids"] = choice.token_ids
            if self._surface == "completions":
                shaped["prompt_token_ids"] = choice.prompt_token_ids
        return shaped


def _objects(json: Any) -> Any:  # noqa: ANN401  # JSON is of any type
    return msgspec.json.decode(json) if isinstance(json, msgspec.Raw) else json


def _merge_tool_calls(known: dict[int, dict[str, Any]], parts: list[dict[str, Any]]) -> None:
    for part in parts:
        index = part.get("index", 0)
        call = known.setdefault(index, {"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call["id"] = part.get("id") or call["id"]
        function = part.get("function") or {}
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _merge_logprobs(known: dict[str, list[Any]], part: dict[str, Any]) -> None:
    """Concatenate list by list: `content` in chat, `tokens` and its companions in text completions."""
    for name, items in part.items():
        if isinstance(items, list):
            known.setdefault(name, []).extend(items)
