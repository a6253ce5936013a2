"""What each field of each dialect says about thinking, gathered without contradiction.

Owns: the meaning of every effort, budget, mode and visibility field, and which of them contradict each other.
Pure; O(fields). Does not own: the resolved `Ask` (resolve.py), the types of the fields (request.py).
Dialects: docs/api.md, "Requests".
"""

from __future__ import annotations

from typing import Any

from gateway.ask.request import AnthropicThinking, Common, Extension, GeminiThinking, Reasoning, Summary
from gateway.errors import InvalidRequest

LEAST_FIELD = "thinkgate.min_thinking_tokens"
# Arguments of the templating itself, not of a template.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        "chat_template",
        "conversation",
        "messages",
        "tools",
        "documents",
        "tokenize",
        "add_generation_prompt",
        "continue_final_message",
        "return_dict",
        "return_tensors",
        "return_assistant_tokens_mask",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
    }
)
NOT_BUILT = {
    "agentic": "agentic mode is not built yet: use instant or reasoning",
    "search": "search is not built yet: use reasoning, or n for several answers",
}


class Said:
    """What the fields said so far; each setter refuses what contradicts an earlier field.

    Attributes:
        on: thinking is switched on or off; None: nobody said.
        on_field: the first field that said so.
        tokens: the cap that is named, never 0; a negative number asks for the most that is allowed.
        tokens_field: the first field that named it.
        effort: effort word other than `none`.
        effort_field: the first field that named it.
        least: fewest thinking tokens.
        hidden: the thinking text is left out.
        summary: a summary takes the place of the thinking text.
        shown_field: the first field that said what is shown of the text.
    """

    __slots__ = (
        "effort",
        "effort_field",
        "hidden",
        "least",
        "on",
        "on_field",
        "shown_field",
        "summary",
        "tokens",
        "tokens_field",
    )

    def __init__(self) -> None:
        self.on: bool | None = None
        self.on_field = self.tokens_field = self.effort_field = self.shown_field = ""
        self.tokens: int | None = None
        self.effort: str | None = None
        self.least = 0
        self.hidden = False
        self.summary: Summary | None = None

    def think(self, field: str, on: bool) -> None:
        """Thinking is on or off."""
        if self.on is not None and self.on != on:
            raise contradiction(self.on_field, field)
        if self.on is None:
            self.on, self.on_field = on, field

    def cap(self, field: str, tokens: int) -> None:
        """At most so many thinking tokens; 0 is off."""
        self.think(field, tokens != 0)
        if tokens == 0:
            return
        if self.tokens is not None and self.tokens != tokens:
            raise contradiction(self.tokens_field, field)
        self.tokens, self.tokens_field = tokens, self.tokens_field or field

    def try_hard(self, field: str, effort: str) -> None:
        """An effort word; `none` is off."""
        self.think(field, effort != "none")
        if effort == "none":
            return
        if self.effort is not None and self.effort != effort:
            raise contradiction(self.effort_field, field)
        self.effort, self.effort_field = effort, self.effort_field or field

    def show(self, field: str, *, hidden: bool, summary: Summary | None = None) -> None:
        """What the client sees of the thinking text: all of it, nothing or a summary."""
        if self.shown_field and (self.hidden, self.summary) != (hidden, summary):
            raise contradiction(self.shown_field, field)
        self.hidden, self.summary, self.shown_field = hidden, summary, self.shown_field or field


def contradiction(first: str, second: str) -> InvalidRequest:
    """The error for two fields that cannot both be honoured."""
    return InvalidRequest(
        f"`{first}` and `{second}` contradict each other: send one of them.",
        param=second,
        code="contradictory_parameters",
    )


def hear_common(said: Said, fields: Common, suffix: str | None) -> None:
    """The fields of chat and text completions. Raises: InvalidRequest."""
    if suffix is not None:
        _hear_mode(said, "model", suffix)
    if fields.thinking_token_budget is not None:
        said.cap("thinking_token_budget", fields.thinking_token_budget)
    extension = fields.thinkgate
    if extension is None:
        return
    if extension.mode is not None:
        _hear_mode(said, "thinkgate.mode", extension.mode)
    if extension.thinking_tokens is not None:
        said.cap("thinkgate.thinking_tokens", extension.thinking_tokens)
    _refuse_not_built(extension)


