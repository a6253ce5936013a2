"""What the embedded engine is asked and what it answers: plain values, importable without torch.

Owns: the vocabulary between the engine and whoever stands in front of it. Counting follows
docs/api.md, "Counting": thinking excludes markers, forced text and markers are injected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kernels.errors import KernelError

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one token is picked; the meaning of each value is vLLM's.

    Attributes:
        temperature: 0 picks the most likely token.
        top_k: None keeps all.
        logit_bias: added to the logits, by token id.
        seed: choice i uses seed + i; None draws one from the system.
        logprobs: how many alternatives to report per token; None reports nothing.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopping:
    """When a choice ends.

    Stop strings and stop tokens end the answer; they do not act on the thinking.

    Attributes:
        max_tokens: most output tokens per choice: thinking, injected and answer together.
        min_tokens: no end-of-sequence, stop token or stop string before that many output tokens.
        strings: stop strings; may span tokens.
        token_ids: stop tokens besides the model's own end of sequence.
        include: keep the stop string, or the text of the stop token, in the answer.
        silent_ids: those of `token_ids` whose text is never kept, whatever `include` says.
    """

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    strings: tuple[str, ...] = ()
    token_ids: frozenset[int] = frozenset()
    include: bool = False
    silent_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingRules:
    """How each choice may think; the fields are those of the gateway's port."""

    enabled: bool = False
    cap: int | None = 0
    start: str = "<think>"
    end: str = "</think>"
    wrap_up: str = ""
    native: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What chat and completion requests have in common.

    Attributes:
        cache_salt: prompts are kept and reused only among requests of the same salt.
    """

    request_id: str
    stopping: Stopping
    sampling: Sampling = Sampling()
    thinking: ThinkingRules = ThinkingRules()
    n: int = 1
    priority: int = 0
    skip_special_tokens: bool = True
    cache_salt: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """What the answer has to be; at most one of schema, choices and regex, and none leaves it free.

    Attributes:
        response_schema: JSON Schema of the answer.
        response_choices: the answer is one of these texts.
        response_regex: the answer matches this regular expression as a whole.
        response_param: the request field that asks for it, for refusals.
    """

    response_schema: Json | None = None
    response_choices: tuple[str, ...] = ()
    response_regex: str | None = None
    response_param: str = "response_format"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatInput(AnswerFormat):
    """A chat request as the client sent it, decoded.

    Attributes:
        messages: OpenAI messages.
        tools: OpenAI tool definitions.
        tool_choice: `none`, `auto`, `required`, or the name of a function in a one-element tuple.
        parallel_tool_calls: more than one call per answer is fine.
        template_kwargs: extra variables for the chat template.
    """

    messages: list[Json]
    tools: list[Json] = field(default_factory=list)
    tool_choice: str | tuple[str] = "auto"
    parallel_tool_calls: bool = True
    template_kwargs: Json = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionInput(AnswerFormat):
    """A completion request: each prompt is text or token ids."""

    prompts: tuple[str | tuple[int, ...], ...]
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt, ready for the model.

    Attributes:
        token_ids: what the model reads, a prefilled start marker included.
        chain_open: the prompt ends inside the thinking.
    """

    token_ids: tuple[int, ...]
    chain_open: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What the engine runs; choice `p * n + j` is the j-th continuation of prompt p.

    Attributes:
        grammar: llguidance grammar of the answer; None leaves it free.
        parses_tools: the answer may hold tool calls in Hermes' format.
    """

    prompts: tuple[Prompt, ...]
    options: Options
    grammar: str | None = None
    parses_tools: bool = False


class Kind(IntEnum):
    """What the text of an output is; the values are the port's."""

    ANSWER = 0
    THINKING = 1
    INJECTED = 2


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural-log probabilities under the model's own distribution, before penalties and masks.

    Attributes:
        chosen: of the token itself.
        top: (token id, logprob) of the most likely tokens, best first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Token:
    """One output token."""

    id: int
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallPart:
    """A piece of a tool call; `id` and `name` come with the first one."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True, kw_only=True)
class Output:
    """Something new for one choice; the fields are those of the port's Delta."""

    index: int
    kind: Kind = Kind.ANSWER
    text: str = ""
    thinking: int = 0
    answer: int = 0
    injected: int = 0
    tokens: list[Token] = field(default_factory=list)
    calls: list[CallPart] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    capped: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last event of a request that ran to its end.

    Attributes:
        cached_tokens: part of `prompt_tokens` that did not have to be read.
    """

    prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The last event of a request that did not."""

    error: KernelError


Event = Output | Finished | Failed
