"""A fuzzer against a live gateway: what its document says is what it does, and no input makes it fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import schemathesis
import uvloop
from hypothesis import HealthCheck, settings

from gateway.api.openapi import document
from tests.gateway.admin_client import ROOT_SECRET, reporting_ledger
from tests.gateway.live import EMBEDDINGS, live, tree_of
from tests.gateway.test_edge import key_of
from tests.scripted_backend import ScriptedBackend
from tests.scripted_script import Script, json_reply
from tests.scripted_stream import Say, tokens

pytestmark = pytest.mark.e2e  # seconds, not milliseconds: a fuzzer over every route
KNOWN = "qwen3"
CHECKS = {
    # Rules between fields (a budget and its opposite, more choices than the model allows, what is reserved) are
    # beyond JSON Schema, so a request that fits the schema may still be a 400.
    "positive_data_acceptance": {"enabled": False},
    # An envelope may have a nanosecond: that is a 504, and right.
    "not_a_server_error": {"expected-statuses": ["2xx", "3xx", "4xx", "504"]},
}

schema = schemathesis.openapi.from_dict(document(), config=schemathesis.Config.from_dict({"checks": CHECKS}))


@schema.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    """Name the model that is served wherever the body has a name that could be one: else nearly all were 404."""
    if isinstance(body, dict) and isinstance(body.get("model"), str) and 0 < len(body["model"]) <= 256:
        return {**body, "model": KNOWN}
    return body


async def _serve(started: Future[int], stop: asyncio.Event) -> None:
    async with ScriptedBackend() as scripted:
        scripted.routes[EMBEDDINGS] = json_reply({"data": [], "usage": {"prompt_tokens": 1, "total_tokens": 1}})
        tree = tree_of(scripted, keys=[key_of("fuzzer", "good")])
        tree["models"] = dict.fromkeys((KNOWN, "bge"), tree["models"].pop("qwen"))
        async with live(tree) as gateway:
            gateway.gateway.ledger = reporting_ledger()
            scripted.default = Script(say=[Say(thinking=tokens("hm so"), answer=tokens("it is"))])
            started.set_result(gateway.port)
            await stop.wait()


@pytest.fixture(scope="module")
def base_url() -> Iterator[str]:
    """A gateway in a thread of its own: the fuzzer is not asynchronous."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("THINKGATE_ADMIN_TOKEN", ROOT_SECRET)
        yield from _served()


def _served() -> Iterator[str]:
    started: Future[int] = Future()
    loop, stop = uvloop.new_event_loop(), asyncio.Event()

    def run() -> None:
        try:
            loop.run_until_complete(_serve(started, stop))
        except BaseException as exc:
            if started.done():
                raise
            started.set_exception(exc)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{started.result(timeout=20)}"
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(timeout=20)
        loop.close()


@schema.parametrize()
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_gateway_does_what_its_document_says(case: schemathesis.Case[Any], base_url: str) -> None:
    """Every generated request, well formed or not, is answered as the document says, and never with a 500."""
    secret = ROOT_SECRET if case.path.startswith("/admin/") else "good"
    case.call_and_validate(base_url=base_url, headers={"Authorization": f"Bearer {secret}"})
