"""The admin API over HTTP: its door, its routes, its errors, and that secrets stay where they are told."""

from __future__ import annotations

import asyncio
import csv
import datetime as dt
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from budget.errors import BudgetError, RecordsUnreachable
from budget.ledger import UsageRow
from gateway.api.admin import routes
from gateway.api.admin_door import MOST_BODY_BYTES
from tests.gateway.admin_client import ROOT, Admin, admin_of
from tests.gateway.asgi import ask
from tests.gateway.still import config_of
from tests.gateway.tenants import NOON

Json = dict[str, Any]
LIMIT: Json = {"scope": "team:ml", "unit": "tokens", "amount": 100_000, "window": "day"}
TODAY = dt.datetime.fromtimestamp(NOON, dt.UTC).date()


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    """A gateway without keys and limits, with the memory store."""
    with admin_of(config_of(), monkeypatch) as client:
        yield client


def every_route() -> list[tuple[str, str]]:
    """Method and path of each route, with ids filled in."""
    return sorted(
        (method, route.path.removeprefix("/admin/v1").replace("{key_id}", "ada").replace("{token_id}", "t"))
        for route in routes()
        for method in route.methods or ()
    )


@pytest.mark.parametrize(("method", "path"), every_route())
class TestTheDoor:
    """Before anything of a request is looked at."""

    async def test_every_route_is_closed_while_the_root_token_is_unset(
        self, admin: Admin, monkeypatch: pytest.MonkeyPatch, method: str, path: str
    ) -> None:
        """It is a 403 that says which variable to set, whatever token is sent."""
        monkeypatch.delenv("THINKGATE_ADMIN_TOKEN")
        for headers in ({}, ROOT, {"authorization": "Bearer "}):
            answer = await admin.ask(method, path, b"{", headers)
            assert (answer.status, answer.error["code"]) == (403, "permission_denied")
            assert "THINKGATE_ADMIN_TOKEN" in answer.error["message"]

    async def test_every_route_needs_an_admin_token(self, admin: Admin, method: str, path: str) -> None:
        """No token, a wrong one and the key of an API are a 401, whatever else is wrong with the request."""
        secret = await admin.make("user")
        for headers in ({}, {"authorization": "Bearer nope"}, {"authorization": f"Bearer {secret}"}):
            answer = await admin.ask(method, path + "?x=1", b"{", headers)
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"

    async def test_unknown_parameters_are_refused(self, admin: Admin, method: str, path: str) -> None:
        """A parameter of the query that a route does not know is a 400 that names it."""
        body = {"POST": {"id": "ada"}, "PUT": LIMIT, "PATCH": {}}.get(method, b"")
        is_removal = (method, path) == ("DELETE", "/limits")
        query = "?scope=team:ml&unit=tokens&moon=1" if is_removal else "?moon=1"
        answer = await admin.ask(method, path + query, body)
        assert (answer.status, answer.error["param"], answer.error["code"]) == (400, "moon", "unknown_parameter")

    async def test_a_store_that_is_away_is_a_503(
        self, admin: Admin, monkeypatch: pytest.MonkeyPatch, method: str, path: str
    ) -> None:
        """It says that a retry may help, and nothing is answered from memory, but for the ledger's health."""

        async def away() -> int:
            raise RecordsUnreachable("nobody answers")

        monkeypatch.setattr(admin.gateway.stored.records, "revision", away)
        answer = await admin.ask(method, path)
        if path == "/ledger":
            assert answer.status == 200
            return
        assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
        assert answer.headers["retry-after"] == "1"

    async def test_bodies_are_bounded(self, admin: Admin, method: str, path: str) -> None:
        """More than 64 KiB is a 413."""
        answer = await admin.ask(method, path, b" " * (MOST_BODY_BYTES + 1))
        assert (answer.status, answer.error["code"]) == (413, "request_too_large")


