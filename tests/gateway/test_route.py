"""Explaining a decision, scoring its outcome, and deciding again from a log."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

import msgspec
import pytest

from gateway.cli import main
from gateway.edge.extension import DecisionReport
from gateway.eval_route import eval_route, replay
from gateway.judge import load_scorer
from router.features import NAMES
from router.judge import Policy, judge, judge_score
from router.scorer import Score
from router.utility import Arm
from tests.gateway.asgi import ask, gateway_of
from tests.gateway.live import MODEL, key_headers, live, tree_of
from tests.gateway.live import ask as live_ask
from tests.gateway.still import Json, config_of
from tests.scripted_backend import ScriptedBackend

SCORER = load_scorer("builtin")
CHAT = {"model": "qwen", "messages": [{"role": "user", "content": "hello there, how are you?"}]}
WORK = {**CHAT, "messages": [{"role": "user", "content": "Prove that n^2 + n is even for all integers n."}]}


def gateway(**top: Any) -> Any:
    """A gateway with the text scorer, and its log."""
    return gateway_of(config_of(routing={"scorer": "builtin"}, **top))


async def test_a_decision_is_explained_without_being_carried_out() -> None:
    """Mode, cap and hold are those of a completion, with every number the text gave; nothing is held or called."""
    app, _ = gateway()
    told = (await ask(app, WORK, "/v1/route")).json
    assert (told["mode"], told["by_text"], told["cap"]["tokens"]) == ("reasoning", True, 500)
    assert told["text"]["probability"] >= 0.75
    assert set(told["text"]["features"]) >= {"words_logic", "symbol_share"}
    assert told["hold"]["thinking_tokens"] == 500
    assert app.ledger.held().tokens == 0
    assert app.serving.models["qwen"].slots[0].in_flight == 0


async def test_what_structure_decides_is_told_beside_what_the_text_says() -> None:
    """A request that names its mode keeps it, and the text's view is shown all the same."""
    app, _ = gateway()
    told = (await ask(app, {**CHAT, "reasoning_effort": "low"}, "/v1/route")).json
    assert (told["mode"], told["by_text"], told["mode_reason"]) == ("reasoning", False, "asked by reasoning_effort")
    assert told["text"]["mode"] == "instant"


async def test_without_a_scorer_there_is_no_text() -> None:
    """Structure alone is explained, too."""
    app, _ = gateway_of(config_of())
    told = (await ask(app, CHAT, "/v1/route")).json
    assert (told["by_text"], told["text"]) == (False, None)


async def test_the_response_and_the_log_say_the_same() -> None:
    """The record of a completion is that of /v1/route, and the log can be decided again from it."""
    app, lines = gateway()
    explained = (await ask(app, WORK, "/v1/route")).json["text"]
    answer = (await ask(app, WORK)).json["thinkgate"]
    assert answer["decision"] == explained
    app.lines.flush()
    logged = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["decision"] for line in logged] == [explained, explained]
    out = io.StringIO()
    assert SCORER is not None
    assert eval_route(lines.getvalue().encode().splitlines(), SCORER, out) == 0
    assert "decided by text: 2 (2 reasoning)" in out.getvalue()
    assert "the same: 2" in out.getvalue()


async def test_a_score_is_counted_once_and_for_its_own_key_only() -> None:
    """Feedback moves the statistics of the mode and difficulty it was about; nobody else's, and not twice."""
    app, _ = gateway()
    answer = (await ask(app, WORK)).json["thinkgate"]
    level = answer["decision"]["level"]
    before = app.statistics.of("qwen", "reasoning", level).quality
    said = {"request_id": answer["request_id"], "score": 0}
    assert (await ask(app, said, "/v1/feedback")).json == {"object": "thinkgate.feedback", "accepted": True}
    assert app.statistics.of("qwen", "reasoning", level).quality < before
    assert (await ask(app, said, "/v1/feedback")).status == 404
    assert (await ask(app, {**said, "request_id": "other"}, "/v1/feedback")).status == 404


async def test_tokens_are_learnt_without_being_told() -> None:
    """A finished request moves the expected tokens of its mode and difficulty towards what it took."""
    app, _ = gateway()
    level = (await ask(app, WORK, "/v1/route")).json["text"]["level"]
    before = app.statistics.of("qwen", "reasoning", level).tokens
    await ask(app, WORK)
    assert app.statistics.of("qwen", "reasoning", level).tokens < before


@pytest.mark.parametrize(
    "body", [{}, {"request_id": "a"}, {"request_id": "a", "score": 2}, {"request_id": "a", "score": 1, "x": 1}, b"["]
)
async def test_feedback_is_checked(body: Json | bytes) -> None:
    """A missing, wrong or unknown field is a 400."""
    app, _ = gateway()
    assert (await ask(app, body, "/v1/feedback")).status == 400


