"""The client's fields for the embedded engine: checked, typed, and none of them ignored.

Owns: which fields the engine honours, which it refuses by name, and which change nothing by their own
definition. Does not own: what needs the model, such as vocabulary and context window (kernels/compose.py).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from gateway.backends.port import refuse_field
from gateway.errors import InvalidRequest
from kernels.params import (
    ChatInput,
    CompletionInput,
    Options,
    Sampling,
    Stopping,
    ThinkingRules,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.backends.port import Call, Segment

# Fields of the call itself, which the gateway may leave among the client's.
CONSUMED = frozenset({"model", "n", "return_token_ids", "stream", "stream_options"})

# Fields that by definition change nothing about what is generated.
NO_EFFECT = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "user"}
)

# Fields we know and cannot honour, with the values that ask for nothing, and what to do instead.
REFUSED: Mapping[str, tuple[tuple[bytes, ...], str]] = {
    "add_generation_prompt": ((b"true",), "the prompt always ends where the answer begins"),
    "allowed_token_ids": ((), "use `logit_bias`"),
    "audio": ((), "this model writes text only"),
    "bad_words": ((b"[]",), "use `logit_bias`"),
    "best_of": ((b"1",), "use `n` and choose yourself"),
    "continue_final_message": ((b"false",), "send the text as a prompt to /v1/completions"),
    "detokenize": ((b"true",), "leave it out"),
    "documents": ((b"[]",), "put the documents into a message"),
    "echo": ((b"false",), "the prompt is yours already"),
    "function_call": ((), "use `tool_choice`"),
    "functions": ((b"[]",), "use `tools`"),
    "length_penalty": ((b"1", b"1.0"), "leave it out"),
    "logprob_token_ids": ((), "use `top_logprobs`"),
    "modalities": ((b'["text"]',), "this model writes text only"),
    "prediction": ((), "leave it out"),
    "prompt_logprobs": ((), "ask for `logprobs` of the answer"),
    "return_tokens_as_token_ids": ((b"false",), "use `return_token_ids`"),
    "spaces_between_special_tokens": ((b"true",), "leave it out"),
    "store": ((b"false",), "nothing is stored here"),
    "suffix": ((b'""',), "leave it out"),
    "truncate_prompt_tokens": ((), "shorten the prompt yourself"),
    "use_beam_search": ((b"false",), "use `n` with a temperature"),
    "verbosity": ((), "say it in a message"),
    "web_search_options": ((), "leave it out"),
}

# Sampling fields that are handed on as they come.
SAMPLING = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "seed",
)

_Fields = TypeVar("_Fields", bound="_Common")
_Penalty = Annotated[float, Meta(ge=-2, le=2)] | None
_JsonObject = dict[str, Any]


class _StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's field; of its kinds the engine knows these."""

    json: _JsonObject | str | None = None
    json_object: bool | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1)] | None = None
    regex: str | None = None


