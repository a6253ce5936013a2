"""Who asks: a bearer secret to a key, and what the key may use."""

from __future__ import annotations

import hashlib

import pytest

from gateway.auth import ANYONE, Key, Keyring, check_model
from gateway.config.schema import KeyConfig
from gateway.errors import PermissionDenied, Unauthenticated
from tests.gateway.still import config_of

SECRETS = {"ada": "sk-ada", "bob": "sk-böb"}


def keyring() -> Keyring:
    """Two keys."""
    config = config_of(keys=[{"id": name, "secret_env": name.upper()} for name in SECRETS])
    return Keyring(config, {name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in SECRETS.items()})


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b"Bearer sk-ada", "ada"),
        (b"bearer sk-ada", "ada"),
        (b"BEARER  sk-ada ", "ada"),
        ("Bearer sk-böb".encode(), "bob"),
    ],
)
def test_a_secret_is_its_key(header: bytes, name: str) -> None:
    """The secret decides, whatever the case of the scheme and the white space around it."""
    assert keyring().identify(header).id == name


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer   ",
        b"Bearer sk-eve",
        b"Bearer sk-ada2",
        b"Bearer SK-ADA",
        b"Bearer sk-ada sk-ada",
        b"Basic sk-ada",
        b"sk-ada",
        b"Bearer \xff\xfe",
        b"Bearer " + b"x" * 100_000,
        b"Bearer " + hashlib.sha256(b"sk-ada").hexdigest().encode(),
    ],
)
def test_anything_else_is_a_401_that_tells_nothing(header: bytes | None) -> None:
    """A missing, malformed or unknown secret, and a digest in its place, are refused without being repeated."""
    with pytest.raises(Unauthenticated) as refused:
        keyring().identify(header)
    assert refused.value.status == 401
    assert "sk-" not in refused.value.message
    assert (b"www-authenticate", b"Bearer") in refused.value.headers()


@pytest.mark.parametrize("header", [None, b"", b"Bearer whatever", b"Basic x"])
def test_without_keys_everybody_is_anyone(header: bytes | None) -> None:
    """An open gateway asks for nothing and takes whatever clients send."""
    assert Keyring(config_of(), {}).identify(header) is ANYONE
    assert ANYONE.scopes == ("key:anyone",)


def test_a_key_pays_in_its_scopes_from_narrow_to_wide() -> None:
    """Key, user, team, org and tags are the scopes; what is not set is left out, and no scope stands twice."""
    full = KeyConfig(id="laptop", secret_env="X", user="ada", team="ml", org="acme", tags=("beta", "paid", "beta"))
    assert Key.from_config(full).scopes == (
        "key:laptop",
        "user:ada",
        "team:ml",
        "org:acme",
        "tag:beta",
        "tag:paid",
    )
    assert Key.from_config(KeyConfig(id="laptop", secret_env="X")).scopes == ("key:laptop",)


def test_a_key_carries_its_restrictions() -> None:
    """Models, modes, ceiling and the name of the thinking field come from the configuration; None means all."""
    key = Key.from_config(
        KeyConfig(
            id="k",
            secret_env="X",
            models=("a", "b"),
            modes=("instant",),
            max_thinking_tokens=5,
            reasoning_field="both",
        )
    )
    assert (key.models, key.modes, key.max_thinking_tokens, key.both_fields) == (
        frozenset("ab"),
        frozenset({"instant"}),
        5,
        True,
    )
    free = Key.from_config(KeyConfig(id="k", secret_env="X"))
    assert (free.models, free.modes, free.max_thinking_tokens, free.both_fields) == (None, None, None, False)


def test_a_key_without_any_model_may_use_none() -> None:
    """An empty list is not the same as no list."""
    check_model(Key(id="k", scopes=()), "qwen")
    check_model(Key(id="k", scopes=(), models=frozenset({"qwen"})), "qwen")
    for models in (frozenset[str](), frozenset({"other"})):
        with pytest.raises(PermissionDenied) as refused:
            check_model(Key(id="k", scopes=(), models=models), "qwen")
        assert (refused.value.status, refused.value.param) == (403, "model")
