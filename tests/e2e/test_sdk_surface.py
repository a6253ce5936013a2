"""The OpenAI SDK's features through the gateway, with a real vLLM and with the embedded engine."""

from __future__ import annotations

import json
import secrets
from typing import Any

import openai
import pytest
from openai import OpenAI

from tests.e2e.sdk import MODEL, NO_END, ask, check_accounts, client_of
from tests.e2e.servers import Gateway

QUESTION = "What is 17+25? Think, then answer briefly."
INSTANT = {"mode": "instant"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def schema(name: str, values: list[Any]) -> dict[str, Any]:
    """A response format that allows one property with one of `values`."""
    body = {
        "type": "object",
        "properties": {name: {"enum": values}},
        "required": [name],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": body}}


@pytest.fixture(params=["vllm", "embedded"])
def served(request: pytest.FixtureRequest) -> Gateway:
    """A gateway before a real vLLM, and one with the engine inside."""
    gateway: Gateway = request.getfixturevalue(f"{request.param}_gateway")
    return gateway


@pytest.fixture
def client(served: Gateway) -> OpenAI:
    """The SDK of that gateway."""
    return client_of(served)


def test_models_are_listed(client: OpenAI) -> None:
    """The SDK's model list has the public name, and so has the single model."""
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_plain_chat_answers(client: OpenAI) -> None:
    """A request that knows nothing of thinkgate works."""
    answer = ask(client, "Say hello.", max_completion_tokens=64)
    check_accounts(answer)
    assert answer.first.finish_reason in {"stop", "length"}


def test_response_names_mode_and_backend_in_headers(client: OpenAI) -> None:
    """Headers repeat what the extension says, and every response has a request id."""
    messages: Any = [{"role": "user", "content": "Say hello."}]
    raw = client.chat.completions.with_raw_response.create(
        model=f"{MODEL}:instant", messages=messages, max_completion_tokens=8
    )
    report = (raw.parse().model_extra or {})["thinkgate"]
    assert raw.headers["x-thinkgate-mode"] == report["mode"] == "instant"
    assert raw.headers["x-thinkgate-backend"] == report["backend"]
    assert raw.headers["x-request-id"] == report["request_id"]
    assert float(raw.headers["x-thinkgate-overhead-ms"]) >= 0


@pytest.mark.parametrize("stream", [False, True])
def test_request_sent_again_gets_the_first_answer(client: OpenAI, stream: bool) -> None:
    """With `extra_headers` the SDK's request is carried out once: even at a high temperature both answers agree."""
    create = client.chat.completions.with_raw_response.create
    request: Any = {"model": f"{MODEL}:instant", "messages": [{"role": "user", "content": "Say something."}]}
    request |= {"max_completion_tokens": 24, "temperature": 2.0, "stream": stream}
    headers = {"Idempotency-Key": secrets.token_hex()}
    told, heads = [], []
    for _ in range(2):
        raw = create(**request, extra_headers=headers)
        told.append([chunk.to_dict() for chunk in raw.parse()] if stream else raw.parse().to_dict())
        heads.append(raw.headers)
    assert told[0] == told[1]
    assert heads[0]["x-request-id"] == heads[1]["x-request-id"]
    assert ("idempotent-replayed" in heads[0], heads[1]["idempotent-replayed"]) == (False, "true")
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        create(**request | {"max_completion_tokens": 25}, extra_headers=headers)
    assert refused.value.code == "idempotency_mismatch"


@pytest.mark.parametrize("stream", [False, True])
def test_stop_ends_the_answer_where_the_string_begins(client: OpenAI, stream: bool) -> None:
    """The answer ends before the stop string, the thinking is what it was, and the accounts agree."""
    asked: dict[str, Any] = {
        "max_completion_tokens": 40,
        "logit_bias": NO_END,
        "thinkgate": {"mode": "reasoning", "thinking_tokens": 10},
    }
    ask(client, QUESTION, **asked)  # from here on the prompt is in the prefix cache
    free = ask(client, QUESTION, **asked)
    middle = len(free.first.content) // 2
    stop = free.first.content[middle : middle + 5]
    cut = ask(client, QUESTION, stream=stream, stop=[stop], **asked)
    check_accounts(cut, cap=10)
    assert cut.first.content == free.first.content[: free.first.content.index(stop)]
    assert cut.first.thinking == free.first.thinking
    assert cut.first.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_come_for_every_token(client: OpenAI, stream: bool) -> None:
    """With logprobs there is an entry with alternatives for each output token."""
    answer = ask(
        client,
        "Count to five.",
        stream=stream,
        logprobs=True,
        top_logprobs=2,
        max_completion_tokens=8,
        logit_bias=NO_END,
        thinkgate=INSTANT,
    )
    check_accounts(answer)
    assert len(answer.first.logprobs) == answer.tokens["answer"] == 8
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in answer.first.logprobs)
    assert "".join(entry.token for entry in answer.first.logprobs) == answer.first.content


@pytest.mark.parametrize("stream", [False, True])
def test_named_tool_is_called(client: OpenAI, stream: bool) -> None:
    """A tool the client names comes back as a call with its own arguments; the gateway runs nothing."""
    answer = ask(
        client,
        "What is the weather in Paris?",
        stream=stream,
        tools=[WEATHER],
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        max_completion_tokens=120,
        thinkgate=INSTANT,
    )
    check_accounts(answer)
    (call,) = answer.first.calls.values()
    assert call["name"] == "get_weather"
    assert call["id"]
    assert json.loads(call["arguments"]) in ({"city": "Paris"}, {"city": "Rome"})
    assert answer.first.finish_reason in {"stop", "tool_calls"}
    assert answer.thinkgate["mode"] == "instant"


@pytest.mark.parametrize("stream", [False, True])
def test_schema_holds_after_capped_thinking(client: OpenAI, stream: bool) -> None:
    """Thinking is free until its cap; the answer after it is JSON of the schema."""
    answer = ask(
        client,
        QUESTION,
        stream=stream,
        response_format=schema("sum", [41, 42, 43]),
        max_completion_tokens=200,
        logit_bias=NO_END,
        thinkgate={"mode": "reasoning", "thinking_tokens": 20},
    )
    check_accounts(answer, cap=20)
    assert json.loads(answer.first.content)["sum"] in {41, 42, 43}
    assert answer.first.finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens_arrive_whole(client: OpenAI, stream: bool) -> None:
    """Characters that are several tokens are never torn, whatever the chunks."""
    text = "😀漢字é 👩‍👧 ok"
    answer = ask(
        client,
        "Write the text.",
        stream=stream,
        response_format=schema("text", [text]),
        max_completion_tokens=120,
        thinkgate=INSTANT,
    )
    check_accounts(answer)
    assert json.loads(answer.first.content) == {"text": text}
    assert "\ufffd" not in answer.first.content


def test_text_completion_works(client: OpenAI) -> None:
    """The old completions call answers without thinking and is accounted for."""
    done = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0)
    report = (done.model_extra or {})["thinkgate"]
    assert done.choices[0].text
    assert done.usage is not None
    assert done.usage.completion_tokens == report["tokens"]["answer"] + report["tokens"]["injected"]
    assert report["tokens"]["thinking"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "nope"}, 404, "model"),
        ({"temperature": "hot"}, 400, "temperature"),
        ({"extra_body": {"cache_salt": "mine"}}, 400, "cache_salt"),
        ({"extra_body": {"thinkgate": {"thinking_tokens": 5000}}}, 400, "thinkgate.thinking_tokens"),
        ({"extra_body": {"thinkgate": {"mode": "instant", "thinking_tokens": 5}}}, 400, None),
    ],
)
def test_bad_requests_name_the_field(client: OpenAI, fields: dict[str, Any], status: int, param: Any) -> None:
    """What is wrong with a request is said as the SDK expects it, with the field at fault."""
    create: Any = client.chat.completions.create
    request = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    with pytest.raises(openai.APIStatusError) as failed:
        create(**request)
    assert failed.value.status_code == status
    assert failed.value.type == "invalid_request_error"
    assert param is None or failed.value.param == param


def test_prompt_beyond_the_window_is_refused(client: OpenAI) -> None:
    """A prompt that does not fit the model's window is the client's mistake, not a broken backend."""
    with pytest.raises(openai.BadRequestError):
        ask(client, "hello " * 9000, max_completion_tokens=8)
