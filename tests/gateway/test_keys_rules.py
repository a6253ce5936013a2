"""How keys of the store stand beside the file's, and what each role may do with them."""

from __future__ import annotations

import pytest

from gateway.errors import ConflictingChange, PermissionDenied, Unauthenticated
from tests.gateway.still import config_of
from tests.gateway.tenants import ROOT, VIEWER, is_refused, replica, scoped, with_file_key


class TestBesideTheFile:
    """Which of file and store says what holds."""

    async def test_keys_of_the_file_are_read_only(self) -> None:
        """They are listed with their source; changing, rotating or revoking one is a 409 that names the file."""
        one = replica(with_file_key())
        assert [(e.id, e.source, e.status) for e in one.keys.entries(ROOT, limit=9)[0]] == [("file", "file", "active")]
        for call in (
            one.keys.change(ROOT, "file", {"team": "x"}),
            one.keys.rotate(ROOT, "file"),
            one.keys.revoke(ROOT, "file"),
        ):
            with pytest.raises(ConflictingChange, match="configuration file: change it in the file") as refused:
                await call
            assert refused.value.status == 409

    async def test_file_wins_where_it_later_has_the_id(self) -> None:
        """The stored key of that id is refused and listed as shadowed; when the file lets go, it works again."""
        one = replica()
        secret = await one.make("ada")
        without, one.config = one.config, with_file_key("ada")
        assert is_refused(one, secret)
        assert one.identify("file-secret").scopes == ("key:ada", "team:ml")
        entries, _ = one.keys.entries(ROOT, limit=9)
        assert [(e.source, e.status) for e in entries] == [("file", "active"), ("store", "shadowed")]
        assert one.keys.entry(ROOT, "ada").source == "file"
        with pytest.raises(ConflictingChange):
            await one.keys.rotate(ROOT, "ada")
        one.config = without
        assert not is_refused(one, secret)

    async def test_shadowed_key_can_be_revoked(self) -> None:
        """What stands behind a key of the file can be ended without touching the file, once and for all."""
        one = replica()
        await one.make("ada")
        one.config = with_file_key("ada")
        assert (await one.keys.revoke(ROOT, "ada")).status == "revoked"
        assert one.identify("file-secret").id == "ada"

    async def test_anyone_is_let_in_only_on_loopback_without_any_key(self) -> None:
        """A gateway on another address, which has a store and no key yet, refuses everybody."""
        here = replica(config_of(store={"kind": "sqlite"}))
        elsewhere = replica(config_of(store={"kind": "sqlite"}, server={"host": "0.0.0.0"}))
        for one in (here, elsewhere):
            await one.stored.refresh()
        assert here.keyring().is_open
        assert not elsewhere.keyring().is_open
        with pytest.raises(Unauthenticated):
            elsewhere.keyring().identify(None)


async def test_viewer_changes_nothing() -> None:
    """A viewer reads all keys; each change is a 403 and leaves no trace."""
    one = replica()
    await one.make("ada")
    audit = await one.audit()
    assert [entry.id for entry in one.keys.entries(VIEWER, limit=9)[0]] == ["ada"]
    for call in (
        one.make("eve", VIEWER),
        one.keys.change(VIEWER, "ada", {"team": "x"}),
        one.keys.rotate(VIEWER, "ada"),
        one.keys.revoke(VIEWER, "ada"),
    ):
        with pytest.raises(PermissionDenied):
            await call
    assert await one.audit() == audit


async def test_scope_admin_sees_and_changes_its_keys_only() -> None:
    """Keys of its path are its own; others are not listed, and reading or changing them is a 403."""
    one = replica()
    lead = scoped("team:ml")
    await one.make("mine", lead, team="ml", user="ada")
    await one.make("other", team="ops")
    await one.make("shared", team="ml", org="acme")
    assert [entry.id for entry in one.keys.entries(lead, limit=9)[0]] == ["mine", "shared"]
    with pytest.raises(PermissionDenied):
        one.keys.entry(lead, "other")
    for call in (
        one.keys.change(lead, "other", {"max_thinking_tokens": 5}),
        one.keys.rotate(lead, "other"),
        one.keys.revoke(lead, "other"),
        one.keys.change(lead, "mine", {"team": "ops"}),
        one.keys.change(lead, "shared", {"org": None}),
        one.make("new", lead, team="ops"),
        one.make("new", lead, team="ml", org="acme"),
        one.make("new", lead),
        one.make("new", lead, team="ml", tags=["paid"]),
    ):
        with pytest.raises(PermissionDenied):
            await call
    assert (await one.keys.change(lead, "shared", {"max_thinking_tokens": 5})).max_thinking_tokens == 5
    assert (await one.keys.revoke(lead, "mine")).status == "revoked"
