"""`thinkgate check` finds what would stop the start."""

from __future__ import annotations

import io

import pytest

from gateway.check import check
from gateway.config.load import ConfigError
from gateway.config.schema import Config
from tests.gateway.live import tree_of

ALERTS = {"webhook_url": "https://example.test/hook", "secret_env": "HOOK"}


@pytest.mark.parametrize(
    ("variable", "value", "key"),
    [("HOOK", "", "alerts.secret_env"), ("THINKGATE_KEY_HASH_SECRET", "short", "server.key_hash_env")],
)
async def test_secrets_are_looked_at(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, key: str) -> None:
    """A secret that `serve` would refuse is refused here, by its key, before any backend is asked."""
    monkeypatch.setenv("HOOK", "whsec_c2VjcmV0")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError, match=f"^{key}"):
        await check(
            Config.model_validate(
                tree_of(alerts=ALERTS, model={"backends": [{"id": "a", "url": "http://127.0.0.1:1"}]})
            ),
            io.StringIO(),
        )
