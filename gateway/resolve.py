"""Every dialect of effort and budget, resolved into one frozen `Ask`.

Owns: what each field says about thinking, and which fields contradict each other. Pure; O(fields).
Does not own: whether what is asked for fits or is allowed (serve.py, budget/cap.py).
Dialects: docs/api.md, "Requests".
"""

from __future__ import annotations

from typing import Literal

import msgspec

from budget.price import nano_usd
from gateway.errors import InvalidRequest
from gateway.request import ChatFields, Common, CompletionFields, Extension

UNCAPPED = -1
SUFFIXES = ("instant", "reasoning", "auto", "agentic", "search")
PRIORITY = {"priority": -1, "flex": 1}
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


class EnvelopeAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`thinkgate.envelope`: most tokens, nano-USD and seconds of the whole request."""

    tokens: int | None = None
    nano_usd: int | None = None
    seconds: float | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What this request wants, whatever dialect it spoke.

    Attributes:
        model: public name, suffix removed.
        mode: `auto` when nothing in the request decides it.
        mode_field: the field that decided `mode`; None for `auto`.
        thinking_tokens: explicit cap; UNCAPPED for the most that is allowed; None when no number is given.
        thinking_field: the field that gave it.
        effort: effort word, or None.
        effort_field: the field that gave it.
        total_max: most thinking and answer tokens together per choice, or None.
        total_field: the field that gave it.
        answer_floor: the request's own answer floor, or None.
        n: choices per prompt.
        prompts: prompts in the request; 1 for chat.
        stream: the client wants server-sent events.
        include_usage: the client wants the usage chunk.
        exclude_thinking: thinking text is left out of the response (and still charged).
        both_fields: thinking text goes out as `reasoning` and as `reasoning_content`; None: as configured.
        wants_token_ids: the client wants token ids itself.
        envelope: bounds of the whole request.
        tier: `service_tier` as asked, or None.
        priority: -1, 0 or 1; lower goes first.
        has_tools: the client brings tools.
    """

    model: str
    mode: Literal["auto", "instant", "reasoning"] = "auto"
    mode_field: str | None = None
    thinking_tokens: int | None = None
    thinking_field: str | None = None
    effort: str | None = None
    effort_field: str | None = None
    total_max: int | None = None
    total_field: str = "max_completion_tokens"
    answer_floor: int | None = None
    n: int = 1
    prompts: int = 1
    stream: bool = False
    include_usage: bool = False
    exclude_thinking: bool = False
    both_fields: bool | None = None
    wants_token_ids: bool = False
    envelope: EnvelopeAsk | None = None
    tier: str | None = None
    priority: int = 0
    has_tools: bool = False


class _Said:
    """What the fields said so far; each setter refuses what contradicts an earlier field."""

    __slots__ = ("effort", "effort_field", "exclude", "on", "on_field", "tokens", "tokens_field")

    def __init__(self) -> None:
        self.on: bool | None = None
        self.on_field = self.tokens_field = self.effort_field = ""
        self.tokens: int | None = None
        self.effort: str | None = None
        self.exclude: tuple[str, bool] | None = None

    def think(self, field: str, on: bool) -> None:
        if self.on is not None and self.on != on:
            raise _contradiction(self.on_field, field)
        if self.on is None:
            self.on, self.on_field = on, field

    def cap(self, field: str, tokens: int) -> None:
        self.think(field, tokens != 0)
        if tokens == 0:
            return
        if self.tokens is not None and self.tokens != tokens:
            raise _contradiction(self.tokens_field, field)
        self.tokens, self.tokens_field = tokens, self.tokens_field or field

    def try_hard(self, field: str, effort: str) -> None:
        self.think(field, effort != "none")
        if effort == "none":
            return
        if self.effort is not None and self.effort != effort:
            raise _contradiction(self.effort_field, field)
        self.effort, self.effort_field = effort, self.effort_field or field

    def hide(self, field: str, hidden: bool) -> None:
        if self.exclude is not None and self.exclude[1] != hidden:
            raise _contradiction(self.exclude[0], field)
        self.exclude = self.exclude or (field, hidden)


def _contradiction(first: str, second: str) -> InvalidRequest:
    return InvalidRequest(
        f"`{first}` and `{second}` contradict each other: send one of them.",
        param=second,
        code="contradictory_parameters",
    )


