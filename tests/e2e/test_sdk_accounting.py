"""Caps and counts through the OpenAI SDK, with a real vLLM and with the embedded engine."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from tests.e2e.sdk import NO_END, Answer, ask, check_accounts, check_token_ids, client_of
from tests.e2e.servers import Gateway

QUESTION = "What is 17+25? Think, then answer briefly."
DEFAULT_CAP = 64  # conftest.model_config
FLOOR = 8  # likewise
WRAP_UP_TOKENS = 15  # the default one, and the end marker: the engine forces them, vLLM's own cap the marker alone
TEMPLATE_TOKENS = 4  # vLLM counts what the template puts after the start marker; here that is one


@pytest.fixture(params=["vllm", "embedded"])
def served(request: pytest.FixtureRequest) -> Gateway:
    """A gateway before a real vLLM, and one with the engine inside."""
    gateway: Gateway = request.getfixturevalue(f"{request.param}_gateway")
    return gateway


@pytest.fixture
def client(served: Gateway) -> OpenAI:
    """The SDK of that gateway."""
    return client_of(served)


def reason(client: OpenAI, cap: int | None, *, stream: bool = False, total: int | None = None, n: int = 1) -> Answer:
    """A request in reasoning mode whose model would think for ever."""
    thinkgate = {"mode": "reasoning"} | ({} if cap is None else {"thinking_tokens": cap})
    sampling: dict[str, Any] = {"n": n, "temperature": 1.0, "seed": 7} if n > 1 else {}
    return ask(
        client,
        QUESTION,
        stream=stream,
        max_completion_tokens=total or (DEFAULT_CAP if cap is None else cap) + 24,
        logit_bias=NO_END,
        thinkgate=thinkgate,
        return_token_ids=True,
        **sampling,
    )


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("cap", [1, 5, 40, None])
def test_cap_ends_thinking_and_the_counts_add_up(client: OpenAI, cap: int | None, stream: bool) -> None:
    """Thinking stays within the cap, uses nearly all of it, and every account agrees with the token ids."""
    answer = reason(client, cap, stream=stream)
    bound = DEFAULT_CAP if cap is None else cap
    check_accounts(answer, cap=bound)
    check_token_ids(answer)
    assert answer.tokens["thinking"] >= bound - TEMPLATE_TOKENS
    assert (answer.thinkgate["mode"], answer.thinkgate["capped"]) == ("reasoning", True)
    assert answer.thinkgate["cap"]["tokens"] == bound
    assert answer.thinkgate["cap"]["source"] == ("default" if cap is None else "request")
    assert answer.first.content
    assert "</think>" not in answer.first.thinking + answer.first.content


@pytest.mark.parametrize("stream", [False, True])
def test_cap_of_zero_answers_at_once(client: OpenAI, stream: bool) -> None:
    """Without thinking tokens there is no thinking text and none is counted."""
    answer = ask(
        client,
        QUESTION,
        stream=stream,
        max_completion_tokens=20,
        logit_bias=NO_END,
        thinkgate={"thinking_tokens": 0},
    )
    check_accounts(answer, cap=0)
    assert answer.first.thinking == ""
    assert answer.first.content
    assert answer.tokens["thinking"] == 0
    assert not answer.thinkgate["capped"]
    assert answer.first.finish_reason == "length"


def test_cap_above_what_fits_is_clamped_when_nobody_named_it(client: OpenAI) -> None:
    """A default that leaves no room for the answer floor is clamped, and the response says from what."""
    answer = reason(client, None, total=40)
    most = 40 - FLOOR - WRAP_UP_TOKENS
    check_accounts(answer, cap=most)
    assert answer.thinkgate["cap"]["tokens"] == most
    assert answer.first.content
    assert answer.thinkgate["cap"]["clamped_from"] == DEFAULT_CAP
    assert answer.thinkgate["cap"]["clamped_by"]


def test_stream_and_whole_answer_agree(client: OpenAI) -> None:
    """The same greedy request gives the same text, finish and counts, streamed or not."""
    reason(client, 20)  # from here on the prompt is in the prefix cache
    whole, streamed = reason(client, 20), reason(client, 20, stream=True)
    assert streamed.choices == whole.choices
    assert streamed.usage == whole.usage
    same = ("mode", "capped", "cap", "tokens", "settled", "cost_usd", "backend")
    assert {name: streamed.thinkgate[name] for name in same} == {name: whole.thinkgate[name] for name in same}


@pytest.mark.parametrize("stream", [False, True])
def test_every_choice_has_its_own_cap(client: OpenAI, stream: bool) -> None:
    """With n=3 each choice thinks within the cap, finishes once and is counted in one usage."""
    answer = reason(client, 10, stream=stream, n=3, total=40)
    assert sorted(answer.choices) == [0, 1, 2]
    check_accounts(answer, cap=10)
    check_token_ids(answer)
    assert all(choice.finish_reason == "length" for choice in answer.choices.values())
    assert all(len(choice.token_ids) == 40 for choice in answer.choices.values())


def test_usage_comes_only_when_asked_for(client: OpenAI) -> None:
    """A stream that did not ask for usage has no chunk without choices, and the same accounts."""
    answer = ask(client, QUESTION, stream=True, usage=False, max_completion_tokens=16, thinkgate={"mode": "instant"})
    check_accounts(answer)
    assert answer.usage is None


def test_repeated_prompt_is_counted_as_cached(vllm_gateway: Gateway) -> None:
    """What vLLM takes from its prefix cache is `cached`, at its own price, and the rest is `prompt`."""
    client = client_of(vllm_gateway)
    prompt = "Tell me about the sea, the wind and the sky above it. " * 8
    first = ask(client, prompt, max_completion_tokens=4, thinkgate={"mode": "instant"})
    second = ask(client, prompt, max_completion_tokens=4, thinkgate={"mode": "instant"})
    check_accounts(second)
    assert second.tokens["cached"] >= 32
    assert second.tokens["prompt"] + second.tokens["cached"] == first.tokens["prompt"] + first.tokens["cached"]


def test_metrics_count_what_the_response_counts(served: Gateway, client: OpenAI) -> None:
    """The counters grow by the response's tokens and money, and nothing stays held."""
    served.wait_settled()
    names = ("thinking", "answer", "injected")
    before = {kind: served.metric("thinkgate_tokens_total", kind=kind) for kind in names}
    money = served.metric("thinkgate_cost_nano_usd_total")
    answer = reason(client, 10, total=40)
    served.wait_metric("thinkgate_cost_nano_usd_total", money + answer.thinkgate["settled"]["nano_usd"])
    served.wait_settled()
    after = {kind: served.metric("thinkgate_tokens_total", kind=kind) for kind in names}
    assert {kind: after[kind] - before[kind] for kind in names} == {kind: answer.tokens[kind] for kind in names}