class _Common(msgspec.Struct, kw_only=True):
    """What chat and completions share. None is what clients send for "not set"."""

    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: _Penalty = None
    frequency_penalty: _Penalty = None
    # Beyond these, dividing a logit overflows.
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    logit_bias: dict[int, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[Annotated[str, Meta(min_length=1)]] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    response_format: _JsonObject | None = None
    structured_outputs: _StructuredOutputs | None = None
    cache_salt: Annotated[str, Meta(min_length=1)] | None = None


class _Function(msgspec.Struct):
    name: Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: _JsonObject | None = None
    strict: bool | None = None


class _Tool(msgspec.Struct):
    type: Literal["function"]
    function: _Function


class _FunctionName(msgspec.Struct):
    name: str


class _NamedChoice(msgspec.Struct):
    type: Literal["function"]
    function: _FunctionName


class _Chat(_Common, kw_only=True):
    messages: list[_JsonObject]
    tools: list[_Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | _NamedChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: _JsonObject | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class _Completion(_Common, kw_only=True):
    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    add_special_tokens: bool | None = None


class _Segment(_Common, kw_only=True):
    """A segment has its prompt and its logprobs beside the fields."""


def read_call(call: Call, defaults: Mapping[str, Any]) -> tuple[ChatInput | CompletionInput, Options]:
    """What the engine is asked.

    Args:
        call: from the gateway.
        defaults: the model's own sampling values, for what the client did not set.

    Raises: InvalidRequest naming the field.
    """
    if call.surface == "chat":
        chat = _decode(call.fields, _Chat)
        if chat.top_logprobs and not chat.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        logprobs = (chat.top_logprobs or 0) if chat.logprobs else None
        return _chat_input(chat), _options(call, chat, defaults, logprobs)
    fields = _decode(call.fields, _Completion)
    given = CompletionInput(
        prompts=_prompts(fields),
        add_special_tokens=fields.add_special_tokens is not False,
        **_format(fields),
    )
    return given, _options(call, fields, defaults, fields.logprobs)


def read_segment(call: Call, segment: Segment, defaults: Mapping[str, Any]) -> tuple[CompletionInput, Options]:
    """What the engine is asked to go on with; nothing watches for thinking.

    Args:
        call: whose segment it is; only its id and priority count.
        segment: ids, limits and fields. What its fields say about stopping comes on top.
        defaults: as in `read_call`.

    Raises: InvalidRequest naming the field.
    """
    if segment.max_tokens < 1:
        raise InvalidRequest("`max_tokens` must be at least 1.", param="max_tokens")
    fields = _decode(segment.fields, _Segment)
    options = _options(call, fields, defaults, segment.top_logprobs)
    asked = options.stopping
    stopping = replace(
        asked,
        max_tokens=segment.max_tokens,
        strings=(*segment.stop, *asked.strings),
        token_ids=asked.token_ids.union(segment.stop_token_ids),
        include=True,
        silent_ids=frozenset(segment.stop_token_ids).union(() if asked.include else asked.token_ids),
    )
    given = CompletionInput(prompts=(tuple(segment.prompt),), **_format(fields))
    return given, replace(options, n=1, stopping=stopping, thinking=ThinkingRules(native=False))


def _decode(given: Mapping[str, msgspec.Raw], struct: type[_Fields]) -> _Fields:
    """The fields, typed. Raises: InvalidRequest."""
    _refuse(given, struct)
    known = {name: raw for name, raw in given.items() if name in struct.__struct_fields__}
    try:
        return msgspec.json.decode(msgspec.json.encode(known), type=struct)
    except msgspec.ValidationError as exc:
        raise _as_invalid(exc) from exc


def _refuse(fields: Mapping[str, msgspec.Raw], struct: type[_Common]) -> None:
    """Raises: InvalidRequest for the first field that would be ignored."""
    for name, raw in fields.items():
        if name in struct.__struct_fields__ or name in CONSUMED or name in NO_EFFECT:
            continue
        value = bytes(raw).strip()
        if value == b"null":
            continue
        if name not in REFUSED:
            message = f"`{name}` is not known to this model's embedded backend: leave it out."
            raise InvalidRequest(message, param=name, code="unknown_parameter")
        harmless, instead = REFUSED[name]
        if value not in harmless:
            raise refuse_field(name, "embedded", instead)


def _as_invalid(exc: msgspec.ValidationError) -> InvalidRequest:
    """The decoder's complaint, naming the field as api.md does."""
    text = str(exc)
    path = re.search(r"`\$\.?([^`]*)`$", text) or re.search(r"field `([^`]*)`", text)
    param = path[1].replace("[...]", "[]") if path else None
    reason = text.partition(" - at ")[0]
    return InvalidRequest(f"`{param}`: {reason}.", param=param)


def _options(call: Call, fields: _Common, defaults: Mapping[str, Any], logprobs: int | None) -> Options:
    asked = {name: value for name in SAMPLING if (value := getattr(fields, name)) is not None}
    if fields.top_k is not None:
        # vLLM: both -1 and 0 mean all tokens.
        asked["top_k"] = fields.top_k if fields.top_k > 0 else None
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if "" in stops:
        raise InvalidRequest("`stop` must not hold an empty string.", param="stop")
    thinking = call.thinking
    return Options(
        request_id=call.request_id,
        n=call.n,
        priority=call.priority,
        skip_special_tokens=fields.skip_special_tokens is not False,
        cache_salt=fields.cache_salt,
        sampling=Sampling(**{**defaults, **asked, "logprobs": logprobs}),
        stopping=Stopping(
            max_tokens=call.max_tokens,
            min_tokens=fields.min_tokens or 0,
            ignore_eos=bool(fields.ignore_eos),
            strings=tuple(stops),
            token_ids=frozenset(fields.stop_token_ids or ()),
            include=bool(fields.include_stop_str_in_output),
        ),
        thinking=ThinkingRules(
            enabled=thinking.enabled,
            cap=thinking.cap,
            start=thinking.start,
            end=thinking.end,
            wrap_up=thinking.wrap_up,
            native=thinking.native,
        ),
    )


def _chat_input(fields: _Chat) -> ChatInput:
    choice = fields.tool_choice
    tools = [{"type": "function", "function": _function(tool.function)} for tool in fields.tools or ()]
    names = [tool.function.name for tool in fields.tools or ()]
    if len(set(names)) != len(names):
        raise InvalidRequest("`tools` holds two functions of the same name.", param="tools")
    return ChatInput(
        messages=fields.messages,
        tools=tools,
        tool_choice=(choice.function.name,) if isinstance(choice, _NamedChoice) else choice or "auto",
        parallel_tool_calls=fields.parallel_tool_calls is not False,
        template_kwargs=fields.chat_template_kwargs or {},
        **_format(fields),
    )


def _function(function: _Function) -> _JsonObject:
    """The definition as the client wrote it, without what it left out."""
    return {key: value for key, value in msgspec.structs.asdict(function).items() if value is not None}


def _prompts(fields: _Completion) -> tuple[str | tuple[int, ...], ...]:
    """One prompt or several, each text or token ids."""
    prompt = fields.prompt
    if isinstance(prompt, str):
        return (prompt,)
    if prompt and all(isinstance(each, int) for each in prompt):
        return (tuple(each for each in prompt if isinstance(each, int)),)
    prompts = tuple(tuple(each) if isinstance(each, list) else each for each in prompt)
    texts = tuple(each for each in prompts if not isinstance(each, int))
    if not prompts or len(texts) < len(prompts):
        raise InvalidRequest("`prompt` must be text, token ids, or a list of either.", param="prompt")
    return texts


def _format(fields: _Common) -> _JsonObject:
    """What the answer has to be, as the attributes of an AnswerFormat."""
    asked = fields.structured_outputs
    schema = _schema(fields.response_format)
    if asked is None:
        return {"response_schema": schema}
    param = "structured_outputs"
    if schema is not None:
        message = f"`response_format` and `{param}` contradict each other: send one of them."
        raise InvalidRequest(message, param=param)
    given = [name for name, value in msgspec.structs.asdict(asked).items() if value not in (None, False)]
    if len(given) != 1:
        message = f"`{param}` must hold exactly one of json, json_object, choice, regex."
        raise InvalidRequest(message, param=param)
    return {
        "response_schema": {"type": "object"} if asked.json_object else _parsed(asked.json),
        "response_choices": tuple(asked.choice or ()),
        "response_regex": asked.regex,
        "response_param": f"{param}.{given[0]}",
    }


def _parsed(schema: _JsonObject | str | None) -> _JsonObject | None:
    """A JSON Schema that may come as text."""
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema, type=_JsonObject)
    except msgspec.DecodeError as exc:
        param = "structured_outputs.json"
        raise InvalidRequest(f"`{param}` is not a JSON object.", param=param) from exc


def _schema(response_format: _JsonObject | None) -> _JsonObject | None:
    """The JSON Schema of the answer; None for free text."""
    kind = response_format.get("type") if response_format is not None else "text"
    if response_format is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind != "json_schema":
        message = f"`response_format.type` {kind!r} is not one of text, json_object, json_schema."
        raise InvalidRequest(message, param="response_format")
    schema = response_format.get("json_schema")
    schema = schema.get("schema") if isinstance(schema, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest("`response_format.json_schema.schema` must be an object.", param="response_format")
    return schema
