"""`thinkgate keys`: the same as the admin API, from the shell, and what is printed where."""

from __future__ import annotations

import asyncio
import io
import json
from pathlib import Path

import pytest

from budget.records.sqlite import SqliteRecords
from gateway.admin.stored import Stored
from gateway.cli import main

CONFIG = """
models: {qwen: {backends: [{id: a, url: "http://127.0.0.1:1"}]}}
keys: [{id: file, secret_sha256: "%s", team: ml}]
store: {kind: sqlite, path: %s}
"""
Said = tuple[int, str, str]


class Shell:
    """Somebody at a shell, with a configuration file."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.records = folder / "thinkgate-records.db"
        self.config = folder / "thinkgate.yaml"
        self.config.write_text(CONFIG % ("ab" * 32, folder / "thinkgate.db"))
        self._capsys = capsys

    def keys(self, *arguments: str) -> Said:
        """Exit status, standard output and standard error of a command."""
        status = main(["keys", *arguments, "--config", str(self.config)])
        said = self._capsys.readouterr()
        return status, said.out, said.err

    def owner(self, secret: str) -> str | None:
        """The id of the key that a gateway on the same store would take a secret for."""

        async def look() -> str | None:
            stored = Stored(SqliteRecords(self.records, clock=lambda: 0.0), clock=lambda: 0.0)
            await stored.refresh()
            await stored.records.close()
            key = stored.key_of(secret.encode())
            return None if key is None else key.id

        return asyncio.run(look())

    def audit(self) -> list[dict[str, object]]:
        """The audit log."""

        async def read() -> list[dict[str, object]]:
            records = SqliteRecords(self.records, clock=lambda: 0.0)
            entries = await records.read_log("audit", after=0, limit=99)
            await records.close()
            return [json.loads(entry) for _, entry in entries]

        return asyncio.run(read())


@pytest.fixture
def shell(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A shell with an empty store."""
    monkeypatch.delenv("THINKGATE_KEY_HASH_SECRET", raising=False)
    return Shell(tmp_path, capsys)


def test_a_key_lives_from_the_shell(shell: Shell) -> None:
    """Created, rotated without grace and revoked; its secret alone is on standard output, once each."""
    status, first, told = shell.keys("create", "ada", "--team", "ml", "--models", "qwen", "--tags", "a,b")
    assert (status, first.count("\n")) == (0, 1)
    assert "not shown again" in told
    assert first.strip() not in told
    assert shell.owner(first.strip()) == "ada"
    status, second, _ = shell.keys("rotate", "ada", "--grace-s", "0")
    assert status == 0
    assert [shell.owner(secret.strip()) for secret in (first, second)] == [None, "ada"]
    assert shell.keys("revoke", "ada") == (0, "", "The key 'ada' is revoked.\n")
    assert shell.owner(second.strip()) is None
    audit = shell.audit()
    assert [(e["actor"], e["action"], e["address"]) for e in audit] == [
        ("cli", "key.create", ""),
        ("cli", "key.rotate", ""),
        ("cli", "key.revoke", ""),
    ]
    assert not any(secret.strip() in str(audit) for secret in (first, second))


def test_keys_of_file_and_store_are_listed(shell: Shell) -> None:
    """A table for people, JSON lines for programs; neither has a secret."""
    _, secret, _ = shell.keys("create", "ada", "--org", "acme", "--expires-at", "2099-01-01T00:00:00Z")
    _, table, _ = shell.keys("list")
    lines = [line.split() for line in table.splitlines()]
    assert lines[1] == ["ada", "store", "active", "org:acme", "all", "2099-01-01T00:00:00+00:00"]
    assert lines[2] == ["file", "file", "active", "team:ml", "all", "never"]
    _, listed, _ = shell.keys("list", "--json")
    assert [json.loads(line)["id"] for line in listed.splitlines()] == ["ada", "file"]
    assert secret.strip() not in table + listed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "a b"), "`id`"),
        (("create", "file"), "stands in the configuration file"),
        (("create", "new", "--models", "gpt"), "'gpt' is not one of qwen"),
        (("create", "new", "--modes", "dream"), "`modes[0]`"),
        (("create", "new", "--expires-at", "tomorrow"), "`expires_at`"),
        (("rotate", "nobody"), "There is no key 'nobody'"),
        (("rotate", "file"), "stands in the configuration file"),
        (("rotate", "nobody", "--grace-s", "-1"), "`grace_s`"),
        (("revoke", "nobody"), "There is no key 'nobody'"),
    ],
)
def test_what_cannot_be_done_is_said(shell: Shell, arguments: tuple[str, ...], said: str) -> None:
    """The reason is on standard error, the exit status is 1, and nothing is on standard output."""
    status, out, err = shell.keys(*arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"thinkgate keys {arguments[0]}: ")
    assert said in err


def test_a_store_that_cannot_be_reached_is_said(shell: Shell) -> None:
    """The file at fault is named."""
    shell.config.write_text(CONFIG % ("ab" * 32, "/nowhere/thinkgate.db"))
    status, _, err = shell.keys("list")
    assert status == 1
    assert "/nowhere/thinkgate-records.db" in err


def test_keys_in_memory_are_refused(shell: Shell) -> None:
    """A key that would be gone with the command is not made; the remedy is named."""
    shell.config.write_text(shell.config.read_text().split("store:")[0])
    status, out, err = shell.keys("create", "ada")
    assert (status, out) == (1, "")
    assert "sqlite or redis" in err


def test_a_gateways_hash_secret_is_needed(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where keys were made with a hash secret of the environment, a shell without it is refused."""
    monkeypatch.setenv("THINKGATE_KEY_HASH_SECRET", "sixteen characters at least")
    assert shell.keys("create", "ada")[0] == 0
    monkeypatch.delenv("THINKGATE_KEY_HASH_SECRET")
    status, _, err = shell.keys("create", "eve")
    assert status == 1
    assert "server.key_hash_env" in err
    monkeypatch.setenv("THINKGATE_KEY_HASH_SECRET", "short")
    status, _, err = shell.keys("list")
    assert status == 1
    assert "at least 16 characters" in err


def test_another_hash_secret_makes_no_key(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell with another hash secret than the gateway's is refused, instead of making keys that it does not know."""
    monkeypatch.setenv("THINKGATE_KEY_HASH_SECRET", "sixteen characters at least")
    assert shell.keys("create", "ada")[0] == 0
    monkeypatch.setenv("THINKGATE_KEY_HASH_SECRET", "sixteen others, by mistake")
    for command in (("create", "eve"), ("rotate", "ada")):
        status, out, err = shell.keys(*command)
        assert (status, out) == (1, "")
        assert "server.key_hash_env" in err
    assert [entry["action"] for entry in shell.audit()] == ["key.create"]


def test_secret_is_written_alone(shell: Shell) -> None:
    """What a pipe gets is the secret and nothing else."""
    _, out, _ = shell.keys("create", "ada")
    assert io.StringIO(out).read() == out.strip() + "\n"
    assert out.startswith("tg-")
