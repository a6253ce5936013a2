"""The configuration: what a file may say, what is assumed, and what is told about a wrong value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from pydantic import ValidationError

from gateway.config.load import _problems
from gateway.config.schema import Config

Json = dict[str, Any]
SMALL: Json = {"models": {"qwen3": {"backends": [{"id": "a", "url": "http://127.0.0.1:8000"}]}}}
SHA = "ab" * 32


def tree(*changes: tuple[str, object]) -> Json:
    """The smallest configuration with values put at these paths, e.g. `models.qwen3.max_n`."""
    changed = copy.deepcopy(SMALL)
    for path, value in changes:
        node: Any = changed
        *way, last = path.split(".")
        for step in way:
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    return changed


def config(*changes: tuple[str, object]) -> Config:
    """That configuration, validated."""
    return Config.model_validate(tree(*changes))


def problems(*changes: tuple[str, object]) -> list[str]:
    """What is wrong with that configuration, as the operator reads it."""
    with pytest.raises(ValidationError) as refused:
        config(*changes)
    return [line for problem in _problems(refused.value, {}) for line in problem.split("\n")]


def key(**fields: object) -> Json:
    """A key with a secret."""
    return {"id": "ada", "secret_sha256": SHA, **fields}


def limit(**fields: object) -> Json:
    """A limit on the model."""
    return {"scope": "model:qwen3", "unit": "tokens", "amount": 100, "window": "hour", **fields}


PRICED = ("models.qwen3.price_usd_per_mtok", {"prompt": 1, "answer": 2})


def test_one_model_with_one_backend_is_enough() -> None:
    """Everything else has the documented default."""
    small = config()
    assert (small.server.host, small.server.port, small.server.workers) == ("127.0.0.1", 8080, 1)
    assert (small.server.max_body_bytes, small.server.metrics.port) == (10 * 1024 * 1024, 9464)
    assert (small.keys, small.limits, small.store.kind) == ((), (), "memory")
    assert (small.routing.default_mode, small.routing.on_uncertain) == ("auto", "reasoning")
    model = small.models["qwen3"]
    assert (model.backends[0].kind, model.backends[0].weight, model.max_n) == ("vllm", 1, 16)
    assert (model.thinking.default_tokens, model.thinking.max_tokens, model.thinking.answer_floor_tokens) == (
        2048,
        16384,
        128,
    )
    assert model.thinking.off == {"chat_template_kwargs": {"enable_thinking": False}}
    assert (model.answer.default_tokens, model.answer.max_tokens) == (1024, 8192)
    assert small.not_built_yet() == []


def test_a_configuration_never_changes() -> None:
    """What was validated once is frozen, so that running requests may share it."""
    with pytest.raises(ValidationError):
        config().server.port = 1  # type: ignore[misc]  # frozen


def test_two_models_do_not_share_a_default() -> None:
    """Defaults that can be changed in place are copies."""
    one, other = config().models["qwen3"].thinking.off, config().models["qwen3"].thinking.off
    assert one == other
    assert one is not other


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("server.port", 70000, "server.port: Input should be less than or equal to 65535 (got 70000)"),
        ("server.port", "http", "server.port: Input should be a valid integer"),
        ("server.workers", 0, "server.workers: Input should be greater than 0 (got 0)"),
        ("server.max_body_bytes", -1, "server.max_body_bytes: Input should be greater than 0 (got -1)"),
        ("server.metrics.port", -1, "server.metrics.port: Input should be greater than or equal to 0 (got -1)"),
        ("server.timeouts.idle_s", 0, "server.timeouts.idle_s: Input should be greater than 0 (got 0)"),
        ("server.timeouts.idle_s", float("inf"), "server.timeouts.idle_s: Input should be a finite number (got inf)"),
        ("server.timeouts.drain_s", float("nan"), "server.timeouts.drain_s: Input should be a finite number (got nan)"),
        ("models", {}, "models: Dictionary should have at least 1 item after validation"),
        ("models.qwen3", None, "models.qwen3: Input should be a valid dictionary"),
        ("models.qwen3.max_n", 0, "models.qwen3.max_n: Input should be greater than 0 (got 0)"),
        ("models.qwen3.backends", [], "models.qwen3: needs at least one entry in `backends`"),
        ("models.qwen3.backends.0.id", "a b", "models.qwen3.backends[0].id: String should match pattern"),
        ("models.qwen3.backends.0.kind", "tgi", "models.qwen3.backends[0].kind: Input should be 'vllm', 'openai' or"),
        ("models.qwen3.backends.0.weight", 0, "models.qwen3.backends[0].weight: Input should be greater than 0"),
        ("models.qwen3.backends.0.url", "127.0.0.1:8000", "models.qwen3.backends[0].url: must look like http://host"),
        ("models.qwen3.backends.0.url", "http://", "models.qwen3.backends[0].url: must look like http://host:8000"),
        ("models.qwen3.backends.0.url", "ftp://h", "models.qwen3.backends[0].url: must look like http://host:8000"),
        ("models.qwen3.backends.0.url", "http://h:99999", "models.qwen3.backends[0].url: Port out of range 0-65535"),
        ("models.qwen3.backends.0.url", "http://h:0", "models.qwen3.backends[0].url: must look like http://host:8000"),
        ("models.qwen3.backends.0.url", "http://[::1", "models.qwen3.backends[0].url: Invalid IPv6 URL"),
        ("models.qwen3.backends.0.url", "http://h/?q=1", "models.qwen3.backends[0].url: must not carry credentials"),
        ("models.qwen3.backends.0.url", "dns+https://h", "models.qwen3.backends[0].url: dns+https:// is not possible"),
        ("models.qwen3.thinking.start", "", "models.qwen3.thinking.start: String should have at least 1 character"),
        ("models.qwen3.thinking.enforce", "hope", "models.qwen3.thinking.enforce: Input should be 'auto', 'native'"),
        ("models.qwen3.thinking.off", {"temperature": 0}, "models.qwen3.thinking.off: may only hold `chat_template"),
        (
            "models.qwen3.thinking.off",
            {"chat_template_kwargs": True},
            "models.qwen3.thinking.off: may only hold `chat_template_kwargs`, a mapping",
        ),
        (
            "models.qwen3.thinking",
            {"max_tokens": 10},
            "models.qwen3.thinking: default_tokens 2048 is above max_tokens 10",
        ),
        ("models.qwen3.thinking", {"start": "x", "end": "x"}, "models.qwen3.thinking: start and end must differ"),
        ("models.qwen3.answer.max_tokens", 0, "models.qwen3.answer.max_tokens: Input should be greater than 0"),
        ("models.qwen3.targets", [{"model": "x"}], "models.qwen3: has `targets`, so `"),
        (
            "models.qwen3.effort_tokens",
            {"huge": 5},
            "models.qwen3.effort_tokens.huge: Input should be 'minimal', 'low'",
        ),
        ("models.qwen3.effort_tokens", {"low": -5}, "models.qwen3.effort_tokens.low: Input should be greater than or"),
        ("models.qwen3.price_usd_per_mtok", {"prompt": -1}, "models.qwen3.price_usd_per_mtok.prompt: Input should be"),
        (
            "models.qwen3.price_usd_per_mtok",
            {"prompt": float("inf")},
            "models.qwen3.price_usd_per_mtok.prompt: Input should be a finite number (got inf)",
        ),
        ("models.qwen3.architecture", {"layers": 1}, "models.qwen3.architecture.parameters: Field required"),
        ("keys", [{"secret_sha256": SHA}], "keys[0].id: Field required"),
        ("keys", [{"id": "ada"}], "keys[0]: needs exactly one of `secret_env` and `secret_sha256`"),
        ("keys", [key(secret_env="K")], "keys[0]: needs exactly one of `secret_env` and `secret_sha256`"),
        ("keys", [key(team="a b")], "keys[0].team: String should match pattern"),
        ("keys", [key(user="")], "keys[0].user: String should match pattern"),
        ("keys", [key(tags=["x", "\n"])], "keys[0].tags[1]: String should match pattern"),
        ("keys", [key(modes=["fast"])], "keys[0].modes[0]: Input should be 'instant', 'reasoning' or 'agentic'"),
        ("keys", [key(models=["gpt"])], "keys[0].models: 'gpt' is not under `models` (qwen3)"),
        ("keys", [key(), key(secret_sha256="cd" * 32)], "keys: id 'ada' stands twice"),
        ("keys", [key(max_thinking_tokens=-1)], "keys[0].max_thinking_tokens: Input should be greater than or equal"),
        ("limits", [limit(scope="qwen3")], "limits[0].scope: must be org:, team:, user:, key:, model: or tag: and a"),
        ("limits", [limit(scope="model:gpt")], "limits[0].scope: 'gpt' is not under `models` (qwen3)"),
        ("limits", [limit(scope="key:bob")], "limits[0].scope: 'bob' is not under `keys` (anyone)"),
        ("limits", [limit(amount=0)], "limits[0].amount: Input should be greater than 0 (got 0)"),
        ("limits", [limit(amount=1.5)], "limits[0].amount: must be a whole number of tokens (got 1.5)"),
        ("limits", [limit(amount=float("inf"))], "limits[0].amount: Input should be a finite number (got inf)"),
        ("limits", [limit(unit="usd", amount=1e-10)], "limits[0].amount: must be at least 1e-09"),
        ("limits", [limit(unit="euro")], "limits[0].unit: Input should be 'tokens', 'thinking_tokens', 'usd'"),
        ("limits", [limit(window="year")], "limits[0].window: Input should be 'second', 'minute', 'hour', 'day'"),
        ("limits", [limit(window=None)], "limits[0].window: concurrency has none; every other unit needs one"),
        ("limits", [limit(unit="concurrency")], "limits[0].window: concurrency has none; every other unit needs one"),
        ("limits", [limit(unit="usd")], "limits[0]: a usd limit needs models.qwen3.price_usd_per_mtok"),
        ("limits", [limit(), limit(amount=5)], "limits[1]: limits model:qwen3 as limits[0] does already: keep one"),
        ("limits", [limit(amount=2**53 + 1)], "limits[0].amount: must be at most 9007199254740991 in tokens"),
        ("store.kind", "etcd", "store.kind: Input should be 'memory', 'sqlite' or 'redis'"),
        ("store.path", "x.db", "store: the memory store has no `path`: it takes no other key"),
        ("store", {"kind": "sqlite", "url": "redis://h"}, "store: the sqlite store has no `url`: it takes `path`"),
        ("store", {"kind": "sqlite", "offline_share": 0.5}, "store: the sqlite store has no `offline_share`: it takes"),
        ("store", {"kind": "sqlite", "synchronous": "off"}, "store.synchronous: Input should be 'normal' or 'full'"),
        ("store", {"kind": "sqlite", "lease_s": 1}, "store.lease_s: Input should be greater than or equal to 2"),
        ("store", {"kind": "sqlite", "timeout_s": 0}, "store.timeout_s: Input should be greater than 0 (got 0)"),
        ("store", {"kind": "redis", "path": "x.db"}, "store: the redis store has no `path`: it takes `url`"),
        ("store", {"kind": "redis"}, "store: the redis store needs `url`, such as redis://127.0.0.1:6379/0"),
        ("store", {"kind": "redis", "url": "http://a"}, "store: the redis store needs `url`, such as redis://"),
        (
            "store",
            {"kind": "redis", "url": "redis://h", "offline_share": 1.5},
            "store.offline_share: Input should be less than or equal to 1",
        ),
        ("routing.default_mode", "agentic", "routing.default_mode: Input should be 'auto', 'instant' or 'reasoning'"),
        ("server.host", "0.0.0.0", "server.host: '0.0.0.0' would answer anyone, since no `keys` are configured"),
        ("server.workers", 2, "server.workers: above 1 needs a shared store"),
    ],
)
def test_a_wrong_value_is_told_with_its_path_and_what_would_be_right(path: str, value: object, line: str) -> None:
    """Each wrong value is one line: where it stands, what is wrong or right, and mostly what stands there."""
    assert any(said.startswith(line) for said in problems((path, value))), problems((path, value))


@pytest.mark.parametrize(
    "path",
    [
        "sever",
        "server.prot",
        "server.metrics.prot",
        "server.timeouts.idle",
        "models.qwen3.backend",
        "models.qwen3.backends.0.adress",
        "models.qwen3.thinking.budget",
        "models.qwen3.answer.min_tokens",
        "store.file",
        "routing.mode",
        "search.scorer",
        "agentic.tool",
    ],
)
def test_an_unknown_key_is_told_by_its_path(path: str) -> None:
    """A misspelt key stops the start instead of being ignored."""
    (line,) = problems((path, 1))
    assert line.startswith(path.replace(".0.", "[0]."))
    assert "is not a key of this section" in line
    assert "docs/config.md" in line


def test_every_problem_is_told_at_once() -> None:
    """Problems between parts of the file are listed together, a line each."""
    lines = problems(
        ("server.host", "0.0.0.0"),
        ("server.workers", 2),
        ("limits", [limit(scope="model:gpt"), limit(scope="key:bob")]),
    )
    assert len(lines) == 4
    assert len({line.partition(":")[0] for line in lines}) == 4


def test_backends_of_one_model_are_of_one_kind() -> None:
    """A model whose backends speak differently would change its answers by chance: it is refused, naming the kinds."""
    backends = [
        {"id": "a", "url": "http://a:8000"},
        {"id": "b", "url": "http://b:8000", "kind": "openai"},
        {"id": "c", "url": "http://c:8000"},
    ]
    (line,) = problems(("models.qwen3.backends", backends))
    assert line.startswith("models.qwen3: backends must all be of one kind, got openai, vllm")
    assert len(config(("models.qwen3.backends", [backends[0], backends[2]])).models["qwen3"].backends) == 2


def test_backends_of_one_model_have_their_own_ids() -> None:
    """Two backends with one id could not be told apart in metrics."""
    twins = [{"id": "a", "url": "http://a:8000"}, {"id": "a", "url": "http://b:8000"}]
    assert problems(("models.qwen3.backends", twins)) == ["models.qwen3: backend ids must be distinct, got ['a', 'a']"]


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        ({"id": "a"}, "a vllm backend needs `url`, and no `path`"),
        ({"id": "a", "url": "http://a", "path": "/w"}, "a vllm backend needs `url`, and no `path`"),
        ({"id": "a", "kind": "openai", "path": "/w"}, "a openai backend needs `url`, and no `path`"),
        ({"id": "a", "kind": "embedded"}, "an embedded backend needs `path`"),
        ({"id": "a", "kind": "embedded", "path": "/w", "url": "http://a"}, "an embedded backend has `path`, not `url`"),
    ],
)
def test_each_kind_of_backend_has_its_own_address(backend: Json, line: str) -> None:
    """Servers have a URL, the embedded engine has a path."""
    assert problems(("models.qwen3.backends", [backend]))[0].startswith(f"models.qwen3.backends[0]: {line}")


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("http://a:8000", "http://a:8000"),
        ("http://a:8000/", "http://a:8000"),
        ("http://a:8000/v1", "http://a:8000"),
        ("http://a:8000/v1/", "http://a:8000"),
        ("https://a/openai/v1", "https://a/openai"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_trailing_v1_is_ignored(url: str, kept: str) -> None:
    """The URL may be given as OpenAI clients write it."""
    assert config(("models.qwen3.backends.0.url", url)).models["qwen3"].backends[0].url == kept


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_without_keys_only_loopback_is_bound(host: str) -> None:
    """A gateway that answers anyone stays on this machine; with a key it may listen anywhere."""
    assert config(("server.host", host)).server.host == host
    assert config(("server.host", "0.0.0.0"), ("keys", [key()])).server.host == "0.0.0.0"


def test_a_store_in_a_file_has_defaults() -> None:
    """The SQLite store needs no key but its kind."""
    store = config(("store", {"kind": "sqlite"})).store
    assert (store.path, store.synchronous, store.lease_s, store.timeout_s) == ("thinkgate.db", "normal", 10, 1)


def test_several_workers_need_a_store_that_they_share() -> None:
    """A store in memory belongs to one process; with any other, several may serve."""
    (line,) = problems(("server.workers", 2))
    assert line.startswith("server.workers: above 1 needs a shared store")
    assert config(("server.workers", 2), ("store", {"kind": "sqlite"})).server.workers == 2


def test_workers_would_load_the_embedded_engine_several_times() -> None:
    """Above one worker the embedded engine is refused, naming the model."""
    backends = [{"id": "a", "kind": "embedded", "path": "/w"}]
    lines = problems(("server.workers", 2), ("models.qwen3.backends", backends))
    assert any("embedded engine of models.qwen3" in line for line in lines)


@pytest.mark.parametrize("field", ["secret_env", "admin_token_env", "api_key_env"])
def test_a_secret_in_place_of_a_variables_name_is_refused_and_not_shown(field: str) -> None:
    """Who pastes the secret itself is told so, without the secret ending up in a log."""
    secret = "sk-very-secret"
    places: dict[str, tuple[str, object]] = {
        "secret_env": ("keys", [{"id": "ada", "secret_env": secret}]),
        "admin_token_env": ("server.admin_token_env", secret),
        "api_key_env": ("models.qwen3.backends.0.api_key_env", secret),
    }
    (line,) = problems(places[field])
    assert line.endswith(f"{field}: must be the name of an environment variable, not the secret itself")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("keys", [{"id": "ada", "secret_sha256": "sk-very-secret"}]),
        ("models.qwen3.backends.0.url", "http://user:sk-very-secret@host"),
    ],
)
def test_other_misplaced_secrets_are_not_shown(path: str, value: object) -> None:
    """A secret where a digest belongs, or inside a URL, is refused without being repeated."""
    assert "sk-very-secret" not in "\n".join(problems((path, value)))


def test_a_usd_limit_over_everything_needs_every_price() -> None:
    """A limit in dollars on a team could be spent on any model, so each must have a price."""
    keys = ("keys", [key(team="ml")])
    limits = ("limits", [limit(scope="team:ml", unit="usd", amount=5)])
    assert "models.qwen3.price_usd_per_mtok" in problems(keys, limits)[0]
    assert config(keys, limits, PRICED).limits[0].amount == 5


def test_the_same_scope_may_have_different_limits() -> None:
    """Units and windows are limits of their own."""
    limits = [
        limit(),
        limit(window="day"),
        limit(unit="requests"),
        limit(unit="concurrency", window=None),
        limit(unit="usd", amount=0.000000001),
    ]
    assert len(config(("limits", limits), PRICED).limits) == 5


def test_anyone_may_be_limited() -> None:
    """Without keys there is one key, `anyone`; with keys there is not."""
    assert config(("limits", [limit(scope="key:anyone")])).limits[0].scope == "key:anyone"
    assert problems(("limits", [limit(scope="key:anyone")]), ("keys", [key()])) == [
        "limits[0].scope: 'anyone' is not under `keys` (ada)"
    ]


def test_a_store_may_have_the_keys() -> None:
    """With a store beside memory, a gateway without keys may bind any address: it then refuses everybody."""
    for store in ({"kind": "sqlite"}, {"kind": "redis", "url": "redis://127.0.0.1:6379/0"}):
        assert not config(("server.host", "0.0.0.0"), ("store", store)).may_be_open()
        assert config(("store", store)).may_be_open()
        assert not config(("store", store), ("keys", [key()])).may_be_open()
        assert config(("store", store), ("limits", [limit(scope="team:ml")])).not_built_yet() == []


def test_what_has_no_effect_is_listed() -> None:
    """Keys that validate but do nothing yet, and limits on owners that no key has, are said at the start."""
    inert = config(
        ("models.qwen3.planner", "qwen3-small"),
        ("models.qwen3.fallback", ["qwen3", "qwen3-small"]),
        (
            "models.qwen3.architecture",
            {"parameters": 8e9, "layers": 36, "query_heads": 32, "kv_heads": 8, "head_dim": 128},
        ),
        ("keys", [key(degrade=["cap", "model"], team="ml", tags=["beta"])]),
        ("limits", [limit(scope=scope) for scope in ("team:ml", "tag:beta", "team:mll", "org:acme", "key:ada")]),
        ("search.scorers", {"x": 1}),
        ("agentic.tools", {"x": 1}),
    ).not_built_yet()
    assert inert == [
        "models.qwen3.architecture",
        "models.qwen3.planner (qwen3-small is not under models)",
        "models.qwen3.fallback (qwen3-small is not under models)",
        "limits[2].scope (team:mll has no key)",
        "limits[3].scope (org:acme has no key)",
        "search.scorers",
        "agentic.tools",
    ]
