"""What is held before a request runs: never less than it can use."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.backends.port import Capabilities, Surface
from gateway.ceiling import MEDIA_PART_TOKENS, TEMPLATE_MARGIN_TOKENS
from gateway.errors import InvalidRequest
from tests.gateway.still import CHAT, HOLDS_CAPS, TEXT, Json, config_of, key, prepared

IGNORES_CAPS = Capabilities(cap_binds=False)


def hold_of(body: Json, surface: Surface = "chat", **how: Any) -> tuple[int, int, int]:
    """Tokens, thinking tokens and nano-dollars that are held, less the prompt's bound in bytes and margin."""
    ceiling = prepared(body, surface=surface, **how).ceiling
    size = len(json.dumps({**(CHAT if surface == "chat" else TEXT), **body}).encode())
    return ceiling.tokens - size - TEMPLATE_MARGIN_TOKENS, ceiling.thinking_tokens, ceiling.nano_usd


def test_the_hold_is_prompt_and_output_times_choices() -> None:
    """The prompt is bounded by its bytes and a margin; the output limit counts once per choice and prompt."""
    assert hold_of({"max_tokens": 300}) == (300, 250, 0)
    assert hold_of({"max_tokens": 300, "n": 3}) == (900, 750, 0)
    assert hold_of({"max_tokens": 300, "thinking_budget": 10}) == (300, 10, 0)
    assert hold_of({"max_tokens": 5, "prompt": ["a", "b"], "n": 2}, "completions") == (20, 0, 0)


def test_pictures_lengthen_the_prompts_bound() -> None:
    """A picture's address is short and its tokens are many, so each part is held for."""
    part = {"type": "image_url", "image_url": {"url": "http://img.example/a.png"}}
    body = {"messages": [{"role": "user", "content": [part, part]}], "max_tokens": 300}
    config = config_of(server={"media_hosts": ["img.example"]})
    assert hold_of(body, config=config)[0] == 300 + 2 * MEDIA_PART_TOKENS


def test_the_hold_in_money_is_at_the_models_prices() -> None:
    """The dearest way the tokens can fall is what is held in nano-USD."""
    config = config_of({"price_usd_per_mtok": {"prompt": 1, "cached": 0.5, "thinking": 4, "answer": 2}})
    request = prepared({"max_tokens": 300}, config=config)
    prompt = request.ceiling.tokens - 300
    assert request.ceiling.nano_usd == prompt * 1000 + 300 * 4000


@settings(max_examples=100, deadline=None)
@given(
    total=st.none() | st.integers(1, 1900),
    cap=st.none() | st.integers(-1, 1100),
    floor=st.none() | st.integers(0, 900),
    effort=st.none() | st.sampled_from(["none", "minimal", "medium", "max"]),
    n=st.integers(1, 8),
    key_max=st.none() | st.integers(0, 1200),
    binds=st.booleans(),
)
def test_what_is_run_never_exceeds_what_is_held(
    total: int | None,
    cap: int | None,
    floor: int | None,
    effort: str | None,
    n: int,
    key_max: int | None,
    binds: bool,
) -> None:
    """Over all limits, caps and efforts: a 400 by a field's name, or a call that fits its hold and its ceilings."""
    body: Json = {
        "max_tokens": total,
        "thinking_token_budget": cap,
        "reasoning_effort": effort,
        "n": n,
        "thinkgate": {"answer_tokens_min": floor},
    }
    how: Json = {
        "key": key(max_thinking_tokens=key_max),
        "capabilities": HOLDS_CAPS if binds else IGNORES_CAPS,
    }
    try:
        request = prepared(body, **how)
    except InvalidRequest as error:
        named = error.param
    else:
        named = None
    if named is not None:
        assert named in body or named == "thinkgate.answer_tokens_min"
        return
    call, ceiling = request.call, request.ceiling
    assert call.max_tokens == (total if total is not None else call.max_tokens) >= 1
    assert ceiling.tokens >= n * call.max_tokens
    assert ceiling.thinking_tokens <= n * call.max_tokens
    if call.thinking.cap is None:
        assert not binds
        return
    assert ceiling.thinking_tokens == n * min(call.thinking.cap, call.max_tokens)
    assert call.thinking.cap <= min(1000, 1000 if key_max is None else key_max)
    if total is not None and call.thinking.enabled:
        assert total - call.thinking.cap >= (50 if floor is None else floor)
    if cap is not None and cap > 0:
        assert call.thinking.cap == cap
