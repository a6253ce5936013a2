"""Reading a configuration: the file, what the environment overrides, and where secrets come from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config.load import (
    DEFAULT_MODEL,
    ConfigError,
    backend_api_key,
    load_config,
    secret_sha256s,
)
from gateway.config.schema import Config

SMALL = """
server: {port: 8081}
models:
  qwen-3.5:
    backends:
      - {id: a, url: "http://127.0.0.1:8000"}
      - {id: b, url: "http://127.0.0.1:8001"}
"""

# The sample of the specification, less what it has as comments.
SAMPLE = """
server:
  host: 127.0.0.1
  port: 8080
  workers: 1
  max_body_bytes: 10485760
  admin_token_env: THINKGATE_ADMIN_TOKEN
  metrics: {port: 9464}
models:
  qwen3:
    upstream_model: Qwen/Qwen3-8B
    backends:
      - {id: a, url: "http://127.0.0.1:8000", kind: vllm, api_key_env: null, weight: 1}
    thinking:
      start: "<think>"
      end: "</think>"
      default_tokens: 2048
      max_tokens: 16384
      answer_floor_tokens: 128
      wrap_up: "\\n\\nTime is up: I answer with what I have.\\n"
      native: true
      enforce: auto
      off: {chat_template_kwargs: {enable_thinking: false}}
    answer: {default_tokens: 1024, max_tokens: 8192}
    max_n: 16
    planner: qwen3-small
    fallback: [qwen3-small]
    effort_tokens: {minimal: 128, low: 512, medium: 2048, high: 8192}
    price_usd_per_mtok: {prompt: 0.10, cached: 0.02, thinking: 0.40, answer: 0.40}
    architecture: {parameters: 8.2e9, layers: 36, query_heads: 32, kv_heads: 8, head_dim: 128}
keys:
  - {id: ada-laptop, secret_env: ADA_KEY, user: ada, team: ml, org: acme, models: [qwen3], modes: [instant, reasoning],
     max_thinking_tokens: 4096, degrade: [cap, effort, instant], tags: []}
limits:
  - {scope: "org:acme",  unit: usd,      amount: 50,      window: day}
  - {scope: "team:ml",   unit: tokens,   amount: 2000000, window: hour}
  - {scope: "key:ada-laptop", unit: requests, amount: 60, window: minute}
  - {scope: "key:ada-laptop", unit: concurrency, amount: 8}
  - {scope: "model:qwen3", unit: thinking_tokens, amount: 5000000, window: day}