async def test_a_key_lives_through_the_api(admin: Admin) -> None:
    """Made, used, changed, rotated, listed and revoked: each holds for the next completion."""
    made = await admin.ask("POST", "/keys", {"id": "ada", "team": "ml", "modes": ["reasoning"]})
    assert (made.status, made.headers["cache-control"]) == (201, "no-store")
    first = made.json["secret"]
    assert (await admin.chat(None)).status == 401
    assert (await admin.chat(first)).json["thinkgate"]["cap"]["tokens"] == 500
    changed = await admin.ask("PATCH", "/keys/ada", {"modes": None, "max_thinking_tokens": 6})
    assert (changed.status, changed.json["modes"], changed.json["team"]) == (200, None, "ml")
    assert (await admin.chat(first)).json["thinkgate"]["cap"]["tokens"] == 6
    second = (await admin.ask("POST", "/keys/ada/rotate", {"grace_s": 0})).json["secret"]
    assert [(await admin.chat(secret)).status for secret in (first, second)] == [401, 200]
    listed = (await admin.ask("GET", "/keys")).json
    assert (listed["object"], listed["has_more"], listed["data"]) == (
        "list",
        False,
        [(await admin.ask("GET", "/keys/ada")).json],
    )
    revoked = await admin.ask("DELETE", "/keys/ada")
    assert (revoked.status, revoked.json["status"]) == (200, "revoked")
    assert (await admin.chat(second)).error["message"] == "The API key is not known, was revoked, or has expired."


async def test_a_limit_lives_through_the_api(admin: Admin) -> None:
    """Set, it refuses the next request; made wider, it does not; removed, it is gone."""
    secret = await admin.make("ada", team="ml")
    put = await admin.ask("PUT", "/limits", {**LIMIT, "amount": 10})
    assert (put.status, put.json["is_counted"], put.json["changed_by"]) == (200, True, "root")
    assert (await admin.chat(secret)).error["code"] == "budget_exceeded"
    await admin.ask("PUT", "/limits", LIMIT)
    answer = await admin.chat(secret)
    assert (answer.status, answer.headers["x-ratelimit-limit-tokens"]) == (200, "100000")
    assert [entry["amount"] for entry in (await admin.ask("GET", "/limits?scope=team:ml")).json["data"]] == [100_000]
    gone = await admin.ask("DELETE", "/limits?scope=team:ml&unit=tokens&window=day")
    assert (gone.status, gone.body) == (204, b"")
    assert "x-ratelimit-limit-tokens" not in (await admin.chat(secret)).headers


async def test_entries_of_the_file_are_read_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and limits of the file are listed with their source, and are a 409 to change that names the file."""
    config = config_of(keys=[{"id": "ada", "secret_sha256": "ab" * 32}], limits=[LIMIT])
    with admin_of(config, monkeypatch) as admin:
        for path in ("/keys", "/limits"):
            assert [entry["source"] for entry in (await admin.ask("GET", path)).json["data"]] == ["file"]
        for method, path, body in (
            ("POST", "/keys", {"id": "ada"}),
            ("PATCH", "/keys/ada", {"team": "x"}),
            ("POST", "/keys/ada/rotate", b""),
            ("DELETE", "/keys/ada", b""),
            ("PUT", "/limits", {**LIMIT, "amount": 5}),
            ("DELETE", "/limits?scope=team:ml&unit=tokens&window=day", b""),
        ):
            refused = await admin.ask(method, path, body)
            assert (refused.status, refused.error["code"]) == (409, "conflict"), (method, path)
            assert "configuration file" in refused.error["message"]
            assert refused.headers["x-should-retry"] == "false"


async def test_slow_body_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A body that does not arrive within `timeouts.body_s` is a 504, and nothing was changed."""
    with admin_of(config_of(server={"timeouts": {"body_s": 0.01}}), monkeypatch) as admin:
        sent: list[Any] = []

        async def never() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/admin/v1/keys",
            "raw_path": b"/admin/v1/keys",
            "query_string": b"",
            "headers": [(b"authorization", ROOT["authorization"].encode())],
            "client": None,
        }
        await admin.gateway(scope, never, send)
        assert sent[0]["status"] == 504


