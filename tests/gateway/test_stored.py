"""Following the store: what one replica changes, the others know; a store that is away stops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging

import pytest

from budget.errors import RecordsUnreachable
from budget.records.port import Note
from gateway.admin.kept import HASHER, KEYS, LIMITS, KeptKey, KeptLimit
from gateway.admin.secret import KEY_BYTES, Hasher, new_secret
from gateway.admin.stored import Stored
from gateway.config.budgets import LimitConfig
from gateway.errors import ConflictingChange, StoreUnavailable, Unauthenticated
from tests.gateway.still import config_of
from tests.gateway.tenants import ROOT, BreakableRecords, Clock, Replica, replica, replicas

LIMIT = LimitConfig(scope="team:ml", unit="tokens", amount=100, window="day")


def is_known(one: Replica, secret: str) -> bool:
    """Whether a secret is a key's there."""
    try:
        return one.identify(secret).id != "anyone"
    except Unauthenticated:
        return False


def test_hash_is_hmac_sha256_and_its_id_tells_hashers_apart() -> None:
    """Digests are those of the standard, whatever was hashed before; another secret is another hasher."""
    hasher = Hasher(b"key")
    for secret in (b"a", b"b", b"a"):
        assert hasher.digest(secret) == hmac.new(b"key", secret, hashlib.sha256).digest()
    assert hasher.id == Hasher(b"key").id != Hasher(b"other").id


def test_secrets_are_long_random_and_known_by_their_form() -> None:
    """A thousand secrets are a thousand different ones, all of the length that tells them from others."""
    secrets = {new_secret("tg-") for _ in range(1000)}
    assert len(secrets) == 1000
    assert {len(secret) for secret in secrets} == {KEY_BYTES}


async def test_change_is_known_at_once_where_it_was_made_and_elsewhere_when_followed() -> None:
    """A key that one replica makes is its own at once, another's once it has followed."""
    here, there = replicas(2)
    await there.stored.refresh()
    secret = await here.make("ada", team="ml")
    assert here.identify(secret).scopes == ("key:ada", "team:ml")
    assert not is_known(there, secret)
    await there.stored.refresh()
    assert there.identify(secret).id == "ada"


async def test_following_without_a_change_reads_nothing() -> None:
    """A poll that finds the same revision does not read entries; one that finds another reads what is new."""
    one = replica()
    await one.make("ada")
    before = one.records.scans
    for _ in range(5):
        await one.stored.refresh()
    assert one.records.scans == before
    await one.make("eve")
    assert one.records.scans == before + 1


async def test_unchanged_keys_stay_the_same_object() -> None:
    """Decisions are kept by key: a change of one key, or reading everything again, does not undo those of others."""
    one = replica()
    ada = one.identify(await one.make("ada"))
    secret = await one.make("eve")
    eve = one.identify(secret)
    await one.keys.change(ROOT, "eve", {"max_thinking_tokens": 5})
    await one.stored.refresh(whole=True)
    assert one.stored.keys["ada"].key is ada
    assert one.identify(secret) is not eve
    assert one.identify(secret).max_thinking_tokens == 5


async def test_limits_are_told_when_they_change() -> None:
    """Setting, changing and removing a limit tells each replica once; other changes do not."""
    here, there = replicas(2)
    await here.limits.put(ROOT, LIMIT)
    await there.stored.refresh()
    assert (here.limit_changes, there.limit_changes) == (1, 1)
    await here.make("ada")
    await there.stored.refresh()
    await here.limits.remove(ROOT, ("team:ml", "tokens", "day"))
    await there.stored.refresh()
    assert (here.limit_changes, there.limit_changes) == (2, 2)
    assert there.limits.in_force(there.config) == []


async def test_limits_that_could_not_be_told_are_told_again() -> None:
    """Where the ledger fails to take changed limits, it is given them again when the store is next read."""
    here, there = replicas(2)
    await here.limits.put(ROOT, LIMIT)

    def broken() -> None:
        raise ZeroDivisionError

    tell, there.stored._on_limits = there.stored._on_limits, broken
    with pytest.raises(ZeroDivisionError):
        await there.stored.refresh()
    there.stored._on_limits = tell
    await there.stored.refresh()
    assert there.limit_changes == 1


