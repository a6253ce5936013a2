"""Segments on vLLM's wire: from exact token ids in, to deltas of one choice out.

Owns: which of a chat call's fields make its prompt, which sample it, and reading /v1/completions events.
Does not own: what the tokens mean (budget/chain.py). O(prompt) per segment, O(1) per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.backends.events import DONE, ChoiceBody, compact, decode_chunk
from gateway.backends.port import Call, Delta, Segment, Usage
from gateway.backends.reader import read_usage
from gateway.backends.tool_calls import OPENING
from gateway.backends.tool_text import ToolPlan, ToolsNotParsable, answer_plan
from gateway.errors import InvalidRequest

if TYPE_CHECKING:
    from budget.chain import Chain, Forcing

WAIT = "Wait"
CONTINUES = {"continue_final_message": True, "add_generation_prompt": False}
FORBIDDEN_BIAS = -100
MOST_SEED = 2**63  # seeds are signed 64 bit integers at vLLM
# `stop` is there in instant mode only; in reasoning mode the gateway looks for it.
ANSWER_FIELDS = ("response_format", "structured_outputs", "stop", "include_stop_str_in_output")
CHECKED_FIELDS = ("response_format", "structured_outputs")  # by the backend, and only there

PROMPT_FIELDS = (
    "messages",
    "tools",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
)
NOT_SAMPLING = frozenset(
    (
        *PROMPT_FIELDS,
        "echo",
        "functions",
        "function_call",
        "include_stop_str_in_output",
        "logit_bias",
        "logprobs",
        "metadata",
        "min_tokens",
        "modalities",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "response_format",
        "safety_identifier",
        "seed",
        "stop",
        "stop_token_ids",
        "store",
        "structured_outputs",
        "tool_choice",
        "top_logprobs",
        "verbosity",
    )
)
# Fields of a chat call whose prompt /tokenize cannot render, or that mean another thing after a cut.
NOT_IN_SEGMENTS = ("documents", "media_io_kwargs", "mm_processor_kwargs", "prompt_logprobs", "truncate_prompt_tokens")


def tokenize_body(call: Call) -> bytes:
    """The request to /tokenize that renders a chat call's prompt, or reads a completion's text."""
    names = PROMPT_FIELDS if call.surface == "chat" else ("prompt", "add_special_tokens")
    fields: dict[str, Any] = {name: call.fields[name] for name in names if name in call.fields}
    return msgspec.json.encode({**fields, "model": call.model})


def sampling_fields(fields: Mapping[str, msgspec.Raw]) -> dict[str, msgspec.Raw]:
    """A chat call's fields that say how every token is sampled, in the thinking and in the answer."""
    return {name: value for name, value in fields.items() if name not in NOT_SAMPLING}


def segment_body(call: Call, segment: Segment) -> bytes:
    """The request to /v1/completions."""
    fields: dict[str, Any] = dict(segment.fields)
    fields["model"] = call.model
    fields["prompt"] = segment.prompt
    fields["max_tokens"] = segment.max_tokens
    fields["stream"] = True
    fields["stream_options"] = {"include_usage": True}
    fields["return_token_ids"] = True
    if segment.stop_token_ids:
        fields["stop_token_ids"] = segment.stop_token_ids
    if segment.stop:
        # Without this vLLM's text lags behind its ids by the length of the longest stop string.
        fields["stop"], fields["include_stop_str_in_output"] = segment.stop, True
    if segment.top_logprobs is not None:
        fields["logprobs"] = segment.top_logprobs
    if call.priority:
        fields["priority"] = call.priority
    return msgspec.json.encode(fields)


