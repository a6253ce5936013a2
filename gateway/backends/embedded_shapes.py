"""The engine's outputs as the port's deltas.

Owns: logprobs in the chat and the completions shape, tool-call deltas, and the numbers of the port. A
segment's deltas have none of the latter: what its tokens count as is its caller's business.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gateway.backends.port import Delta, Kind, Usage

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.backends.port import Surface
    from kernels.params import CallPart, Finished, Output, Token

# JSON has no infinity; vLLM reports an impossible token so.
IMPOSSIBLE = -9999.0


class DeltaShaper:
    """Shapes the outputs of one call.

    Args:
        surface: decides the shape of logprobs.
        bytes_of: all bytes of a token.
        prompts: token ids of each prompt.
        n: choices per prompt.
        wants_token_ids: report the prompts' ids.
    """

    def __init__(
        self,
        surface: Surface,
        bytes_of: Callable[[int], bytes],
        prompts: Sequence[tuple[int, ...]],
        *,
        n: int,
        wants_token_ids: bool,
    ) -> None:
        self._surface = surface
        self._bytes_of = bytes_of
        self._prompts = prompts
        self._n = n
        self._wants_token_ids = wants_token_ids
        self._told: set[int] = set()
        self._offsets: dict[int, int] = {}

    def delta(self, output: Output) -> Delta:
        """One output."""
        delta = Delta(
            index=output.index,
            kind=Kind(output.kind),
            text=output.text,
            thinking=output.thinking,
            answer=output.answer,
            injected=output.injected,
            token_ids=[token.id for token in output.tokens],
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
            capped=output.capped,
        )
        if output.calls:
            delta.tool_calls = [_call(part) for part in output.calls]
        if output.tokens and output.tokens[0].logprob is not None:
            is_chat = self._surface == "chat"
            delta.logprobs = _chat_logprobs(output, self._bytes_of) if is_chat else self._completion_logprobs(output)
        if not self._told:
            delta.prompt_tokens = sum(map(len, self._prompts))
        prompt = output.index // self._n
        if prompt not in self._told:
            self._told.add(prompt)
            if self._wants_token_ids:
                delta.prompt_token_ids = list(self._prompts[prompt])
        return delta

    def last(self, finished: Finished) -> Delta:
        """The end of the call."""
        usage = Usage(
            prompt_tokens=finished.prompt_tokens,
            completion_tokens=finished.completion_tokens,
            cached_tokens=finished.cached_tokens,
            reasoning_tokens=finished.reasoning_tokens,
        )
        return Delta(usage=usage)

    def _completion_logprobs(self, output: Output) -> dict[str, Any]:
        names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
        shape: dict[str, list[Any]] = {name: [] for name in names}
        offset = self._offsets.get(output.index, 0)
        for token in output.tokens:
            entry = _chat_entry(token, self._bytes_of)
            top = {each["token"]: each["logprob"] for each in entry["top_logprobs"]}
            shape["text_offset"].append(offset)
            shape["token_logprobs"].append(entry["logprob"])
            shape["tokens"].append(entry["token"])
            # The token that came is always listed, however unlikely it was.
            shape["top_logprobs"].append({entry["token"]: entry["logprob"], **top})
            offset += len(entry["token"])
        self._offsets[output.index] = offset
        return shape


class SegmentShaper:
    """Shapes the outputs of one segment: text, ids, logprobs in chat shape, and why it ended.

    Args:
        bytes_of: all bytes of a token.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of

    def delta(self, output: Output) -> Delta:
        """One output."""
        delta = Delta(
            text=output.text,
            token_ids=[token.id for token in output.tokens],
            finish_reason=output.finish_reason,
            stop_reason=output.stop_reason,
        )
        if output.tokens and output.tokens[0].logprob is not None:
            delta.logprobs = _chat_logprobs(output, self._bytes_of)
        return delta

    def last(self, finished: Finished) -> Delta:
        """The end of the segment."""
        prompt, completion = finished.prompt_tokens, finished.completion_tokens
        cached = finished.cached_tokens
        return Delta(usage=Usage(prompt_tokens=prompt, completion_tokens=completion, cached_tokens=cached))


def _chat_logprobs(output: Output, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    return {"content": [_chat_entry(token, bytes_of) for token in output.tokens]}


def _chat_entry(token: Token, bytes_of: Callable[[int], bytes]) -> dict[str, Any]:
    logprob = token.logprob
    assert logprob is not None
    top = [_named(bytes_of(token_id), value) for token_id, value in logprob.top]
    return {**_named(bytes_of(token.id), logprob.chosen), "top_logprobs": top}


def _named(written: bytes, logprob: float) -> dict[str, Any]:
    text = written.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, IMPOSSIBLE), "bytes": list(written)}


def _call(part: CallPart) -> dict[str, Any]:
    """A piece of a tool call as OpenAI streams it."""
    if part.name is None:
        return {"index": part.index, "function": {"arguments": part.arguments}}
    function = {"name": part.name, "arguments": part.arguments}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}
