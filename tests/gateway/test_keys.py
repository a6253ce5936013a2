"""The life of a key: made, used, changed, rotated, expired, revoked."""

from __future__ import annotations

import datetime as dt
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import pytest

from gateway.admin.keys import GRACE_S, MOST_SECRETS
from gateway.config.schema import Config, KeyTraits
from gateway.errors import ConflictingChange, EntryNotFound, InvalidRequest, Unauthenticated
from tests.gateway.still import config_of
from tests.gateway.tenants import NOON, ROOT, Replica, is_refused, replica, replicas, with_file_key

HOUR_S = 3600.0
FULL: dict[str, Any] = {
    "user": "ada",
    "team": "ml",
    "org": "acme",
    "models": ["qwen"],
    "modes": ["instant"],
    "max_thinking_tokens": 7,
    "degrade": ["cap"],
    "tags": ["beta"],
    "reasoning_field": "both",
}


def moment(seconds: float) -> dt.datetime:
    """A time after noon."""
    return dt.datetime.fromtimestamp(NOON + seconds, dt.UTC)


async def test_a_key_is_what_it_was_made() -> None:
    """Everything that a configured key has holds for a stored one, and is listed; its secret is not."""
    one = replica()
    entry, secret = await one.keys.create(ROOT, "laptop", KeyTraits.model_validate(FULL))
    key = one.identify(secret)
    assert key.scopes == ("key:laptop", "user:ada", "team:ml", "org:acme", "tag:beta")
    assert (key.models, key.modes, key.max_thinking_tokens, key.both_fields) == (
        frozenset({"qwen"}),
        frozenset({"instant"}),
        7,
        True,
    )
    assert entry == one.keys.entry(ROOT, "laptop")
    shown = entry.model_dump(mode="json")
    assert FULL.items() <= shown.items()
    assert (entry.source, entry.status, entry.created_by) == ("store", "active", "root")
    assert entry.created_at == moment(0)
    assert secret not in entry.model_dump_json()


