"""Which fields reach a backend, as what, and which are refused by name."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import pytest
from msgspec import Raw

from gateway.ask.fields import CONSUMED, NOT_ON_VLLM, Switches, check_choices, check_media, thinking_on, upstream_fields
from gateway.ask.request import ChatFields, parse_chat
from gateway.config.schema import ThinkingConfig
from gateway.errors import InvalidRequest

Json = dict[str, Any]
THINKING = ThinkingConfig()


def fields(body: Json, *, kind: str = "vllm", mode: str = "reasoning", thinking: ThinkingConfig = THINKING) -> Json:
    """What goes upstream of this chat request."""
    raw = {name: Raw(json.dumps(value).encode()) for name, value in {"messages": [], **body}.items()}
    upstream = upstream_fields(raw, Switches(thinking), kind=kind, mode=mode)
    return {name: json.loads(bytes(value)) for name, value in upstream.items() if name != "messages"}


def media(part: Json) -> ChatFields:
    """A chat request with one part of content before it."""
    content = [{"type": "text", "text": "look"}, part]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": content}]
    return parse_chat(json.dumps({"model": "qwen", "messages": messages}).encode())[0]


def test_sampling_and_unknown_fields_ride_along() -> None:
    """What the gateway does not decide goes upstream as it came."""
    body = {"temperature": 0.5, "stop": ["x"], "tools": [{"a": 1}], "mystery": {"deep": [1]}, "min_tokens": 3}
    assert fields(body, thinking=ThinkingConfig(off={})) == body


@pytest.mark.parametrize("name", sorted(CONSUMED))
def test_what_the_gateway_decides_is_consumed(name: str) -> None:
    """Model, limits, streaming and every dialect of thinking are rewritten, so the client's own never pass."""
    value: object = {} if name == "chat_template_kwargs" else "anything"
    assert fields({name: value}, thinking=ThinkingConfig(off={})) == {}


@pytest.mark.parametrize("name", ["service_tier", "reasoning_effort", "max_completion_tokens"])
def test_an_openai_backend_keeps_what_it_understands_itself(name: str) -> None:
    """An OpenAI-compatible server gets OpenAI's own fields; a vLLM backend does not."""
    assert fields({name: "low"}, kind="openai", thinking=ThinkingConfig(off={})) == {name: "low"}
    assert fields({name: "low"}, kind="vllm", thinking=ThinkingConfig(off={})) == {}


@pytest.mark.parametrize("name", sorted(NOT_ON_VLLM))
def test_what_vllm_would_ignore_is_refused_by_name(name: str) -> None:
    """A field that we know and vLLM drops is refused with what to use instead, unless it is off anyway."""
    with pytest.raises(InvalidRequest, match=NOT_ON_VLLM[name]) as refused:
        fields({name: {"x": 1}})
    assert (refused.value.param, refused.value.code) == (name, "unsupported_parameter")
    assert "vllm" in refused.value.message
    for nothing in (None, False):
        assert name in fields({name: nothing})
    assert fields({name: {"x": 1}}, kind="openai")[name] == {"x": 1}


@pytest.mark.parametrize(
    ("off", "asked", "instant", "reasoning"),
    [
        ({"enable_thinking": False}, None, {"enable_thinking": False}, {"enable_thinking": True}),
        ({"thinking": False}, None, {"thinking": False}, {"thinking": True}),
        (
            {"enable_thinking": False},
            {"language": "de", "enable_thinking": True, "thinking": True},
            {"language": "de", "enable_thinking": False},
            {"language": "de", "enable_thinking": True},
        ),
        (
            {"reasoning_effort": "none", "fast": True},
            {},
            {"reasoning_effort": "none", "fast": True},
            {"fast": False},
        ),
        ({}, {"language": "de", "enable_thinking": True}, {"language": "de"}, {"language": "de"}),
        ({}, {"enable_thinking": False}, None, None),
        ({}, None, None, None),
    ],
)
def test_the_mode_sets_the_templates_switches(
    off: Json, asked: Json | None, instant: Json | None, reasoning: Json | None
) -> None:
    """Instant sets what `thinking.off` says, reasoning the opposite of its switches; the client's other words stay."""
    thinking = ThinkingConfig(off={"chat_template_kwargs": off} if off else {})
    body = {} if asked is None else {"chat_template_kwargs": asked}
    for mode, expected in (("instant", instant), ("reasoning", reasoning)):
        assert fields(body, mode=mode, thinking=thinking).get("chat_template_kwargs") == expected


def test_template_words_of_null_are_no_words() -> None:
    """`chat_template_kwargs: null` is as if it were absent."""
    assert fields({"chat_template_kwargs": None}) == {"chat_template_kwargs": {"enable_thinking": True}}


