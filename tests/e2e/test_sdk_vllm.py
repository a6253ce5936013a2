"""What happens to a request whose client or whose vLLM goes away, seen through the OpenAI SDK."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.e2e.cuttable_proxy import CuttableProxy, cuttable
from tests.e2e.sdk import MODEL, NO_END, ask, check_accounts, client_of
from tests.e2e.servers import Gateway, StartGateway, Vllm, model_config

MESSAGES = [{"role": "user", "content": "Tell me a long story about the sea."}]
ENDLESS: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "logit_bias": NO_END, "temperature": 1.0}


def start_stream(gateway: Gateway, **fields: Any) -> Any:
    """A stream that would go on for a thousand tokens and more, and thinks first."""
    create: Any = client_of(gateway).chat.completions.create
    extra = {"thinkgate": {"mode": "reasoning", "thinking_tokens": 900}}
    return create(stream=True, max_completion_tokens=1500, extra_body=extra, **{**ENDLESS, **fields})


def read(stream: Any, count: int) -> list[Any]:
    """The next chunks with a choice."""
    chunks = iter(stream)
    return [next(chunks) for _ in range(count)]


def error_of(stream: Any) -> openai.APIError:
    """What the rest of a stream raises. Fails with what came instead, where it raises nothing."""
    rest = []
    try:
        for chunk in stream:
            rest.append(chunk)  # noqa: PERF402  # what came before the error is wanted, too
    except openai.APIError as error:
        return error
    pytest.fail(f"{len(rest)} chunks and no error; the last ones: {rest[-4:]}")


@pytest.fixture
def proxy(vllm_server: Vllm) -> Iterator[CuttableProxy]:
    """A way to the real vLLM that the test can cut."""
    with cuttable(vllm_server.url) as proxy:
        yield proxy


@pytest.mark.parametrize("n", [1, 3])
def test_client_that_leaves_stops_vllm(vllm_gateway: Gateway, vllm_server: Vllm, n: int) -> None:
    """Closing the stream aborts every choice at vLLM, settles the hold and charges what was generated."""
    vllm_gateway.wait_settled()
    left = vllm_gateway.metric("thinkgate_disconnects_total")
    thinking = vllm_gateway.metric("thinkgate_tokens_total", kind="thinking")
    stream = start_stream(vllm_gateway, n=n)
    read(stream, 5 * n)
    assert vllm_server.running_requests() > 0
    assert vllm_gateway.metric("thinkgate_held_tokens") > 900 * n
    stream.close()
    vllm_server.wait_idle()
    vllm_gateway.wait_metric("thinkgate_disconnects_total", left + 1)
    vllm_gateway.wait_settled()
    charged = vllm_gateway.metric("thinkgate_tokens_total", kind="thinking") - thinking
    assert 4 * n <= charged < 900 * n


def test_client_that_leaves_a_whole_answer_stops_vllm(vllm_gateway: Gateway, vllm_server: Vllm) -> None:
    """A client that gives up waiting for an answer in one piece stops vLLM, too."""
    vllm_gateway.wait_settled()
    with pytest.raises(openai.APITimeoutError):
        ask(
            client_of(vllm_gateway).with_options(timeout=2),
            "Tell me a long story.",
            max_completion_tokens=1500,
            logit_bias=NO_END,
            thinkgate={"mode": "instant"},
        )
    vllm_server.wait_idle()
    vllm_gateway.wait_settled()


def test_client_that_leaves_stops_the_embedded_engine(embedded_gateway: Gateway) -> None:
    """Closing the stream ends the generation inside the gateway and settles the hold."""
    embedded_gateway.wait_settled()
    stream = start_stream(embedded_gateway)
    read(stream, 5)
    assert embedded_gateway.metric("thinkgate_inflight_requests") == 1
    stream.close()
    embedded_gateway.wait_settled()
    assert embedded_gateway.metric("thinkgate_backend_calls") == 0


def test_backend_that_dies_ends_the_stream_with_an_error(
    gateway: StartGateway, proxy: CuttableProxy, vllm_server: Vllm
) -> None:
    """The SDK raises the gateway's error, what was generated is charged, and the hold is settled."""
    mine = gateway(model_config({"id": "vllm", "url": proxy.url}, upstream_model=vllm_server.model))
    stream = start_stream(mine)
    read(stream, 8)
    proxy.cut()
    failure = error_of(stream)
    assert isinstance(failure.body, dict)
    assert failure.body["type"] == "upstream_error"
    mine.wait_settled()
    assert 5 <= mine.metric("thinkgate_tokens_total", kind="thinking") < 900
    assert mine.metric("thinkgate_cost_nano_usd_total") > 0
    vllm_server.wait_idle()


def test_error_is_the_last_event_of_a_broken_stream(
    gateway: StartGateway, proxy: CuttableProxy, vllm_server: Vllm
) -> None:
    """On the wire a broken stream ends with a data line that has a top-level `error`, and no [DONE]."""
    mine = gateway(model_config({"id": "vllm", "url": proxy.url}, upstream_model=vllm_server.model))
    body = json.dumps({**ENDLESS, "stream": True, "max_completion_tokens": 1500}).encode()
    request = urllib.request.Request(
        f"{mine.url}/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.status == 200
        first = answer.readline()
        proxy.cut()
        events = [line for line in (first + answer.read()).split(b"\n\n") if line]
    assert json.loads(events[-1].removeprefix(b"data: "))["error"]["type"] == "upstream_error"
    assert not any(event == b"data: [DONE]" for event in events)


def test_gateway_outlives_its_backend(gateway: StartGateway, proxy: CuttableProxy, vllm_server: Vllm) -> None:
    """While the backend is gone requests fail at once and hold nothing; when it is back they work."""
    mine = gateway(model_config({"id": "vllm", "url": proxy.url}, upstream_model=vllm_server.model))
    client = client_of(mine)
    asked: dict[str, Any] = {"max_completion_tokens": 8, "thinkgate": {"mode": "instant"}}
    check_accounts(ask(client, "Say hello.", **asked))
    proxy.cut()
    with pytest.raises(openai.APIStatusError) as failed:
        ask(client, "Say hello.", **asked)
    assert failed.value.status_code in {502, 503}
    mine.wait_settled()
    proxy.mend()
    mine.wait_metric("thinkgate_backend_up", 1)
    check_accounts(ask(client, "Say hello.", **asked))
