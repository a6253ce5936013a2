"""What the port promises, of all three kinds of records."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from budget.errors import Conflict
from budget.records.memory import MemoryRecords
from budget.records.port import Note, Record
from tests.budget.records.stores import Clock, Store

TTL_S = 30


async def test_a_record_is_what_was_put(store: Store) -> None:
    """A value comes back byte by byte, and one that was never put is not there."""
    value = bytes(range(256)) * 4096
    version = await store.records.put("a/ö", value)
    assert await store.records.get("a/ö") == Record(value, version)
    assert await store.records.get("a") is None


async def test_versions_are_never_given_twice(store: Store) -> None:
    """Each change of any record has a greater version than all before it, also where a record is made again."""
    versions = [await store.records.put("a", b"1"), await store.records.put("b", b"2")]
    await store.records.delete("a")
    versions += [await store.records.put("a", b"3"), await store.records.put("c", b"4", ttl_s=600)]
    assert versions == sorted(set(versions))


async def test_zero_expects_nothing(store: Store) -> None:
    """`expect=0` writes only where there is no record, and says which version there is."""
    version = await store.records.put("a", b"1", expect=0)
    with pytest.raises(Conflict) as conflict:
        await store.records.put("a", b"2", expect=0)
    assert (conflict.value.key, conflict.value.version) == ("a", version)
    assert await store.records.get("a") == Record(b"1", version)


async def test_only_the_expected_version_is_changed(store: Store) -> None:
    """Of two changes made for the same version the second is refused, and so is a change of what is gone."""
    first = await store.records.put("a", b"1")
    second = await store.records.put("a", b"2", expect=first)
    for change in (store.records.put("a", b"3", expect=first), store.records.delete("a", expect=first)):
        with pytest.raises(Conflict):
            await change
    assert await store.records.get("a") == Record(b"2", second)
    assert await store.records.delete("a", expect=second) is True
    with pytest.raises(Conflict) as conflict:
        await store.records.put("a", b"4", expect=second)
    assert conflict.value.version == 0


async def test_what_is_deleted_is_gone(store: Store) -> None:
    """Deleting says whether there was anything."""
    await store.records.put("a", b"1")
    assert await store.records.delete("a") is True
    assert await store.records.get("a") is None
    assert await store.records.delete("a") is False


async def test_one_of_many_claims_wins(store: Store) -> None:
    """Of many that put the same key at once with `expect=0`, exactly one succeeds, and its value stands."""

    async def claim(number: int) -> bytes | None:
        try:
            await store.records.put("claim", b"%d" % number, expect=0, ttl_s=600)
        except Conflict:
            return None
        return b"%d" % number

    won = [value for value in await asyncio.gather(*map(claim, range(20))) if value is not None]
    record = await store.records.get("claim")
    assert record is not None
    assert [record.value] == won


async def test_a_record_ends_with_its_time(store: Store) -> None:
    """After its time to live a record is not there for anybody: it can be claimed again, and is not deleted twice."""
    version = await store.records.put("a", b"1", expect=0, ttl_s=TTL_S)
    assert await store.records.get("a") == Record(b"1", version)
    await store.pass_time(TTL_S * 2)
    assert await store.records.get("a") is None
    assert await store.records.delete("a") is False
    with pytest.raises(Conflict):
        await store.records.put("a", b"2", expect=version)
    assert await store.records.put("a", b"2", expect=0, ttl_s=600) > version


async def test_time_to_live_is_said_anew_by_each_put(store: Store) -> None:
    """A later put without a time makes a record last, one with a longer time prolongs it."""
    await store.records.put("lasts", b"1", ttl_s=TTL_S)
    await store.records.put("lasts", b"2")
    await store.records.put("longer", b"1", ttl_s=TTL_S)
    await store.records.put("longer", b"2", ttl_s=600)
    await store.pass_time(TTL_S * 2)
    assert await store.records.get("lasts") is not None
    assert await store.records.get("longer") is not None


async def test_room_of_ended_records_is_freed(store: Store) -> None:
    """Purging frees what has ended and nothing else; Valkey does it by itself."""
    await store.records.put("lasting", b"1")
    await store.records.put("later", b"1", ttl_s=600)
    for number in range(450):
        await store.records.put(f"over/{number}", b"1", ttl_s=TTL_S)
    await store.pass_time(TTL_S * 2)
    assert await store.records.purge() == (0 if store.kind == "redis" else 450)
    assert await store.records.purge() == 0
    assert await store.records.get("lasting") is not None
    assert await store.records.get("later") is not None


async def test_scan_gives_the_lasting_records_of_a_prefix_in_order(store: Store) -> None:
    """Only keys that begin so, ordered by key; not what ends, and a prefix is no pattern."""
    for key in ("k/b", "k/a", "k", "l/a", "k/ö", "k*"):
        await store.records.put(key, key.encode())
    await store.records.put("k/ending", b"", ttl_s=600)
    assert [(key, record.value) for key, record in await store.records.scan("k/")] == [
        ("k/a", b"k/a"),
        ("k/b", b"k/b"),
        ("k/ö", "k/ö".encode()),
    ]
    assert [key for key, _ in await store.records.scan("k*")] == ["k*"]
    assert len(await store.records.scan("")) == 6


async def test_scan_gives_only_what_changed_after_a_version(store: Store) -> None:
    """A reader that knows all up to a version is told of later ones only."""
    await store.records.put("k/a", b"1")
    known = await store.records.revision()
    assert await store.records.scan("k/", after=known) == []
    changed = await store.records.put("k/a", b"2")
    added = await store.records.put("k/b", b"1")
    assert await store.records.scan("k/", after=known) == [("k/a", Record(b"2", changed)), ("k/b", Record(b"1", added))]


async def test_scan_follows_what_begins_and_ceases_to_last(store: Store) -> None:
    """A record that is given a time to live, or is deleted, is no longer scanned; one that loses it is."""
    await store.records.put("k/ceases", b"1")
    await store.records.put("k/ceases", b"2", ttl_s=600)
    await store.records.put("k/begins", b"1", ttl_s=600)
    await store.records.put("k/begins", b"2")
    await store.records.put("k/deleted", b"1")
    await store.records.delete("k/deleted")
    assert [key for key, _ in await store.records.scan("k/")] == ["k/begins"]


async def test_scan_reads_many(store: Store) -> None:
    """More records than are fetched at a time come all, once."""
    await asyncio.gather(*(store.records.put(f"k/{number:04}", b"%d" % number) for number in range(1100)))
    found = await store.records.scan("k/")
    assert [record.value for _, record in found] == [b"%d" % number for number in range(1100)]


async def test_revision_grows_with_lasting_changes_only(store: Store) -> None:
    """Puts and deletes of what lasts are seen, also when a record begins or ceases to last; what ends is not."""
    seen = [await store.records.revision()]

    async def grew() -> bool:
        seen.append(await store.records.revision())
        return seen[-1] > seen[-2]

    version = await store.records.put("a", b"1")
    assert await grew()
    assert seen[-1] >= version
    await store.records.put("claim", b"1", ttl_s=600)
    await store.records.delete("claim")
    await store.records.delete("nothing")
    await store.records.append("log", b"entry")
    assert not await grew()
    await store.records.put("a", b"2", ttl_s=600)
    assert await grew()
    await store.records.put("a", b"3")
    assert await grew()
    await store.records.delete("a")
    assert await grew()


async def test_log_is_numbered_from_one_without_gaps(store: Store) -> None:
    """Entries come back in the order they were appended, page by page, and logs do not mix."""
    assert await store.records.log_size("audit") == 0
    assert await store.records.read_log("audit", after=0, limit=10) == []
    for number in range(1, 6):
        assert await store.records.append("audit", b"%d" % number) == number
    assert await store.records.append("other", b"x") == 1
    assert await store.records.read_log("audit", after=0, limit=2) == [(1, b"1"), (2, b"2")]
    assert await store.records.read_log("audit", after=2, limit=10) == [(3, b"3"), (4, b"4"), (5, b"5")]
    assert await store.records.read_log("audit", after=5, limit=10) == []
    assert await store.records.log_size("audit") == 5


async def test_a_change_and_its_note_are_one_step(store: Store) -> None:
    """A note is in the log exactly if its change was made."""
    version = await store.records.put("a", b"1", note=Note("audit", b"made"))
    with pytest.raises(Conflict):
        await store.records.put("a", b"2", expect=0, note=Note("audit", b"refused"))
    with pytest.raises(Conflict):
        await store.records.delete("a", expect=version + 1, note=Note("audit", b"refused"))
    await store.records.delete("a", note=Note("audit", b"removed"))
    await store.records.delete("a", note=Note("audit", b"nothing to remove"))
    assert [entry for _, entry in await store.records.read_log("audit", after=0, limit=9)] == [b"made", b"removed"]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.sampled_from([None, 0, 1, 2]), st.booleans()),
        st.tuples(st.just("delete"), st.sampled_from("abc"), st.sampled_from([None, 0, 1, 2]), st.booleans()),
    ),
    max_size=12,
)


async def play(records: object, steps: list[tuple[str, str, int | None, bool]]) -> list[object]:
    """What each step answers, and what stands in the end; `expect` counts back from the version that is there."""
    told: list[object] = []
    for what, key, behind, flag in steps:
        record = await records.get(key)  # type: ignore[attr-defined]
        version = record.version if record else 0
        expect = None if behind is None else max(0, version - behind)
        try:
            if what == "put":
                told.append(await records.put(key, b"v", expect=expect, ttl_s=600 if flag else None))  # type: ignore[attr-defined]
            else:
                told.append(await records.delete(key, expect=expect))  # type: ignore[attr-defined]
        except Conflict as conflict:
            told.append(("conflict", conflict.key, conflict.version))
        told.append(await records.revision())  # type: ignore[attr-defined]
    return [*told, await records.scan("")]  # type: ignore[attr-defined]


@given(steps=STEPS)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
async def test_all_kinds_answer_alike(store: Store, steps: list[tuple[str, str, int | None, bool]]) -> None:
    """Any sequence of changes is answered as the reference in memory answers it, versions and revisions included."""
    for key in "abc":
        await store.records.delete(key)
    base = await store.records.put("base", b"")
    reference = MemoryRecords(clock=Clock())
    reference._sequence = base - 1
    await reference.put("base", b"")
    assert await play(store.records, steps) == await play(reference, steps)
