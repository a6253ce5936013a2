"""Requests that differ in their messages only are decided once (docs/adr/0010), or once per outcome of their text.

Owns: what the shape of a chat request is, what is kept by shape and for how long. Does not own: deciding
(prepare.py). O(body bytes); at most MOST_SHAPES decisions are kept, and nothing of any message.

The shape of a body is every byte before its first `[` and after its last `]`, kept only where what is between is
the value of `messages`. Another body with the same bytes around a JSON array can then only mean the same, but for
its messages: those are checked each time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Raw
from msgspec.structs import replace

from gateway.ask.fields import check_media
from gateway.ask.hear import hear
from gateway.ask.request import check_text, parse_messages
from gateway.cascade import with_messages
from gateway.ceiling import ceiling_of
from gateway.prepare import Prepared, decide

if TYPE_CHECKING:
    from gateway.auth import Key
    from gateway.backends.port import Capabilities, Surface
    from gateway.config.schema import Config
    from gateway.judge import Judge
    from gateway.models import Model
    from router.judge import Verdict

MOST_SHAPES = 256
MOST_SHAPE_BYTES = 512
# Numbers, switches and fixed words: no field that may hold a text of the client's own, so none is kept, and none that
# every request is likely to have another value of.
SHAPING = frozenset(
    (
        "messages",
        "model",
        "stream",
        "n",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logprobs",
        "top_logprobs",
        "reasoning_effort",
        "reasoning",
        "thinking",
        "thinking_config",
        "enable_thinking",
        "thinking_budget",
        "thinking_token_budget",
        "include_reasoning",
        "thinkgate",
        "return_token_ids",
        "service_tier",
    )
)
NO_MESSAGES = Raw(b"[]")
Shape = tuple[str, bytes, bytes]
Outcome = tuple[str, int | None, str]


class _Kept(NamedTuple):
    """The decision about an earlier request, without its messages, and what it followed from beside the shape.

    Attributes:
        prepared: that decision.
        key: whose it was.
        found: what the model's backends could do.
        by_text: where the text decided, what follows from each mode and cap it may say; else empty.
    """

    prepared: Prepared
    key: Key
    found: list[Capabilities | None]
    by_text: dict[Outcome, Prepared]


class Decisions:
    """`prepare` under one configuration, remembering.

    Args:
        config: what is in force.
        models: by public name.
        judge: asks texts; None: structure alone decides.
    """

    def __init__(self, config: Config, models: Mapping[str, Model], judge: Judge | None = None) -> None:
        self._judge = judge
        self._config = config
        self._models = models
        self._kept: dict[Shape, _Kept] = {}

    def __len__(self) -> int:
        """How many are kept."""
        return len(self._kept)

    def prepare(
        self, body: bytes, surface: Surface, key: Key, *, request_id: str, trace: tuple[tuple[bytes, bytes], ...]
    ) -> Prepared:
        """See `gateway.prepare.prepare`. Raises: the same."""
        shape: Shape | None = None
        begin, end = body.find(b"["), body.rfind(b"]") + 1
        if surface == "chat" and 0 < begin < end and begin + len(body) - end <= MOST_SHAPE_BYTES:
            shape = key.id, body[:begin], body[end:]
            kept = self._kept.get(shape)
            if kept is not None:
                prepared = self._again(kept, body, body[begin:end], key, request_id, trace)
                if prepared is not None:
                    return prepared
        heard = hear(body, surface, self._config)
        if self._judge is not None:
            heard = heard._replace(pick=self._judge.picker(heard.messages, heard.media_parts))
            if surface == "chat":
                heard = heard._replace(read=self._judge.reader(heard.messages, heard.media_parts))
        prepared = decide(
            heard, len(body), surface, key, self._models, self._config, request_id=request_id, trace=trace
        )
        # Nothing that begins with a bracket and ends with one is as long: so this is the place.
        if (
            shape is not None
            and prepared.target is None  # that follows from load and statistics, each time
            and not heard.media_parts
            and heard.raw.keys() <= SHAPING
            and bytes(heard.raw["messages"]) == body[begin:end]
            and _plans_alike(prepared)
        ):
            self._keep(shape, prepared, key)
        return prepared

    def _again(
        self,
        kept: _Kept,
        body: bytes,
        messages: bytes,
        key: Key,
        request_id: str,
        trace: tuple[tuple[bytes, bytes], ...],
    ) -> Prepared | None:
        """The same decision for other messages; None where it must be made anew, or refused in words."""
        known = kept.prepared
        if kept.key is not key or kept.found != _found(known.model):
            return None
        check_text(body)
        parsed = parse_messages(messages)
        if parsed is None or check_media(parsed, self._config.server.media_hosts):
            return None
        decision = known.decision
        if kept.by_text:
            assert self._judge is not None
            verdict = self._judge.read(parsed, 0, key, known.model)
            by_text = kept.by_text.get(_outcome(verdict))
            if by_text is None:
                return None
            known = by_text
            decision = known.decision._replace(verdict=verdict)
            if (
                decision.mode == verdict.mode or decision.cascade is not None
            ):  # else there was no room, whatever the text says
                decision = decision._replace(reason=verdict.reason)
        call, cap = known.call, known.cap
        most = call.max_tokens + known.slack
        return replace(
            known,
            decision=decision,
            call=replace(
                call, request_id=request_id, fields={**call.fields, "messages": Raw(messages)}, trace_headers=trace
            ),
            cap=replace(cap),  # the answer fills it in
            draft=with_messages(known.draft, Raw(messages), request_id, trace),
            ceiling=ceiling_of(known.ask, known.model, cap.tokens, most, known.aside, body_bytes=len(body)),
        )

    def _keep(self, shape: Shape, prepared: Prepared, key: Key) -> None:
        call = prepared.call
        fields = {name: value.copy() for name, value in call.fields.items()}  # a view would keep its whole body
        fields["messages"] = NO_MESSAGES
        bare = replace(call, request_id="", fields=fields, trace_headers=())
        draft = with_messages(prepared.draft, NO_MESSAGES, "", ())
        verdict = prepared.decision.verdict
        decision = prepared.decision._replace(verdict=None)
        bare_prepared = replace(prepared, decision=decision, call=bare, cap=replace(prepared.cap), draft=draft)
        kept = _Kept(bare_prepared, key, _found(prepared.model), {})
        before = self._kept.pop(shape, None)
        if verdict is not None:
            if before is not None and before.key is key and before.found == kept.found:
                kept.by_text.update(before.by_text)
            kept.by_text[_outcome(verdict)] = kept.prepared
        if len(self._kept) >= MOST_SHAPES:
            del self._kept[next(iter(self._kept))]  # the oldest, so that using one writes nothing
        self._kept[shape] = kept


def _outcome(verdict: Verdict) -> Outcome:
    """What a decision takes of a verdict: few different ones, so few are kept for a shape."""
    return verdict.mode, verdict.most_thinking, verdict.by


def _plans_alike(prepared: Prepared) -> bool:
    """Whether another text is planned alike: what is held for a plan, and whether one pays, goes by the text."""
    planning = prepared.planning
    return planning is None or (planning.refused is not None and prepared.decision.verdict is None)


def _found(model: Model) -> list[Capabilities | None]:
    """What the model's backends can do at the moment."""
    return [slot.capabilities for slot in model.slots]