async def test_last_known_goes_on_while_the_store_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """Keys and limits stay in force, the log says so once, each failure is told, and afterwards all is read again."""
    one = replica()
    secret = await one.make("ada")
    await one.limits.put(ROOT, LIMIT)
    one.records.is_away = True
    one.told.clear()
    with caplog.at_level(logging.INFO, "thinkgate.stored"):
        for _ in range(3):
            with pytest.raises(RecordsUnreachable):
                await one.stored.refresh()
        await one.stored.follow()
        assert one.identify(secret).id == "ada"
        assert len(one.limits.in_force(one.config)) == 1
        one.records.is_away = False
        scans = one.records.scans
        await one.stored.refresh()
    assert one.records.scans == scans + 1
    assert one.told == [False, False, False, False, True]
    assert [record.getMessage() for record in caplog.records] == [
        "store cannot be read, what is known goes on",
        "store can be read again",
    ]


async def test_a_gateway_that_never_read_the_store_lets_nobody_in() -> None:
    """Until the store was read all are a 503: it may know the key, limit one of the file's, or say nobody is anyone."""
    digest = hashlib.sha256(b"file-secret").hexdigest()
    for config in (config_of(keys=[{"id": "file", "secret_sha256": digest}]), config_of()):
        one = replica(config)
        one.records.is_away = True
        await one.stored.follow()
        for secret in ("file-secret", new_secret("tg-")):
            with pytest.raises(StoreUnavailable) as refused:
                one.identify(secret)
            assert refused.value.status == 503
        one.records.is_away = False
        await one.stored.follow()
        if config.keys:
            assert one.identify("file-secret").id == "file"
            with pytest.raises(Unauthenticated):
                one.identify(new_secret("tg-"))
        else:
            assert one.identify("whatever").id == "anyone"


async def test_store_that_lost_writes_is_followed() -> None:
    """After a store came back empty, or with less, what it no longer has is not valid any more."""
    one = replica()
    secret = await one.make("ada")
    await one.limits.put(ROOT, LIMIT)
    one.stored.records = one.records = BreakableRecords(clock=one.clock)
    await one.stored.refresh()
    assert (one.stored.keys, one.stored.limits) == ({}, {})
    assert not is_known(one, secret)
    assert await one.make("ada") != secret


async def test_same_version_of_another_value_is_another_entry() -> None:
    """A store that began anew gives versions again: entries are told apart by what they are, too."""
    here, other = replicas(1)[0], replicas(1)[0]
    old = await here.make("ada")
    new = await other.make("ada")
    here.stored.records = here.records = other.records
    await here.stored.refresh(whole=True)
    assert not is_known(here, old)
    assert here.identify(new).id == "ada"


async def test_entry_that_is_not_understood_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    """A key with a trait of a newer version is refused as a whole and logged; others go on; mended, it works."""
    here, there = replicas(2)
    ada, eve = await here.make("ada"), await here.make("eve")
    await there.stored.refresh()
    strange = (await here.records.get(f"{KEYS}ada")).value.replace(b'"traits":{', b'"traits":{"moon":1,')  # type: ignore[union-attr]
    await here.records.put(f"{KEYS}ada", strange)
    await here.records.put(f"{KEYS}bob", b"no JSON")
    with caplog.at_level(logging.ERROR, "thinkgate.stored"):
        await there.stored.refresh()
    assert [record.entry for record in caplog.records] == [f"{KEYS}ada", f"{KEYS}bob"]  # type: ignore[attr-defined]
    assert not is_known(there, ada)
    assert there.identify(eve).id == "eve"
    await here.records.put(f"{KEYS}ada", strange.replace(b'"moon":1,', b""))
    await there.stored.refresh()
    assert there.identify(ada).id == "ada"


