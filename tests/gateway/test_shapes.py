"""Decisions that are kept by shape: always the one that would have been made anew."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.auth import Key
from gateway.backends.port import Capabilities, Surface
from gateway.errors import GatewayError, InvalidRequest
from gateway.prepare import Prepared, prepare
from gateway.shapes import MOST_SHAPE_BYTES, MOST_SHAPES, Decisions
from tests.gateway.still import CHAT, HOLDS_CAPS, Json, config_of, key, models_of

CONFIG = config_of(
    {"price_usd_per_mtok": {"prompt": 1, "answer": 2}, "thinking": {"max_tokens": 1000, "default_tokens": 300}},
    server={"media_hosts": ["img.example"]},
    models={"other": {"backends": [{"id": "b", "url": "http://127.0.0.1:2"}], "max_n": 2}},
)
KEYS = [key(), key(id="bob", modes=frozenset({"instant"})), key(id="eve", models=frozenset({"other"}))]
FOUND = [HOLDS_CAPS, Capabilities(), Capabilities(cap_binds=True, max_model_len=300), None]


def decisions_of() -> tuple[Decisions, Any]:
    """A fresh memory and the models it decides about."""
    models = models_of(CONFIG)
    return Decisions(CONFIG, models), models


def decided(decisions: Decisions, body: bytes, *, by: Key = KEYS[0], surface: Surface = "chat") -> Prepared:
    """What a request becomes, remembering."""
    return decisions.prepare(body, surface, by, request_id="req-1", trace=((b"traceparent", b"00-1"),))


def bytes_of(request: Prepared) -> tuple[object, ...]:
    """All of it, in a form that can be compared."""
    fields = [(name, bytes(value)) for name, value in request.call.fields.items()]
    rest = {name: getattr(request.call, name) for name in request.call.__struct_fields__ if name != "fields"}
    kept = {name: getattr(request, name) for name in request.__struct_fields__ if name not in {"call", "enforcer"}}
    return fields, rest, kept, request.enforcer._needs  # it shows itself in nothing else


def same_outcome(decisions: Decisions, models: Any, body: bytes, by: Key, surface: Surface = "chat") -> None:
    """Check that a request is answered as if nothing was remembered."""
    outcomes: list[object] = []
    for remembers in (True, False):
        try:
            if remembers:
                request = decided(decisions, body, by=by, surface=surface)
            else:
                trace = ((b"traceparent", b"00-1"),)
                request = prepare(body, surface, by, models, CONFIG, request_id="req-1", trace=trace)
            outcomes.append(bytes_of(request))
            request.cap.hit = True  # as an answer may
        except GatewayError as error:
            outcomes.append((type(error), error.message, error.param, error.code))
    assert outcomes[0] == outcomes[1]


TEXT = st.text(st.sampled_from('[]{}",:\\é a'), max_size=6) | st.sampled_from(["messages", '"messages":[', "]}"])
PARTS = st.sampled_from(
    [
        {"type": "text", "text": "hi"},
        {"type": "image_url", "image_url": {"url": "https://img.example/a.png"}},
        {"type": "image_url", "image_url": {"url": "https://evil.example/a.png"}},
        {"type": "text", "image_url": "http://evil.example"},
    ]
)
ROLES = st.sampled_from(["user"] * 9 + ["nobody"])
MESSAGE = st.fixed_dictionaries({"role": ROLES, "content": TEXT | st.lists(PARTS, max_size=2)}, optional={"name": TEXT})
FIELDS: list[tuple[str, Any]] = [
    ("model", "qwen:instant"),
    ("model", "qwen:reasoning"),
    ("model", "other"),
    ("max_tokens", 100),
    ("max_tokens", 300),
    ("max_tokens", 0),
    ("max_completion_tokens", 100),
    ("n", 3),
    ("temperature", 0.5),
    ("stream", True),
    ("reasoning_effort", "low"),
    ("thinkgate", {"mode": "instant"}),
    ("thinkgate", {"thinking_tokens": 50}),
    ("thinkgate", {"min_thinking_tokens": 5}),
    ("thinkgate", {"envelope": {"tokens": 99}}),
    ("thinkgate", {"degrade": []}),
    ("user", "[x]"),
    ("stop", ["]"]),
    ("chat_template_kwargs", {"enable_thinking": False}),
    ("priority", 1),
]
SHAPE = st.lists(st.sampled_from(FIELDS), max_size=3).map(lambda fields: {"model": "qwen", **dict(fields)})
STEP = st.tuples(st.integers(0, 1), st.lists(MESSAGE, max_size=2), st.booleans(), st.integers(0, 9))


@settings(max_examples=150, deadline=None)
@given(shapes=st.lists(SHAPE, min_size=1, max_size=2), steps=st.lists(STEP, min_size=3, max_size=9))
def test_a_remembered_decision_is_the_one_that_would_be_made(
    shapes: list[Json], steps: list[tuple[int, list[Json], bool, int]]
) -> None:
    """Whatever fields, messages, keys and backends come in whatever order, memory changes no outcome."""
    decisions, models = decisions_of()
    for which, messages, is_first, who in steps:
        fields = shapes[which % len(shapes)]
        fields = {"messages": messages, **fields} if is_first else {**fields, "messages": messages}
        models["qwen"].slots[0].capabilities = FOUND[max(0, who - 6)]
        same_outcome(decisions, models, json.dumps(fields).encode(), KEYS[who % 4 % 3])


PIECES = st.sampled_from(
    [
        b'{"model":"qwen",',
        b'"messages":',
        b'[{"role":"user","content":"hi"}]',
        b'[{"role":"user","content":"]"}]',
        b'[{"":":","role":"user"}]',
        b'"user":"[',
        b'"user":"',
        b'"n":2',
        b'"model":"qwen"',
        b'"temperature":[',
        b"[",
        b"]",
        b'"',
        b",",
        b"}",
        b" ",
        b"\xff",
        b"0",
    ]
)
BODIES = st.lists(PIECES, max_size=9).map(b"".join) | st.lists(PIECES, max_size=6).map(
    lambda pieces: b'{"model":"qwen","messages":' + b"".join(pieces) + b',"n":2}'
)


@settings(max_examples=300, deadline=None)
@given(bodies=st.lists(BODIES, min_size=1, max_size=4))
def test_no_bytes_pass_for_a_shape_that_they_do_not_have(bodies: list[bytes]) -> None:
    """After well-formed requests, torn and repeated fields are refused or read as if nothing was remembered."""
    decisions, models = decisions_of()
    for body in (
        b'{"model":"qwen","messages":[{"role":"user","content":"hi"}]}',
        b'{"model":"qwen","messages":[{"role":"user","content":"hi"}],"n":2}',
        b'{"messages":[{"role":"user","content":"hi"}],"model":"qwen"}',
        *bodies,
    ):
        same_outcome(decisions, models, body, KEYS[0])


def chat_of(text: str, **fields: Any) -> bytes:
    """A chat request whose one message says `text`."""
    return json.dumps({**CHAT, **fields, "messages": [{"role": "user", "content": text}]}).encode()


def test_requests_that_differ_in_their_messages_are_decided_once() -> None:
    """The second of them gets the first one's decision, with its own messages, id and hold."""
    decisions, _ = decisions_of()
    first, second = decided(decisions, chat_of("hi")), decided(decisions, chat_of("hello"))
    assert second.ask is first.ask
    assert json.loads(bytes(second.call.fields["messages"]))[0]["content"] == "hello"
    assert second.ceiling.tokens == first.ceiling.tokens + len("hello") - len("hi")
    assert second.cap is not first.cap
    assert len(decisions) == 1


