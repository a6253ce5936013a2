"""From a parsed request to what will be run and held."""

from __future__ import annotations

from typing import Any

import pytest

from budget.cap import MARKER_ALLOWANCE_TOKENS
from budget.chain import Forcing
from gateway.backends.port import Capabilities, Surface
from gateway.errors import GatewayError, ModelNotFound, PermissionDenied
from gateway.modes.reasoning import Stops
from tests.gateway.still import CHAT, Json, config_of, key, prepared, sent

IGNORES_CAPS = Capabilities(cap_binds=False, detail={"cap": "ignored: 9 thinking tokens under a cap of 4"})
BREAKS_WITH_TOOLS = Capabilities(
    cap_binds=True, cap_binds_with_tools=False, detail={"cap": "4 of 4 tokens used", "cap + tools": "ignored"}
)
FORCING = Forcing(opening=(15, 9), closing=(16,), wrap_up=(7, 8, 9, 10), start_id=15, end_id=16)
ONLY_NATIVE = config_of(
    {"thinking": {"default_tokens": 500, "max_tokens": 1000, "answer_floor_tokens": 50, "enforce": "native"}}
)
TAKES_IDS = Capabilities(cap_binds=False, forcing=FORCING, instant_is_quiet=True)
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def refused(body: Json, **how: Any) -> GatewayError:
    """The error that such a request is answered with."""
    with pytest.raises(GatewayError) as caught:
        prepared(body, **how)
    return caught.value


# ------------------------------------------------------------------------------------------ what is run


def test_a_request_that_says_nothing_thinks_with_the_default_cap() -> None:
    """Nothing decided: reasoning with the model's default cap and answer limit."""
    request = prepared({})
    assert (request.decision.mode, request.cap.tokens, request.cap.source) == ("reasoning", 500, "default")
    assert request.call.thinking.enabled
    assert (request.call.thinking.cap, request.call.max_tokens) == (500, 500 + MARKER_ALLOWANCE_TOKENS + 200)
    assert (request.call.model, request.call.surface, request.call.n, request.choices) == ("up/qwen", "chat", 1, 1)
    assert request.call.trace_headers == ((b"traceparent", b"00-1"),)
    assert sent(request) == {"messages": CHAT["messages"], "chat_template_kwargs": {"enable_thinking": True}}
    assert not request.is_plain()


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "qwen:instant"},
        {"thinkgate": {"mode": "instant"}},
        {"thinkgate": {"thinking_tokens": 0}},
        {"reasoning_effort": "none"},
        {"reasoning": {"max_tokens": 0}},
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
        {"thinking_config": {"thinking_budget": 0}},
        {"thinking_budget": 0},
        {"thinking_token_budget": 0},
        {"enable_thinking": False},
    ],
)
def test_a_cap_of_zero_is_instant_in_every_dialect(fields: Json) -> None:
    """Off in any dialect switches the template, leaves no thinking and holds none."""
    request = prepared(fields)
    assert (request.decision.mode, request.cap.tokens, request.cap.source) == ("instant", 0, "mode")
    assert (request.call.thinking.enabled, request.call.thinking.cap) == (False, 0)
    assert request.call.max_tokens == 200
    assert request.ceiling.thinking_tokens == 0
    assert sent(request)["chat_template_kwargs"] == {"enable_thinking": False}
    assert request.decision.reason.startswith("asked by ")


def test_a_named_cap_is_the_calls_cap() -> None:
    """The number of the request goes to the call, the report and the hold."""
    request = prepared({"thinkgate": {"thinking_tokens": 300}, "n": 2})
    assert (request.cap.tokens, request.cap.source, request.call.thinking.cap) == (300, "request", 300)
    assert request.ceiling.thinking_tokens == 600


def test_a_cap_that_does_not_fit_is_refused_by_the_field_that_gave_it() -> None:
    """Above the total less the floor, the key's or the model's ceiling: 400 with what would fit."""
    error = refused({"thinking_token_budget": 60, "max_tokens": 100})
    assert (error.status, error.code, error.param) == (400, "thinking_budget_too_high", "thinking_token_budget")
    assert "is 60, but the most that fits is 50: the total limit 100 less 50 kept for the answer" in error.message
    error = refused({"thinkgate": {"thinking_tokens": 60}}, key=key(max_thinking_tokens=59))
    assert error.param == "thinkgate.thinking_tokens"
    assert "this key's max_thinking_tokens" in error.message
    assert "thinking.max_tokens" in refused({"thinking_budget": 1001}).message


