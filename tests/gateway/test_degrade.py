"""Requests that their limits refuse, and that go down the degrade ladder instead."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytest

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts, Remaining, Unit
from gateway.serve import Answer as Answering
from tests.gateway.live import ASK, INSTANT, MODEL, STREAM, Answer, Client, Json, Live, ask, key_headers, live, tree_of
from tests.gateway.test_bounds import whole
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Gate, Script
from tests.scripted_stream import Say, tokens

SECRET = "s"
RAMBLES = Say(thinking=tokens("on and on " * 200), answer=tokens("at last"))
ALL = ["cap", "effort", "instant"]
CAPPED: Json = {"thinkgate": {"thinking_tokens": 200}}
EFFORTS = {"minimal": 20, "low": 40, "medium": 100, "high": 200}


def tree(backend: ScriptedBackend, left: int, *, unit: str = "tokens", limits: list[Json] | None = None, **key: Any):
    """A key that may degrade, and one limit on it."""
    thinking = {"default_tokens": 200, "max_tokens": 256, "answer_floor_tokens": 16, **key.pop("thinking", {})}
    entry = {"id": "ada", "secret_sha256": hashlib.sha256(SECRET.encode()).hexdigest(), "degrade": ALL, **key}
    limit: Json = {"scope": "key:ada", "unit": unit, "amount": left, "window": "day"}
    model = {"thinking": thinking, "effort_tokens": EFFORTS}
    return tree_of(backend, model=model, keys=[entry], limits=[limit] if limits is None else limits)


async def full_hold(backend: ScriptedBackend, body: Json, **how: Any) -> Json:
    """What a request holds that nothing limits."""
    async with live(tree(backend, 0, limits=[], **how)) as running:
        backend.queue(Script(say=[RAMBLES]))
        hold: Json = whole(await asked(running, body))[1]["hold"]
    return hold


async def asked(running: Live, body: Json) -> Answer:
    """One request with the key."""
    return await ask(running, body, headers=key_headers(SECRET))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("enforce", ["native", "two_phase"])
@pytest.mark.parametrize("body", [ASK, STREAM])
@pytest.mark.parametrize(
    ("missing", "cap", "step"),
    [
        (50, 150, {"step": "cap", "from": 200, "to": 150}),
        (110, 40, {"step": "effort", "from": 200, "to": "low"}),
        (185, 0, {"step": "instant", "from": "reasoning", "to": "instant"}),
    ],
)
async def test_a_refused_request_thinks_less(
    scripted: ScriptedBackend, body: Json, enforce: str, n: int, missing: int, cap: int, step: Json
) -> None:
    """With a few tokens too few the cap is lowered, with more the effort, then the mode; the response says which."""
    request = {**body, **CAPPED, "n": n}
    hold = await full_hold(scripted, request, thinking={"enforce": enforce})
    left = hold["tokens"] - n * missing
    async with live(tree(scripted, left, thinking={"enforce": enforce})) as running:
        scripted.queue(Script(say=[RAMBLES]))
        answer = await asked(running, request)
        texts, extension = whole(answer)
        name, taken = step["step"], [{**step, "scope": "key:ada", "unit": "tokens"}]
        assert (answer.status, answer.headers["x-thinkgate-degraded"]) == (200, name)
        assert extension["degraded"] == taken
        assert [message["content"] for _, message in sorted(texts.items())] == ["at last"] * n
        assert extension["hold"]["tokens"] <= left
        assert extension["cap"]["tokens"] == cap
        assert extension["tokens"]["thinking"] <= n * cap
        assert answer.headers["x-thinkgate-mode"] == extension["mode"] == ("reasoning" if cap else "instant")
        if cap:
            assert (extension["cap"]["clamped_from"], extension["capped"]) == (200, True)
            assert extension["cap"]["clamped_by"] == "what key:ada has left of tokens"
            assert extension["cap"]["source"] == ("effort" if name == "effort" else "request")
        (line,) = running.request_lines()
        assert (line["degraded"], line["mode"], line.get("cap", 0)) == (taken, extension["mode"], cap)
        assert running.metric("thinkgate_degraded_total", step=name, model=MODEL) == 1


@pytest.mark.parametrize(("unit", "left"), [("thinking_tokens", 120), ("usd", 0.0014)])
async def test_every_unit_that_thinking_spends_leads_down(scripted: ScriptedBackend, unit: str, left: float) -> None:
    """A limit of thinking tokens or of money is met by a smaller cap as one of tokens is."""
    async with live(tree(scripted, left, unit=unit)) as running:  # type: ignore[arg-type]  # dollars
        scripted.queue(Script(say=[RAMBLES]))
        extension = (await asked(running, {**ASK, **CAPPED})).json["thinkgate"]
    assert [(d["step"], d["unit"]) for d in extension["degraded"]] == [("cap", unit)]
    assert 100 <= extension["cap"]["tokens"] < 200
    if unit == "thinking_tokens":
        assert extension["cap"]["tokens"] == left


async def test_what_thinking_gives_up_goes_to_no_answer(scripted: ScriptedBackend) -> None:
    """Under a total limit the answer keeps the room it had, and gets more only where limits have it."""
    request = {**ASK, **CAPPED, "max_completion_tokens": 300}
    hold = await full_hold(scripted, request)
    async with live(tree(scripted, hold["tokens"] - 60)) as running:
        scripted.forget()
        extension = (await asked(running, request)).json["thinkgate"]
        assert extension["cap"]["tokens"] == 140
        assert scripted.calls[-1].json["max_tokens"] == 240
    async with live(tree(scripted, 140, unit="thinking_tokens")) as running:
        scripted.forget()
        extension = (await asked(running, request)).json["thinkgate"]
        assert extension["cap"]["tokens"] == 140
        assert scripted.calls[-1].json["max_tokens"] == 300


@pytest.mark.parametrize(
    ("degrade", "asks", "step"),
    [
        (ALL, None, "cap"),
        (ALL, True, "cap"),
        (ALL, ["instant"], "instant"),
        (["instant", "cap"], ["cap", "instant"], "cap"),
        (["instant"], None, "instant"),
        (["model", "cap"], None, "cap"),
        (ALL, False, None),
        (ALL, [], None),
        ([], None, None),
        (["model"], None, None),
    ],
)
async def test_key_and_request_both_say_which_steps_may_be_taken(
    scripted: ScriptedBackend, degrade: list[str], asks: Any, step: str | None
) -> None:
    """The key allows steps, the request agrees to some of them; without one the cap that was named is not lowered."""
    async with live(tree(scripted, 150, unit="thinking_tokens", degrade=degrade)) as running:
        answer = await asked(running, {**ASK, "thinkgate": {"thinking_tokens": 200, "degrade": asks}})
        if step is None:
            assert (answer.status, answer.error["code"]) == (429, "budget_exceeded")
            assert "key:ada has 150 of 150 thinking_tokens" in answer.error["message"]
            assert "x-thinkgate-degraded" not in answer.headers
            assert running.metric("thinkgate_requests_total", **labels("reasoning", 429)) == 1
        else:
            assert (answer.status, answer.headers["x-thinkgate-degraded"]) == (200, step)


def labels(mode: str, status: int) -> dict[str, str]:
    """Of the counter of requests."""
    return {"route": "/v1/chat/completions", "model": MODEL, "mode": mode, "status": str(status)}


@pytest.mark.parametrize(
    ("degrade", "asks", "status", "code"),
    [
        (["cap"], ["cap", "instant"], 403, "permission_denied"),
        ([], ["cap"], 403, "permission_denied"),
        (ALL, ["model"], 403, "permission_denied"),
        (ALL, ["cap", "model"], 403, "permission_denied"),
    ],
)
async def test_steps_that_cannot_be_had_are_refused_by_name(
    scripted: ScriptedBackend, degrade: list[str], asks: list[str], status: int, code: str
) -> None:
    """A step that the key does not allow is a 403, also where nothing is short."""
    async with live(tree(scripted, 9999, degrade=degrade)) as running:
        answer = await asked(running, {**ASK, "thinkgate": {"degrade": asks}})
    assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, "thinkgate.degrade")
    assert asks[-1] in answer.error["message"]


async def test_bifrost_5770_no_request_that_fits_is_degraded(scripted: ScriptedBackend) -> None:
    """With exactly as much left as a request holds it thinks as it asked to, and with one token less it does not."""
    request = {**ASK, **CAPPED}
    hold = await full_hold(scripted, request)
    for missing in (0, 1):
        async with live(tree(scripted, hold["tokens"] - missing)) as running:
            answer = await asked(running, request)
            assert answer.json["thinkgate"]["cap"]["tokens"] == 200 - missing
            assert ("degraded" in answer.json["thinkgate"]) == bool(missing)
            assert ("x-thinkgate-degraded" in answer.headers) == bool(missing)


@pytest.mark.parametrize("unit", ["requests", "concurrency"])
async def test_less_thinking_does_not_help_against_too_many_requests(scripted: ScriptedBackend, unit: str) -> None:
    """A limit of requests or concurrency refuses as ever, even beside one of tokens that is short too."""
    limit = {"scope": "key:ada", "unit": unit, "amount": 1, **({"window": "day"} if unit == "requests" else {})}
    short = {"scope": "key:ada", "unit": "thinking_tokens", "amount": 150, "window": "day"}
    gate = Gate()
    async with live(tree(scripted, 0, limits=[limit, short])) as running, Client(running.port) as first:
        scripted.queue(Script(gates={0: gate}))
        first.send({**STREAM, **INSTANT}, headers=key_headers(SECRET))
        await gate.wait()
        answer = await asked(running, {**ASK, **CAPPED})
        assert (answer.status, "x-thinkgate-degraded" in answer.headers) == (429, False)
        gate.open()
        assert (await first.answer()).status == 200


async def test_the_least_thinking_is_kept_or_the_request_refused(scripted: ScriptedBackend) -> None:
    """`min_thinking_tokens` bounds every step from below and rules out instant mode."""
    for left, status in ((60, 200), (50, 429)):
        async with live(tree(scripted, left, unit="thinking_tokens")) as running:
            scripted.queue(Script(say=[RAMBLES]))
            answer = await asked(running, {**ASK, "thinkgate": {"thinking_tokens": 200, "min_thinking_tokens": 60}})
            assert answer.status == status


async def test_a_key_without_instant_mode_is_not_degraded_to_it(scripted: ScriptedBackend) -> None:
    """The key's modes hold on the ladder: what is left is a smaller cap, and where that is none, a refusal."""
    for left, status in ((30, 200), (10, 429)):
        how: Json = {"modes": ["reasoning"], "degrade": ["cap", "instant"]}
        async with live(tree(scripted, left, unit="thinking_tokens", **how)) as running:
            answer = await asked(running, {**ASK, **CAPPED})
            assert answer.status == status
            if status == 200:
                assert answer.json["thinkgate"]["cap"]["tokens"] == left


