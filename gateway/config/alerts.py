"""The part `alerts` of the configuration: whom the gateway calls when a limit passes its soft mark."""

from __future__ import annotations

from typing import Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from gateway.config.base import PositiveInt, Section, Variable


class AlertsConfig(Section):
    """The webhook; calls are signed with the secret."""

    webhook_url: str | None = None
    secret_env: Variable | None = None
    timeout_s: float = Field(10, gt=0, le=300)
    attempts: PositiveInt = 5

    @field_validator("webhook_url")
    @classmethod
    def _url_is_http(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.port == 0:
            raise ValueError("must look like https://host/path")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise ValueError("must carry neither credentials nor a fragment: calls are signed with `secret_env`")
        return url

    @model_validator(mode="after")
    def _is_signed(self) -> Self:
        if (self.webhook_url is None) != (self.secret_env is None):
            raise ValueError("`webhook_url` and `secret_env` go together: calls are signed")
        return self
