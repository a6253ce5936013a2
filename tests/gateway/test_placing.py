"""What the gateway tells placement: prompts at decision time, what backends say, tenants apart, wrong predictions."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest

from gateway.attempts import Attempts
from gateway.backends.port import Call, Thinking, Usage
from gateway.load import Load, parse_load
from gateway.models import Model
from gateway.placing import Prompt
from gateway.slots import Slot
from router.prefix import MOST_BLOCKS, Agreement
from tests.gateway.live import DEADLINE_S, INSTANT, ask, live, tree_of
from tests.gateway.still import config_of, key, models_of, prepared, sent
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Reply

BACKENDS = [{"id": name, "url": f"http://127.0.0.1:{port}"} for port, name in enumerate("abc", 1)]
METRICS = b"""# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="m"} 0.5
vllm:cache_config_info{block_size="32",engine="0",num_gpu_blocks="1000"} 1.0
"""


class Clock:
    """Seconds that a test turns."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        """The time."""
        return self.now_s


POLLED = {"placement": {"poll_s": 0.001}}


def metrics(text: bytes) -> Reply:
    """An answer of /metrics."""
    return Reply(body=text, content_type="text/plain")


def model_of(count: int = 3, **routing: Any) -> Model:
    """A model with so many backends, all up for long, on a clock of its own."""
    config = config_of({"backends": BACKENDS[:count]}, routing={"placement": routing})
    model = models_of(config)["qwen"]
    model.clock = Clock()
    for slot in model.slots:
        slot.clock, slot.up_since_s = model.clock, 0.0
    return model


def call(text: str, salt: str | None = None) -> Call:
    """A chat call with this message."""
    fields = {"messages": msgspec.Raw(json.dumps([{"role": "user", "content": text}]).encode())}
    if salt is not None:
        fields["cache_salt"] = msgspec.Raw(json.dumps(salt).encode())
    return Call(
        surface="chat",
        request_id="r",
        model="m",
        fields=fields,
        thinking=Thinking(enabled=False, cap=0),
        max_tokens=9,
    )


def served(model: Model, text: str, salt: str | None = None, usage: Usage | None = None) -> Slot:
    """Where a call goes, served to its end."""
    attempts = Attempts(model, call(text, salt))
    slot = attempts.next()
    with slot:
        attempts.began(slot)
    attempts.leave()
    attempts.ended(usage)
    return slot


def test_prompts_that_begin_alike_go_to_one_backend() -> None:
    """The second turn of a chat goes where the first one was, whatever else has been placed meanwhile."""
    for seed in range(5):
        model, head = model_of(), f"system {seed} " * 200
        first = served(model, head)
        for i in range(6):
            served(model, f"another {i} " * 100)
        assert served(model, head + "and more") is first


def test_tenants_find_nothing_of_each_other() -> None:
    """The same prompt under another salt is expected nowhere."""
    model = model_of()
    slot = served(model, "x" * 4000, "ada")
    ada, bob = (Prompt(model.placing, call("x" * 4000, salt)) for salt in ("ada", "bob"))
    assert ada.hit_tokens(slot.standing, model.clock()) > 900
    assert bob.hit_tokens(slot.standing, model.clock()) == 0


def test_every_key_of_an_owner_has_one_salt_of_its_own() -> None:
    """The widest owner decides the salt; nobody has one without keys, or where caches are shared on purpose."""
    assert "cache_salt" not in sent(prepared({}))
    assert sent(prepared({}, key=key(salt="abc")))["cache_salt"] == "abc"
    shared = config_of(routing={"placement": {"isolate": False}})
    assert "cache_salt" not in sent(prepared({}, config=shared, key=key(salt="abc")))
    openai = config_of({"backends": [{"id": "a", "url": "http://127.0.0.1:1", "kind": "openai"}]})
    assert "cache_salt" not in sent(prepared({}, config=openai, key=key(salt="abc")))


def test_a_prompt_waits_from_its_placing_to_its_first_byte() -> None:
    """Its tokens are counted at once where it was placed, and gone when it begins, fails or is left, once."""
    model = model_of(2)
    attempts = Attempts(model, call("x" * 4000))
    slot = attempts.next()
    assert slot.standing.pending_tokens == pytest.approx(1000, abs=30)
    attempts.began(slot)
    attempts.began(slot)
    attempts.leave()
    assert [each.standing.pending_tokens for each in model.slots] == [0, 0]
    attempts = Attempts(model, call("y" * 4000))
    attempts.next()
    attempts.leave()
    attempts.leave()
    assert [each.standing.pending_tokens for each in model.slots] == [0, 0]


def test_a_lost_backend_has_nothing_cached() -> None:
    """Whoever answers next at its address starts with an empty cache."""
    model = model_of(2)
    slot = served(model, "x" * 4000)
    slot.mark_down("gone")
    assert Prompt(model.placing, call("x" * 4000)).hit_tokens(slot.standing, model.clock()) == 0


def test_predictions_that_are_wrong_are_no_longer_believed() -> None:
    """A backend that never has what it should loses its index; it is believed again once it has what it should."""
    model, text = model_of(2), "x" * 8000
    none, all_of_it = (Usage(prompt_tokens=2000, completion_tokens=1, cached_tokens=n) for n in (0, 2000))
    slot = served(model, text)
    while slot.standing.agreement.is_trusted:
        assert slot.standing.told["predicted"][0] < 100 * 2000
        slot = served(model, text, usage=none)
    assert Prompt(model.placing, call(text)).hit_tokens(slot.standing, model.clock()) == 0
    for _ in range(400):
        served(model, text, usage=all_of_it)
    assert slot.standing.agreement.is_trusted


def test_what_a_prompts_token_takes_is_learned() -> None:
    """Bytes per token follow what backends count, within reason."""
    model = model_of(2)
    for _ in range(200):
        served(model, "x" * 8000, usage=Usage(prompt_tokens=4000, completion_tokens=1, cached_tokens=None))
    assert model.placing.bytes_per_token == pytest.approx(2.0, abs=0.1)


def test_the_index_can_be_switched_off() -> None:
    """With `index: off` no prompt is hashed and nothing is remembered."""
    model = model_of(2, index="off")
    slot = served(model, "x" * 8000)
    assert len(slot.standing.cache) == 0
    assert Prompt(model.placing, call("x" * 8000)).chain == []


def test_a_model_with_one_backend_looks_at_no_prompt() -> None:
    """Where there is nothing to choose, nothing is hashed or remembered."""
    model = model_of(1)
    assert model.prompt(call("x" * 8000)) is None
    assert served(model, "x" * 8000) is model.slots[0]


def test_what_a_server_says_of_itself_is_read() -> None:
    """Calls of all its engines are added up, the fullest memory counts; other servers say nothing."""
    assert parse_load(METRICS) == Load(running=5, waiting=5, kv_use=0.5, cache_tokens=32000)
    assert parse_load(b"go_goroutines 7\n") is None


def test_a_server_that_is_full_is_avoided() -> None:
    """What a backend says of itself counts as well: calls that others have placed there are seen."""
    model = model_of(2)
    model.slots[0].standing.hear(Load(running=60, waiting=30, kv_use=0.99, cache_tokens=1000), 4.0)
    assert {served(model, f"question {i}").config.id for i in range(20)} == {"b"}
    assert len(model.slots[0].standing.cache) <= 1000 * 4 // 256


def test_a_cold_backend_gets_less() -> None:
    """Just up, a backend gets few of the calls that run at once, and later its full share."""
    model = model_of(2)
    model.slots[0].up_since_s = model.clock()
    for _ in range(40):
        Attempts(model, None).next().__enter__()
    assert model.slots[0].in_flight < 10
    assert model.slots[1].in_flight > 30


def test_trust_needs_enough_calls_to_be_lost() -> None:
    """A few wrong predictions are no reason."""
    agreement = Agreement(enough=20)
    for _ in range(19):
        agreement.add(1000, 0, 1000)
    assert agreement.is_trusted
    agreement.add(1000, 0, 1000)
    assert not agreement.is_trusted


def test_the_bound_on_load_can_hold_at_every_size() -> None:
    """With nothing allowed side by side, equal prompts in a row spread as far as the bound says, hit or not."""
    for side_by_side, allowed in ((64, {12}), (0, {4, 5})):
        model = model_of(3, side_by_side=side_by_side)
        for _ in range(12):
            Attempts(model, call("x" * 9000)).next().__enter__()
        assert max(slot.in_flight for slot in model.slots) in allowed


@pytest.mark.parametrize(
    "lie",
    [
        b"vllm:num_requests_waiting 1e999\n",
        b"vllm:num_requests_waiting 1.2.3\n",
        b"vllm:num_requests_waiting NaN\n",
        b"vllm:num_requests_waiting 0\nvllm:kv_cache_usage_perc e\n",
        b'vllm:num_requests_waiting 0\nvllm:cache_config_info{num_gpu_blocks="%b",block_size="16"} 1\n' % (b"9" * 5000),
        b'vllm:num_requests_waiting 0\nvllm:cache_config_info{num_gpu_blocks="%b",block_size="9"} 1\n' % (b"9" * 12),
    ],
)
def test_nonsense_in_metrics_is_as_good_as_nothing(lie: bytes) -> None:
    """Numbers that cannot be are no load, and no size makes the index larger than it may be."""
    load = parse_load(lie) or Load(0, 0, 0.0, None)
    assert (load.running, load.waiting, load.kv_use) == (0, 0, 0.0)
    standing = model_of(2).slots[0].standing
    standing.hear(load, 4.0)
    standing.cache.expect(range(2 * MOST_BLOCKS), 0.0)
    assert len(standing.cache) <= MOST_BLOCKS


def test_more_cached_than_there_was_counts_as_all_of_it() -> None:
    """A backend's wild word about its cache is bounded by the prompt, in what is told and in what is trusted."""
    model = model_of(2)
    slot = served(model, "x" * 4000, usage=Usage(prompt_tokens=1000, completion_tokens=1, cached_tokens=10**9))
    assert slot.standing.told["predicted"][2] == 1000
    assert slot.standing.agreement._wrong <= 1000


async def test_a_server_whose_metrics_turn_into_nonsense_is_served_on(scripted: ScriptedBackend) -> None:
    """It is polled on, what it said last holds no longer, and nothing of the gateway stops."""
    scripted.routes["/metrics"] = metrics(b"vllm:num_requests_waiting 9\n")
    async with ScriptedBackend() as other, live(tree_of(scripted, other, routing=POLLED)) as gateway:
        async with asyncio.timeout(DEADLINE_S):
            while gateway.slot().standing.limit is None:
                await asyncio.sleep(0)
            scripted.routes["/metrics"] = metrics(b"vllm:num_requests_waiting 1e999\n")
            while gateway.slot().standing.limit is not None:
                await asyncio.sleep(0)
        assert (await ask(gateway, INSTANT)).status == 200
