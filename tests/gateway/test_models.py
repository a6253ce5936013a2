"""The models a configuration serves: their backends, which of them are kept over a reload, and who is next."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.backends.http_backend import HttpBackend
from gateway.backends.port import Capabilities
from gateway.config.load import ConfigError
from gateway.config.schema import Config
from gateway.errors import Overloaded
from gateway.models import Model, build_models
from tests.gateway.still import HOLDS_CAPS, Json, config_of, models_of

TWO: Json = {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}, {"id": "b", "url": "http://127.0.0.1:2"}]}


def reloaded(old: dict[str, Model], model: Json, **top: Any) -> Model:
    """The model after a reload with this entry."""
    return build_models(config_of(model, **top), old)["qwen"]


def test_a_model_knows_its_names_prices_and_scope() -> None:
    """The upstream name defaults to the public one, prices to nothing."""
    models = models_of(
        config_of(
            {"price_usd_per_mtok": {"prompt": 1, "answer": 2}},
            models={"plain": {"backends": [{"id": "b", "url": "http://127.0.0.1:2"}]}},
        )
    )
    assert (models["qwen"].upstream, models["qwen"].scope) == ("up/qwen", "model:qwen")
    assert (models["plain"].upstream, models["plain"].prices.answer) == ("plain", 0)
    assert (models["qwen"].prices.prompt, models["qwen"].prices.thinking) == (10**9, 2 * 10**9)


def test_the_tightest_of_the_limits_bounds_a_cap() -> None:
    """Model, key, total and floor go into the bounds; the request's own floor beats the model's."""
    model = models_of(config_of())["qwen"]
    assert model.bounds(None, None, None).ceiling()[0] == 1000
    assert model.bounds(70, None, None).ceiling()[0] == 70
    assert model.bounds(None, 300, None).ceiling()[0] == 250
    assert model.bounds(None, 300, 10).ceiling()[0] == 290


def test_an_unknown_kind_of_server_gets_no_template_switches_unless_told() -> None:
    """An OpenAI-compatible server may refuse `chat_template_kwargs`: the default is not sent, a configured one is."""
    backends = [{"id": "a", "url": "http://127.0.0.1:1", "kind": "openai"}]
    off = {"chat_template_kwargs": {"thinking": False}}
    silent, told = (
        models_of(config_of({"backends": backends, "thinking": thinking}))["qwen"] for thinking in ({}, {"off": off})
    )
    assert silent.switches.encoded("instant", None) is None
    raw = told.switches.encoded("instant", None)
    assert raw is not None
    assert bytes(raw) == b'{"thinking":false}'


# ----------------------------------------------------------------------------------------------- choosing


def test_a_call_goes_to_a_backend_that_is_up() -> None:
    """Backends that are down, and those that were tried already, are left out."""
    model = models_of(config_of(TWO))["qwen"]
    a, b = model.slots
    a.capabilities = None
    assert {model.choose() for _ in range(10)} == {b}
    a.capabilities = HOLDS_CAPS
    assert {model.choose(without=[b]) for _ in range(10)} == {a}


def test_a_call_goes_to_the_least_busy_backend() -> None:
    """Calls in flight are counted from the decision to the end of the call."""
    model = models_of(config_of(TWO))["qwen"]
    a, b = model.slots
    with a:
        assert {model.choose() for _ in range(10)} == {b}
        with b, b:
            assert {model.choose() for _ in range(10)} == {a}
    assert (a.in_flight, b.in_flight) == (0, 0)


@pytest.mark.parametrize("backends", [TWO, {}])
def test_without_a_backend_the_gateway_is_overloaded(backends: Json) -> None:
    """No backend up, or every one tried: a 503 that names the model, says when to retry, and gives no address away."""
    model = models_of(config_of(backends))["qwen"]
    for slot in model.slots:
        slot.mark_down("connect to 10.0.0.7 failed")
    for tried in ([], model.slots):
        with pytest.raises(Overloaded, match="'qwen'") as refused:
            model.choose(without=tried)
        assert refused.value.retry_after_s is not None
        assert "10.0.0.7" not in refused.value.message


def test_a_lost_backend_is_out_until_it_is_probed_again() -> None:
    """Marking it down keeps the reason for humans and asks for a probe."""
    slot = models_of(config_of())["qwen"].slots[0]
    assert slot.is_up
    slot.mark_down("gone")
    assert (slot.is_up, slot.failure, slot.suspect.is_set()) == (False, "gone", True)


# ------------------------------------------------------------------------------------------------ reload


@pytest.mark.parametrize(
    "model",
    [
        TWO,
        {**TWO, "max_n": 2},
        {**TWO, "price_usd_per_mtok": {"prompt": 9}},
        {**TWO, "answer": {"max_tokens": 9000}},
        {"backends": [TWO["backends"][1], TWO["backends"][0]]},
    ],
)
def test_an_unchanged_backend_is_taken_over(model: Json) -> None:
    """Its connections, health and calls in flight survive a reload of anything that does not concern it."""
    old = models_of(config_of(TWO))
    new = reloaded(old, model)
    assert set(new.slots) == set(old["qwen"].slots)
    assert new.config.max_n == model.get("max_n", 8)


def test_an_added_backend_is_new_and_a_removed_one_is_gone() -> None:
    """Only what changed is built or dropped."""
    old = models_of(config_of(TWO))
    a, b = old["qwen"].slots
    more = reloaded(old, {"backends": [*TWO["backends"], {"id": "c", "url": "http://127.0.0.1:3"}]})
    assert more.slots[:2] == [a, b]
    assert not more.slots[2].is_up
    assert reloaded(old, {"backends": TWO["backends"][1:]}).slots == [b]


@pytest.mark.parametrize(
    ("model", "is_trusted"),
    [
        ({"backends": [{"id": "a", "url": "http://127.0.0.1:1", "weight": 2}]}, True),
        ({"backends": [{"id": "z", "url": "http://127.0.0.1:1"}]}, True),
        ({"thinking": {"default_tokens": 7}}, True),
        ({"backends": [{"id": "a", "url": "http://127.0.0.1:9"}]}, False),
        ({"upstream_model": "other"}, False),
        ({"thinking": {"end": "</thought>"}}, False),
    ],
)
def test_a_changed_backend_is_built_anew_and_trusted_if_it_is_the_same_server(model: Json, is_trusted: bool) -> None:
    """New settings make a new backend; the same server serves on meanwhile, another one waits for its probe."""
    old = models_of(config_of())
    (slot,) = reloaded(old, model).slots
    assert slot is not old["qwen"].slots[0]
    assert slot.is_up == is_trusted


def test_other_ways_of_placing_make_new_backends() -> None:
    """What placement knows of a backend belongs to its settings; the same server serves on meanwhile."""
    old = models_of(config_of(TWO))
    new = build_models(config_of(TWO, routing={"placement": {"ttl_s": 5}}), old)["qwen"]
    assert not set(new.slots) & set(old["qwen"].slots)
    assert all(slot.is_up for slot in new.slots)


def test_exact_needs_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pyzmq the configuration is refused, naming the extra that brings it."""
    entry = {"backends": [{"id": "a", "url": "http://127.0.0.1:1", "kv_events": {}}]}
    config = config_of(entry, routing={"placement": {"index": "exact"}})
    build_models(config)
    monkeypatch.setattr("gateway.models.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match="kv-events"):
        build_models(config)


def test_another_models_backend_is_not_taken_over() -> None:
    """Two public names on one server have backends of their own."""
    old = models_of(config_of())
    new = build_models(config_of(models={"twin": {"upstream_model": "up/qwen", **TWO}}), old)
    assert not set(new["twin"].slots) & set(new["qwen"].slots)


def test_a_backends_credential_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The named variable is sent as a bearer token; while it is unset the configuration is refused by its place."""
    entry: Json = {"backends": [{"id": "a", "url": "http://127.0.0.1:1", "api_key_env": "UP_KEY"}]}
    monkeypatch.setenv("UP_KEY", "sk-up\n")
    backend = build_models(config_of(entry))["qwen"].slots[0].backend
    assert isinstance(backend, HttpBackend)
    assert backend.pool.headers == {"authorization": "Bearer sk-up"}
    monkeypatch.delenv("UP_KEY")
    with pytest.raises(ConfigError, match=r"models\.qwen\.backends\[a\]\.api_key_env: the variable UP_KEY is unset"):
        build_models(config_of(entry))


def test_building_asks_no_backend() -> None:
    """A configuration of unreachable servers builds, with every backend down until it was probed."""
    config: Config = config_of(TWO)
    model = build_models(config)["qwen"]
    assert [(slot.is_up, slot.failure) for slot in model.slots] == [(False, "not probed yet")] * 2
    assert isinstance(model.slots[0].backend, HttpBackend)
    assert model.slots[0].backend.capabilities == Capabilities()