@pytest.mark.parametrize(
    "fields",
    [{"user": "ada"}, {"seed": 1}, {"stop": "x"}, {"metadata": {"a": "b"}}, {"tools": []}, {"x_own": "secret"}],
)
def test_fields_with_a_text_or_a_number_of_their_own_are_not_kept(fields: Json) -> None:
    """A request with a field that may hold anything is decided anew each time."""
    decisions, _ = decisions_of()
    decided(decisions, chat_of("hi", **fields))
    assert len(decisions) == 0


def test_nothing_of_a_message_is_kept() -> None:
    """Once a request is over, no view into its body is left in memory."""
    decisions, _ = decisions_of()
    body = chat_of("a secret", temperature=0.5, max_tokens=100)
    before = sys.getrefcount(body)
    decided(decisions, body)
    assert len(decisions) == 1
    assert sys.getrefcount(body) == before


def test_a_backend_that_can_do_something_else_is_decided_about_anew() -> None:
    """A cap that could be held is refused once the backend was found not to hold it."""
    decisions, models = decisions_of()
    body = chat_of("hi", thinkgate={"thinking_tokens": 50})
    assert decided(decisions, body).cap.enforcement == "native"
    models["qwen"].slots[0].capabilities = Capabilities(cap_binds=False, max_model_len=300, thinking_field="reasoning")
    assert decided(decisions, body).cap.enforcement == "soft"
    assert decided(decisions, body).cap.enforcement == "soft"


