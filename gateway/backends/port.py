"""The port that every backend stands behind: one call in, deltas out.

Owns: the vocabulary between `gateway/modes` and a backend. A backend translates `Call` into its own
wire (HTTP for vLLM and OpenAI-compatible servers, a queue for the embedded engine) and yields
`Delta`s, several at a time when several arrived together.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Literal, Protocol

import msgspec

from budget.chain import Forcing
from gateway.errors import InvalidRequest

Surface = Literal["chat", "completions"]


class Kind(IntEnum):
    """What the tokens of a delta are; see docs/api.md, "Counting"."""

    ANSWER = 0
    THINKING = 1
    INJECTED = 2


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """How one call may think.

    Attributes:
        enabled: False in instant mode: the template's no-think switch is in `Call.fields` already.
        cap: most thinking tokens per choice; None for no cap; 0 whenever not `enabled`.
        start: opening marker, as text.
        end: closing marker, as text.
        wrap_up: forced before `end` when the cap ends the thinking, where the backend can.
        native: the model thinks by itself; False: the chain has to be prefilled with `start`.
        answer_floor: tokens kept back for the answer.
        min_tokens: thinking that ends earlier is made to go on, where ids allow that.
    """

    enabled: bool
    cap: int | None
    start: str = "<think>"
    end: str = "</think>"
    wrap_up: str = ""
    native: bool = True
    answer_floor: int = 0
    min_tokens: int = 0


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One model call, all dialects resolved.

    Attributes:
        surface: `chat` has `messages` in `fields`, `completions` has `prompt`.
        request_id: for logs and engines; unique per client request.
        model: the name at the backend.
        fields: the client's top-level fields as JSON, checked, without those the gateway consumed
            (model, stream, stream_options, limits, every thinking dialect); chat_template_kwargs
            are final.
        thinking: what `budget` allows.
        max_tokens: most output tokens per choice, thinking, markers and answer together.
        n: choices.
        priority: lower goes first, 0 is the default class.
        is_live: somebody reads along; False: deltas may come in larger pieces.
        wants_token_ids: the client itself asked for `return_token_ids`.
        trace_headers: W3C trace context to forward.
    """

    surface: Surface
    request_id: str
    model: str
    fields: Mapping[str, msgspec.Raw]
    thinking: Thinking
    max_tokens: int
    n: int = 1
    priority: int = 0
    is_live: bool = True
    wants_token_ids: bool = False
    trace_headers: tuple[tuple[bytes, bytes], ...] = ()


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of one choice: the model goes on from exact token ids (two-phase enforcement).

    Attributes:
        prompt: token ids the model reads: the rendered prompt and everything that came after it.
        max_tokens: most tokens to sample.
        fields: sampling fields of the completions API as JSON; `seed` is this choice's own.
        stop_token_ids: sampling one of these ends the segment; it is the last of its token ids.
        stop: texts that end it, included in its text.
        top_logprobs: alternatives per token to report, 0 for none but the sampled one; None: no logprobs.
    """

    prompt: Sequence[int]
    max_tokens: int
    fields: Mapping[str, msgspec.Raw]
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


class Usage(msgspec.Struct, kw_only=True):
    """What the backend itself says it processed.

    Attributes:
        prompt_tokens: the prompt once, cached part included.
        completion_tokens: all choices together.
        cached_tokens: part of `prompt_tokens`; None if the backend does not say.
        reasoning_tokens: None if the backend does not say.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class Delta(msgspec.Struct):
    """What arrived for one choice.

    Attributes:
        index: the choice.
        kind: of `text`. A delta never mixes thinking with answer in `text`.
        text: thinking or answer text; empty for markers, tool calls and bookkeeping.
        thinking: thinking tokens in this delta.
        answer: answer tokens in this delta (tool-call and end-of-sequence tokens too).
        injected: marker and forced tokens in this delta.
        token_ids: ids of all those tokens, in order; empty if the backend gives none.
        logprobs: in chat or completions shape, for this delta's tokens; objects or `msgspec.Raw`.
        tool_calls: list of OpenAI tool-call deltas, likewise.
        finish_reason: set once per choice, by its last delta.
        stop_reason: the stop string or token id that ended it, as vLLM reports it.
        capped: the cap ended this choice's thinking (said once, by the delta where it happened).
        usage: set by the very last delta of the call (index is then meaningless).
        prompt_tokens: length of the rendered prompt, said once, by backends that know it early.
        prompt_token_ids: the rendered prompt, once, by backends that know it and were asked.
        wire: the event as JSON (without "data: ") as an HTTP backend sent it, less what the client
            did not ask for; empty (embedded engine): the edge encodes the fields above.
    """

    index: int = 0
    kind: Kind = Kind.ANSWER
    text: str = ""
    thinking: int = 0
    answer: int = 0
    injected: int = 0
    token_ids: list[int] = []
    logprobs: Any = None
    tool_calls: Any = None
    finish_reason: str | None = None
    stop_reason: Any = None
    capped: bool = False
    usage: Usage | None = None
    prompt_tokens: int = 0
    prompt_token_ids: list[int] | None = None
    wire: bytes = b""


