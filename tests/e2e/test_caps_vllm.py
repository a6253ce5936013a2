"""Caps before a real vLLM: its own, two-phase enforcement, and a chain opened for a model that does not think."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.caps import CAPS, QUESTION, ROOM, SHAPES, Cell, Marks, Vocabulary, ask_cells, check_cell
from tests.e2e.cuttable_proxy import cuttable
from tests.e2e.sdk import MODEL, NO_END, ask, check_accounts, client_of
from tests.e2e.servers import CAP_WAYS, WRAP_UP, Gateway, StartGateway, Vllm, capped_by

BLOCK_TOKENS = 32  # servers.VLLM_FLAGS
CapGateway = Callable[[str], Gateway]


@pytest.fixture(scope="session")
def vocabulary(thinking_model: Path) -> Vocabulary:
    """The model's tokens."""
    return Vocabulary(thinking_model)


def is_native(way: str, shape: str = "plain") -> bool:
    """Whether the backend's own cap holds: it lets calls that a grammar makes break their schema after thinking."""
    return way == "native" and shape not in {"named", "required"}


def marks_of(vocabulary: Vocabulary, way: str, shape: str = "plain") -> Marks:
    """What a gateway of that way may force."""
    thinking = CAP_WAYS[way]
    end = vocabulary.ids(thinking.get("end", "</think>"))
    if is_native(way, shape):
        return Marks([], end, [], kept_back=len(vocabulary.ids(WRAP_UP)))
    return Marks(vocabulary.ids(f"{thinking.get('start', '<think>')}\n"), end, vocabulary.ids(WRAP_UP))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", CAP_WAYS)
def test_cap_holds_in_every_cell(cap_gateway: CapGateway, vocabulary: Vocabulary, way: str, shape: str) -> None:
    """Whatever is asked for, streamed or not, each choice thinks within the cap by count, and answers whole."""
    choices = (1,) if shape == "plain" else (1, 3)  # logprobs are asked for plain answers, too
    cells = [Cell(cap, n, stream) for cap in CAPS for n in choices for stream in (False, True)]
    marks = marks_of(vocabulary, way, shape)
    answers = ask_cells(client_of(cap_gateway(way)), SHAPES[shape], cells, marks, vocabulary.compact())
    for cell, answer in zip(cells, answers, strict=True):
        check_cell(answer, SHAPES[shape], cell, marks)
        if cell.cap != 0:
            assert answer.thinkgate["cap"]["enforcement"] == ("native" if is_native(way, shape) else "two_phase")


@pytest.mark.parametrize("way", CAP_WAYS)
def test_stream_and_whole_answer_agree_token_by_token(
    cap_gateway: CapGateway, vocabulary: Vocabulary, way: str
) -> None:
    """The same greedy request gives the same text, ids, tokens with logprobs, usage and report, streamed or not."""
    asked: dict[str, Any] = {
        "max_completion_tokens": 5 + marks_of(vocabulary, way).most_forced + ROOM,
        "logit_bias": NO_END,
        "thinkgate": {"thinking_tokens": 5},
        "return_token_ids": True,
        "logprobs": True,
        "top_logprobs": 2,
        "seed": 7,
    }
    client = client_of(cap_gateway(way))
    ask(client, QUESTION, **asked)  # from here on what can be in the prefix cache is there
    whole, streamed = ask(client, QUESTION, **asked), ask(client, QUESTION, stream=True, **asked)
    for one, other in zip(streamed.first.logprobs, whole.first.logprobs, strict=True):
        assert (one.token, one.bytes, len(one.top_logprobs)) == (other.token, other.bytes, len(other.top_logprobs))
        assert one.logprob == pytest.approx(other.logprob, abs=0.25)  # bfloat16 rounds otherwise in another batch
    streamed.first.logprobs = whole.first.logprobs = []
    assert streamed.choices == whole.choices
    assert streamed.usage == whole.usage
    same = ("mode", "capped", "cap", "tokens", "settled", "cost_usd", "backend")
    assert {name: streamed.thinkgate[name] for name in same} == {name: whole.thinkgate[name] for name in same}