def test_a_decision_is_of_one_key() -> None:
    """A key that may not do what another one may is refused, also after the other one."""
    decisions, _ = decisions_of()
    body = chat_of("hi", model="qwen:reasoning")
    assert decided(decisions, body).decision.mode == "reasoning"
    with pytest.raises(GatewayError, match="may not use reasoning mode"):
        decided(decisions, body, by=KEYS[1])
    assert decided(decisions, body, by=key(max_thinking_tokens=7)).cap.tokens == 7


def test_what_is_kept_is_bounded() -> None:
    """Ever new shapes push out the oldest, and a long one is not kept at all."""
    decisions, _ = decisions_of()
    for i in range(MOST_SHAPES + 10):
        decided(decisions, chat_of("hi", temperature=i / 1000))
    assert len(decisions) == MOST_SHAPES
    decisions, _ = decisions_of()
    decided(decisions, chat_of("hi")[:-1] + b" " * MOST_SHAPE_BYTES + b"}")
    assert len(decisions) == 0


def test_a_hit_shares_nothing_that_changes() -> None:
    """What an answer writes into its cap stands in no later answer."""
    decisions, _ = decisions_of()
    decided(decisions, chat_of("hi")).cap.hit = True
    decided(decisions, chat_of("hi")).cap.hit = True
    assert not decided(decisions, chat_of("hi")).cap.hit


def test_pictures_are_decided_about_anew() -> None:
    """A picture in a known shape is held for, and one from a host that is not allowed is refused."""
    decisions, models = decisions_of()
    plain, place = chat_of("hi"), b'"hi"'
    decided(decisions, plain)
    for host in (b"img", b"evil"):
        picture = b'[{"type":"image_url","image_url":"https://%b.example/a.png"}]' % host
        same_outcome(decisions, models, plain.replace(place, picture), KEYS[0])


@pytest.mark.parametrize(
    ("known", "torn"),
    [
        (b'{"model":"qwen","thinkgate":{"degrade":[]},"messages":%b}', b'{"model":"qwen","thinkgate":{"degrade":%b}'),
        (b'{"model":"qwen","messages":%b,"thinkgate":{"degrade":[]}}', b'{"model":"qwen","messages":%b}}'),
        (b'{"model":"qwen","messages":%b}', b'{"model":"qwen","messages":%b,"messages":[]}'),
    ],
)
def test_only_the_brackets_of_the_messages_make_a_shape(known: bytes, torn: bytes) -> None:
    """Where another field has the first or the last bracket, the bytes around it say nothing."""
    decisions, models = decisions_of()
    messages = b'[{"role":"user","content":"hi"}]'
    same_outcome(decisions, models, known % messages, KEYS[0])
    same_outcome(decisions, models, torn % messages, KEYS[0])


def test_messages_are_checked_each_time() -> None:
    """A role that is none is refused in the same words, whether or not the shape is known."""
    decisions, _ = decisions_of()
    decided(decisions, chat_of("hi"))
    with pytest.raises(InvalidRequest, match=r"messages\[0\]\.role"):
        decided(decisions, chat_of("hi").replace(b'"user"', b'"nobody"'))
    with pytest.raises(InvalidRequest, match="nested deeper"):
        decided(decisions, chat_of("hi").replace(b'"hi"', b'"hi","x":' + b"[" * 101 + b"]" * 101))
    with pytest.raises(InvalidRequest, match="not UTF-8"):
        decided(decisions, chat_of("hi").replace(b"hi", b"\xff"))
