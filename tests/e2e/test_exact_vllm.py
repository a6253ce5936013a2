"""Placement by KV events over two real vLLM servers: what is predicted is cached, also after one was started anew."""

from __future__ import annotations

import json
import random
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import UPSTREAM_NAME
from tests.e2e.processes import free_port, wait_until
from tests.e2e.servers import Gateway, StartGateway, Vllm, model_config, vllm_running

pytestmark = pytest.mark.e2e
HEADS, HEAD_WORDS, CALLS = 6, 150, 30
SEEN_WITHIN_S = 120
WORDS = ("amber", "brook", "cliff", "delta", "ember", "field", "grove", "house")
Json = dict[str, Any]


class Second:
    """A second server, which can be killed and started again where it was."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder, self._port = model, folder, free_port()
        self._running = ExitStack()
        self.server = self.start()

    def start(self) -> Vllm:
        """Up when it returns."""
        running = vllm_running(self._model, UPSTREAM_NAME, port=self._port, sockets=self._folder, log="vllm-second")
        self.server = self._running.enter_context(running)
        return self.server

    def kill(self) -> None:
        """At once, with its engine."""
        assert self.server.child is not None
        self.server.child.kill()
        self._running.close()


@pytest.fixture(scope="module")
def second(thinking_model: Path, vllm_server: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Second]:
    """Beside the one that all tests share, if that publishes its events."""
    if vllm_server.kv_events is None:
        pytest.skip("the server at THINKGATE_TEST_VLLM_URL says nothing of its events")
    server = Second(thinking_model, tmp_path_factory.mktemp("kv"))
    yield server
    server.kill()


def trace(tag: str, calls: int = CALLS) -> list[Json]:
    """Requests that begin with one of a few long system prompts, which nobody else sends."""
    rng = random.Random(tag)
    heads = [f"{tag} {i}: " + " ".join(rng.choices(WORDS, k=HEAD_WORDS)) for i in range(HEADS)]
    return [
        {
            "model": UPSTREAM_NAME,
            "messages": [{"role": "system", "content": rng.choice(heads)}, {"role": "user", "content": f"{tag} {i}?"}],
            "max_tokens": 1,
            "chat_template_kwargs": {"enable_thinking": False},
        }
        for i in range(calls)
    ]


def cached(requests: list[Json], urls: list[str]) -> tuple[int, set[str]]:
    """Prompt tokens that were cached, one request after the other in turns, and the backends that served them."""
    tokens, backends = 0, set()
    for i, body in enumerate(requests):
        url = f"{urls[i % len(urls)]}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            tokens += json.load(answer)["usage"]["prompt_tokens_details"]["cached_tokens"]
            backends.add(answer.headers.get("x-thinkgate-backend"))
    return tokens, backends


def predicted(gateway: Gateway) -> int:
    """Prompt tokens that the exact index said were cached."""
    return int(gateway.metric("thinkgate_prefix_tokens_total", index="exact", kind="predicted"))


def wait_followed(gateway: Gateway, backend: str) -> None:
    """Until a backend is up, and its events are followed and believed."""
    for name in ("thinkgate_backend_up", "thinkgate_kv_live"):
        what = f"{name} of {backend}"
        wait_until(lambda name=name: gateway.metric(name, backend=backend) == 1, within_s=SEEN_WITHIN_S, what=what)  # type: ignore[misc]


@pytest.mark.timeout(900)
def test_what_events_say_is_cached_is_cached(vllm_server: Vllm, second: Second, gateway: StartGateway) -> None:
    """Predicted and cached tokens agree within a tenth, more is cached than in turns, and a restart is followed."""
    first, other = ({"id": id, "url": it.url, "kv_events": dict(it.kv_events or {})}
                    for id, it in (("first", vllm_server), ("second", second.server)))  # fmt: skip
    config = model_config(first, upstream_model=UPSTREAM_NAME, backends=[first, other])
    config["routing"]["placement"] = {"index": "exact", "tokens_wait_s": 2}
    ours = gateway(config)
    for backend in ("first", "second"):
        wait_followed(ours, backend)

    in_turns, _ = cached(trace("turns"), [vllm_server.url, second.server.url])
    placed, backends = cached(trace("placed"), [ours.url])
    assert predicted(ours) == pytest.approx(placed, rel=0.1)
    assert placed > in_turns
    assert backends == {"first", "second"}

    second.kill()
    wait_until(
        lambda: ours.metric("thinkgate_kv_live", backend="second") == 0, within_s=SEEN_WITHIN_S, what="it is noticed"
    )
    _, backends = cached(trace("alone", 6), [ours.url])
    assert backends == {"first"}
    second.start()
    wait_followed(ours, "second")
    assert ours.metric("thinkgate_kv_events_total", backend="second", kind="restarts") == 1

    before = predicted(ours)
    again, backends = cached(trace("placed") + trace("after", 12), [ours.url])
    assert predicted(ours) - before == pytest.approx(again, rel=0.1)
    assert ours.metric("thinkgate_kv_events_total", kind="malformed") == 0
    assert ours.metric("thinkgate_prefix_tokens_total", index="predicted", kind="prompt") == 0
