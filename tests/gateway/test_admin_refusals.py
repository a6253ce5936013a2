"""What the admin API refuses: each flawed request in our error form, with the field and what would be right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.gateway.admin_client import ROOT, Admin, admin_of
from tests.gateway.still import config_of

Json = dict[str, Any]
LIMIT: Json = {"scope": "team:ml", "unit": "tokens", "amount": 100_000, "window": "day"}


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[Admin]:
    """A gateway without keys and limits, with the memory store."""
    with admin_of(config_of(), monkeypatch) as client:
        yield client


FLAWED: list[tuple[str, str, Json | bytes, str | None, str]] = [
    ("POST", "/keys", b"", None, "missing_required_parameter"),
    ("POST", "/keys", b"{", None, "invalid_json"),
    ("POST", "/keys", b"\xff", None, "invalid_json"),
    ("POST", "/keys", b"[" * 20_000, None, "nested_too_deep"),
    ("POST", "/keys", b'{"id": ' + b"1" * 5000 + b"}", None, "invalid_json"),
    ("POST", "/keys", b"[]", None, "invalid_type"),
    ("POST", "/keys", {}, "id", "missing_required_parameter"),
    ("POST", "/keys", {"id": "a b"}, "id", "invalid_value"),
    ("POST", "/keys", {"id": "a/b"}, "id", "invalid_value"),
    ("POST", "/keys", {"id": "a" * 65}, "id", "invalid_value"),
    ("POST", "/keys", {"id": 5}, "id", "invalid_type"),
    ("POST", "/keys", {"id": "a", "secret": "mine"}, "secret", "unknown_parameter"),
    ("POST", "/keys", b'{"id": "a", "id": "b"}', "id", "invalid_json"),
    ("POST", "/keys", {"id": "a", "team": "a b"}, "team", "invalid_value"),
    ("POST", "/keys", {"id": "a", "user": ""}, "user", "invalid_value"),
    ("POST", "/keys", {"id": "a", "org": "x" * 257}, "org", "invalid_value"),
    ("POST", "/keys", {"id": "a", "tags": ["x\x1c"]}, "tags[0]", "invalid_value"),
    ("POST", "/keys", {"id": "a", "modes": ["dream"]}, "modes[0]", "invalid_value"),
    ("POST", "/keys", {"id": "a", "models": ["gpt"]}, "models", "invalid_value"),
    ("POST", "/keys", {"id": "a", "models": "qwen"}, "models", "invalid_type"),
    ("POST", "/keys", {"id": "a", "max_thinking_tokens": -1}, "max_thinking_tokens", "invalid_value"),
    ("POST", "/keys", {"id": "a", "max_thinking_tokens": "5"}, "max_thinking_tokens", "invalid_type"),
    ("POST", "/keys", {"id": "a", "max_thinking_tokens": True}, "max_thinking_tokens", "invalid_type"),
    ("POST", "/keys", {"id": "a", "team": "\ud800"}, None, "invalid_json"),
    ("POST", "/keys", {"id": "a", "expires_at": "2020-01-01T00:00:00Z"}, "expires_at", "invalid_value"),
    ("POST", "/keys", {"id": "a", "expires_at": "2030-01-01T00:00:00"}, "expires_at", "invalid_value"),
    ("POST", "/keys", {"id": "a", "expires_at": 1900000000}, "expires_at", "invalid_value"),
    ("POST", "/keys", {"id": "a", "expires_at": "9999-12-31T23:59:59-12:00"}, "expires_at", "invalid_value"),
    ("POST", "/keys/ada/rotate", {"grace_s": -1}, "grace_s", "invalid_value"),
    ("POST", "/keys/ada/rotate", {"grace_s": 1e9}, "grace_s", "invalid_value"),
    ("POST", "/keys/ada/rotate", b'{"grace_s": NaN}', None, "invalid_json"),
    ("GET", "/keys?limit=0", b"", "limit", "invalid_value"),
    ("GET", "/keys?limit=many", b"", "limit", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "scope": "ml"}, "scope", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "amount": 0}, "amount", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "amount": "5"}, "amount", "invalid_type"),
    ("PUT", "/limits", {**LIMIT, "amount": 1.5}, "amount", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "window": None}, "window", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "soft": "0.5"}, "soft", "invalid_type"),
    ("PUT", "/limits", {**LIMIT, "window": "minute", "soft": 0.5}, "soft", "invalid_value"),
    ("PUT", "/limits", {**LIMIT, "amount": 2**53 + 1}, "amount", "invalid_value"),
    ("PUT", "/limits", b'{"scope": "team:ml", "amount": 5, "unit": "tokens", "amount": 9}', "amount", "invalid_json"),
    ("PUT", "/limits", {**LIMIT, "unit": "usd"}, "unit", "invalid_value"),
    ("DELETE", "/limits", b"", "scope", "missing_required_parameter"),
    ("DELETE", "/limits?scope=team:ml&unit=euro", b"", "unit", "invalid_value"),
    ("POST", "/tokens", {"id": "t", "role": "king"}, "role", "invalid_value"),
    ("POST", "/tokens", {"id": "t", "role": "scope-admin"}, "scopes", "invalid_value"),
    ("POST", "/tokens", {"id": "t", "role": "scope-admin", "scopes": ["ml"]}, "scopes[0]", "invalid_value"),
    ("POST", "/tokens", {"id": "t", "role": "admin", "scopes": ["team:ml"]}, "scopes", "invalid_value"),
    ("GET", "/audit?after=-1", b"", "after", "invalid_value"),
    ("GET", "/audit?after=9223372036854775808", b"", "after", "invalid_value"),
    ("GET", "/usage?from=yesterday", b"", "from", "invalid_value"),
    ("GET", "/usage?to=1700000000", b"", "to", "invalid_value"),
    ("GET", "/usage?to=0001-01-01", b"", "to", "invalid_value"),
    ("GET", "/usage?from=2026-02-02&to=2026-02-01", b"", "from", "invalid_value"),
    ("GET", "/usage?from=2024-01-01&to=2026-01-01", b"", "from", "invalid_value"),
    ("GET", "/usage?group_by=day,week", b"", "group_by", "invalid_value"),
    ("GET", "/usage?group_by=", b"", "group_by", "invalid_value"),
    ("GET", "/limits?scope=team:a&scope=team:b", b"", "scope", "invalid_value"),
    ("GET", "/usage?format=xml", b"", "format", "invalid_value"),
]


@pytest.mark.parametrize(("method", "path", "body", "param", "code"), FLAWED)
async def test_flawed_requests_are_refused_in_our_form(
    admin: Admin, method: str, path: str, body: Json | bytes, param: str | None, code: str
) -> None:
    """Each is a 400 that names the field and says more than nothing, and changes nothing."""
    await admin.make("ada")
    revision = await admin.gateway.stored.records.revision()
    answer = await admin.ask(method, path, body)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (400, param, code)
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["message"].endswith(".")
    assert await admin.gateway.stored.records.revision() == revision


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/keys/nobody", 404, "not_found"),
        ("PATCH", "/keys/nobody", 404, "not_found"),
        ("POST", "/keys/nobody/rotate", 404, "not_found"),
        ("DELETE", "/keys/nobody", 404, "not_found"),
        ("DELETE", "/tokens/nobody", 404, "not_found"),
        ("DELETE", "/limits?scope=team:x&unit=tokens&window=day", 404, "not_found"),
        ("GET", "/nothing", 404, "unknown_url"),
        ("GET", "", 404, "unknown_url"),
    ],
)
async def test_what_is_not_there_is_a_404(admin: Admin, method: str, path: str, status: int, code: str) -> None:
    """Unknown keys, tokens, limits and routes are told apart by their code."""
    answer = await admin.ask(method, path, {} if method == "PATCH" else b"")
    assert (answer.status, answer.error["code"]) == (status, code)


async def test_wrong_methods_name_all_right_ones(admin: Admin) -> None:
    """The allow header has every method of the path, not only those of one route."""
    for path, allow in (("/keys", "GET, POST"), ("/keys/ada", "DELETE, GET, PATCH"), ("/limits", "DELETE, GET, PUT")):
        answer = await admin.ask("TRACE", path)
        assert (answer.status, answer.headers["allow"], answer.error["code"]) == (405, allow, "method_not_allowed")


async def test_body_is_json_whatever_its_type_says(admin: Admin) -> None:
    """What curl sends by itself as a form is read as the JSON it is."""
    form = {**ROOT, "content-type": "application/x-www-form-urlencoded"}
    assert (await admin.ask("POST", "/keys", {"id": "ada"}, form)).status == 201