def split_suffix(name: str, known: object) -> tuple[str, str | None]:
    """`model:instant` as (`model`, `instant`); a configured name that ends like a suffix stays whole."""
    if ":" in name and name not in known:  # type: ignore[operator]  # any container of names
        stem, _, suffix = name.rpartition(":")
        if suffix in SUFFIXES:
            return stem, suffix
    return name, None


def resolve_chat(fields: ChatFields, model: str, suffix: str | None) -> Ask:
    """The `Ask` of a chat completion. Raises: InvalidRequest for contradictions and what is not built."""
    said = _Said()
    _hear_common(said, fields, suffix)
    if fields.reasoning_effort is not None:
        said.try_hard("reasoning_effort", fields.reasoning_effort)
    if fields.reasoning is not None:
        _hear_openrouter(said, fields)
    if fields.thinking is not None:
        _hear_anthropic(said, fields)
    if fields.thinking_config is not None:
        _hear_gemini(said, fields)
    _hear_qwen(said, fields)
    if fields.include_reasoning is not None:
        said.hide("include_reasoning", not fields.include_reasoning)
    total, total_field = _total(fields.max_tokens, fields.max_completion_tokens)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    return _ask(fields, model, said, total, total_field, has_tools=bool(fields.tools))


def resolve_completion(fields: CompletionFields, model: str, suffix: str | None) -> Ask:
    """The `Ask` of a text completion: a raw prompt has no thinking switch, so thinking is refused by name."""
    said = _Said()
    _hear_common(said, fields, suffix)
    if said.on or said.effort is not None:
        raise InvalidRequest(
            f"`{said.on_field}` asks for thinking, which a raw prompt cannot switch: use /v1/chat/completions.",
            param=said.on_field,
            code="unsupported_parameter",
        )
    if fields.best_of is not None and fields.best_of != (fields.n or 1):
        raise InvalidRequest("`best_of` must equal `n`; more candidates are not built yet.", param="best_of")
    ask = _ask(fields, model, said, fields.max_tokens, "max_tokens", has_tools=False)
    return msgspec.structs.replace(
        ask, mode="instant", mode_field=ask.mode_field or "prompt", prompts=prompt_count(fields.prompt)
    )


