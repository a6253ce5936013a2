"""What else decides how long is thought, and what of it is seen: on a real vLLM and on the embedded engine."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.sdk import END_THINK, NO_END, Answer, ask, check_accounts, client_of
from tests.e2e.servers import Gateway

QUESTION = "What is 17+25?"
FLOOR = 8  # conftest.model_config
LONG = 900


@pytest.fixture(params=["vllm", "embedded"])
def client(request: pytest.FixtureRequest) -> OpenAI:
    """The SDK of a gateway before a real vLLM, and of one with the engine inside."""
    gateway: Gateway = request.getfixturevalue(f"{request.param}_gateway")
    return client_of(gateway)


def think(client: OpenAI, *, stream: bool, bias: dict[str, float] | None = None, **fields: Any) -> Answer:
    """A greedy request of a model that would think for ever, unless `bias` says otherwise."""
    return ask(client, QUESTION, stream=stream, logit_bias=bias or NO_END, return_token_ids=True, **fields)


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_that_ends_too_early_goes_on(client: OpenAI, stream: bool) -> None:
    """With `min_thinking_tokens` an end that is sampled early is dropped for "Wait", and the cap holds as ever."""
    thinkgate = {"thinking_tokens": 24, "min_thinking_tokens": 16}
    eager = {str(END_THINK): 8.0, **NO_END}  # ends its thinking after a few tokens
    answer = think(client, stream=stream, bias=eager, max_completion_tokens=52, thinkgate=thinkgate)
    check_accounts(answer, cap=24, may_waste=True)
    waits = answer.thinkgate["cap"]["waits"]
    assert answer.first.thinking.count("Wait") == waits > 0
    assert answer.tokens["wasted"] == waits  # the markers that were dropped
    assert answer.first.token_ids.index(END_THINK) == answer.tokens["thinking"] + waits
    assert answer.tokens["thinking"] >= 16
    assert answer.first.content
    assert "Wait" not in answer.first.content


@pytest.mark.parametrize(
    ("part", "most", "ended_by", "stream"),
    [("tokens", 100, "total", True), ("usd", 0.00025, "usd", False), ("seconds", 4, "seconds", True)],
)
def test_envelope_ends_thinking_gracefully(client: OpenAI, part: str, most: float, ended_by: str, stream: bool) -> None:
    """Whichever part of the envelope runs out, the thinking is wrapped up while an answer still fits."""
    thinkgate = {"thinking_tokens": LONG, "envelope": {part: most}, "answer_tokens_min": 2 * FLOOR}
    answer = think(client, stream=stream, max_completion_tokens=1500, thinkgate=thinkgate)
    check_accounts(answer, cap=LONG)
    assert answer.thinkgate["cap"]["ended_by"] == ended_by
    assert not answer.thinkgate["capped"]
    assert 0 < answer.tokens["thinking"] < LONG
    assert answer.first.thinking.endswith("I answer with what I have.\n")
    assert answer.first.content
    if part == "tokens":
        assert sum(answer.tokens.values()) <= most
    elif part == "usd":
        assert answer.thinkgate["cost_usd"] <= most
    if part != "seconds":
        assert answer.tokens["answer"] >= 2 * FLOOR


@pytest.mark.parametrize("stream", [False, True])
def test_excluded_thinking_is_counted_and_not_shown(client: OpenAI, stream: bool) -> None:
    """With `reasoning.exclude` no thinking text arrives; its tokens are thought, counted and charged all the same."""
    reasoning = {"max_tokens": 8, "exclude": True}
    answer = ask(client, QUESTION, stream=stream, max_completion_tokens=36, logit_bias=NO_END, reasoning=reasoning)
    check_accounts(answer, cap=8)
    assert answer.first.thinking == ""
    assert answer.first.content
    assert answer.tokens["thinking"] > 0
    assert "Time is up" not in answer.first.content


@pytest.mark.parametrize("stream", [False, True])
def test_summary_stands_where_the_thinking_would(client: OpenAI, stream: bool) -> None:
    """With `reasoning.summary` the same backend's summary arrives instead, paid for but no part of the usage."""
    fields: dict[str, Any] = {"stream": stream, "max_completion_tokens": 40, "thinkgate": {"thinking_tokens": 12}}
    full = think(client, **fields)
    answer = think(client, **fields, reasoning={"summary": "concise"})
    assert answer.thinkgate["summary"] == "concise"
    assert answer.first.thinking
    assert answer.first.thinking != full.first.thinking
    assert answer.first.content  # two runs of one request may differ by a rounded logit, and from there on
    assert answer.first.thinking not in answer.first.content
    assert answer.usage is not None
    assert full.usage is not None
    counted = ("completion_tokens", "prompt_tokens", "total_tokens")
    assert {name: answer.usage[name] for name in counted} == {name: full.usage[name] for name in counted}
    assert answer.tokens["planner"] > 0
    assert answer.thinkgate["settled"]["tokens"] == sum(answer.tokens.values())
    assert answer.thinkgate["settled"]["nano_usd"] > full.thinkgate["settled"]["nano_usd"]
    assert answer.thinkgate["settled"]["tokens"] <= answer.thinkgate["hold"]["tokens"]