# Deals with one ordinary token in the same turn of the event loop; or False, and then nothing has happened. Given are
# the choice, whether it is thinking, its id, and the event as the client may have it, framing included.
Express = Callable[[int, bool, int, bytes], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend was measured to do when it came up.

    Attributes:
        cap_binds: `thinking_token_budget` (or the engine) ends thinking at the cap; None: unknown.
        cap_binds_with_tools: the same with tools in the request; None: unknown.
        thinking_field: where thinking text arrives: `reasoning`, `reasoning_content`,
            `inline` (markers in the content), or None (the model did not think).
        token_ids_in: takes prompts as token ids.
        token_ids_out: returns token ids when asked.
        cached_tokens: reports cached prompt tokens.
        tools: takes tools.
        instant_is_quiet: with the no-think switch the model did not think, and its answer came as content.
        max_model_len: context window in tokens; None if it does not say.
        forcing: texts to force, as token ids; None where a choice cannot be continued from exact ids.
        template_opens: the prompt ends inside the thinking when thinking is on.
        tool_format: how the model's template teaches it to call tools, see tool_text.py; None: unknown.
        tool_opener: the token that begins a tool call, where it is one.
        tool_opener_ids: the tokens of what begins one, where they are several.
        takes_effort: accepts `reasoning_effort`.
        continues_assistant: goes on from an assistant message that holds closed thinking, without thinking again.
        logprobs: gives the log probabilities of a chat's tokens when asked; None: unknown.
        limit_binds: it generates no more than `max_tokens`, as far as it was seen.
        detail: one remark per capability for `thinkgate check`, e.g. why something is unknown.
    """

    cap_binds: bool | None = None
    cap_binds_with_tools: bool | None = None
    thinking_field: str | None = None
    token_ids_in: bool = False
    token_ids_out: bool = False
    cached_tokens: bool = False
    tools: bool | None = None
    instant_is_quiet: bool = False
    max_model_len: int | None = None
    forcing: Forcing | None = None
    template_opens: bool = False
    tool_format: str | None = None
    tool_opener: int | None = None
    tool_opener_ids: tuple[int, ...] = ()
    takes_effort: bool = False
    continues_assistant: bool = False
    logprobs: bool | None = None
    limit_binds: bool = True
    detail: Mapping[str, str] = field(default_factory=dict)


class Backend(Protocol):
    """One upstream server, or the engine in this process."""

    id: str
    kind: str

    def generate(self, call: Call, express: Express | None = None) -> AsyncGenerator[list[Delta], None]:
        """Run `call`; closing the iterator aborts it at the backend at once.

        An ordinary token may be given to `express` instead of being yielded, while whoever iterates waits for the
        next batch; where it says False, it is yielded.

        Raises: UpstreamRejected, UpstreamError, DeadlinePassed, InvalidRequest.
        """

    async def tokenize(self, call: Call) -> list[int]:
        """The prompt of a chat call as token ids, as the backend itself would render it.

        Raises: UpstreamRejected, UpstreamError, InvalidRequest.
        """

    async def encode(self, text: str) -> list[int]:
        """A text as token ids, with no special token added; markers in it are those of the model.

        Raises: UpstreamRejected, UpstreamError, Overloaded.
        """

    def extend(self, call: Call, segment: Segment) -> AsyncGenerator[list[Delta], None]:
        """Sample on from `segment.prompt`: plain deltas of choice 0 with text, ids, logprobs in chat shape.

        Kinds and counts are the caller's business. The last delta with tokens has `finish_reason` (`stop` or
        `length`) and `stop_reason` (the id or text that stopped it); then comes one with `usage`, if known.
        Raises: as `generate`.
        """

    async def probe(self) -> Capabilities:
        """Measure what the backend can do. Raises UpstreamError when it is not up."""

    async def close(self) -> None:
        """Release connections or the engine; running calls are aborted."""


def refuse_field(name: str, backend_kind: str, instead: str) -> InvalidRequest:
    """The error for a field that we know and that this backend cannot honour."""
    return InvalidRequest(
        f"`{name}` is not supported by this model's {backend_kind} backend; {instead}",
        param=name,
        code="unsupported_parameter",
    )