@pytest.mark.parametrize("probability", [0.1, 0.6, 0.9])
@pytest.mark.parametrize("by", ["text", "utility", "drawn"])
def test_every_kind_of_decision_can_be_repeated(probability: float, by: str) -> None:
    """What was weighed or drawn stands in the record, and comes out the same."""
    assert SCORER is not None
    arms = [Arm("instant", 0.5, 0.001, 0.4), Arm("reasoning", 0.9, 0.01, 0.3)]
    text = {0.1: "hello", 0.6: "How many squares are on the board?", 0.9: "Solve x^2 = 4*x + 5."}[probability]
    policy = Policy(
        on_uncertain="instant",
        quality_floor=0.3,
        weighed=(lambda _: arms) if by == "utility" else None,
        drawn=(lambda _: arms) if by == "drawn" else None,
    )
    told = DecisionReport.of(judge(SCORER, text, policy, has_media=False))
    assert replay(told, SCORER) == told


@pytest.mark.parametrize("by", ["utility", "drawn"])
def test_a_record_that_lost_its_arms_is_told(by: str) -> None:
    """What was weighed cannot be weighed again without the arms: the decision counts as one that differs."""
    assert SCORER is not None
    told = _plain(DecisionReport.of(judge(SCORER, "How many squares are on the board?", Policy(), has_media=False)))
    line = {"request_id": "r1", "decision": {**told, "by": by}}
    assert eval_route([json.dumps(line).encode()], SCORER, io.StringIO()) == 1


def test_a_changed_record_and_a_changed_scorer_are_told() -> None:
    """A decision that this scorer made and does not repeat is an error; one of another scorer is only counted."""
    assert SCORER is not None
    told = DecisionReport.of(judge_score(SCORER, Score(0.9, 3, SCORER.read("hello").features), Policy()))
    line = {"request_id": "r1", "decision": json.loads(json.dumps(_plain(told)))}
    out = io.StringIO()
    assert eval_route([json.dumps(line).encode(), b"no json", b""], SCORER, out) == 1
    assert out.getvalue().startswith("r1: reasoning (text, 0.9, difficulty 3), now instant (text, ")
    other = {**line, "decision": {**line["decision"], "scorer": "0123456789ab"}}
    out = io.StringIO()
    assert eval_route([json.dumps(other).encode()], SCORER, out) == 0
    assert "reasoning would now be instant: 1" in out.getvalue()


def _plain(told: DecisionReport) -> Any:
    return msgspec.to_builtins(told)


def test_the_command_line_replays_a_log(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """`thinkgate eval route --log FILE` prints the counts; a file that is not there is said."""
    log = tmp_path / "gateway.log"
    log.write_text('{"event": "request"}\n')
    assert main(["eval", "route", "--log", str(log)]) == 0
    assert "decided by text: 0" in capsys.readouterr().out
    assert main(["eval", "route", "--log", str(tmp_path / "no.log")]) == 1
    assert "cannot be read" in capsys.readouterr().err


async def test_one_step_down_keeps_what_the_text_said(scripted: ScriptedBackend) -> None:
    """A request whose text asks for thinking, and whose limits refuse it, thinks less, and tells the same."""
    entry = {"id": "ada", "secret_sha256": hashlib.sha256(b"s").hexdigest(), "degrade": ["cap"]}
    body = {**WORK, "model": MODEL}
    headers = key_headers("s")
    async with live(tree_of(scripted, keys=[entry], routing={"scorer": "builtin"})) as running:
        full = (await live_ask(running, body, headers=headers)).json["thinkgate"]
    limit = {"scope": "key:ada", "unit": "tokens", "amount": full["hold"]["tokens"] - 4, "window": "day"}
    async with live(tree_of(scripted, keys=[entry], limits=[limit], routing={"scorer": "builtin"})) as running:
        less = (await live_ask(running, body, headers=headers)).json["thinkgate"]
    assert [taken["step"] for taken in less["degraded"]] == ["cap"]
    assert less["cap"]["tokens"] == full["cap"]["tokens"] - 4
    assert less["decision"] == full["decision"]


async def test_a_record_of_a_text_holds_nothing_of_it() -> None:
    """Names are the features' own and values are numbers: no word of a prompt is among them."""
    app, lines = gateway()
    secret = "Prove that xylophone n^2 + quokka is even for all integers n."
    told = (await ask(app, {**WORK, "messages": [{"role": "user", "content": secret}]})).json["thinkgate"]["decision"]
    app.lines.flush()
    assert set(told["features"]) <= set(NAMES)
    assert {type(value) for value in told["features"].values()} <= {float, int}
    assert "xylophone" not in lines.getvalue() + json.dumps(told)
    assert "quokka" not in lines.getvalue() + json.dumps(told)