@pytest.mark.parametrize("n", [1, 3])
def test_second_phase_finds_the_first_in_the_prefix_cache(cap_gateway: CapGateway, n: int) -> None:
    """Of what is sent again, all but the last partial block, nine tenths and more are cached, for every choice."""
    answer = ask(
        client_of(cap_gateway("two_phase")),
        f"{n} choices. " + "The sea, the wind and the sky above it are grey today. " * 60,
        max_completion_tokens=60,
        logit_bias=NO_END,
        thinkgate={"thinking_tokens": 36},
        n=n,
        temperature=1.0,
        seed=3,
    )
    check_accounts(answer, cap=36)
    cap = answer.thinkgate["cap"]
    assert cap["resent_tokens"] > n * 700
    whole_blocks = cap["resent_tokens"] // n // BLOCK_TOKENS * BLOCK_TOKENS * n
    print(f"n={n}: {cap['resent_cached_tokens']} of {whole_blocks} tokens in whole blocks ({cap['resent_tokens']})")
    assert cap["resent_cached_tokens"] >= 0.9 * whole_blocks


def start_stream(gateway: Gateway, cap: int, n: int = 1) -> Any:
    """A stream of a thousand tokens and more, `cap` of them thinking."""
    create: Any = client_of(gateway).chat.completions.create
    extra = {"thinkgate": {"mode": "reasoning", "thinking_tokens": cap}}
    messages = [{"role": "user", "content": "Tell me a long story about the sea."}]
    return create(
        model=MODEL,
        messages=messages,
        stream=True,
        n=n,
        max_completion_tokens=1500,
        logit_bias=NO_END,
        temperature=1.0,
        extra_body=extra,
    )


def read_until_answered(stream: Any) -> None:
    """Read on until some choice has begun to answer."""
    for chunk in stream:
        if any(part.delta.content for part in chunk.choices):
            return


@pytest.mark.parametrize(("phase", "n"), [("thinking", 1), ("thinking", 3), ("answer", 1), ("answer", 3)])
def test_client_that_leaves_in_either_phase_stops_vllm(
    cap_gateway: CapGateway, vllm_server: Vllm, phase: str, n: int
) -> None:
    """Closing the stream aborts every choice's call at vLLM, charges what was generated and holds nothing."""
    gateway = cap_gateway("two_phase")
    gateway.wait_settled()
    left = gateway.metric("thinkgate_disconnects_total")
    thinking = gateway.metric("thinkgate_tokens_total", kind="thinking")
    stream = start_stream(gateway, 900 if phase == "thinking" else 5, n)
    if phase == "thinking":
        chunks = iter(stream)
        assert not any(part.delta.content for _ in range(4 * n) for part in next(chunks).choices)
    else:
        read_until_answered(stream)
    assert vllm_server.running_requests() > 0
    assert gateway.metric("thinkgate_held_tokens") > 1000 * n
    stream.close()
    vllm_server.wait_idle()
    gateway.wait_metric("thinkgate_disconnects_total", left + 1)
    gateway.wait_settled()
    charged = gateway.metric("thinkgate_tokens_total", kind="thinking") - thinking
    assert 0 < charged <= (900 if phase == "thinking" else 5) * n
    assert gateway.metric("thinkgate_backend_calls") == 0


def test_vllm_that_dies_in_the_second_phase_ends_the_stream_with_an_error(
    gateway: StartGateway, vllm_config: dict[str, Any], vllm_server: Vllm
) -> None:
    """The SDK raises the gateway's error, what was generated is charged, and the hold is settled."""
    with cuttable(vllm_server.url) as proxy:
        config = capped_by(vllm_config, "two_phase")
        config["models"][MODEL]["backends"] = [{"id": "vllm", "url": proxy.url}]
        mine = gateway(config)
        stream = start_stream(mine, 5)
        read_until_answered(stream)
        proxy.cut()
        with pytest.raises(openai.APIError) as failed:
            list(stream)
        assert isinstance(failed.value.body, dict)
        assert failed.value.body["type"] == "upstream_error"
        mine.wait_settled()
        assert mine.metric("thinkgate_tokens_total", kind="thinking") == 5
        assert mine.metric("thinkgate_tokens_total", kind="answer") > 0
        vllm_server.wait_idle()


def test_cached_prompt_is_counted_where_a_stop_string_ends_the_answer(cap_gateway: CapGateway) -> None:
    """What the first segment found in the prefix cache is priced as cached, though the second never tells its usage."""
    client, prompt = client_of(cap_gateway("two_phase")), "The moon, the sand and the tide go round. " * 10
    stopped: dict[str, Any] = {**SHAPES["stop"].fields, "max_completion_tokens": 40, "logit_bias": NO_END}
    for _ in range(2):
        answer = ask(client, prompt, thinkgate={"thinking_tokens": 5}, **stopped)
        check_accounts(answer, cap=5, may_waste=True)
        assert answer.first.finish_reason == "stop"
    assert answer.tokens["cached"] >= 64
    assert answer.tokens["prompt"] <= BLOCK_TOKENS