async def test_a_keys_ceiling_is_where_the_ladder_begins(scripted: ScriptedBackend) -> None:
    """Above `max_thinking_tokens` a named cap is a 400 and a default is clamped; the ladder goes on from there."""
    async with live(tree(scripted, 80, unit="thinking_tokens", max_thinking_tokens=100)) as running:
        refused = await asked(running, {**ASK, **CAPPED})
        assert (refused.status, refused.error["code"]) == (400, "thinking_budget_too_high")
        answer = await asked(running, ASK)
        cap = answer.json["thinkgate"]["cap"]
        assert (cap["tokens"], cap["clamped_from"], cap["source"]) == (80, 200, "default")
        assert answer.json["thinkgate"]["degraded"][0]["from"] == 100


async def test_an_effort_is_lowered_by_its_word(scripted: ScriptedBackend) -> None:
    """A request that names an effort is told from which word it came down to which."""
    async with live(tree(scripted, 50, unit="thinking_tokens")) as running:
        answer = await asked(running, {**ASK, "reasoning_effort": "high"})
        (taken,) = answer.json["thinkgate"]["degraded"]
        assert (taken["from"], taken["to"], answer.json["thinkgate"]["cap"]["tokens"]) == ("high", "low", 40)


async def test_a_summary_is_left_out_where_nothing_is_thought(scripted: ScriptedBackend) -> None:
    """A request for a summary that ends up in instant mode holds for none and gets none."""
    async with live(tree(scripted, 5, unit="thinking_tokens")) as running:
        answer = await asked(running, {**ASK, "reasoning": {"effort": "high", "summary": "concise"}})
        extension = answer.json["thinkgate"]
        assert (answer.status, extension["mode"], extension["tokens"]["planner"]) == (200, "instant", 0)
        assert extension["mode_reason"] == "less than it needs: what key:ada has left of thinking_tokens"