def test_one_request_does_not_change_the_next() -> None:
    """The switches of a model are shared by its requests and stay as they were configured."""
    switches = Switches(THINKING)
    first = switches.encoded("instant", Raw(b'{"a":1}'))
    assert first is not None
    assert json.loads(bytes(first)) == {"a": 1, "enable_thinking": False}
    second = switches.encoded("instant", None)
    assert second is not None
    assert json.loads(bytes(second)) == {"enable_thinking": False}


def test_text_completions_have_no_template() -> None:
    """A raw prompt gets no template switches."""
    upstream = upstream_fields({"prompt": Raw(b'"hi"')}, Switches(THINKING), kind="vllm", mode="instant")
    assert {name: bytes(value) for name, value in upstream.items()} == {"prompt": b'"hi"'}


def test_only_switches_can_be_turned_around() -> None:
    """The opposite of `off` exists for booleans; other words are left to the template."""
    assert thinking_on({"chat_template_kwargs": {"a": False, "b": True, "c": "none", "d": 0}}, native=True) == {
        "a": True,
        "b": False,
    }
    assert thinking_on({}, native=True) == {}


def test_a_model_without_thinking_keeps_its_template_off_in_every_mode() -> None:
    """Its chain is opened behind the template, which must not open one of its own."""
    switches = Switches(THINKING.model_copy(update={"native": False}))
    assert switches.encoded("reasoning", None) == switches.encoded("instant", None) == Raw(b'{"enable_thinking":false}')


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "http://anywhere.example"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AAAA"}},
        {"type": "image_url", "image_url": {"url": "https://img.example/a.png", "detail": "low"}},
        {"type": "image_url", "image_url": {"url": "HTTPS://IMG.example:443/a.png"}},
        {"type": "input_image", "image_url": "https://img.example/a.png"},
        {"type": "audio_url", "audio_url": {"url": "http://img.example/a.wav"}},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ],
)
def test_media_may_come_inline_or_from_allowed_hosts(part: Json) -> None:
    """Data URLs and hosts of server.media_hosts pass, whatever their case; text that looks like a URL is text."""
    check_media(media(part).messages, ["img.example"])


@pytest.mark.parametrize(
    "url",
    [
        "",
        "x",
        "http://169.254.169.254/latest/meta-data",
        "http://localhost:8000/v1",
        "https://img.example.evil.org/a.png",
        "https://evil.org/img.example",
        "https://evil.org#img.example",
        "https://img.example@evil.org/a.png",
        "https://user:word@img.example/a.png",
        "https://evil.org\\@img.example/a.png",
        "https://img.example.",
        "http://[::1",
        "http://[img.example]/",
        "ftp://img.example/a.png",
        "file:///etc/passwd",
        "//img.example/a.png",
        " https://img.example/a.png",
        "https://img.example/a.png\n",
        "https://img.exam\tple/a.png",
        "https://img.example\\evil.org/a.png",
        "https://img.example/\x00",
        " data:image/png;base64,AAAA",
        "javascript:data:",
    ],
)
def test_media_from_anywhere_else_is_refused_by_its_place(url: str) -> None:
    """What a backend would fetch from a host that nobody allowed is refused, naming message and part."""
    for name, value in product(("image_url", "audio_url", "video_url"), ({"url": url}, url)):
        part = {"type": name, name: value}
        with pytest.raises(InvalidRequest, match=r"server\.media_hosts") as refused:
            check_media(media(part).messages, ["img.example"])
        assert refused.value.param == f"messages[1].content[1].{name}"


def test_without_allowed_hosts_only_inline_media_pass() -> None:
    """The default allows no host at all."""
    with pytest.raises(InvalidRequest):
        check_media(media({"type": "image_url", "image_url": {"url": "https://img.example/a.png"}}).messages, [])


@pytest.mark.parametrize(("n", "prompts"), [(8, 1), (1, 8), (2, 4)])
def test_choices_up_to_the_maximum_fit(n: int, prompts: int) -> None:
    """`n` times the prompts may reach the model's max_n."""
    check_choices(n, prompts, 8)


@pytest.mark.parametrize(
    ("n", "prompts", "param"), [(9, 1, "n"), (1, 9, "prompt"), (3, 3, "n"), (2**31 - 1, 1000, "n")]
)
def test_more_choices_are_refused_by_the_field_that_asks(n: int, prompts: int, param: str) -> None:
    """Above max_n the request is refused, naming `n`, or the prompts when `n` is one."""
    with pytest.raises(InvalidRequest, match="at most 8 choices") as refused:
        check_choices(n, prompts, 8)
    assert refused.value.param == param


@pytest.mark.parametrize(("kind", "gets"), [("vllm", True), ("embedded", True), ("openai", False)])
def test_the_tenants_salt_goes_where_a_cache_is_kept_apart_by_it(kind: str, gets: bool) -> None:
    """A vLLM and the embedded engine are told whose prompt it is; other servers do not know the field."""
    upstream = upstream_fields({"prompt": Raw(b'"hi"')}, Switches(THINKING), kind=kind, mode="instant", salt="ab12")
    assert upstream.get("cache_salt") == (Raw(b'"ab12"') if gets else None)
