"""Every dialect of effort and budget, resolved into one frozen `Ask`.

Owns: `Ask`, and how a whole request becomes one. Pure; O(fields). Does not own: what each field says about
thinking (dialects.py), whether what is asked for fits or is allowed (prepare.py, caps.py).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from budget.degrade import STEPS, Step
from budget.price import nano_usd
from gateway.ask.dialects import LEAST_FIELD, Said, contradiction, hear_common, hear_dialects, hear_least
from gateway.ask.request import ChatFields, Common, CompletionFields, Extension, Summary
from gateway.errors import InvalidRequest

UNCAPPED = -1
SUFFIXES = ("instant", "reasoning", "auto", "agentic", "search")
PRIORITY = {"priority": -1, "flex": 1}


class EnvelopeAsk(msgspec.Struct, frozen=True, kw_only=True):
    """`thinkgate.envelope`: most tokens, nano-USD and seconds of the whole request."""

    tokens: int | None = None
    nano_usd: int | None = None
    seconds: float | None = None


class Ask(msgspec.Struct, frozen=True, kw_only=True):
    """What this request wants, whatever dialect it spoke.

    Attributes:
        model: public name, suffix removed; once it is decided, the model that the name stands for.
        named: the public name of several models that it was; None for one of its own.
        mode: `auto` when nothing in the request decides it.
        mode_field: the field that decided `mode`; None for `auto`.
        thinking_tokens: explicit cap; UNCAPPED for the most that is allowed; None when no number is given.
        thinking_field: the field that gave it.
        stop_in_thinking: `stop` is looked for in the thinking, too.
        min_thinking: fewest thinking tokens per choice (`thinkgate.min_thinking_tokens`), at most an explicit
            cap and less than the total; thinking that ends earlier is continued. 0: it ends where it ends.
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
        summary: how long a summary shall be that takes the place of the thinking text; None: none does.
        both_fields: thinking text goes out as `reasoning` and as `reasoning_content`; None: as configured.
        wants_token_ids: the client wants token ids itself.
        envelope: bounds of the whole request.
        tier: `service_tier` as asked, or None.
        priority: -1, 0 or 1; lower goes first.
        has_tools: the client brings tools.
        forces_call: one of them must be called.
        degrade: steps down the ladder that it agrees to; None: all that its key allows.
        plan: whether its thinking is planned; None: as configured.
    """

    model: str
    mode: Literal["auto", "instant", "reasoning"] = "auto"
    mode_field: str | None = None
    thinking_tokens: int | None = None
    thinking_field: str | None = None
    min_thinking: int = 0
    stop_in_thinking: bool = False
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
    summary: Summary | None = None
    both_fields: bool | None = None
    wants_token_ids: bool = False
    envelope: EnvelopeAsk | None = None
    tier: str | None = None
    priority: int = 0
    has_tools: bool = False
    forces_call: bool = False
    degrade: tuple[Step, ...] | None = None
    plan: Literal["off", "auto", "on"] | None = None
    named: str | None = None


def split_suffix(name: str, known: object) -> tuple[str, str | None]:
    """`model:instant` as (`model`, `instant`); a configured name that ends like a suffix stays whole."""
    if ":" in name and name not in known:  # type: ignore[operator]  # any container of names
        stem, _, suffix = name.rpartition(":")
        if suffix in SUFFIXES:
            return stem, suffix
    return name, None


def resolve_chat(fields: ChatFields, model: str, suffix: str | None) -> Ask:
    """The `Ask` of a chat completion. Raises: InvalidRequest for contradictions and what is not built."""
    said = Said()
    total, total_field = _total(fields.max_tokens, fields.max_completion_tokens)
    hear_common(said, fields, suffix)
    hear_dialects(said, fields, total, total_field)
    if fields.thinkgate is not None:
        hear_least(said, fields.thinkgate)
        if said.least:
            _check_least(said, total, total_field)
    if said.summary is not None and said.on is False:
        raise contradiction(said.on_field, said.shown_field)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    ask = _ask(fields, model, said, total, total_field, has_tools=bool(fields.tools))
    forces_call = isinstance(fields.tool_choice, dict) or fields.tool_choice == "required"
    return msgspec.structs.replace(ask, forces_call=True) if forces_call else ask


def resolve_completion(fields: CompletionFields, model: str, suffix: str | None) -> Ask:
    """The `Ask` of a text completion: a raw prompt has no thinking switch, so thinking is refused by name."""
    said = Said()
    hear_common(said, fields, suffix)
    hear_dialects(said, fields, fields.max_tokens, "max_tokens")
    if fields.thinkgate is not None:
        hear_least(said, fields.thinkgate)
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


def _total(max_tokens: int | None, max_completion_tokens: int | None) -> tuple[int | None, str]:
    if max_completion_tokens is None:
        return max_tokens, "max_tokens"
    if max_tokens is not None and max_tokens != max_completion_tokens:
        raise contradiction("max_tokens", "max_completion_tokens")
    return max_completion_tokens, "max_completion_tokens"


def _check_least(said: Said, total: int | None, total_field: str) -> None:
    """Raises: InvalidRequest when no thinking can be as long as the request's own least."""
    if said.tokens is not None and UNCAPPED != said.tokens < said.least:
        limit = f"at most `{said.tokens_field}` ({said.tokens})"
    elif total is not None and said.least >= total:
        limit = f"less than `{total_field}` ({total})"
    else:
        return
    raise InvalidRequest(
        f"`{LEAST_FIELD}` ({said.least}) must be {limit}.", param=LEAST_FIELD, code="contradictory_parameters"
    )


def _ask(fields: Common, model: str, said: Said, total: int | None, total_field: str, *, has_tools: bool) -> Ask:
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
        min_thinking=said.least,
        stop_in_thinking=extension is not None and extension.stop_in_thinking is True,
        effort=said.effort,
        effort_field=said.effort_field or None,
        total_max=total,
        total_field=total_field,
        answer_floor=None if extension is None else extension.answer_tokens_min,
        n=fields.n or 1,
        stream=stream,
        include_usage=options is not None and bool(options.include_usage),
        exclude_thinking=said.hidden,
        summary=said.summary,
        both_fields=None
        if extension is None or extension.reasoning_field is None
        else extension.reasoning_field == "both",
        wants_token_ids=bool(fields.return_token_ids),
        envelope=None if extension is None else _envelope(extension),
        tier=fields.service_tier,
        priority=PRIORITY.get(fields.service_tier or "", 0),
        has_tools=has_tools,
        degrade=None if extension is None else _degrade(extension.degrade),
        plan=None if extension is None else extension.plan,
    )


def _degrade(asked: bool | list[Literal["cap", "effort", "instant", "model"]] | None) -> tuple[Step, ...] | None:
    if asked is None or asked is True:
        return None
    return () if asked is False else tuple(step for step in STEPS if step in asked)


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