def test_a_total_below_the_answer_floor_leaves_no_room_for_a_named_cap() -> None:
    """With a total smaller than the floor, any named cap is refused and an open mode becomes instant."""
    error = refused({"thinking_token_budget": 1, "max_tokens": 40})
    assert "the most that fits is 0" in error.message
    request = prepared({"max_tokens": 40})
    assert (request.decision.mode, request.decision.reason) == ("instant", "limits leave no room for thinking")
    assert request.call.max_tokens == 40


def test_reasoning_without_room_becomes_instant_and_says_why() -> None:
    """A request that asks to think without naming a number is answered instantly when nothing fits."""
    request = prepared({"thinkgate": {"mode": "reasoning"}, "max_tokens": 50})
    assert request.decision.mode == "instant"
    assert request.decision.reason == "no room for thinking: the total limit 50 less 50 kept for the answer"
    assert sent(request)["chat_template_kwargs"] == {"enable_thinking": False}


def test_an_effort_is_clamped_and_the_report_says_so() -> None:
    """A cap from an effort that does not fit is lowered, and the response will tell from what and by what."""
    request = prepared({"reasoning_effort": "max"}, key=key(max_thinking_tokens=100))
    assert (request.cap.tokens, request.cap.source) == (100, "effort")
    assert (request.cap.clamped_from, request.cap.clamped_by) == (950, "this key's max_thinking_tokens")


@pytest.mark.parametrize("field", ["thinking_token_budget", "thinking_budget"])
def test_minus_one_is_the_most_that_is_allowed(field: str) -> None:
    """Without a cap of the client's own, the tightest ceiling is the cap."""
    request = prepared({field: -1, "max_tokens": 700})
    assert (request.cap.tokens, request.cap.source) == (650, "request")
    assert request.cap.clamped_by == "the total limit 700 less 50 kept for the answer"
    assert prepared({field: -1}).cap.tokens == 1000


def test_a_named_cap_is_refused_where_no_backend_holds_one() -> None:
    """Better an error than a promise: the message says what was measured."""
    error = refused({"thinkgate": {"thinking_tokens": 5}}, config=ONLY_NATIVE, capabilities=IGNORES_CAPS)
    assert (error.code, error.param) == ("cap_not_enforceable", "thinkgate.thinking_tokens")
    assert "ignored: 9 thinking tokens under a cap of 4" in error.message


@pytest.mark.parametrize(
    "fields", [{}, {"reasoning_effort": "low"}, {"thinking_token_budget": -1}, {"thinkgate": {"mode": "reasoning"}}]
)
def test_other_caps_go_without_enforcement_where_no_backend_holds_one(fields: Json) -> None:
    """Defaults, efforts and -1 name no number: they run uncapped, hold all their output, and the report says so."""
    request = prepared(fields, config=ONLY_NATIVE, capabilities=IGNORES_CAPS)
    assert (request.cap.tokens, request.cap.enforcement) == (None, "none")
    assert request.call.thinking.cap is None
    assert request.ceiling.thinking_tokens == request.call.max_tokens


def test_a_cap_that_breaks_with_tools_binds_only_without_them() -> None:
    """What was measured with tools counts for requests with tools."""
    config = ONLY_NATIVE
    plain = prepared({"thinking_token_budget": 5}, config=config, capabilities=BREAKS_WITH_TOOLS)
    assert plain.cap.enforcement == "native"
    for nothing in (None, list[object]()):
        body: Json = {"thinking_token_budget": 5, "tools": nothing}
        assert prepared(body, config=config, capabilities=BREAKS_WITH_TOOLS).cap.enforcement == "native"
    body = {"thinking_token_budget": 5, "tools": TOOLS}
    error = refused(body, config=config, capabilities=BREAKS_WITH_TOOLS)
    assert error.code == "cap_not_enforceable"
    assert "(ignored" in error.message


def test_a_cap_is_held_from_token_ids_where_the_backend_does_not_hold_it() -> None:
    """Two-phase enforcement keeps room for ending the thinking, and holds what a chain may waste on top."""
    request = prepared({"thinking_token_budget": 60, "max_tokens": 150}, capabilities=TAKES_IDS)
    assert (request.cap.tokens, request.cap.enforcement) == (60, "two_phase")
    assert request.slack == FORCING.most_wasted()
    assert request.call.thinking.answer_floor == 50
    native = prepared({"thinking_token_budget": 60, "max_tokens": 150})
    assert request.ceiling.tokens == native.ceiling.tokens + request.slack
    error = refused({"thinking_token_budget": 96, "max_tokens": 150}, capabilities=TAKES_IDS)
    assert "the most that fits is 93" in error.message
    assert "50 kept for the answer and 7 for ending the thinking" in error.message