def hear_dialects(said: Said, fields: Common, total: int | None, total_field: str) -> None:
    """What others than we call it. Raises: InvalidRequest."""
    if fields.reasoning_effort is not None:
        said.try_hard("reasoning_effort", fields.reasoning_effort)
    if fields.reasoning is not None:
        _hear_openrouter(said, fields.reasoning)
    if fields.thinking is not None:
        _hear_anthropic(said, fields.thinking, total, total_field)
    if fields.thinking_config is not None:
        _hear_gemini(said, fields.thinking_config)
    _hear_qwen(said, fields)
    if fields.include_reasoning is not None:
        said.show("include_reasoning", hidden=not fields.include_reasoning)


def hear_least(said: Said, extension: Extension) -> None:
    """The fewest thinking tokens. Goes last: it decides the mode only where no other field does."""
    least = extension.min_thinking_tokens
    if least:
        said.think(LEAST_FIELD, on=True)
        said.least = least


def _refuse_not_built(extension: Extension) -> None:
    if extension.search is not None:
        raise InvalidRequest(NOT_BUILT["search"].capitalize() + ".", param="thinkgate.search", code="not_built")


def _hear_mode(said: Said, field: str, mode: str) -> None:
    if mode in NOT_BUILT:
        raise InvalidRequest(f"`{field}`: {NOT_BUILT[mode]}.", param=field, code="not_built")
    if mode != "auto":
        said.think(field, mode == "reasoning")


def _hear_openrouter(said: Said, reasoning: Reasoning) -> None:
    if reasoning.effort is not None and reasoning.max_tokens is not None:
        raise contradiction("reasoning.effort", "reasoning.max_tokens")
    if reasoning.enabled is not None:
        said.think("reasoning.enabled", reasoning.enabled)
    if reasoning.effort is not None:
        said.try_hard("reasoning.effort", reasoning.effort)
    elif reasoning.max_tokens is not None:
        said.cap("reasoning.max_tokens", reasoning.max_tokens)
    elif reasoning.enabled and said.effort is None:
        said.effort, said.effort_field = "medium", "reasoning.enabled"
    if reasoning.exclude is not None:
        said.show("reasoning.exclude", hidden=reasoning.exclude)
    if reasoning.summary is not None:
        said.show("reasoning.summary", hidden=False, summary=reasoning.summary)


def _hear_anthropic(said: Said, thinking: AnthropicThinking, total: int | None, total_field: str) -> None:
    if thinking.type == "enabled" and thinking.budget_tokens == 0:
        said.cap("thinking.budget_tokens", 0)  # `type` cannot be left out: the number says what is meant
        return
    said.think("thinking.type", thinking.type == "enabled")
    if thinking.budget_tokens is None:
        return
    if thinking.type == "disabled":
        raise contradiction("thinking.type", "thinking.budget_tokens")
    said.cap("thinking.budget_tokens", thinking.budget_tokens)
    if total is not None and thinking.budget_tokens >= total:
        raise InvalidRequest(
            f"`thinking.budget_tokens` must be less than `{total_field}` ({total}).", param="thinking.budget_tokens"
        )


def _hear_gemini(said: Said, config: GeminiThinking) -> None:
    if config.thinking_budget is not None and config.thinking_budget >= 0:  # -1: dynamic, so auto
        said.cap("thinking_config.thinking_budget", config.thinking_budget)
    if config.include_thoughts is not None:
        said.show("thinking_config.include_thoughts", hidden=not config.include_thoughts)


def _hear_qwen(said: Said, fields: Common) -> None:
    if fields.enable_thinking is not None:
        said.think("enable_thinking", fields.enable_thinking)
    if fields.thinking_budget is not None:
        said.cap("thinking_budget", fields.thinking_budget)
    if fields.chat_template_kwargs is not None:
        _hear_template(said, fields.chat_template_kwargs)


def _hear_template(said: Said, kwargs: dict[str, Any]) -> None:
    for name in sorted(RESERVED_TEMPLATE_KWARGS.intersection(kwargs)):
        field = f"chat_template_kwargs.{name}"
        raise InvalidRequest(
            f"`{field}` is set by the gateway or its backend and cannot be taken from a client: leave it out.",
            param=field,
            code="unknown_parameter",
        )
    for name in ("enable_thinking", "thinking"):
        value = kwargs.get(name)
        if value is None:
            continue
        field = f"chat_template_kwargs.{name}"
        if not isinstance(value, bool):
            raise InvalidRequest(f"`{field}` must be true or false.", param=field, code="invalid_type")
        said.think(field, value)
