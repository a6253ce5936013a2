"""A backend's whole JSON answer, made ours without taking it apart.

Owns: the non-streamed instant path (docs/adr/0004): counting, stripping what the client did not ask for,
and adding `usage` details and `thinkgate`. O(body bytes), decoding only what is needed.
"""

from __future__ import annotations

from itertools import compress
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Raw, Struct

from budget.cap import ThinkingMeter
from gateway.backends.events import UsageBody, cut_prompt_ids, cut_token_ids
from gateway.backends.guesses import at_least
from gateway.backends.reader import read_usage
from gateway.errors import UpstreamError

if TYPE_CHECKING:
    from gateway.backends.reader import MarkerIds
    from gateway.edge.extension import Report, UsageReport
    from gateway.tally import Tally

HIDDEN = ("prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params", "metrics")

TAIL_BYTES = 128
NULL = Raw(b"null")  # a union with Raw cannot be declared: absent and null read the same


class _Message(Struct):
    content: Raw = NULL  # looked at only where thinking strays
    reasoning: str | None = None
    reasoning_content: str | None = None

    def has_thinking(self) -> bool:
        return bool(self.reasoning or self.reasoning_content)


class _Choice(Struct):
    index: int
    message: _Message | None = None
    text: Raw = NULL
    token_ids: list[int] | None = None

    def words(self) -> tuple[int, int]:
        """The least tokens that its thinking and its answer can have."""
        message = self.message
        said = msgspec.json.decode(self.text if message is None else message.content)
        thought = "" if message is None else message.reasoning or message.reasoning_content or ""
        return at_least(thought), at_least(said) if isinstance(said, str) and said else 1


class _Body(Struct):
    choices: list[_Choice]
    usage: UsageBody | None = None
    prompt_token_ids: Raw = NULL


_body_decoder = msgspec.json.Decoder(_Body)
_fields_decoder = msgspec.json.Decoder(dict[str, Raw])


class PlainAnswer:
    """One whole answer.

    Args:
        body: the backend's JSON.
        markers: ids of the thinking markers, if known.

    Raises: UpstreamError when it is no completion.
    """

    def __init__(self, body: bytes, markers: MarkerIds | None) -> None:
        try:
            self._typed = _body_decoder.decode(body)
            self._fields = _fields_decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise UpstreamError("The backend answered with something that is no completion.") from exc
        self._markers = markers
        self._size = len(body)
        self._has_stray_thinking = False

    def count(self, tally: Tally) -> None:
        """Add what the answer used."""
        tally.saw_bytes(self._size)
        if self._typed.usage is not None:
            tally.usage = read_usage(self._typed.usage)
        for choice in self._typed.choices:
            if choice.token_ids is None:
                self._has_stray_thinking |= choice.message is not None and choice.message.has_thinking()
                if tally.usage is None:
                    thought, said = choice.words()
                    tally.wasted, tally.answer = tally.wasted + thought, tally.answer + said
                continue
            tally.has_ids = True
            if self._markers is None or choice.message is None:
                tally.answer += len(choice.token_ids)
                continue
            meter = ThinkingMeter(self._markers.start, self._markers.end, cap=0, is_open=self._is_open())
            split = meter.feed(choice.token_ids)
            tally.wasted += split.thinking  # the cap of instant mode is 0: what was thought is cut
            tally.answer += split.answer
            tally.injected += split.injected
            self._has_stray_thinking |= split.thinking > 0
        if self._has_stray_thinking:
            tally.capped = True
            if not tally.has_ids and tally.usage is not None:
                tally.wasted, tally.usage.reasoning_tokens = self._stray_tokens(tally), 0

    def _stray_tokens(self, tally: Tally) -> int:
        """Tokens of thinking that is cut, without ids: as the backend says, else by its share of the words."""
        assert tally.usage is not None
        if tally.usage.reasoning_tokens is not None:
            return tally.usage.reasoning_tokens
        tally.is_guess = True
        words = [choice.words() for choice in self._typed.choices]
        thought, said = sum(thought for thought, _ in words), sum(said for _, said in words)
        return -(-tally.usage.completion_tokens * thought // (thought + said))

    def require(self, choices: int) -> None:
        """Raises: UpstreamError when choices are missing."""
        if len(self._typed.choices) < choices:
            raise UpstreamError("The backend answered with fewer choices than it was asked for.")

    def render(self, model: str | None, *, usage: UsageReport, extension: Report, wants_token_ids: bool) -> bytes:
        """The client's body, once counted: thinking is cut, other text in `reasoning` is the answer.

        Args:
            model: public name, if it differs from the backend's.
            usage: what stands there in place of the backend's own.
            extension: the `thinkgate` object.
            wants_token_ids: the client asked for ids.
        """
        fields: dict[str, Any] = self._fields
        if not wants_token_ids:
            for name in HIDDEN:
                fields.pop(name, None)
        if model is not None:
            fields["model"] = model
        fields["usage"] = usage
        fields["thinkgate"] = extension
        if self._has_stray_thinking or any(choice.token_ids for choice in self._typed.choices):
            fields["choices"] = self._choices(wants_token_ids)
        return msgspec.json.encode(fields)

    def _choices(self, wants_token_ids: bool) -> list[Any] | Raw:
        has_field = any(c.message is not None and c.message.has_thinking() for c in self._typed.choices)
        is_clean = not has_field and not self._has_stray_thinking
        if is_clean and len(self._typed.choices) == 1 and not wants_token_ids:
            return Raw(cut_token_ids(cut_prompt_ids(bytes(self._fields["choices"]))[0]))
        choices: list[Any] = msgspec.json.decode(self._fields["choices"])
        for choice in choices:
            if self._has_stray_thinking:
                self._cut_spelling(choice)
            if not wants_token_ids:
                choice.pop("token_ids", None)
                choice.pop("prompt_token_ids", None)
            message = choice.get("message")
            if has_field and isinstance(message, dict):
                text = "".join(message.pop(name, None) or "" for name in ("reasoning", "reasoning_content"))
                message["content"] = ("" if self._has_stray_thinking else text) + (message.get("content") or "")
        return choices

    def _cut_spelling(self, choice: dict[str, Any]) -> None:
        """Take out of a choice the ids and logprobs of its thinking, which spell what was cut."""
        ids, logprobs = choice.get("token_ids"), choice.get("logprobs")
        if not ids or self._markers is None:
            choice["logprobs"] = None  # whose entries are whose cannot be told
            return
        meter = ThinkingMeter(self._markers.start, self._markers.end, cap=0, is_open=self._is_open())
        is_kept = [not meter.feed([token_id]).thinking for token_id in ids]
        choice["token_ids"] = list(compress(ids, is_kept))
        if isinstance(logprobs, dict) and isinstance(entries := logprobs.get("content"), list):
            choice["logprobs"] = {**logprobs, "content": list(compress(entries, is_kept))}

    def _is_open(self) -> bool:
        prompt, markers = bytes(self._typed.prompt_token_ids), self._markers
        if prompt == b"null" or markers is None:
            return False
        tail = prompt[-TAIL_BYTES:].strip(b"[] ").split(b",")
        for token in reversed(tail[len(prompt) > TAIL_BYTES :]):
            if token.strip() == b"%d" % markers.end:
                return False
            if token.strip() == b"%d" % markers.start:
                return True
        return False
