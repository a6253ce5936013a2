"""Token ids of prompts: asked for once, within a bound of time, and only where they tell what is cached."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

from gateway.attempts import Attempts
from gateway.backends.port import Call, Thinking, Usage
from gateway.errors import UpstreamError, UpstreamRejected
from gateway.models import Model
from gateway.prompt_ids import PAUSE_S, PromptIds
from tests.gateway.still import config_of, models_of
from tests.gateway.test_kv_events import batch, stored
from tests.gateway.test_placing import Clock

EVENTS = {"endpoint": "ipc:///nowhere/events"}
BACKENDS = [{"id": name, "url": f"http://127.0.0.1:{port}", "kv_events": EVENTS} for port, name in enumerate("ab", 1)]
Tokenize = Callable[[Call], Awaitable[list[int]]]


class Server:
    """A backend that only tokenises, one id per letter of the message."""

    def __init__(self, how: Tokenize | None = None) -> None:
        self.how = how
        self.asked = 0

    async def tokenize(self, call: Call) -> list[int]:
        """The ids, or whatever it was told to do."""
        self.asked += 1
        if self.how is not None:
            return await self.how(call)
        found = json.loads(bytes(call.fields["messages"] if call.surface == "chat" else call.fields["prompt"]))
        return [ord(letter) for letter in (found if isinstance(found, str) else found[0]["content"])]


def model_of(server: Server, **placement: Any) -> Model:
    """A model with two backends that are followed, up, and heard of."""
    config = config_of({"backends": BACKENDS}, routing={"placement": {"index": "exact", **placement}})
    model = models_of(config)["qwen"]
    clock = model.clock = Clock()
    for slot in model.slots:
        slot.clock, slot.up_since_s, slot.backend = clock, 0.0, server  # type: ignore[assignment]
        assert slot.standing.kv is not None
        slot.standing.kv.is_live = True
    model.prompt_ids = PromptIds(model.slots, config.routing.placement.tokens_wait_s, clock)
    return model


def call(text: str, **fields: Any) -> Call:
    """A chat call with this message."""
    return of("chat", messages=[{"role": "user", "content": text}], **fields)


def of(surface: Any, **fields: Any) -> Call:
    """A call with these fields."""
    return Call(
        surface=surface,
        request_id="r",
        model="m",
        fields={name: msgspec.Raw(json.dumps(value).encode()) for name, value in fields.items()},
        thinking=Thinking(enabled=False, cap=0),
        max_tokens=9,
    )


async def ids(model: Model, asked: Call) -> list[int]:
    """As the model finds them."""
    assert model.prompt_ids is not None
    return list(await model.prompt_ids.of(asked))


async def test_equal_prompts_are_asked_for_once() -> None:
    """What a backend said is kept; another prompt, or another template, is asked for again."""
    model = model_of(server := Server())
    for _ in range(3):
        assert await ids(model, call("ab", temperature=1)) == [97, 98]
    assert server.asked == 1
    await ids(model, call("ab", chat_template_kwargs={"enable_thinking": False}))
    assert server.asked == 2


async def test_completions_have_their_ids_or_text() -> None:
    """A prompt of ids is taken as it is, one of text is tokenised, several in one call are not told apart."""
    model = model_of(server := Server())
    assert await ids(model, of("completions", prompt=[5, 6])) == [5, 6]
    assert await ids(model, of("completions", prompt=["a", "b"])) == []
    assert server.asked == 0
    assert await ids(model, of("completions", prompt="ab")) == [97, 98]


@pytest.mark.parametrize(
    "asked",
    [
        of("chat", messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        call("ab", documents=[]),
    ],
)
async def test_what_is_more_than_text_is_not_asked_for(asked: Call) -> None:
    """Pictures, and what /tokenize does not render, cost no request: their ids would tell nothing."""
    model = model_of(server := Server())
    assert (await ids(model, asked), server.asked) == ([], 0)


async def test_nobody_waits_longer_than_the_bound() -> None:
    """A backend that does not answer in time leaves the prompt to the prediction, and is left alone for a second."""

    async def never(_call: Call) -> list[int]:
        await asyncio.Event().wait()
        return []

    model = model_of(server := Server(never), tokens_wait_s=0.001)
    assert (await ids(model, call("ab")), await ids(model, call("cd")), server.asked) == ([], [], 1)
    model.clock.now_s += PAUSE_S  # type: ignore[attr-defined]
    server.how = None
    assert await ids(model, call("ab")) == [97, 98]
    assert model.prompt_ids is not None
    assert (model.prompt_ids.asked, model.prompt_ids.late) == (2, 1)


@pytest.mark.parametrize(("error", "asked"), [(UpstreamError("x"), 1), (UpstreamRejected(400, b"{}"), 2)])
async def test_a_refusal_fails_no_call(error: Exception, asked: int) -> None:
    """A backend that fails is left alone for a while; one that refuses a client's mistake is not."""

    async def fails(_call: Call) -> list[int]:
        raise error

    model = model_of(server := Server(fails))
    assert (await ids(model, call("ab")), await ids(model, call("cd")), server.asked) == ([], [], asked)