class Racing:
    """A hold that is refused: others took what was left since the last attempt."""

    is_offline = False

    def __init__(self, log: list[Amounts], ceiling: Amounts) -> None:
        self.ceiling = ceiling
        self._attempts = log
        log.append(ceiling)

    async def __aenter__(self) -> Self:
        raise HoldRefused("gone", scope="key:ada", unit="tokens", kind="rate", retry_after_s=1.0)

    async def __aexit__(self, *_: object) -> None:
        """Nothing was held."""

    def remaining(self, unit: Unit) -> Remaining | None:
        left = self._attempts[-1].tokens - 10
        return Remaining(limit=left, remaining=left, reset_s=1.0) if unit == "tokens" else None


@contextmanager
def raced(running: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Amounts]]:
    """The holds that are tried while each is refused by a few tokens."""
    attempts: list[Amounts] = []
    with monkeypatch.context() as patch:
        patch.setattr(running.gateway.ledger, "hold", lambda _scopes, ceiling, **_: Racing(attempts, ceiling))
        yield attempts


async def test_a_race_leads_down_and_not_in_circles(scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often others are faster, each step is tried once, for less each time, and then the request is refused."""
    async with live(tree(scripted, 9999)) as running:
        with raced(running, monkeypatch) as attempts:
            answer = await asked(running, {**ASK, **CAPPED})
        assert (answer.status, answer.error["code"]) == (429, "rate")
        assert len(attempts) == 4
        thinking = [each.thinking_tokens for each in attempts]
        assert thinking == sorted(set(thinking), reverse=True)
        assert thinking[-1] == 0
        assert running.metric("thinkgate_requests_total", **labels("reasoning", 429)) == 1
        assert running.metric("thinkgate_degraded_total", step="cap", model=MODEL) == 0


async def test_a_text_completion_has_nothing_to_degrade(scripted: ScriptedBackend) -> None:
    """A raw prompt does not think, so that it fits or is refused."""
    async with live(tree(scripted, 10)) as running:
        answer = await ask(running, {"model": MODEL, "prompt": "hi"}, "/v1/completions", headers=key_headers(SECRET))
        assert answer.status == 429


REFUSED_LATE = HoldRefused("late", scope="key:ada", unit="tokens", kind="rate", retry_after_s=1.0)


@pytest.mark.parametrize("late", [REFUSED_LATE, StoreUnreachable("late")])
async def test_only_a_refusal_of_the_hold_itself_is_one(
    scripted: ScriptedBackend, monkeypatch: pytest.MonkeyPatch, late: Exception
) -> None:
    """What a hold that was taken raises later starts no second answer, and is no refusal of the request."""
    begun = []

    async def carry_out(answer: Answering) -> None:
        begun.append(answer)
        raise late

    async with live(tree(scripted, 10**6)) as running:
        monkeypatch.setattr(Answering, "carry_out", carry_out)
        assert (await asked(running, STREAM)).status == 500
    assert len(begun) == 1