async def test_limit_of_a_newer_version_is_held_as_far_as_it_is_understood() -> None:
    """What is added to a limit may only narrow it, so a replica that does not know it holds everybody to the rest."""
    here, there = replicas(2)
    await here.limits.put(ROOT, LimitConfig(scope="team:ml", unit="tokens", amount=5, window="day"))
    ((name, record),) = await here.records.scan(LIMITS)
    await here.records.put(name, record.value.replace(b'"limit":{', b'"limit":{"moon":1,'))
    await there.stored.refresh()
    assert [limit.amount for limit in there.limits.in_force(there.config)] == [5]
    assert [entry.amount for entry in there.limits.entries(ROOT)] == [5]


async def test_many_entries_leave_room_for_others() -> None:
    """Reading thousands of keys lets other tasks run in between."""
    one = replica()
    await one.make("first")
    record = await one.records.get(f"{KEYS}first")
    assert record is not None
    for number in range(2000):
        await one.records.put(f"{KEYS}k{number}", record.value.replace(b'"first"', b'"k%d"' % number))
    fresh = Replica(one.records, one.clock, one.config)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.ensure_future(count())
    await fresh.stored.refresh()
    counting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await counting
    assert len(fresh.stored.keys) == 2001
    assert turns >= 4


async def test_of_many_edits_at_once_none_is_lost() -> None:
    """Replicas that change one entry at the same time change it one after the other, each with its note."""
    ones = replicas(4)
    await ones[0].make("ada")
    tags = [f"t{i}" for i in range(len(ones))]

    async def add(one: Replica, tag: str) -> None:
        def decide(old: KeptKey | None) -> tuple[KeptKey, Note]:
            assert old is not None
            traits = {**old.traits, "tags": [*old.traits["tags"], tag]}
            return KeptKey(**{**{f: getattr(old, f) for f in old.__struct_fields__}, "traits": traits}), Note("n", b"")

        await one.stored.edit(f"{KEYS}ada", KeptKey, decide)

    await asyncio.gather(*(add(one, tag) for one, tag in zip(ones, tags, strict=True)))
    await ones[0].stored.refresh()
    assert sorted(ones[0].stored.keys["ada"].traits.tags) == tags
    assert await ones[0].records.log_size("n") == len(ones)


async def test_edit_that_never_gets_through_is_a_conflict() -> None:
    """Where others are always faster, giving up is said, and nothing of ours is written."""

    class Contested(BreakableRecords):
        async def put(self, key, value, **more):
            await super().put(key, value.replace(b"mine", b"theirs"))
            return await super().put(key, value, **more)

    one = replica()
    one.stored.records = Contested(clock=one.clock)
    mine = KeptLimit(limit={}, changed_at_s=0, changed_by="mine")
    with pytest.raises(ConflictingChange, match="try again"):
        await one.stored.edit(f"{LIMITS}x", KeptLimit, lambda _: (mine, Note("audit", b"")))
    record = await one.stored.records.get(f"{LIMITS}x")
    assert record is not None
    assert b"theirs" in record.value
    assert await one.stored.records.log_size("audit") == 0


@pytest.mark.parametrize(
    "value", [b"no JSON", b'{"id":"ada","traits":{"moon":1},"secrets":[],"made_at_s":1,"made_by":"x"}']
)
async def test_entry_of_another_version_is_not_overwritten(value: bytes) -> None:
    """Changing what this version does not understand is a conflict that says so."""
    one = replica()
    await one.records.put(f"{KEYS}ada", value)
    with pytest.raises(ConflictingChange, match="Another version"):
        await one.keys.revoke(ROOT, "ada")