def test_a_least_of_thinking_needs_token_ids() -> None:
    """`min_thinking_tokens` is refused by name where no chain can be continued, or above what may be thought."""
    body = {"thinkgate": {"min_thinking_tokens": 20}}
    assert prepared(body, capabilities=TAKES_IDS).call.thinking.min_tokens == 20
    assert prepared(body, capabilities=TAKES_IDS).cap.enforcement == "two_phase"
    error = refused(body)
    assert (error.code, error.param) == ("cap_not_enforceable", "thinkgate.min_thinking_tokens")
    error = refused({"thinkgate": {"min_thinking_tokens": 600}}, capabilities=TAKES_IDS)
    assert (error.code, error.param) == ("thinking_budget_too_high", "thinkgate.min_thinking_tokens")
    assert "500" in error.message


def test_while_every_backend_is_down_the_request_is_prepared_all_the_same() -> None:
    """That no backend is up is for placement to say, with its own status."""
    assert prepared({"thinking_token_budget": 5}, capabilities=None).cap.tokens == 5


# ----------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_the_requests_total_is_the_calls_limit(field: str) -> None:
    """The total limit goes upstream as it is, thinking included."""
    request = prepared({field: 300})
    assert (request.call.max_tokens, request.call.thinking.cap) == (300, 250)


@pytest.mark.parametrize(
    ("fields", "most", "mode"),
    [({}, 800 + 1000 + MARKER_ALLOWANCE_TOKENS, "reasoning"), ({"enable_thinking": False}, 800, "instant")],
)
def test_a_total_above_what_the_model_gives_is_refused(fields: Json, most: int, mode: str) -> None:
    """The model's ceilings for thinking and answer bound the total, per mode, and the message says how."""
    assert prepared({**fields, "max_tokens": most}).call.max_tokens == most
    error = refused({**fields, "max_completion_tokens": most + 1})
    assert (error.code, error.param) == ("max_tokens_too_high", "max_completion_tokens")
    assert f"at most {most} tokens in {mode} mode" in error.message


def test_the_context_window_bounds_what_nobody_named() -> None:
    """Without a total the limit stays below the smallest context window of the backends."""
    small = Capabilities(cap_binds=True, max_model_len=100)
    assert prepared({}, capabilities=small).call.max_tokens == 99


def test_the_requests_own_floor_replaces_the_models() -> None:
    """`answer_tokens_min` is kept back from the total, and lengthens the answer where there is none."""
    assert prepared({"thinkgate": {"answer_tokens_min": 100}, "max_tokens": 300}).cap.tokens == 200
    assert prepared({"thinkgate": {"answer_tokens_min": 0}, "max_tokens": 300}).cap.tokens == 300
    request = prepared({"thinkgate": {"answer_tokens_min": 700}})
    assert request.call.max_tokens == 500 + MARKER_ALLOWANCE_TOKENS + 700


@pytest.mark.parametrize(
    ("fields", "most", "limit"),
    [
        ({"thinkgate": {"answer_tokens_min": 101}, "max_tokens": 100}, 100, "`max_tokens`"),
        ({"thinkgate": {"answer_tokens_min": 801}}, 800, "answer.max_tokens"),
    ],
)
def test_a_floor_above_every_answer_is_refused(fields: Json, most: int, limit: str) -> None:
    """A floor that no answer can reach is a 400 naming what it collides with, not a promise broken later."""
    error = refused(fields)
    assert (error.code, error.param) == ("answer_floor_too_high", "thinkgate.answer_tokens_min")
    assert f"the most that fits is {most}" in error.message
    assert limit in error.message


def test_too_many_choices_are_refused() -> None:
    """`n` and the number of prompts multiply, and the model's max_n bounds the product."""
    assert prepared({"n": 8}).choices == 8
    assert refused({"n": 9}).param == "n"
    assert prepared({"prompt": ["a", "b", "c", "d"], "n": 2}, surface="completions").choices == 8
    assert refused({"prompt": ["a", "b", "c"], "n": 3}, surface="completions").param == "n"
    assert refused({"prompt": ["a"] * 9}, surface="completions").param == "prompt"


# ------------------------------------------------------------------------------------ who may ask for what


def test_an_unknown_model_is_a_404_that_says_where_to_look() -> None:
    """The name is repeated, the list is named, and a suffix alone does not make a model."""
    for name in ("gpt", "gpt:instant", "qwen:8b", ":instant"):
        error = refused({"model": name})
        assert isinstance(error, ModelNotFound)
        assert (error.status, error.param) == (404, "model")
        assert "/v1/models" in error.message


def test_a_model_that_the_key_may_not_use_is_a_403() -> None:
    """With or without a suffix, a forbidden model is refused by `model`."""
    for name in ("qwen", "qwen:instant"):
        error = refused({"model": name}, key=key(models=frozenset({"other"})))
        assert isinstance(error, PermissionDenied)
        assert (error.status, error.param) == (403, "model")


