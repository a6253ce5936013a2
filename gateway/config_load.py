"""Read a configuration: file, then environment, then validation, with errors that name key and remedy.

Owns: YAML to `Config`, `THINKGATE_SECTION__KEY` overrides, the default configuration, secrets from the
environment. The only module that looks at environment variables.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError

from gateway.config import Config

ENV_PREFIX = "THINKGATE_"
DEFAULT_MODEL = "smollm2-135m"
DEFAULT_MODEL_PATH = ".cache/models/smollm2-135m-instruct"


class ConfigError(Exception):
    """The configuration cannot be used; the message lists every problem, one a line."""


class _Loader(yaml.SafeLoader):
    """YAML with the booleans of version 1.2 only (`off` is a word here) and no duplicate keys."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict[object, object]:
    seen: set[object] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if isinstance(key, (dict, list)) or key in seen:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice")
        seen.add(key)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def default_config_tree(path: str = DEFAULT_MODEL_PATH) -> dict[str, object]:
    """What `thinkgate serve` without a file runs: the embedded engine on loopback."""
    return {
        "models": {
            DEFAULT_MODEL: {
                "backends": [{"id": "embedded", "kind": "embedded", "path": path}],
                "thinking": {"native": False, "default_tokens": 256, "max_tokens": 2048},
                "answer": {"default_tokens": 512, "max_tokens": 4096},
            }
        }
    }


def environment(env: Mapping[str, str] | None = None) -> Mapping[str, str]:
    """The process environment, or the one a caller passes."""
    return os.environ if env is None else env


def load_config(
    path: Path | None,
    *,
    env: Mapping[str, str] | None = None,
    overrides: Mapping[str, object] | None = None,
    embedded_path: str | None = None,
) -> Config:
    """Read, override from `env` and validate.

    Args:
        path: the file; None for the default configuration.
        env: variables to override with; None for the process environment.
        overrides: keys of `server` from the command line, which win over everything.
        embedded_path: model of the default configuration, instead of SmolLM2.

    Raises: ConfigError, whose message has a line per problem: key path, value, what would be right.
    """
    if path is not None and embedded_path is not None:
        raise ConfigError("--model goes without --config: name the model in the file")
    tree = _read(path) if path is not None else default_config_tree(embedded_path or DEFAULT_MODEL_PATH)
    for name, text in sorted(environment(env).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            _override(tree, name, text)
    if overrides:
        server = tree.setdefault("server", {})
        if isinstance(server, dict):
            server.update(overrides)
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        raise ConfigError("\n".join(_problems(exc))) from exc


def _read(path: Path) -> dict[str, object]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506  # a SafeLoader
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text") from exc
    except (yaml.YAMLError, RecursionError) as exc:
        raise ConfigError(f"{path}: is not valid YAML: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with `models`, got {type(tree).__name__}")
    return tree


def _override(tree: dict[str, object], name: str, text: str) -> None:
    """Set the value that `THINKGATE_A__B__0__C` names; list items by number; values are YAML."""
    steps = name.removeprefix(ENV_PREFIX).lower().split("__")
    try:
        value = yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.YAMLError as exc:
        raise ConfigError(f"{name}: {text!r} is not a YAML value") from exc
    node: object = tree
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(node, dict):
            key = next((k for k in node if isinstance(k, str) and _env_name(k) == step), step)
            if last:
                node[key] = value
            else:
                node = node.setdefault(key, {})
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            if last:
                node[int(step)] = value
            else:
                node = node[int(step)]
        else:
            raise ConfigError(f"{name}: nothing called {step!r} to override at {'.'.join(steps[:i]) or 'the top'}")


def _env_name(key: str) -> str:
    """How a key is spelled in a variable's name: lower case, everything but letters and digits as `_`."""
    return re.sub(r"[^a-z0-9]", "_", key.lower())


def _problems(exc: ValidationError) -> list[str]:
    lines = []
    for error in exc.errors(include_url=False):
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "is not a key of this section; check the spelling against docs/config.md"
        shown = "" if isinstance(error["input"], dict | list) else f" (got {error['input']!r})"
        lines.append(f"{path}: {message}{shown}" if path else message)
    return lines


def secret_sha256s(config: Config, *, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Digest of every key's secret, as key id -> lower-case hex SHA-256.

    Raises: ConfigError when a variable is unset or empty, or two keys share a secret.
    """
    variables = environment(env)
    digests: dict[str, str] = {}
    for i, key in enumerate(config.keys):
        if key.secret_sha256 is not None:
            digest = key.secret_sha256.lower()
        else:
            secret = variables.get(key.secret_env or "", "")
            if not secret:
                raise ConfigError(f"keys[{i}].secret_env: the variable {key.secret_env} is unset or empty")
            digest = hashlib.sha256(secret.encode()).hexdigest()
        twin = next((name for name, other in digests.items() if other == digest), None)
        if twin is not None:
            raise ConfigError(f"keys[{i}]: has the same secret as key {twin!r}")
        digests[key.id] = digest
    return digests


def backend_api_key(variable: str | None, *, env: Mapping[str, str] | None = None) -> str | None:
    """The credential for a backend. Raises: ConfigError when its variable is unset."""
    if variable is None:
        return None
    secret = environment(env).get(variable, "")
    if not secret:
        raise ConfigError(f"api_key_env: the variable {variable} is unset or empty")
    return secret