def prompt_count(prompt: str | list[str | int | list[int]]) -> int:
    """How many prompts a `prompt` field holds. Raises: InvalidRequest when it mixes kinds."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        kinds: set[type] = {str} if isinstance(prompt, str) else {type(item) for item in prompt}
        count = 1
    else:
        kinds, count = {type(item) for item in prompt}, len(prompt)
    if len(kinds) > 1:
        raise InvalidRequest("`prompt` mixes text, token ids and lists: send one kind.", param="prompt")
    return count


def _hear_common(said: _Said, fields: Common, suffix: str | None) -> None:
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


def _refuse_not_built(extension: Extension) -> None:
    if extension.search is not None:
        raise InvalidRequest(NOT_BUILT["search"].capitalize() + ".", param="thinkgate.search", code="not_built")
    if extension.plan not in {None, "off"}:
        raise InvalidRequest("Planning is not built yet: leave `plan` out.", param="thinkgate.plan", code="not_built")
    if extension.degrade not in (None, False, []):
        raise InvalidRequest(
            "The degrade ladder is not built yet: leave `degrade` out or false.",
            param="thinkgate.degrade",
            code="not_built",
        )


def _hear_mode(said: _Said, field: str, mode: str) -> None:
    if mode in NOT_BUILT:
        raise InvalidRequest(f"`{field}`: {NOT_BUILT[mode]}.", param=field, code="not_built")
    if mode != "auto":
        said.think(field, mode == "reasoning")


def _hear_openrouter(said: _Said, fields: ChatFields) -> None:
    reasoning = fields.reasoning
    assert reasoning is not None
    if reasoning.summary is not None:
        raise InvalidRequest(
            "Summaries of the thinking are not built yet: leave `summary` out, or set `exclude`.",
            param="reasoning.summary",
            code="not_built",
        )
    if reasoning.effort is not None and reasoning.max_tokens is not None:
        raise _contradiction("reasoning.effort", "reasoning.max_tokens")
    if reasoning.enabled is not None:
        said.think("reasoning.enabled", reasoning.enabled)
    if reasoning.effort is not None:
        said.try_hard("reasoning.effort", reasoning.effort)
    elif reasoning.max_tokens is not None:
        said.cap("reasoning.max_tokens", reasoning.max_tokens)
    elif reasoning.enabled and said.effort is None:
        said.effort, said.effort_field = "medium", "reasoning.enabled"
    if reasoning.exclude is not None:
        said.hide("reasoning.exclude", reasoning.exclude)


def _hear_anthropic(said: _Said, fields: ChatFields) -> None:
    thinking = fields.thinking
    assert thinking is not None
    if thinking.type == "enabled" and thinking.budget_tokens == 0:
        said.cap("thinking.budget_tokens", 0)  # `type` cannot be left out: the number says what is meant
        return
    said.think("thinking.type", thinking.type == "enabled")
    if thinking.budget_tokens is None:
        return
    if thinking.type == "disabled":
        raise _contradiction("thinking.type", "thinking.budget_tokens")
    said.cap("thinking.budget_tokens", thinking.budget_tokens)
    total, total_field = _total(fields.max_tokens, fields.max_completion_tokens)
    if total is not None and thinking.budget_tokens >= total:
        raise InvalidRequest(
            f"`thinking.budget_tokens` must be less than `{total_field}` ({total}).", param="thinking.budget_tokens"
        )


def _hear_gemini(said: _Said, fields: ChatFields) -> None:
    config = fields.thinking_config
    assert config is not None
    if config.thinking_budget is not None and config.thinking_budget != UNCAPPED:  # -1: dynamic, so auto
        said.cap("thinking_config.thinking_budget", config.thinking_budget)
    if config.include_thoughts is not None:
        said.hide("thinking_config.include_thoughts", not config.include_thoughts)


def _hear_qwen(said: _Said, fields: ChatFields) -> None:
    if fields.enable_thinking is not None:
        said.think("enable_thinking", fields.enable_thinking)
    if fields.thinking_budget is not None:
        said.cap("thinking_budget", fields.thinking_budget)
    kwargs = fields.chat_template_kwargs or {}
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


def _total(max_tokens: int | None, max_completion_tokens: int | None) -> tuple[int | None, str]:
    if max_completion_tokens is None:
        return max_tokens, "max_tokens"
    if max_tokens is not None and max_tokens != max_completion_tokens:
        raise _contradiction("max_tokens", "max_completion_tokens")
    return max_completion_tokens, "max_completion_tokens"


def _ask(fields: Common, model: str, said: _Said, total: int | None, total_field: str, *, has_tools: bool) -> Ask:
    options, extension = fields.stream_options, fields.thinkgate
    stream = bool(fields.stream)
    if options is not None:
        _check_stream_options(fields, stream)
    return Ask(
        model=model,
        mode="auto" if said.on is None else ("reasoning" if said.on else "instant"),
        mode_field=said.on_field or None,
        thinking_tokens=said.tokens,
        thinking_field=said.tokens_field or None,
        effort=said.effort,
        effort_field=said.effort_field or None,
        total_max=total,
        total_field=total_field,
        answer_floor=None if extension is None else extension.answer_tokens_min,
        n=fields.n or 1,
        stream=stream,
        include_usage=options is not None and bool(options.include_usage),
        exclude_thinking=said.exclude is not None and said.exclude[1],
        both_fields=None
        if extension is None or extension.reasoning_field is None
        else extension.reasoning_field == "both",
        wants_token_ids=bool(fields.return_token_ids),
        envelope=None if extension is None else _envelope(extension),
        tier=fields.service_tier,
        priority=PRIORITY.get(fields.service_tier or "", 0),
        has_tools=has_tools,
    )


def _check_stream_options(fields: Common, stream: bool) -> None:
    options = fields.stream_options
    assert options is not None
    if not stream:
        raise InvalidRequest("`stream_options` needs `stream: true`.", param="stream_options")
    for name in ("include_obfuscation", "continuous_usage_stats"):
        if getattr(options, name):
            raise InvalidRequest(
                f"`stream_options.{name}` is not supported: leave it out.",
                param=f"stream_options.{name}",
                code="unsupported_parameter",
            )


def _envelope(extension: Extension) -> EnvelopeAsk | None:
    bounds = extension.envelope
    if bounds is None:
        return None
    return EnvelopeAsk(
        tokens=bounds.tokens,
        nano_usd=None if bounds.usd is None else nano_usd(bounds.usd),
        seconds=bounds.seconds,
    )