def test_a_mode_that_the_key_may_not_use_is_a_403_by_the_field_that_asked() -> None:
    """The refusal names the field and the modes that are allowed."""
    error = refused({"reasoning_effort": "low"}, key=key(modes=frozenset({"instant"})))
    assert isinstance(error, PermissionDenied)
    assert (error.status, error.param) == (403, "reasoning_effort")
    assert "allowed: instant" in error.message
    assert prepared({}, key=key(modes=frozenset({"instant"}))).decision.mode == "instant"


def test_a_configured_name_with_a_colon_can_have_a_suffix() -> None:
    """A model called `qwen:8b` answers to that name and to `qwen:8b:instant`."""
    config = config_of(models={"qwen:8b": {"backends": [{"id": "b", "url": "http://127.0.0.1:2"}]}})
    assert prepared({"model": "qwen:8b"}, config=config).model.name == "qwen:8b"
    request = prepared({"model": "qwen:8b:instant"}, config=config)
    assert (request.model.name, request.decision.mode) == ("qwen:8b", "instant")


def test_the_routing_defaults_decide_what_nobody_did() -> None:
    """`routing` of the configuration is asked when the request leaves the mode open."""
    config = config_of(routing={"default_mode": "instant"})
    assert prepared({}, config=config).decision.reason == "routing.default_mode"
    assert prepared({"reasoning_effort": "low"}, config=config).decision.mode == "reasoning"


def test_media_hosts_come_from_the_configuration() -> None:
    """Pictures are checked against server.media_hosts before anything is held."""
    part = {"type": "image_url", "image_url": {"url": "http://img.example/a.png"}}
    body = {"messages": [{"role": "user", "content": [part]}]}
    assert refused(body).param == "messages[0].content[0].image_url"
    assert prepared(body, config=config_of(server={"media_hosts": ["img.example"]})).model.name == "qwen"


# -------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize(
    ("stop", "kept"),
    [("x", ("x",)), (["x", "y"], ("x", "y")), ([], ()), (None, ()), ("", ()), (["", "x"], ("", "x"))],
)
def test_in_reasoning_mode_the_gateway_matches_stop_itself(stop: object, kept: tuple[str, ...]) -> None:
    """A backend would also stop inside the thinking: `stop` is taken out of its fields."""
    request = prepared({"stop": stop})
    assert request.stops == Stops(kept)
    assert "stop" not in sent(request)


def test_in_instant_mode_the_backend_matches_stop() -> None:
    """Without thinking there is nothing to keep `stop` from."""
    request = prepared({"stop": ["x"], "include_stop_str_in_output": True, "enable_thinking": False})
    assert request.stops == Stops()
    assert sent(request)["stop"] == ["x"]
    assert sent(request)["include_stop_str_in_output"] is True


@pytest.mark.parametrize(("value", "keep"), [(True, True), (False, False), (None, False)])
def test_the_stop_string_may_stay_in_the_text(value: bool | None, keep: bool) -> None:
    """The `include_stop_str_in_output` of vLLM is honoured by the gateway in the backend's place."""
    request = prepared({"stop": "x", "include_stop_str_in_output": value})
    assert request.stops.keep == keep
    assert "include_stop_str_in_output" not in sent(request)


# ------------------------------------------------------------------------------------- the plain path


@pytest.mark.parametrize(
    ("body", "surface", "plain"),
    [
        ({"enable_thinking": False}, "chat", True),
        ({}, "completions", True),
        ({"enable_thinking": False, "stream": True}, "chat", False),
        ({"enable_thinking": False, "thinkgate": {"envelope": {"tokens": 5}}}, "chat", False),
        ({}, "chat", False),
    ],
)
def test_only_an_instant_answer_that_nobody_watches_is_plain(body: Json, surface: Surface, plain: bool) -> None:
    """The backend's own JSON passes on only where nothing has to be counted while it comes."""
    assert prepared(body, surface=surface).is_plain() == plain


@pytest.mark.parametrize(
    ("body", "live"),
    [({}, False), ({"stream": True}, True), ({"thinkgate": {"envelope": {"seconds": 5}}}, True)],
)
def test_somebody_reads_along_when_it_streams_or_is_bounded(body: Json, live: bool) -> None:
    """Only then need deltas come one by one."""
    assert prepared(body).call.is_live == live


def test_priority_and_ids_go_to_the_call() -> None:
    """The tier's class and the wish for token ids reach the backend's call."""
    call = prepared({"service_tier": "flex", "return_token_ids": True, "n": 3}).call
    assert (call.priority, call.wants_token_ids, call.n, call.request_id) == (1, True, 3, "req-1")