store: {kind: memory}
routing: {default_mode: auto, on_uncertain: reasoning}
search: {scorers: {}}
agentic: {mcp_servers: {}, tools: {}}
"""


def load(tmp_path: Path, text: str | bytes = SMALL, env: Mapping[str, str] | None = None) -> Config:
    """A configuration from a file with this text, under this environment."""
    path = tmp_path / "thinkgate.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(path, env=env or {})


def refused(tmp_path: Path, text: str | bytes = SMALL, env: Mapping[str, str] | None = None) -> str:
    """What is said of a configuration that cannot be used."""
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, env)
    return str(caught.value)


def test_the_documented_sample_loads(tmp_path: Path) -> None:
    """The whole sample of the specification is understood as it is meant."""
    config = load(tmp_path, SAMPLE)
    model = config.models["qwen3"]
    assert model.upstream_model == "Qwen/Qwen3-8B"
    assert model.thinking.off == {"chat_template_kwargs": {"enable_thinking": False}}
    assert model.thinking.wrap_up.startswith("\n\nTime is up")
    assert model.effort_tokens == {"minimal": 128, "low": 512, "medium": 2048, "high": 8192}
    assert model.price_usd_per_mtok is not None
    assert (model.price_usd_per_mtok.cached, model.architecture is not None) == (0.02, True)
    assert config.keys[0].modes == ("instant", "reasoning")
    assert [(limit.unit, limit.window) for limit in config.limits] == [
        ("usd", "day"),
        ("tokens", "hour"),
        ("requests", "minute"),
        ("concurrency", None),
        ("thinking_tokens", "day"),
    ]
    assert config.not_built_yet() == [
        "models.qwen3.architecture",
        "models.qwen3.planner (qwen3-small is not under models)",
        "models.qwen3.fallback (qwen3-small is not under models)",
    ]


def test_without_a_file_the_embedded_engine_serves_on_loopback() -> None:
    """The default configuration needs no file, and may be pointed at another model."""
    config = load_config(None, env={})
    assert list(config.models) == [DEFAULT_MODEL]
    assert config.models[DEFAULT_MODEL].backends[0].kind == "embedded"
    assert (config.server.host, config.keys) == ("127.0.0.1", ())
    other = load_config(None, env={}, embedded_path="org/model")
    assert other.models[DEFAULT_MODEL].backends[0].path == "org/model"


def test_a_file_and_a_model_of_the_command_line_exclude_each_other(tmp_path: Path) -> None:
    """Naming the embedded model beside a file is refused with the remedy."""
    with pytest.raises(ConfigError, match="name the model in the file"):
        load_config(tmp_path / "x.yaml", env={}, embedded_path="org/model")


# ------------------------------------------------------------------------------------------------- YAML


@pytest.mark.parametrize("word", ["off", "on", "yes", "no", "Off", "ON"])
def test_words_are_words(tmp_path: Path, word: str) -> None:
    """Only true and false are booleans: `off` and its like are words, as keys and as values."""
    text = SMALL + f"    thinking: {{off: {{chat_template_kwargs: {{mode: {word}}}}}}}\n"
    assert load(tmp_path, text).models["qwen-3.5"].thinking.off == {"chat_template_kwargs": {"mode": word}}


@pytest.mark.parametrize(("word", "value"), [("true", True), ("True", True), ("false", False), ("False", False)])
def test_true_and_false_are_booleans(tmp_path: Path, word: str, value: bool) -> None:
    """The booleans of YAML 1.2 are read as such."""
    text = SMALL + f"    thinking: {{off: {{chat_template_kwargs: {{enable_thinking: {word}}}}}}}\n"
    off = load(tmp_path, text).models["qwen-3.5"].thinking.off
    assert off == {"chat_template_kwargs": {"enable_thinking": value}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: {}\nmodels: {}\n", "line 2, column 1: the key 'models' stands twice"),
        ("server:\n  port: 1\n  host: x\n  port: 2\n", "line 4, column 3: the key 'port' stands twice"),
        ("server: {port: 1, port: 1}\n", "line 1, column 19: the key 'port' stands twice"),
        ("? [a, b]\n: 1\n", "line 1, column 3: the key ['a', 'b'] is not a name"),
        ("? {a: b}\n: 1\n", "line 1, column 3: the key {'a': 'b'} is not a name"),
        ("? !!set {a}\n: 1\n", "line 1, column 3: the key {'a'} is not a name"),
        ("server: {port: 1\n", "line 2, column 1: expected ',' or '}'"),
        ("server:\n\tport: 1\n", "line 2, column 1: found character '\\t'"),
        ("a: *nowhere\n", "line 1, column 4: found undefined alias"),
        ("a: !!python/object:os.system {}\n", "line 1, column 4: could not determine a constructor"),
        ("when: 2024-13-45\n", "is not valid YAML"),
        ("n: 0x_\n", "is not valid YAML"),
        ("a: \x01\n", "is not valid YAML"),
        ("a: " + "[" * 500, "is not valid YAML"),
    ],
)
def test_broken_yaml_is_told_with_its_place(tmp_path: Path, text: str, said: str) -> None:
    """What is no YAML, and a key that stands twice, is refused on one line with file, line and column."""
    message = refused(tmp_path, text)
    assert message.startswith(f"{tmp_path}/thinkgate.yaml: {said}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping with `models`, got NoneType"),
        ("- a\n", "must be a mapping with `models`, got list"),
        ("just words\n", "must be a mapping with `models`, got str"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str | bytes, said: str) -> None:
    """An empty file, a list, a sentence and other encodings are told apart."""
    assert refused(tmp_path, text) == f"{tmp_path}/thinkgate.yaml: {said}"


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """A missing file and a directory are named with the system's own reason."""
    for path, reason in ((tmp_path / "no.yaml", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(ConfigError, match=f"{path}: cannot be read: {reason}"):
            load_config(path, env={})


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet="abm:{}[]-?!&*#|>'\"%@\n\t ,0129.~_", max_size=40))
def test_any_text_is_a_configuration_or_a_configuration_error(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """No file, however broken, makes a running gateway raise anything but ConfigError on reload."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(path, env={})


def test_problems_of_the_file_are_listed_a_line_each(tmp_path: Path) -> None:
    """All wrong values are told at once, each with its path."""
    text = SMALL + "    max_n: 0\nrouting: {default_mode: fast}\nextra: 1\n"
    lines = refused(tmp_path, text).split("\n")
    assert {line.split(": ")[0] for line in lines} == {"models.qwen-3.5.max_n", "routing.default_mode", "extra"}


# ------------------------------------------------------------------------------------------ environment


def test_the_environment_overrides_any_value(tmp_path: Path) -> None:
    """Sections, names with other characters, list items and values that the file lacks can be set."""
    config = load(
        tmp_path,
        env={
            "THINKGATE_SERVER__PORT": "9000",
            "THINKGATE_SERVER__METRICS__PORT": "null",
            "THINKGATE_MODELS__QWEN_3_5__BACKENDS__1__URL": "http://vllm:8000",
            "THINKGATE_MODELS__QWEN_3_5__THINKING__OFF": "{chat_template_kwargs: {thinking: false}}",
            "THINKGATE_ROUTING__DEFAULT_MODE": "instant",
            "OTHER_SERVER__PORT": "1",
            "THINKGATE_ADMIN_TOKEN": "no section, so no override",
        },
    )
    model = config.models["qwen-3.5"]
    assert (config.server.port, config.server.metrics.port) == (9000, None)
    assert [backend.url for backend in model.backends] == ["http://127.0.0.1:8000", "http://vllm:8000"]
    assert model.thinking.off == {"chat_template_kwargs": {"thinking": False}}
    assert config.routing.default_mode == "instant"


def test_an_empty_section_can_be_filled_by_the_environment(tmp_path: Path) -> None:
    """A section left empty in the file is no obstacle."""
    text = SMALL.replace("server: {port: 8081}", "server:")
    assert load(tmp_path, text, {"THINKGATE_SERVER__PORT": "9000"}).server.port == 9000


def test_the_command_line_wins_over_both(tmp_path: Path) -> None:
    """Options of the command line override file and environment."""
    path = tmp_path / "x.yaml"
    path.write_text(SMALL)
    config = load_config(path, env={"THINKGATE_SERVER__PORT": "9000"}, overrides={"port": 7000})
    assert config.server.port == 7000


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "THINKGATE_SERVER__PORT",
            "no",
            "server.port: Input should be a valid integer, unable to parse string as an integer (got 'no')"
            " (set by THINKGATE_SERVER__PORT)",
        ),
        (
            "THINKGATE_SERVER__PROT",
            "1",
            "server.prot: is not a key of this section; check the spelling against docs/config.md (got 1)"
            " (set by THINKGATE_SERVER__PROT)",
        ),
        (
            "THINKGATE_SERVER__TIMEOUTS",
            "{idle_s: 0}",
            "server.timeouts.idle_s: Input should be greater than 0 (got 0) (set by THINKGATE_SERVER__TIMEOUTS)",
        ),
        (
            "THINKGATE_MODELS__QWEN_3_5__BACKENDS__7__URL",
            "http://x",
            "THINKGATE_MODELS__QWEN_3_5__BACKENDS__7__URL: nothing called '7' to override at models.qwen-3.5.backends",
        ),
        (
            "THINKGATE_SERVER__PORT__DEEPER",
            "1",
            "THINKGATE_SERVER__PORT__DEEPER: nothing called 'deeper' to override at server.port",
        ),
        (
            "THINKGATE_SERVER__PORT",
            "{",
            "THINKGATE_SERVER__PORT: '{' is not a YAML value: line 1, column 2: "
            "expected the node content, but found '<stream end>'",
        ),
    ],
)
def test_a_wrong_override_names_its_variable(tmp_path: Path, name: str, value: str, said: str) -> None:
    """A wrong value from the environment is told with the variable it came from, not as if the file were wrong."""
    assert refused(tmp_path, env={name: value}) == said


def test_the_process_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an environment passed in, the process's own counts."""
    monkeypatch.setenv("THINKGATE_SERVER__PORT", "9001")
    path = tmp_path / "x.yaml"
    path.write_text(SMALL)
    assert load_config(path).server.port == 9001


# ---------------------------------------------------------------------------------------------- secrets


def keys_of(tmp_path: Path, *keys: str) -> Config:
    """A configuration with these keys."""
    return load(tmp_path, SMALL + "keys:\n" + "".join(f"  - {key}\n" for key in keys))


def digest(secret: str) -> str:
    """As the keyring stores it."""
    return hashlib.sha256(secret.encode()).hexdigest()


def test_secrets_come_from_the_environment_or_as_digests(tmp_path: Path) -> None:
    """A named variable is digested; a digest is taken as it is, in lower case."""
    config = keys_of(
        tmp_path, "{id: ada, secret_env: ADA}", f"{{id: bob, secret_sha256: {digest('bob-secret').upper()}}}"
    )
    assert secret_sha256s(config, env={"ADA": "ada-secret"}) == {
        "ada": digest("ada-secret"),
        "bob": digest("bob-secret"),
    }


def test_white_space_around_a_secret_does_not_count(tmp_path: Path) -> None:
    """A secret mounted with a newline at its end is the secret without it, as clients send it."""
    config = keys_of(tmp_path, "{id: ada, secret_env: ADA}")
    assert secret_sha256s(config, env={"ADA": " ada-secret\n"}) == {"ada": digest("ada-secret")}


@pytest.mark.parametrize("env", [{}, {"BOB": ""}, {"BOB": " \n"}])
def test_a_missing_secret_stops_the_start(tmp_path: Path, env: dict[str, str]) -> None:
    """A key whose variable is unset or empty is refused: it would let in whoever sends nothing."""
    config = keys_of(tmp_path, "{id: ada, secret_env: ADA}", "{id: bob, secret_env: BOB}")
    with pytest.raises(ConfigError) as caught:
        secret_sha256s(config, env={"ADA": "x", **env})
    assert str(caught.value) == "keys[1].secret_env: the variable BOB is unset or empty"


def test_two_keys_may_not_share_a_secret(tmp_path: Path) -> None:
    """One secret cannot say which of two keys pays; the message names the other key and not the secret."""
    config = keys_of(tmp_path, "{id: ada, secret_env: ADA}", "{id: bob, secret_env: BOB}")
    with pytest.raises(ConfigError) as caught:
        secret_sha256s(config, env={"ADA": "same-secret", "BOB": "same-secret"})
    assert str(caught.value) == "keys[1]: has the same secret as key 'ada'"


def test_a_backends_credential_comes_from_its_variable() -> None:
    """No variable, no credential; an unset one is told with the backend's place."""
    assert backend_api_key(None, where="x", env={}) is None
    assert backend_api_key("TOKEN", where="x", env={"TOKEN": "sk-1\n"}) == "sk-1"
    with pytest.raises(ConfigError) as caught:
        backend_api_key("TOKEN", where="models.qwen3.backends[a]", env={"TOKEN": ""})
    assert str(caught.value) == "models.qwen3.backends[a].api_key_env: the variable TOKEN is unset or empty"