async def test_nobody_is_asked_while_no_events_are_followed() -> None:
    """With all feeds lost there is nothing the ids would be good for."""
    model = model_of(server := Server())
    for slot in model.slots:
        assert slot.standing.kv is not None
        slot.standing.kv.disconnected()
    assert (await ids(model, call("ab")), server.asked) == ([], 0)


async def test_what_is_kept_is_bounded() -> None:
    """The longest unused prompts are forgotten, and one that is too long is not kept at all."""
    model = model_of(server := Server())
    kept = model.prompt_ids = PromptIds(model.slots, 1.0, model.clock, most_kept=4)
    for text in ("ab", "cd", "ab", "ef", "abcdef"):
        await kept.of(call(text))
    assert (len(kept), server.asked) == (4, 4)
    await kept.of(call("ab"))
    assert server.asked == 4
    await kept.of(call("cd"))
    assert server.asked == 5


def test_nothing_is_looked_up_where_exact_is_not_configured() -> None:
    """Predicted models, and those with one backend, have no token ids to ask for."""
    assert models_of(config_of({"backends": BACKENDS}))["qwen"].prompt_ids is None
    one = config_of({"backends": BACKENDS[:1]}, routing={"placement": {"index": "exact"}})
    assert models_of(one)["qwen"].prompt_ids is None


async def placed(model: Model, asked: Call, usage: Usage | None = None) -> str:
    """The backend that a call goes to, served to its end."""
    attempts = Attempts(model, asked)
    await attempts.admit("", None)
    slot = attempts.next()
    with slot:
        attempts.began(slot)
    attempts.leave()
    attempts.ended(usage)
    return slot.config.id


def tell(model: Model, at: int, text: str) -> None:
    """Backend `at` says that it has this text cached, in blocks of four."""
    index = model.slots[at].standing.kv
    assert index is not None
    event = stored(list(range(len(text) // 4)), token_ids=[ord(letter) for letter in text])
    assert index.take(index.counts["batches"], batch(event))


async def test_a_prompt_goes_where_its_events_say_it_is() -> None:
    """A backend that has a prompt, sent there by somebody else, gets it, whatever was predicted."""
    for at in (0, 1):
        model = model_of(Server())
        tell(model, at, "abcd" * 500)
        usage = Usage(prompt_tokens=2004, completion_tokens=1, cached_tokens=2000)
        assert await placed(model, call("abcd" * 501), usage) == "ab"[at]
        assert model.slots[at].standing.told == {"predicted": [0, 0, 0], "exact": [2004, 2000, 2000]}


async def test_an_index_that_proves_wrong_leaves_the_prediction() -> None:
    """Where a backend reuses nothing of what its events say, they are no longer gone by, and counted as predicted."""
    model = model_of(Server())
    tell(model, 0, "abcd" * 500)
    usage = Usage(prompt_tokens=2004, completion_tokens=1, cached_tokens=0)
    standing = model.slots[0].standing
    assert standing.kv is not None
    while standing.kv.is_believed:
        assert await placed(model, call("abcd" * 501), usage) == "a"
    before = standing.told["exact"][0]
    for _ in range(10):
        await placed(model, call("abcd" * 501), usage)
    assert standing.told["exact"][0] == before


async def test_a_call_whose_ids_are_not_known_is_predicted() -> None:
    """Without token ids a call is placed by its bytes, and counted so."""

    async def fails(_call: Call) -> list[int]:
        raise UpstreamError("x")

    model = model_of(Server(fails))
    text = "abcd" * 500
    usage = Usage(prompt_tokens=2000, completion_tokens=1, cached_tokens=0)
    first = await placed(model, call(text), usage)
    assert await placed(model, call(text), usage) == first
    told = next(slot.standing.told for slot in model.slots if slot.config.id == first)
    assert (told["exact"], told["predicted"][0]) == ([0, 0, 0], 4000)
