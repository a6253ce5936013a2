"""`/metrics` on the public port: whom it shows them, and when it could show a part only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gateway.admin_client import ROOT, ROOT_SECRET, Admin, Json, admin_of
from tests.gateway.asgi import Answered, ask
from tests.gateway.still import config_of


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    """An admin API whose root token's variable has a line end, as a mounted secret may."""
    with admin_of(config_of(), monkeypatch) as admin:
        monkeypatch.setenv("THINKGATE_ADMIN_TOKEN", f"{ROOT_SECRET}\n")
        yield admin


async def scrape(admin: Admin, headers: Json) -> Answered:
    """The metrics."""
    return await ask(admin.gateway, b"", "/metrics", method="GET", headers=headers)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_the_root_token_may_scrape(admin: Admin, scheme: str) -> None:
    """It is told as everywhere else: without the variable's line end, its scheme in any case."""
    answer = await scrape(admin, {"authorization": f"{scheme} {ROOT_SECRET}"})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain")
    assert b"thinkgate_inflight_requests" in answer.body


@pytest.mark.parametrize(
    ("role", "scopes", "status"), [("admin", (), 200), ("viewer", (), 200), ("scope-admin", ("team:ml",), 403)]
)
async def test_tokens_of_the_store_may_scrape(admin: Admin, role: str, scopes: tuple[str, ...], status: int) -> None:
    """Who may read everything may, and who administers a part may not: metrics tell of everyone."""
    assert (await scrape(admin, await admin.token("t", role, *scopes))).status == status


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": ROOT_SECRET}])
async def test_nobody_else_may_scrape(admin: Admin, headers: Json) -> None:
    """Without an admin token there are no metrics."""
    assert (await scrape(admin, headers)).status == 401


async def test_without_a_root_token_nobody_may_scrape(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is closed like the admin API, and says which variable opens it."""
    monkeypatch.delenv("THINKGATE_ADMIN_TOKEN")
    answer = await scrape(admin, ROOT)
    assert answer.status == 403
    assert "THINKGATE_ADMIN_TOKEN" in answer.error["message"]


async def test_one_of_several_workers_shows_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its own part would pass for the whole: the port that has the sum is named."""
    store = {"kind": "sqlite", "path": str(tmp_path / "budgets.db")}
    with admin_of(config_of(server={"workers": 2}, store=store), monkeypatch) as admin:
        answer = await scrape(admin, ROOT)
        assert answer.status == 404
        assert "server.metrics.port" in answer.error["message"]
        assert (await scrape(admin, {})).status == 401