class SegmentFields:
    """What every segment of one request has in common.

    Args:
        call: the chat call.
        plan: how its answer is made.
        forcing: the model's markers: neither may be sampled in the answer, where it would think on, past its cap.
        finds_calls: a tool call that begins in the thinking is found by its text.
    """

    def __init__(self, call: Call, plan: ToolPlan, forcing: Forcing, *, finds_calls: bool = False) -> None:
        fields = call.fields
        self._call, self._plan = call, plan
        self._thinking_stops = (OPENING,) if finds_calls else ()
        self._sampling = sampling_fields(fields)
        self._seed: int | None = _decoded(fields, "seed")
        self._min_tokens = _min_tokens(fields)
        self._stop_token_ids: tuple[int, ...] = tuple(_decoded(fields, "stop_token_ids") or ())
        self._top_logprobs = (_decoded(fields, "top_logprobs") or 0) if _decoded(fields, "logprobs") else None
        self._answer = {name: fields[name] for name in ANSWER_FIELDS if name in fields}
        if plan.structured_outputs is not None:
            self._answer.pop("response_format", None)
            self._answer["structured_outputs"] = _raw(plan.structured_outputs)
        self._bias = {"logit_bias": fields["logit_bias"]} if "logit_bias" in fields else {}
        if plan.how == "auto" and "skip_special_tokens" not in fields:
            self._answer["skip_special_tokens"] = _raw(False)  # some vocabularies call the calls' tags special
        bias: dict[str, float] = dict(_decoded(fields, "logit_bias") or {})
        marker_ids = [token_id for token_id in (forcing.start_id, forcing.end_id) if token_id is not None]
        self._answer["logit_bias"] = _raw({**bias, **{str(token_id): FORBIDDEN_BIAS for token_id in marker_ids}})

    def trial(self, first: int) -> Segment | None:
        """One token with all that only the answer has, so that its mistakes show before the thinking; None: nothing.

        Args:
            first: a token to go on from.
        """
        asked = {name: self._answer[name] for name in CHECKED_FIELDS if name in self._answer}
        fields = {name: value for name, value in asked.items() if bytes(value) != b"null"}
        if not fields and not self._stop_token_ids:
            return None
        return Segment(prompt=[first], max_tokens=1, fields=fields, stop_token_ids=self._stop_token_ids)

    def segment(self, chain: Chain, index: int) -> Segment:
        """The next segment of a choice: seeds differ by choice; the answer has its format, its stops and its floor."""
        fields = dict(self._sampling)
        if self._seed is not None:
            fields["seed"] = _raw((self._seed + index) % MOST_SEED)
        is_thinking = chain.phase == "thinking"
        if is_thinking:
            fields |= self._bias
        else:
            fields |= self._answer
            floor = min(self._min_tokens - chain.output(), chain.room())
            if floor > 0:
                fields["min_tokens"] = _raw(floor)
        stop_ids = chain.stop_token_ids() if is_thinking else self._stop_token_ids
        stops = (*((self._call.thinking.end,) if chain.finds_end_by_text() else ()), *self._thinking_stops)
        return Segment(
            prompt=chain.ids,
            max_tokens=chain.room(),
            fields=fields,
            stop_token_ids=stop_ids,
            stop=stops if is_thinking else (),
            top_logprobs=self._top_logprobs,
        )


def tool_plan(call: Call, tool_format: str | None) -> ToolPlan:
    """How a chat call's answer is made from raw text. Raises: InvalidRequest, naming what cannot be."""
    fields = call.fields
    for name in NOT_IN_SEGMENTS:
        if name in fields and bytes(fields[name]) != b"null":
            raise InvalidRequest(
                f"`{name}` does not go together with this model's thinking cap (two-phase enforcement): leave it out.",
                param=name,
                code="unsupported_parameter",
            )
    tools, choice = _decoded(fields, "tools") or (), _decoded(fields, "tool_choice")
    parallel = _decoded(fields, "parallel_tool_calls")
    try:
        return answer_plan(tools, choice, parallel is not False, tool_format)
    except ToolsNotParsable as exc:
        raise InvalidRequest(exc.message, param=exc.param, code="unsupported_parameter") from exc


def _min_tokens(fields: Mapping[str, msgspec.Raw]) -> int:
    least = _decoded(fields, "min_tokens")
    if least is None:
        return 0
    if not isinstance(least, int) or isinstance(least, bool) or least < 0:
        raise InvalidRequest("`min_tokens` must be an integer of at least 0.", param="min_tokens")
    return least


def _decoded(fields: Mapping[str, msgspec.Raw], name: str) -> Any:  # noqa: ANN401  # JSON is of any type
    return msgspec.json.decode(fields[name]) if name in fields else None


def _raw(value: object) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))


class SegmentReader:
    """Reads the events of one segment.

    Args:
        top_logprobs: alternatives per token that were asked for, if any.
    """

    def __init__(self, top_logprobs: int | None) -> None:
        self._most = top_logprobs or 0
        self.is_done = False
        self.usage: Usage | None = None

    def read(self, event: bytes, out: list[Delta]) -> None:
        """Append the deltas of one event. Raises: UpstreamError."""
        if event == DONE:
            self.is_done = True
            return
        chunk = decode_chunk(compact(event))
        if chunk.usage is not None:
            self.usage = read_usage(chunk.usage)
        out += [_delta(choice, self._most) for choice in chunk.choices if choice.index == 0]


def _delta(choice: ChoiceBody, most: int) -> Delta:
    return Delta(
        text=choice.text or "",
        token_ids=choice.token_ids or [],
        logprobs=None if choice.logprobs is None else chat_logprobs(choice.logprobs, most),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
    )


def chat_logprobs(logprobs: Mapping[str, Any], most: int) -> dict[str, Any]:
    """Logprobs of text completions in chat shape; vLLM adds the sampled token to its `most` alternatives there."""
    tokens, values = logprobs.get("tokens") or [], logprobs.get("token_logprobs") or []
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return {
        "content": [
            {**_entry(token, value), "top_logprobs": [_entry(t, v) for t, v in _likeliest(top or {}, most)]}
            for token, value, top in zip(tokens, values, tops, strict=False)
        ]
    }


def _likeliest(top: Mapping[str, float], most: int) -> list[tuple[str, float]]:
    return sorted(top.items(), key=lambda pair: -pair[1])[:most]


def _entry(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode("utf-8", errors="replace"))}
