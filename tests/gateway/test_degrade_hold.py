"""What a request that goes down the degrade ladder holds, for any limits, prices and sizes."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from budget.chain import Forcing
from budget.degrade import STEPS, fits
from budget.errors import HoldRefused
from budget.ledger import Amounts, Remaining, Unit
from gateway.backends.port import Capabilities
from gateway.degrade import Request, one_step_down
from gateway.prepare import Prepared
from tests.gateway.still import CHAT, HOLDS_CAPS, Json, config_of, key, models_of, prepared, sent

ADA = key(degrade=STEPS)
FORCING = Forcing(opening=(15, 9), closing=(16,), wrap_up=(7, 8, 9, 10), start_id=15, end_id=16)
DOES_ALL = dataclasses.replace(HOLDS_CAPS, forcing=FORCING, instant_is_quiet=True)
IGNORES_CAPS = Capabilities(cap_binds=False, detail={"cap": "ignored"})
UNITS: tuple[Unit, ...] = ("tokens", "thinking_tokens", "usd")


class Refused:
    """A hold that found so much left."""

    def __init__(self, left: dict[Unit, int]) -> None:
        self._left = left

    def remaining(self, unit: Unit) -> Remaining | None:
        left = self._left.get(unit)
        return None if left is None else Remaining(limit=10**6, remaining=left, reset_s=1.0)


def down(body: Json, left: dict[Unit, int], *, model: Json | None = None, found: Capabilities = DOES_ALL):
    """The request as it was refused, and one step down."""
    config = config_of(model)
    refused = prepared(body, config=config, capabilities=found, key=ADA)
    request = Request(json.dumps({**CHAT, **body}).encode(), "chat", ADA, models_of(config, found), config)
    why = HoldRefused("short", scope="key:ada", unit="tokens", kind="rate", retry_after_s=1.0)
    return refused, one_step_down(request, refused, Refused(left), why)  # type: ignore[arg-type]  # all that is asked


def answer_room(request: Prepared) -> int:
    """Output tokens per choice beside the cap."""
    return request.call.max_tokens - (request.cap.tokens or 0)


bodies = st.fixed_dictionaries(
    {},
    optional={
        "n": st.integers(1, 4),
        "max_completion_tokens": st.integers(700, 1600),
        "reasoning_effort": st.sampled_from(["minimal", "low", "medium", "high"]),
        "reasoning": st.just({"summary": "concise"}),
        "thinkgate": st.sampled_from([{"thinking_tokens": 400}, {"min_thinking_tokens": 60}]),
    },
).filter(lambda body: not ("thinkgate" in body and "reasoning_effort" in body))
prices = st.fixed_dictionaries(
    {"prompt": st.floats(0, 3), "thinking": st.floats(0, 9), "answer": st.floats(0, 9)},
)


@given(body=bodies, price=prices, shares=st.dictionaries(st.sampled_from(UNITS), st.floats(0, 1)))
def test_a_step_down_fits_and_keeps_the_answers_room(body: Json, price: Json, shares: dict[Unit, float]):
    """The hold one step down has room in every limit, thinks less, and holds no less for the answer."""
    model = {"price_usd_per_mtok": price}
    full = prepared(body, config=config_of(model), capabilities=DOES_ALL, key=ADA).ceiling.by_unit()
    left = {unit: int(full[unit] * share) for unit, share in shares.items()}
    refused, lower = down(body, left, model=model)
    if lower is None:
        return
    assert not fits(left, refused.ceiling)
    assert fits(left, lower.ceiling)
    assert lower.ceiling.thinking_tokens < refused.ceiling.thinking_tokens
    assert (lower.cap.tokens or 0) < (refused.cap.tokens or 0)
    assert (lower.cap.tokens or 0) >= refused.ask.min_thinking
    assert lower.call.max_tokens <= refused.call.max_tokens
    if lower.decision.mode == "reasoning":
        assert answer_room(lower) >= answer_room(refused)
    assert len(lower.degraded) == 1
    assert len(lower.steps) < len(refused.steps)


@given(body=bodies, share=st.floats(0, 1))
def test_what_instant_mode_can_have_is_never_refused(body: Json, share: float):
    """Whatever is left beyond the hold of instant mode, a request that may be instant gets an answer."""
    refused = prepared(body, config=config_of(), capabilities=DOES_ALL, key=ADA)
    if refused.ask.min_thinking:
        return
    room = refused.ceiling.tokens - refused.ceiling.thinking_tokens - refused.aside.tokens()
    left: dict[Unit, int] = {"tokens": room + int(share * (refused.ceiling.tokens - 1 - room))}
    assert down(body, left)[1] is not None


def test_where_no_cap_can_be_held_the_ladder_leads_to_instant_mode() -> None:
    """A cap that nobody could hold is not lowered: the request is instant at once, and is told so."""
    refused, lower = down({}, {"thinking_tokens": 400}, found=IGNORES_CAPS)
    assert refused.cap.tokens is None
    assert lower is not None
    assert (lower.decision.mode, [taken.step for taken in lower.degraded]) == ("instant", ["instant"])
    assert lower.ceiling.thinking_tokens == 0


@pytest.mark.parametrize(("left", "effort"), [(100, "minimal"), (0, "low")])
def test_a_backend_that_reads_efforts_is_told_the_lower_one(left: int, effort: str) -> None:
    """Where the client's own effort word goes on to the backend, the word of the step goes instead."""
    model = {"backends": [{"id": "a", "url": "http://127.0.0.1:1", "kind": "openai"}]}
    _, lower = down({"reasoning_effort": "medium"}, {"thinking_tokens": left}, model=model)
    assert lower is not None
    assert sent(lower)["reasoning_effort"] == effort


def test_a_request_that_thinks_of_itself_no_more_is_left_alone() -> None:
    """An instant request that is refused has no step to take."""
    refused, lower = down({"thinkgate": {"mode": "instant"}}, {"tokens": 0})
    assert (refused.decision.mode, lower) == ("instant", None)


def test_a_total_above_what_instant_mode_may_answer_is_no_obstacle() -> None:
    """A total that only thinking made possible is brought down to the longest answer."""
    refused, lower = down({"max_completion_tokens": 1700}, {"thinking_tokens": 0})
    assert refused.call.max_tokens == 1700
    assert lower is not None
    assert (lower.decision.mode, lower.call.max_tokens) == ("instant", 800)
    assert lower.ceiling == Amounts(tokens=lower.ceiling.tokens)
