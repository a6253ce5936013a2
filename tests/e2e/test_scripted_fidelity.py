"""The scripted upstream of the unit tests says things in the shape in which a real vLLM says them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal

from tests.e2e.servers import Vllm
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script
from tests.scripted_stream import END_THINK, EOS, NEWLINE, Say, tokens

# What only a real server has: these may be missing from the scripted one.
OPTIONAL = {
    "multimodal_tokens",
    "routed_experts",
    "refusal",
    "annotations",
    "audio",
    "function_call",
    "metrics",
}
OPTIONAL |= {"prompt_text", "kv_transfer_params", "ec_transfer_params", "permission", "prompt_logprobs"}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is 17+25?"}],
    "max_tokens": 12,
    "thinking_token_budget": 5,
    "logit_bias": {"2": -100},
    "seed": 7,
}
CHOICE = "yes it is"
# Completions calls with token ids; `closed`: in a prompt whose thinking is over.
OPEN: dict[str, Any] = {"max_tokens": 6, "logit_bias": {"2": -100}, "seed": 7}
CLOSED: dict[str, Any] = {
    "closed": True,
    "max_tokens": 30,
    "temperature": 0,
    "structured_outputs": {"choice": [CHOICE]},
}


@pytest.fixture(scope="module")
def scripted_url() -> Iterator[str]:
    """The scripted backend in a thread of its own, because these tests block."""
    backend = ScriptedBackend(name="smollm2")
    say = Say(thinking=tokens("a b c d e f"), answer=tokens("g h"), json=tokens(CHOICE), ends=False)
    ending = Say(thinking=say.thinking, json=say.json)
    backend.default = lambda exchange: Script(say=[ending if exchange.json.get("structured_outputs") else say])
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(backend):
        yield backend.url


def ask(url: str, path: str, fields: dict[str, Any] | None) -> tuple[int, str]:
    """Status and body of a call."""
    body = None if fields is None else json.dumps({"model": "smollm2", **fields}).encode()
    request = urllib.request.Request(url + path, data=body, headers={"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def shape(value: Any) -> Any:
    """Keys in order, without values; of a list its first element; alternatives of a token are all alike."""
    if isinstance(value, dict) and value and all(isinstance(inner, float) for inner in value.values()):
        return "logprobs by token"
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items() if key not in OPTIONAL}
    if isinstance(value, list):
        return [shape(value[0])] if value and isinstance(value[0], dict) else []
    return None


def shapes(text: str) -> list[tuple[str, Any]]:
    """The distinct event shapes of a stream, each at its first appearance, [DONE] included."""
    assert text.endswith("data: [DONE]\n\n")
    found: dict[str, Any] = {}
    for event in text.removesuffix("data: [DONE]\n\n").split("\n\n")[:-1]:
        described = shape(json.loads(event.removeprefix("data: ")))
        found.setdefault(json.dumps(described), described)
    return sorted(found.items())


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True}),
        ("/v1/chat/completions", {**CHAT, "return_token_ids": True, "n": 2, "temperature": 1.0}),
        ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"enable_thinking": False}}),
        ("/v1/chat/completions", {**CHAT, "logprobs": True}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_calls_have_the_shape_of_the_real_ones(
    vllm_server: Vllm, scripted_url: str, path: str, fields: dict[str, Any], stream: bool
) -> None:
    """Events and bodies have the same keys in the same order, and streams have the same kinds of event."""
    options = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    status, real = ask(vllm_server.url, path, {**fields, **options})
    _, scripted = ask(scripted_url, path, {**fields, **options})
    assert status == 200, real
    if stream:
        assert shapes(scripted) == shapes(real)
    else:
        assert shape(json.loads(scripted)) == shape(json.loads(real))
        assert list(shape(json.loads(scripted))) == list(shape(json.loads(real)))


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {**CHAT, "model": "nope"}),
        ("/v1/chat/completions/unknown", {}),
        ("/v1/embeddings", {"input": "hi"}),
        ("/tokenize", {"messages": CHAT["messages"]}),
        ("/tokenize", {"prompt": "</think>", "add_special_tokens": False}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [15, 198, 16]}),
        ("/detokenize", {}),
        ("/v1/completions", {"prompt": [1], "logit_bias": {"x": -100}}),
        ("/version", None),
        ("/v1/models", None),
    ],
)
def test_other_answers_have_the_status_and_shape_of_the_real_ones(
    vllm_server: Vllm, scripted_url: str, path: str, fields: dict[str, Any] | None
) -> None:
    """Errors and small routes answer with the same status and keys."""
    real_status, real = ask(vllm_server.url, path, fields)
    scripted_status, scripted = ask(scripted_url, path, fields)
    assert scripted_status == real_status
    assert shape(json.loads(scripted)) == shape(json.loads(real))


def continued(url: str, *, closed: bool = False, **fields: Any) -> tuple[int, str, list[int]]:
    """Status and body of a completions call that goes on from a rendered chat, and its prompt."""
    prompt: list[int] = json.loads(ask(url, "/tokenize", {"messages": CHAT["messages"]})[1])["tokens"]
    prompt += [END_THINK, NEWLINE] if closed else []
    return (*ask(url, "/v1/completions", {"prompt": prompt, "return_token_ids": True, **fields}), prompt)


def choices(text: str) -> list[dict[str, Any]]:
    """The choices of the events of a stream, one each."""
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    return [event["choices"][0] for event in events if event["choices"]]


@pytest.mark.parametrize(
    "fields",
    [
        OPEN,
        {**OPEN, "return_token_ids": False},
        {**OPEN, "logprobs": 1},
        {**OPEN, "logprobs": 0, "n": 2},
        {**OPEN, "thinking_token_budget": 3, "stop_token_ids": [END_THINK]},
        CLOSED,
        {**CLOSED, "logprobs": 2},
        {**CLOSED, "stop": ["t i"], "include_stop_str_in_output": True},
        {**CLOSED, "stop": ["t i"]},
    ],
)
@pytest.mark.parametrize(
    "options",
    [{"stream": False}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}],
    ids=["whole", "stream", "stream with usage"],
)
def test_continuations_have_the_shape_of_the_real_ones(
    vllm_server: Vllm, scripted_url: str, fields: dict[str, Any], options: dict[str, Any]
) -> None:
    """Going on from token ids, events and bodies have the same keys in the same order as the real ones."""
    status, real, _ = continued(vllm_server.url, **fields, **options)
    _, scripted, _ = continued(scripted_url, **fields, **options)
    assert status == 200, real
    if options["stream"]:
        assert shapes(scripted) == shapes(real)
    else:
        assert json.dumps(shape(json.loads(scripted))) == json.dumps(shape(json.loads(real)))


@pytest.fixture(params=["real", "scripted"])
def either(request: pytest.FixtureRequest) -> str:
    """One server after the other, for tests that both have to pass."""
    server = request.getfixturevalue("vllm_server" if request.param == "real" else "scripted_url")
    return server.url if isinstance(server, Vllm) else str(server)


def test_stop_token_is_the_last_id_and_has_no_text(either: str) -> None:
    """On both servers: named by its number, counted, and not in the text unless stops are to be shown."""
    stop: dict[str, Any] = {**OPEN, "thinking_token_budget": 3, "stop_token_ids": [END_THINK]}
    said = choices(continued(either, **stop, stream=True)[1])
    assert [i for choice in said for i in choice["token_ids"]].index(END_THINK) == len(said) - 1 == 2
    assert (said[-1]["text"], said[-1]["finish_reason"], said[-1]["stop_reason"]) == ("", "stop", END_THINK)
    _, whole, _ = continued(either, **stop, include_stop_str_in_output=True)
    assert json.loads(whole)["choices"][0]["text"].endswith("</think>")


@pytest.mark.parametrize(("shown", "text"), [(False, "yes i"), (True, "yes it i")])
def test_stop_string_ends_the_text(either: str, shown: bool, text: str) -> None:
    """On both servers: the text ends before (or with) the string, which is named; streamed or not."""
    stop = {**CLOSED, "stop": ["t i"], "include_stop_str_in_output": shown}
    said = choices(continued(either, **stop, stream=True)[1])
    whole = json.loads(continued(either, **stop)[1])["choices"][0]
    assert "".join(choice["text"] for choice in said) == whole["text"] == text
    assert [i for choice in said for i in choice["token_ids"]] == whole["token_ids"]
    assert (said[-1]["finish_reason"], said[-1]["stop_reason"]) == ("stop", "t i")


def test_end_of_sequence_is_among_the_ids(either: str) -> None:
    """On both servers: an answer that ends by itself ends with that token, which has no text and no stop reason."""
    said = choices(continued(either, **CLOSED, stream=True, logprobs=0)[1])
    assert "".join(choice["text"] for choice in said) == CHOICE
    assert (said[-1]["token_ids"][-1], said[-1]["stop_reason"], said[-1]["finish_reason"]) == (EOS, None, "stop")
    assert said[-1]["logprobs"]["tokens"][-1] == "<|im_end|>"


def test_a_repeated_prompt_is_cached_but_for_its_last_block(either: str) -> None:
    """On both servers: whole blocks are reported as cached, and at least one token is computed."""
    text = "\n".join("one two three four" for _ in range(20))
    prompt = json.loads(ask(either, "/tokenize", {"messages": [{"role": "user", "content": text}]})[1])["tokens"]
    for length in (64, 65, 63):
        for _ in range(2):
            fields = {"prompt": prompt[:length], "max_tokens": 1}
            usage = json.loads(ask(either, "/v1/completions", fields)[1])["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == (length - 1) // 32 * 32
