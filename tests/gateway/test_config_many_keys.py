"""A configuration with many keys and limits is checked in a time that grows with their number, not with its square."""

from __future__ import annotations

from typing import ClassVar

import pytest

from gateway.config.budgets import LimitConfig
from gateway.config.load import ConfigError, secret_sha256s
from gateway.config.schema import Config, KeyConfig

COUNT = 200
MODEL = {"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]}


class Text(str):
    """Counts how often texts are compared.

    Attributes:
        compared: by all of them.
    """

    __slots__ = ()
    compared: ClassVar[list[str]] = []

    def __eq__(self, other: object) -> bool:
        Text.compared.append(self)
        return str.__eq__(self, other)

    __hash__ = str.__hash__

    def lower(self) -> Text:
        """It is."""
        return self


@pytest.fixture
def many() -> Config:
    """As many keys as limits on one key each, made without validation, which would copy their texts."""
    Text.compared.clear()
    numbers = range(COUNT)
    keys = [
        KeyConfig.model_construct(id=Text(f"key-{i}"), secret_sha256=Text(f"{i:064x}"), secret_env=None, models=None)
        for i in numbers
    ]
    limits = [LimitConfig(scope=f"key:key-{i}", unit="tokens", amount=1, window="day") for i in numbers]
    config = Config.model_validate({"models": {"m": MODEL}})
    return config.model_copy(update={"keys": tuple(keys), "limits": tuple(limits)})


def test_ids_of_keys_and_limits_are_looked_up(many: Config) -> None:
    """Neither a second key of an id nor the key of a limit is searched for among all of them."""
    assert (many._key_problems(), many._limit_problems()) == ([], [])
    assert len(Text.compared) <= 2 * COUNT


def test_digests_are_looked_up(many: Config) -> None:
    """A second key with the same secret is not searched for among all of them, and is found."""
    assert len(secret_sha256s(many, env={})) == COUNT
    assert len(Text.compared) <= COUNT
    twin = many.keys[7].model_copy(update={"id": "twin"})
    with pytest.raises(ConfigError, match=rf"^keys\[{COUNT}\]: has the same secret as key 'key-7'$"):
        secret_sha256s(many.model_copy(update={"keys": (*many.keys, twin)}), env={})
