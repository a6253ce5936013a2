"""Bytes to a request: parsed once, known fields checked, unknown fields left as the bytes they came in.

Owns: JSON limits, the types and ranges of known fields, and the fields no client may set. Does not own:
what the fields mean together (resolve.py). O(body bytes).

Every top-level field is kept as raw JSON beside the typed view, and what goes upstream is built from
those: nested text stays byte-identical, and a key that stands twice cannot mean two things.
"""

from __future__ import annotations

import re
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Raw, Struct

from gateway.ask.complaint import invalid_field
from gateway.errors import InvalidRequest

T = TypeVar("T")
MAX_DEPTH = 100
MAX_STOP = 16
# Possessive, and content with a string that never ends: linear in the body, whatever it holds.
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}

Count = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Budget = Annotated[int, Meta(ge=-1, le=2**31 - 1)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Summary = Literal["auto", "concise", "detailed"]
RequestMode = Literal["auto", "instant", "reasoning", "agentic", "search"]

GATEWAY_OWNED = frozenset(
    {
        "cache_salt",
        "priority",
        "request_id",
        "session_id",
        "kv_transfer_params",
        "ec_transfer_params",
        "vllm_xargs",
        "stream_interval",
        "chat_template",
        "use_beam_search",
        "prompt_embeds",
    }
)


class StreamOptions(Struct):
    """`stream_options`."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class Reasoning(Struct, forbid_unknown_fields=True):
    """OpenRouter's `reasoning`, and the one of OpenAI's Responses API."""

    effort: Effort | None = None
    max_tokens: Count | None = None
    exclude: bool | None = None
    enabled: bool | None = None
    summary: Summary | None = None


class AnthropicThinking(Struct, forbid_unknown_fields=True):
    """Anthropic's `thinking`."""

    type: Literal["enabled", "disabled"]
    budget_tokens: Count | None = None


class GeminiThinking(Struct, forbid_unknown_fields=True):
    """Gemini's `thinking_config`."""

    thinking_budget: Budget | None = None
    include_thoughts: bool | None = None


class EnvelopeFields(Struct, forbid_unknown_fields=True):
    """`thinkgate.envelope`."""

    tokens: Positive | None = None
    usd: Annotated[float, Meta(gt=0, le=1e9)] | None = None
    seconds: Annotated[float, Meta(gt=0, le=1e6)] | None = None


class Extension(Struct, forbid_unknown_fields=True):
    """Our own `thinkgate` object."""

    mode: RequestMode | None = None
    thinking_tokens: Count | None = None
    min_thinking_tokens: Count | None = None
    answer_tokens_min: Count | None = None
    stop_in_thinking: bool | None = None
    envelope: EnvelopeFields | None = None
    plan: Literal["off", "auto", "on"] | None = None
    search: dict[str, Any] | None = None
    degrade: bool | list[Literal["cap", "effort", "instant", "model"]] | None = None
    reasoning_field: Literal["upstream", "both"] | None = None


class FunctionTool(Struct):
    """The inside of a tool."""

    name: Annotated[str, Meta(min_length=1)]


class Tool(Struct):
    """One entry of `tools`."""

    type: Literal["function"]
    function: FunctionTool


class MediaUrl(Struct):
    """Where a picture, sound or film is."""

    url: str


class Part(Struct):
    """One part of a message's content."""

    type: str
    text: str | None = None
    image_url: MediaUrl | str | None = None
    audio_url: MediaUrl | str | None = None
    video_url: MediaUrl | str | None = None


class Message(Struct):
    """One message; whatever else it holds rides along as it came."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None


class Common(Struct, kw_only=True):
    """Fields of chat and text completions."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Positive | None = None
    max_tokens: Positive | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=1000)] | None = None
    logit_bias: dict[str, Annotated[float, Meta(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOP)] | None = None
    stop_token_ids: list[TokenId] | None = None
    user: str | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    return_token_ids: bool | None = None
    thinking_token_budget: Budget | None = None
    reasoning_effort: Effort | None = None
    reasoning: Reasoning | None = None
    thinking: AnthropicThinking | None = None
    thinking_config: GeminiThinking | None = None
    enable_thinking: bool | None = None
    thinking_budget: Budget | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    include_reasoning: bool | None = None
    thinkgate: Extension | None = None


Messages = Annotated[list[Message], Meta(min_length=1)]


class ChatFields(Common, kw_only=True):
    """What the gateway reads of a chat completion request."""

    messages: Messages
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None


class CompletionFields(Common, kw_only=True):
    """What the gateway reads of a text completion request."""

    prompt: str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    best_of: Positive | None = None
    echo: bool | None = None


class EmbeddingFields(Struct, kw_only=True):
    """What the gateway reads of an embedding request."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    input: Annotated[str, Meta(min_length=1)] | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    user: str | None = None


RawFields = dict[str, Raw]
_raw_decoder = msgspec.json.Decoder(RawFields)


def check_json(body: bytes) -> RawFields:
    """Split a body into its top-level fields.

    Raises: InvalidRequest for anything but one JSON object of UTF-8 text, nested at most MAX_DEPTH deep.
    """
    check_text(body)
    try:
        return _raw_decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json") from exc
    except msgspec.DecodeError as exc:
        raise InvalidRequest(f"The body is not valid JSON: {exc}.", code="invalid_json") from exc


def check_text(body: bytes) -> None:
    """Raises: InvalidRequest for what is no UTF-8 text, or nested too deep."""
    # Splitting finds brackets many times faster than counting, and stops at so many.
    pieces = len(body.split(b"[", MAX_DEPTH + 1)) + len(body.split(b"{", MAX_DEPTH + 1))
    if pieces - 2 > MAX_DEPTH and _depth(body) > MAX_DEPTH:
        raise InvalidRequest(f"The body is nested deeper than {MAX_DEPTH} levels.", code="nested_too_deep")
    try:
        str(body, "utf-8")
    except UnicodeDecodeError as exc:
        raise InvalidRequest("The body is not UTF-8 text.", code="invalid_json") from exc


def _depth(body: bytes) -> int:
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    return max(accumulate(map(_STEP.__getitem__, brackets)), default=0)


def decode_fields(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """The typed view of a body that `check_json` accepted. Raises: InvalidRequest naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        raise invalid_field(str(exc), decoder.type) from exc
    except (msgspec.DecodeError, RecursionError) as exc:
        raise InvalidRequest(f"The body is not valid JSON: {exc}.", code="invalid_json") from exc


def refuse_gateway_fields(fields: RawFields) -> None:
    """Raises: InvalidRequest for a field that belongs to the gateway, whatever its value."""
    if owned := GATEWAY_OWNED.intersection(fields):
        name = min(owned)
        raise InvalidRequest(
            f"`{name}` is set by the gateway and cannot be taken from a client: leave it out.",
            param=name,
            code="unknown_parameter",
        )


_messages_decoder = msgspec.json.Decoder(Messages)
_chat_decoder = msgspec.json.Decoder(ChatFields)
_completion_decoder = msgspec.json.Decoder(CompletionFields)
_embedding_decoder = msgspec.json.Decoder(EmbeddingFields)


def parse_chat(body: bytes) -> tuple[ChatFields, RawFields]:
    """A chat completion request. Raises: InvalidRequest."""
    fields = check_json(body)
    refuse_gateway_fields(fields)
    return decode_fields(body, _chat_decoder), fields


def parse_messages(text: bytes) -> list[Message] | None:
    """The value of `messages` alone; None for anything that `parse_chat` would refuse there."""
    try:
        return _messages_decoder.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return None


def parse_completion(body: bytes) -> tuple[CompletionFields, RawFields]:
    """A text completion request. Raises: InvalidRequest."""
    fields = check_json(body)
    refuse_gateway_fields(fields)
    return decode_fields(body, _completion_decoder), fields


def parse_embedding(body: bytes) -> tuple[EmbeddingFields, RawFields]:
    """An embedding request. Raises: InvalidRequest."""
    fields = check_json(body)
    refuse_gateway_fields(fields)
    return decode_fields(body, _embedding_decoder), fields