async def test_a_stored_secret_is_digested_once_and_a_files_never_by_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """A valid secret costs one digest, whichever kind it is: the form of a secret says which."""
    one = replica(with_file_key())
    secret = await one.make("ada")
    ring = one.keyring()
    digested: list[str] = []

    def spied(kind: str, digest: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
        def spy(data: bytes) -> Any:
            digested.append(kind)
            return digest(data)

        return spy

    monkeypatch.setattr("gateway.auth.hashlib.sha256", spied("file", hashlib.sha256))
    monkeypatch.setattr(one.stored, "key_of", spied("store", one.stored.key_of))
    ring.identify(b"Bearer " + secret.encode())
    assert digested == ["store"]
    ring.identify(b"Bearer file-secret")
    assert digested == ["store", "file"]


async def test_a_secret_of_the_file_may_have_the_form_of_a_stored_one() -> None:
    """A key that was made here and then put into the file goes on working."""
    one = replica()
    secret, _ = await one.stored.new_secret("tg-")
    await one.stored.follow()
    one.config = config_of(keys=[{"id": "moved", "secret_sha256": hashlib.sha256(secret.encode()).hexdigest()}])
    assert one.identify(secret).id == "moved"


async def test_wrong_secrets_are_refused() -> None:
    """Another secret of the right form, a part of one, a digest or an admin token is a 401."""
    one = replica()
    secret = await one.make("ada")
    _, token = await one.tokens.create(ROOT, "t", "admin", ())
    other, _ = await one.stored.new_secret("tg-")
    wrong = [other, secret[:-1], secret + "A", secret[:-1] + chr(ord(secret[-1]) ^ 1), token, "", "tg-"]
    assert all(is_refused(one, each) for each in wrong)


async def test_ids_are_not_used_twice() -> None:
    """An id that is taken, was revoked or stands in the file is a conflict that says what to do."""
    one = replica(with_file_key())
    await one.make("ada")
    await one.make("old")
    await one.keys.revoke(ROOT, "old")
    for id, remedy in (
        ("ada", "Choose another"),
        ("old", "not used again"),
        ("file", "choose another id"),
        ("anyone", "choose another id"),
    ):
        with pytest.raises(ConflictingChange, match=remedy) as refused:
            await one.make(id)
        assert (refused.value.status, refused.value.param) == (409, "id")


class TestChange:
    """What a key becomes."""

    async def test_only_what_is_named_changes(self) -> None:
        """Other traits stay, null sets the default, and the secret goes on working with the new traits."""
        one = replica()
        secret = await one.make("ada", **FULL)
        entry = await one.keys.change(
            ROOT, "ada", {"max_thinking_tokens": None, "team": "ops", "expires_at": moment(60)}
        )
        assert (entry.max_thinking_tokens, entry.team, entry.org, entry.expires_at) == (None, "ops", "acme", moment(60))
        assert one.identify(secret).scopes == ("key:ada", "user:ada", "team:ops", "org:acme", "tag:beta")
        assert (await one.keys.change(ROOT, "ada", {"expires_at": None})).expires_at is None

    async def test_nothing_to_change_is_no_change(self) -> None:
        """Setting what is set already leaves entry, version and audit log alone."""
        one = replica()
        await one.make("ada", team="ml")
        revision, audit = await one.records.revision(), await one.audit()
        await one.keys.change(ROOT, "ada", {"team": "ml"})
        assert (await one.records.revision(), await one.audit()) == (revision, audit)

    @pytest.mark.parametrize(
        ("changes", "param"),
        [
            ({"degrade": None}, "degrade"),
            ({"modes": ["dreaming"]}, "modes[0]"),
            ({"models": ["gpt"]}, "models"),
            ({"expires_at": moment(0)}, "expires_at"),
            ({"expires_at": moment(-5)}, "expires_at"),
            ({"expires_at": moment(101 * 366 * 24 * HOUR_S)}, "expires_at"),
        ],
    )
    async def test_what_cannot_be_is_refused(self, changes: dict[str, Any], param: str) -> None:
        """A wrong value is a 400 that names the field, and changes nothing."""
        one = replica()
        await one.make("ada")
        before = one.keys.entry(ROOT, "ada")
        with pytest.raises(InvalidRequest) as refused:
            await one.keys.change(ROOT, "ada", changes)
        assert refused.value.param == param
        assert one.keys.entry(ROOT, "ada") == before

    async def test_a_model_that_is_gone_does_not_stand_in_the_way(self) -> None:
        """A key that names a model the file no longer has can still be changed otherwise."""
        one = replica()
        await one.make("ada", models=["qwen"])
        one.config = Config.model_validate({"models": {"other": {"backends": [{"id": "a", "url": "http://x"}]}}})
        assert (await one.keys.change(ROOT, "ada", {"team": "ml"})).models == ("qwen",)

    async def test_replicas_change_one_key_one_after_the_other(self) -> None:
        """A change is made to the key as it is in the store, also where this replica knows an older one."""
        here, there = replicas(2)
        await here.make("ada", team="ml")
        await there.stored.refresh()
        await here.keys.change(ROOT, "ada", {"org": "acme"})
        entry = await there.keys.change(ROOT, "ada", {"user": "ada"})
        assert (entry.team, entry.org, entry.user) == ("ml", "acme", "ada")


class TestEnds:
    """Expiry, rotation and revocation."""

    async def test_a_key_expires_at_its_time(self) -> None:
        """It works until just before and is a 401 from then on, without anybody reading anything."""
        one = replica()
        _, secret = await one.keys.create(ROOT, "ada", KeyTraits(), expires_at=moment(HOUR_S))
        one.records.is_away = True
        one.clock.now = NOON + HOUR_S - 0.001
        assert not is_refused(one, secret)
        one.clock.now = NOON + HOUR_S
        assert is_refused(one, secret)
        assert one.keys.entry(ROOT, "ada").status == "expired"

    async def test_old_secret_stays_valid_for_its_grace(self) -> None:
        """After rotating both work, as the same key; old ones end after a day, or after a shorter time that is said."""
        one = replica()
        first = await one.make("ada")
        entry, second = await one.keys.rotate(ROOT, "ada")
        assert one.identify(first) is one.identify(second)
        assert [secret.valid_until for secret in entry.secrets] == [None, moment(GRACE_S)]
        one.clock.now += HOUR_S
        _, third = await one.keys.rotate(ROOT, "ada", grace_s=60)
        one.clock.now += 59
        assert [is_refused(one, secret) for secret in (first, second, third)] == [False, False, False]
        one.clock.now += 1
        assert [is_refused(one, secret) for secret in (first, second, third)] == [True, True, False]

    async def test_rotating_never_prolongs_a_grace(self) -> None:
        """A secret in its grace ends when that was to end, however long the grace of the next rotation."""
        one = replica()
        first = await one.make("ada")
        await one.keys.rotate(ROOT, "ada", grace_s=60)
        await one.keys.rotate(ROOT, "ada", grace_s=HOUR_S)
        one.clock.now += 60
        assert is_refused(one, first)
        assert len(one.keys.entry(ROOT, "ada").secrets) == 2

    async def test_rotating_without_grace_ends_all_others_now(self) -> None:
        """A leaked secret is ended at once with `grace_s` 0, here and on the other replicas."""
        here, there = replicas(2)
        first = await here.make("ada")
        _, second = await here.keys.rotate(ROOT, "ada")
        _, third = await here.keys.rotate(ROOT, "ada", grace_s=0)
        await there.stored.refresh()
        for one in (here, there):
            assert [is_refused(one, secret) for secret in (first, second, third)] == [True, True, False]

    async def test_secrets_of_a_key_are_bounded(self) -> None:
        """Rotating too often within the grace is a conflict that says what to do; without grace it always works."""
        one = replica()
        await one.make("ada")
        for _ in range(MOST_SECRETS - 1):
            await one.keys.rotate(ROOT, "ada")
        with pytest.raises(ConflictingChange, match="grace_s"):
            await one.keys.rotate(ROOT, "ada")
        entry, _ = await one.keys.rotate(ROOT, "ada", grace_s=0)
        assert len(entry.secrets) == 1

    async def test_a_revoked_key_is_a_401_for_good(self) -> None:
        """It can be revoked again, but not changed or rotated, and all of its secrets are forgotten."""
        one = replica()
        secrets = [await one.make("ada"), (await one.keys.rotate(ROOT, "ada"))[1]]
        entry = await one.keys.revoke(ROOT, "ada")
        assert (entry.status, entry.secrets) == ("revoked", ())
        assert all(is_refused(one, secret) for secret in secrets)
        one.clock.now += 5
        assert (await one.keys.revoke(ROOT, "ada")).revoked_at == entry.revoked_at
        for call in (one.keys.change(ROOT, "ada", {"team": "x"}), one.keys.rotate(ROOT, "ada")):
            with pytest.raises(ConflictingChange, match="create another"):
                await call
        assert len(await one.audit()) == 3

    async def test_revoking_the_last_key_opens_nothing(self) -> None:
        """Once there was a key, who has none is refused, here and where the store is read anew."""
        one = replica()
        await one.stored.refresh()
        assert one.keyring().is_open
        assert one.keyring().identify(None).id == "anyone"
        await one.make("ada")
        await one.keys.revoke(ROOT, "ada")
        fresh = Replica(one.records, one.clock, one.config)
        await fresh.stored.refresh()
        for each in (one, fresh):
            assert not each.keyring().is_open
            with pytest.raises(Unauthenticated):
                each.keyring().identify(None)

    async def test_expired_key_is_not_rotated(self) -> None:
        """A new secret would not work either: the end has to be moved first."""
        one = replica()
        await one.keys.create(ROOT, "ada", KeyTraits(), expires_at=moment(5))
        one.clock.now += 5
        with pytest.raises(ConflictingChange, match="expires_at"):
            await one.keys.rotate(ROOT, "ada")
        await one.keys.change(ROOT, "ada", {"expires_at": moment(HOUR_S)})
        _, secret = await one.keys.rotate(ROOT, "ada")
        assert not is_refused(one, secret)


async def test_lists_come_in_pages() -> None:
    """Keys come by id, as many as asked for, and the list says whether there are more."""
    one = replica(with_file_key("b"))
    for id in ("d", "a", "c"):
        await one.make(id)
    pages = []
    after, has_more = "", True
    while has_more:
        entries, has_more = one.keys.entries(ROOT, after=after, limit=2)
        pages.append([entry.id for entry in entries])
        after = entries[-1].id
    assert pages == [["a", "b"], ["c", "d"]]


async def test_what_is_not_there_is_said() -> None:
    """Reading or changing a key that never was is a 404."""
    one = replica()
    with pytest.raises(EntryNotFound):
        one.keys.entry(ROOT, "ada")
    for call in (one.keys.change(ROOT, "ada", {}), one.keys.rotate(ROOT, "ada"), one.keys.revoke(ROOT, "ada")):
        with pytest.raises(EntryNotFound) as refused:
            await call
        assert refused.value.status == 404


async def test_audit_log_tells_each_change_and_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    """Who, when, from where, what, before and after, once per change; no secret or digest in it, nor in any log."""
    with caplog.at_level(logging.DEBUG):
        one = replica()
        secrets = [await one.make("ada", team="ml")]
        one.clock.now += 1
        await one.keys.change(ROOT, "ada", {"team": "ops"})
        secrets.append((await one.keys.rotate(ROOT, "ada"))[1])
        await one.keys.revoke(ROOT, "ada")
    entries = await one.audit()
    assert [entry["action"] for entry in entries] == ["key.create", "key.change", "key.rotate", "key.revoke"]
    assert {(e["actor"], e["address"], e["request_id"], e["target"]) for e in entries} == {
        ("root", "192.0.2.1", "req-1", "ada")
    }
    assert [entry["at_s"] for entry in entries] == [NOON, NOON + 1, NOON + 1, NOON + 1]
    assert entries[0]["before"] is None
    assert (entries[1]["before"]["team"], entries[1]["after"]["team"]) == ("ml", "ops")
    assert (entries[3]["before"]["status"], entries[3]["after"]["status"]) == ("active", "revoked")
    hasher = await one.stored.hasher()
    said = f"{entries}{caplog.text}{one.keys.entries(ROOT, limit=9)}"
    for secret in secrets:
        assert secret not in said
        assert hasher.digest(secret.encode()).hex() not in said
