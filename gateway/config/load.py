"""Read a configuration: file, then environment, then validation, with errors that name key and remedy.

Owns: YAML to `Config`, `THINKGATE_SECTION__KEY` overrides, the default configuration, secrets from the
environment. The only module that looks at environment variables.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from gateway.config.schema import Config

ENV_PREFIX = "THINKGATE_"
SHORTEST_HASH_SECRET = 16
WEBHOOK_MARK = "whsec_"
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
        wrong = "is not a name" if not isinstance(key, Hashable) else "stands twice" if key in seen else None
        if wrong is not None:
            raise yaml.MarkedYAMLError(problem=f"the key {key!r} {wrong}", problem_mark=key_node.start_mark)
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
    origins: dict[str, str] = {}
    for name, text in sorted(environment(env).items()):
        if name.startswith(ENV_PREFIX) and "__" in name:
            origins[_override(tree, name, text)] = name
    if overrides:
        server = tree.setdefault("server", {})
        if isinstance(server, dict):
            server.update(overrides)
    try:
        return Config.model_validate(tree)
    except ValidationError as exc:
        raise ConfigError("\n".join(_problems(exc, origins))) from exc


def _read(path: Path) -> dict[str, object]:
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path}: is not UTF-8 text") from exc
    except _NotYaml as exc:
        raise ConfigError(f"{path}: {exc}") from exc
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping with `models`, got {type(tree).__name__}")
    return tree


class _NotYaml(Exception):
    """What is wrong with a YAML text, on one line."""


def _parse(text: str) -> object:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506  # a SafeLoader
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise _NotYaml(f"{where}{exc.problem or exc.context}") from exc
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as exc:
        # The safe loader lets a date like 2024-13-45 through as a ValueError.
        raise _NotYaml(f"is not valid YAML: {' '.join(str(exc).split())}") from exc


def _override(tree: dict[str, object], name: str, text: str) -> str:
    """Set the value that `THINKGATE_A__B__0__C` names; list items by number; values are YAML. Returns its path."""
    steps = name.removeprefix(ENV_PREFIX).lower().split("__")
    try:
        value = _parse(text)
    except _NotYaml as exc:
        raise ConfigError(f"{name}: {text!r} is not a YAML value: {exc}") from exc
    node: Any = tree
    path = ""
    for i, step in enumerate(steps):
        last = i == len(steps) - 1
        if isinstance(node, dict):
            key: str | int = next((k for k in node if isinstance(k, str) and _env_name(k) == step), step)
            path = f"{path}.{key}".lstrip(".")
            if not last and node.get(key) is None:
                node[key] = {}
        elif isinstance(node, list) and step.isdecimal() and int(step) < len(node):
            key = int(step)
            path = f"{path}[{key}]"
        else:
            raise ConfigError(f"{name}: nothing called {step!r} to override at {path or 'the top'}")
        if last:
            node[key] = value
        else:
            node = node[key]
    return path


def _env_name(key: str) -> str:
    """How a key is spelled in a variable's name: lower case, everything but letters and digits as `_`."""
    return re.sub(r"[^a-z0-9]", "_", key.lower())


def _problems(exc: ValidationError, origins: Mapping[str, str]) -> list[str]:
    """A line per problem; `origins` says which paths came from which variable."""
    lines = []
    for error in exc.errors(include_url=False):
        parts = [part for part in error["loc"] if part != "[key]"]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            message = "is not a key of this section; check the spelling against docs/config.md"
        shown = "" if _is_private(path, error["input"]) else f" (got {error['input']!r})"
        variable = next(
            (name for at, name in origins.items() if path == at or path.startswith((f"{at}.", f"{at}["))), ""
        )
        source = f" (set by {variable})" if variable else ""
        lines.append(f"{path}: {message}{shown}{source}" if path else message)
    return lines


def _is_private(path: str, value: object) -> bool:
    """Whether a value is too large to show, or may be a secret that stands in the wrong place."""
    is_secret = path.endswith(("_env", "secret_sha256")) or (isinstance(value, str) and "@" in value)
    return is_secret or isinstance(value, dict | list)


def secret_sha256s(config: Config, *, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Digest of every key's secret, as key id -> lower-case hex SHA-256.

    Raises: ConfigError when a variable is unset or empty, or two keys share a secret.
    """
    variables = environment(env)
    digests: dict[str, str] = {}
    owners: dict[str, str] = {}
    for i, key in enumerate(config.keys):
        if key.secret_sha256 is not None:
            digest = key.secret_sha256.lower()
        else:
            secret = variables.get(key.secret_env or "", "").strip()
            if not secret:
                raise ConfigError(f"keys[{i}].secret_env: the variable {key.secret_env} is unset or empty")
            digest = hashlib.sha256(secret.encode()).hexdigest()
        if digest in owners:
            raise ConfigError(f"keys[{i}]: has the same secret as key {owners[digest]!r}")
        owners[digest] = key.id
        digests[key.id] = digest
    return digests


def key_hash_secret(config: Config, *, env: Mapping[str, str] | None = None) -> str | None:
    """What keys the hash of stored secrets; None where the store keeps one. Raises: ConfigError for a short one."""
    variable = config.server.key_hash_env
    secret = environment(env).get(variable, "").strip()
    if secret and len(secret) < SHORTEST_HASH_SECRET:
        raise ConfigError(
            f"server.key_hash_env: {variable} needs at least {SHORTEST_HASH_SECRET} characters (openssl rand -hex 32)"
        )
    return secret or None


def webhook_secret(config: Config, *, env: Mapping[str, str] | None = None) -> bytes:
    """What signs webhook calls: the bytes in base64 after `whsec_`, or else the text; empty if there are none.

    Raises: ConfigError when its variable is unset, or holds something else after `whsec_`.
    """
    variable = config.alerts.secret_env
    if variable is None:
        return b""
    secret = environment(env).get(variable, "").strip()
    if not secret:
        raise ConfigError(f"alerts.secret_env: the variable {variable} is unset or empty")
    if not secret.startswith(WEBHOOK_MARK):
        return secret.encode()
    try:
        key = base64.b64decode(secret.removeprefix(WEBHOOK_MARK), validate=True)
    except ValueError:
        key = b""
    if not key:
        raise ConfigError(
            f"alerts.secret_env: what the variable {variable} has after {WEBHOOK_MARK} is no base64, padding included; "
            f"copy the receiver's secret again, or make one: {WEBHOOK_MARK}$(openssl rand -base64 32)"
        )
    return key


def backend_api_key(variable: str | None, *, where: str, env: Mapping[str, str] | None = None) -> str | None:
    """The credential for a backend; `where` is its entry's path. Raises: ConfigError when its variable is unset."""
    if variable is None:
        return None
    secret = environment(env).get(variable, "").strip()
    if not secret:
        raise ConfigError(f"{where}.api_key_env: the variable {variable} is unset or empty")
    return secret
