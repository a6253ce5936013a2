"""For which requests a draft is made first, and what is said and held of it before it is."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from tests.gateway.live import ASK, MODEL, Json, ask, key_headers, live
from tests.gateway.test_cascade import LIMIT, cascading, drafts, outcome, thinks
from tests.scripted_backend import ScriptedBackend


async def test_a_key_has_the_last_word(scripted: ScriptedBackend) -> None:
    """A key drafts where the configuration does not, and the other way round."""

    def entry(name: str, **more: Any) -> Json:
        return {"id": name, "secret_sha256": hashlib.sha256(name.encode()).hexdigest(), **more}

    keys = [entry("plain"), entry("drafts", cascade="uncertain"), entry("never", cascade="off")]
    for when, drafting in [("off", {"drafts"}), ("uncertain", {"plain", "drafts"})]:
        async with live(cascading(scripted, when=when, keys=keys)) as running:
            for name in ("plain", "drafts", "never"):
                scripted.queue(drafts())
                _, _, told = await outcome(running, ASK, headers=key_headers(name))
                assert ("cascade" in told) is (name in drafting), (when, name)


@pytest.mark.parametrize(
    "asks",
    [{"thinkgate": {"mode": "reasoning"}}, {"reasoning_effort": "low"}, {"thinkgate": {"mode": "instant"}}],
)
async def test_a_request_that_names_its_mode_gets_it(scripted: ScriptedBackend, asks: Json) -> None:
    """A cascade is for those that leave it open."""
    async with live(cascading(scripted, when="always")) as running:
        scripted.queue(thinks())
        _, _, told = await outcome(running, {**ASK, **asks})
        assert "cascade" not in told


@pytest.mark.parametrize(
    ("when", "text", "drafts_first"),
    [
        ("uncertain", "hello there, how are you?", False),
        ("always", "hello there, how are you?", True),
        ("uncertain", "How many squares are on the board?", True),
    ],
)
async def test_route_says_whether_a_draft_would_be_made(
    scripted: ScriptedBackend, when: str, text: str, drafts_first: bool
) -> None:
    """With what it would have to reach, and a hold that has room for it."""
    async with live(cascading(scripted, when=when, routing={"scorer": "builtin"})) as running:
        body = {**ASK, "messages": [{"role": "user", "content": text}]}
        told = (await ask(running, body, "/v1/route")).json
        if not drafts_first:
            assert (told["cascade"], told["mode"]) == (None, "instant")
            return
        assert told["cascade"]["outcome"] == "planned"
        assert (told["cascade"]["least"], told["mode"]) == (0.6, "reasoning")
        scripted.queue(drafts())
        _, _, done = await outcome(running, body)
        assert done["hold"] == told["hold"]
        again = (await ask(running, body, "/v1/route")).json
        assert again["cascade"] == told["cascade"]


async def test_a_draft_that_does_not_fit_is_left_out(scripted: ScriptedBackend) -> None:
    """Limits that have room for the request, but not for a draft beside it, refuse nothing and take no thinking."""
    async with live(cascading(scripted)) as running:
        bare = (await ask(running, {**ASK, "thinkgate": {"mode": "reasoning"}}, "/v1/route")).json["hold"]["tokens"]
    tree = cascading(scripted)
    tree["limits"] = [{**LIMIT, "amount": bare}]
    async with live(tree) as running:
        scripted.queue(thinks())
        _, texts, told = await outcome(running, ASK)
        assert texts[0]["content"] == "it is 42"
        assert told["cascade"]["outcome"] == "aside"
        assert told["cascade"]["reason"] == f"a draft does not fit into what model:{MODEL} has left of tokens"
        assert "degraded" not in told


async def test_its_hold_is_kept_for_every_request_of_a_shape(scripted: ScriptedBackend) -> None:
    """Decisions that are remembered draft with the messages of their own request."""
    async with live(cascading(scripted)) as running:
        scripted.forget()
        for question in ("what is six", "what is seven"):
            scripted.queue(drafts())
            body = {**ASK, "messages": [{"role": "user", "content": question}]}
            _, _, told = await outcome(running, body)
            assert told["cascade"]["outcome"] == "accepted"
            assert json.dumps(scripted.calls[-1].json["messages"]).count(question) == 1
            assert scripted.calls[-1].json["logprobs"] is True
