"""A gateway and somebody who uses its admin API, through its ASGI door."""

from __future__ import annotations

import datetime as dt
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from budget.ledger import Amounts, LedgerHealth, UsageRow
from budget.ledgers.memory import MemoryLedger
from gateway.app import Gateway
from gateway.config.schema import Config
from tests.gateway.asgi import Answered, ask, gateway_of
from tests.gateway.still import CHAT
from tests.gateway.tenants import NOON

Json = dict[str, Any]
ROOT_SECRET = "root-secret"
ROOT = {"authorization": f"Bearer {ROOT_SECRET}"}


class ReportingLedger(MemoryLedger):
    """A ledger that tells what a test gave it to tell.

    Attributes:
        rows: of `usage`.
        asked: the days that were asked for.
    """

    rows: list[UsageRow]
    asked: list[tuple[dt.date, dt.date]]

    async def usage(self, first_day: dt.date, last_day: dt.date) -> list[UsageRow]:
        """The given rows of those days."""
        self.asked.append((first_day, last_day))
        return [row for row in self.rows if first_day <= row.day <= last_day]

    async def health(self) -> LedgerHealth:
        """In good health."""
        return LedgerHealth(
            kind="memory", is_reachable=True, holds=2, held=Amounts(tokens=5, nano_usd=7), detail="fine"
        )


def reporting_ledger() -> ReportingLedger:
    """One without limits that has nothing to tell."""
    ledger = ReportingLedger(clock=lambda: NOON)
    ledger.rows, ledger.asked = [], []
    return ledger


@dataclass
class Admin:
    """Who uses the API.

    Attributes:
        gateway: that is asked.
        lines: what it logs of requests.
        ledger: its ledger.
    """

    gateway: Gateway
    lines: io.StringIO
    ledger: ReportingLedger

    async def ask(self, method: str, path: str, body: Json | bytes = b"", headers: Json | None = None) -> Answered:
        """One request below /admin/v1, as root unless said otherwise."""
        return await ask(
            self.gateway, body, f"/admin/v1{path}", method=method, headers=ROOT if headers is None else headers
        )

    async def make(self, id: str = "ada", **traits: Any) -> str:
        """A key; its secret."""
        made = await self.ask("POST", "/keys", {"id": id, **traits})
        assert made.status == 201, made.body
        secret: str = made.json["secret"]
        return secret

    async def token(self, id: str, role: str, *scopes: str) -> dict[str, str]:
        """An admin token; the header that has it."""
        made = await self.ask("POST", "/tokens", {"id": id, "role": role, "scopes": list(scopes)})
        assert made.status == 201, made.body
        return {"authorization": f"Bearer {made.json['secret']}"}

    async def chat(self, secret: str | None) -> Answered:
        """A completion with a key."""
        headers = {} if secret is None else {"authorization": f"Bearer {secret}"}
        return await ask(self.gateway, CHAT, headers=headers)

    def said(self) -> str:
        """What was logged of requests so far."""
        self.gateway.lines.flush()
        return self.lines.getvalue()


@contextmanager
def admin_of(config: Config, monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    """A gateway with this configuration, whose root token is set."""
    monkeypatch.setenv("THINKGATE_ADMIN_TOKEN", ROOT_SECRET)
    monkeypatch.delenv("THINKGATE_KEY_HASH_SECRET", raising=False)
    gateway, lines = gateway_of(config)
    gateway.stored.clock = lambda: NOON
    ledger = reporting_ledger()
    ledger.set_limits(gateway.admin.limits.in_force(config))
    gateway.ledger = ledger
    try:
        yield Admin(gateway, lines, ledger)
    finally:
        gateway.lines.close()


def shown(answer: Answered) -> str:
    """A body, for looking for what must not be in it."""
    return json.dumps(answer.json)