async def test_a_bug_is_a_500_in_our_form(
    admin: Admin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever goes wrong inside, the client gets an error object, and the log the traceback."""

    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(admin.gateway.admin.keys, "entries", broken)
    answer = await admin.ask("GET", "/keys")
    assert (answer.status, answer.error["type"]) == (500, "server_error")
    assert "ZeroDivisionError" in caplog.text


class TestRoles:
    """What each role may do, over HTTP."""

    async def test_viewer_reads_everything_and_changes_nothing(self, admin: Admin) -> None:
        """Every GET is answered; everything else is a 403."""
        await admin.make("ada")
        viewer = await admin.token("grafana", "viewer")
        bodies = {"POST": {"id": "x"}, "PUT": LIMIT, "PATCH": {}}
        for method, path in every_route():
            body: Json | bytes = bodies.get(method, b"")
            if path == "/tokens" and method == "POST":
                body = {"id": "x", "role": "viewer"}
            if path.endswith("/rotate"):
                body = b""
            query = "?scope=team:ml&unit=tokens&window=day" if (method, path) == ("DELETE", "/limits") else ""
            answer = await admin.ask(method, path + query, body, viewer)
            assert answer.status == (200 if method == "GET" else 403), (method, path)

    async def test_admin_may_do_what_root_may(self, admin: Admin) -> None:
        """A stored token with the role admin makes keys, limits and tokens, and is who the audit log names."""
        deputy = await admin.token("deputy", "admin")
        assert (await admin.ask("POST", "/keys", {"id": "ada"}, deputy)).status == 201
        assert (await admin.ask("PUT", "/limits", LIMIT, deputy)).status == 200
        assert (await admin.ask("POST", "/tokens", {"id": "x", "role": "viewer"}, deputy)).status == 201
        entries = (await admin.ask("GET", "/audit", headers=deputy)).json["data"]
        assert [entry["actor"] for entry in entries] == ["root", "deputy", "deputy", "deputy"]
        assert (await admin.ask("DELETE", "/tokens/deputy")).status == 200
        assert (await admin.ask("GET", "/keys", headers=deputy)).status == 401

    async def test_scope_admin_works_within_its_path(self, admin: Admin) -> None:
        """Its own keys, limits and usage; of others it learns nothing; tokens, audit log and ledger are not its."""
        await admin.make("other", team="ops")
        lead = await admin.token("lead", "scope-admin", "org:acme/team:ml")
        assert (await admin.ask("POST", "/keys", {"id": "mine", "team": "ml", "org": "acme"}, lead)).status == 201
        assert (await admin.ask("PUT", "/limits", LIMIT, lead)).status == 200
        assert [e["id"] for e in (await admin.ask("GET", "/keys", headers=lead)).json["data"]] == ["mine"]
        for method, path, body in (
            ("GET", "/keys/other", b""),
            ("DELETE", "/keys/other", b""),
            ("POST", "/keys", {"id": "x", "team": "ml"}),
            ("POST", "/keys", {"id": "x", "team": "ml", "org": "globex"}),
            ("PUT", "/limits", {**LIMIT, "scope": "org:acme"}),
            ("GET", "/tokens", b""),
            ("POST", "/tokens", {"id": "x", "role": "admin"}),
            ("GET", "/audit", b""),
            ("GET", "/ledger", b""),
        ):
            answer = await admin.ask(method, path, body, lead)
            assert (answer.status, answer.error["code"]) == (403, "permission_denied"), (method, path)
        admin.ledger.rows = [
            UsageRow(day=TODAY, scopes=scopes, mode="instant", requests=1, tokens=tokens, thinking_tokens=0, nano_usd=0)
            for scopes, tokens in ((("key:mine", "team:ml", "org:acme"), 5), (("key:other", "team:ops"), 70))
        ]
        assert [e["tokens"] for e in (await admin.ask("GET", "/usage?group_by=mode", headers=lead)).json["data"]] == [5]
        assert [e["tokens"] for e in (await admin.ask("GET", "/usage?group_by=mode")).json["data"]] == [75]


class TestUsage:
    """GET /usage."""

    @pytest.fixture(autouse=True)
    def rows(self, admin: Admin) -> None:
        """Two rows."""
        admin.ledger.rows = [
            UsageRow(
                day=day,
                scopes=("key:a", "team:ml", "model:qwen"),
                mode=mode,
                requests=2,
                tokens=30,
                thinking_tokens=10,
                nano_usd=1500,
            )
            for day, mode in ((TODAY, "instant"), (TODAY - dt.timedelta(days=1), "reasoning"))
        ]

    async def test_days_are_the_last_thirty_by_themselves(self, admin: Admin) -> None:
        """Without `from` and `to` it is today and the 29 days before; the answer says so."""
        answer = (await admin.ask("GET", "/usage?group_by=model")).json
        first = TODAY - dt.timedelta(days=29)
        assert admin.ledger.asked == [(first, TODAY)]
        assert (answer["from"], answer["to"]) == (first.isoformat(), TODAY.isoformat())
        assert answer["data"] == [
            {
                "model": "qwen",
                "requests": 4,
                "tokens": 60,
                "thinking_tokens": 20,
                "nano_usd": 3000,
                "cost_usd": 0.000003,
            }
        ]

    async def test_days_groups_and_scope_can_be_named(self, admin: Admin) -> None:
        """Both ends are included; groups have what was asked for; only the scope's rows count."""
        yesterday = TODAY - dt.timedelta(days=1)
        query = f"/usage?from={yesterday}&to={yesterday}&group_by=day,mode&scope=team:ml"
        data = (await admin.ask("GET", query)).json["data"]
        assert [(entry["day"], entry["mode"], entry["tokens"]) for entry in data] == [
            (yesterday.isoformat(), "reasoning", 30)
        ]
        assert (await admin.ask("GET", query.replace("team:ml", "team:x"))).json["data"] == []

    async def test_everything_is_grouped_by_itself(self, admin: Admin) -> None:
        """Without `group_by` each day, scope, model and mode is a row."""
        data = (await admin.ask("GET", "/usage")).json["data"]
        assert len(data) == 4
        assert all({"day", "scope", "model", "mode"} <= set(entry) for entry in data)

    async def test_csv_is_a_table(self, admin: Admin) -> None:
        """The same as text/csv, with a head."""
        answer = await admin.ask("GET", "/usage?group_by=mode&format=csv")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        lines = list(csv.DictReader(io.StringIO(answer.body.decode())))
        assert [(line["mode"], line["nano_usd"]) for line in lines] == [("instant", "1500"), ("reasoning", "1500")]


async def test_ledger_says_how_it_is(admin: Admin) -> None:
    """Kind, reachability and what is held are the ledger's."""
    assert (await admin.ask("GET", "/ledger")).json == {
        "kind": "memory",
        "is_reachable": True,
        "holds": 2,
        "held": {"tokens": 5, "thinking_tokens": 0, "nano_usd": 7},
        "detail": "fine",
    }


async def test_a_ledger_that_is_away_is_a_503(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Usage that cannot be read is said as any store that cannot be reached; why is for the log."""

    async def away(*_: Any) -> Any:
        raise BudgetError("redis://10.0.0.5 does not answer")

    monkeypatch.setattr(admin.ledger, "usage", away)
    answer = await admin.ask("GET", "/usage")
    assert (answer.status, answer.error["code"]) == (503, "store_unavailable")
    assert "10.0.0.5" not in answer.error["message"]


async def test_audit_log_comes_in_pages(admin: Admin) -> None:
    """Without `after` the newest, else what follows it; numbers have no gap; the request is told by its id."""
    for number in range(5):
        await admin.make(f"k{number}")
    newest = (await admin.ask("GET", "/audit?limit=2")).json
    assert ([entry["number"] for entry in newest["data"]], newest["last"]) == ([4, 5], 5)
    page = (await admin.ask("GET", "/audit?after=1&limit=3")).json
    assert [entry["number"] for entry in page["data"]] == [2, 3, 4]
    named = {**ROOT, "x-request-id": "req-mine"}
    answer = await admin.ask("DELETE", "/keys/k0", headers=named)
    assert answer.headers["x-request-id"] == "req-mine"
    (entry,) = (await admin.ask("GET", "/audit?after=5")).json["data"]
    assert (entry["actor"], entry["address"], entry["request_id"], entry["action"], entry["target"]) == (
        "root",
        "127.0.0.1",
        "req-mine",
        "key.revoke",
        "k0",
    )


async def test_secrets_are_told_once_and_nowhere_else(admin: Admin, caplog: pytest.LogCaptureFixture) -> None:
    """After making and rotating, no answer, log line, audit entry or record has any of the secrets."""
    with caplog.at_level(logging.DEBUG):
        secrets = [await admin.make("ada")]
        secrets.append((await admin.ask("POST", "/keys/ada/rotate")).json["secret"])
        secrets.append((await admin.token("t", "viewer"))["authorization"].removeprefix("Bearer "))
        for secret in secrets:
            await admin.chat(secret)
        paths = ("/keys", "/keys/ada", "/tokens", "/audit", "/limits")
        said = [(await admin.ask("GET", path)).body.decode() for path in paths]
        said += [admin.said(), caplog.text]
    records = await admin.gateway.stored.records.scan("")
    said += [record.value.decode() for _, record in records]
    said += [entry.decode() for _, entry in await admin.gateway.stored.records.read_log("audit", after=0, limit=99)]
    assert len(said) > 8
    for secret in [*secrets, "root-secret"]:
        assert not any(secret in text for text in said)


async def test_models_are_listed_by_key(admin: Admin) -> None:
    """The routes beside completions know stored keys, too."""
    secret = await admin.make("ada", models=[])
    listed = await ask(admin.gateway, b"", "/v1/models", method="GET", headers={"authorization": f"Bearer {secret}"})
    assert json.loads(listed.body)["data"] == []
    assert (await ask(admin.gateway, b"", "/v1/models", method="GET")).status == 401