class TestHashSecret:
    """What keys the hash of secrets."""

    async def test_without_one_it_is_made_once_for_all(self) -> None:
        """Replicas that make keys at the same time agree on one hash secret, kept in the store."""
        here, there = replicas(2)
        secrets = await asyncio.gather(here.make("ada"), there.make("eve"))
        for one in (here, there):
            await one.stored.refresh()
            assert [one.identify(secret).id for secret in secrets] == ["ada", "eve"]
        record = await here.records.get(HASHER)
        assert record is not None
        assert b'"secret":"' in record.value

    async def test_given_one_stays_out_of_the_store(self) -> None:
        """With a secret of the environment, the store knows only how it can be told from others."""
        one = replica(hash_secret="from the environment")
        secret = await one.make("ada")
        everything = b"".join(record.value for _, record in await one.records.scan(""))
        assert b"from the environment" not in everything
        assert secret.encode() not in everything
        digest = hmac.new(b"from the environment", secret.encode(), hashlib.sha256).hexdigest()
        assert digest.encode() in everything

    async def test_process_without_the_given_one_makes_nothing(self) -> None:
        """A shell that was not told the gateway's hash secret is refused, instead of making keys that nobody knows."""
        gateway, shell = replicas(2)
        gateway = Replica(gateway.records, gateway.clock, gateway.config, hash_secret="from the environment")
        await gateway.make("ada")
        await shell.stored.refresh()
        with pytest.raises(ConflictingChange, match="key_hash_env"):
            await shell.make("eve")
        assert [entry.status for entry in shell.keys.entries(ROOT, limit=9)[0]] == ["unusable"]

    async def test_another_one_makes_keys_unusable_until_they_are_rotated(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """After a change of the hash secret the old keys are refused and listed as such; rotating mends one."""
        old = replica(hash_secret="the first secret")
        secret = await old.make("ada")
        new = Replica(old.records, old.clock, old.config, hash_secret="another secret")
        with caplog.at_level(logging.WARNING, "thinkgate.stored"):
            await new.stored.refresh()
        assert [record.getMessage() for record in caplog.records] == [
            "secrets in the store were hashed with another hash secret"
        ]
        assert not is_known(new, secret)
        assert new.keys.entry(ROOT, "ada").status == "unusable"
        entry, rotated = await new.keys.rotate(ROOT, "ada")
        assert entry.status == "active"
        assert new.identify(rotated).id == "ada"

    async def test_change_is_noted_where_secrets_are_made(self) -> None:
        """Once a gateway with another hash secret has made one, a shell needs that; what the store made is kept."""
        old = replica()
        secret = await old.make("ada")
        new = Replica(old.records, old.clock, old.config, hash_secret="another secret")
        await new.stored.refresh()
        await new.make("eve")
        for given, is_right in ((None, False), ("a third secret", False), ("another secret", True)):
            shell = Stored(old.records, clock=old.clock, hash_secret=given, must_match=True)
            await shell.refresh()
            if is_right:
                await shell.new_secret("tg-")
                continue
            with pytest.raises(ConflictingChange, match="key_hash_env"):
                await shell.new_secret("tg-")
        await old.stored.refresh()
        assert is_known(old, secret)
        assert is_known(old, await old.make("bob"))


async def test_keeping_up_follows_purges_and_survives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The task of a gateway follows changes, frees what is over, outlives failures and bugs, and can be cancelled."""
    monkeypatch.setattr("gateway.admin.stored.POLL_S", 0)
    monkeypatch.setattr("gateway.admin.stored.PURGE_EVERY", 1)
    monkeypatch.setattr("gateway.admin.stored.WHOLE_EVERY", 3)
    here, there = replicas(2)
    await there.stored.refresh()

    async def until(is_so) -> None:
        async with asyncio.timeout(5):
            while not is_so():
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(there.stored.keep_up())
        secret = await here.make("ada")
        await until(lambda: is_known(there, secret))
        here.records.is_away = True
        await until(lambda: False in there.told)
        here.records.is_away = False
        there.told.clear()
        await until(lambda: True in there.told)
        await here.records.put("claim", b"", ttl_s=1)
        here.clock.now += 2
        await until(lambda: "claim" not in here.records._ending)
        revision, there.stored._revision = there.stored._revision, None  # type: ignore[assignment]  # a bug
        await until(lambda: "following the store failed" in caplog.messages)
        there.stored._revision = revision
        other = await here.make("eve")
        await until(lambda: is_known(there, other))
        following.cancel()


async def test_a_new_store_needs_no_reading() -> None:
    """Records that belong to this process alone are known to be empty from the start."""
    clock = Clock()
    assert Stored(BreakableRecords(clock=clock), clock=clock, is_new=True).never_had_a_key
    assert not Stored(BreakableRecords(clock=clock), clock=clock).never_had_a_key
