"""Limits of file and store: what is joined, which counts, and who may change what."""

from __future__ import annotations

from typing import Any

import pytest

from budget.ledger import Limit
from gateway.config.budgets import LimitConfig
from gateway.errors import ConflictingChange, EntryNotFound, InvalidRequest, PermissionDenied
from tests.gateway.still import config_of
from tests.gateway.tenants import ROOT, VIEWER, Replica, replica, scoped

PRICED = {"price_usd_per_mtok": {"prompt": 1, "answer": 2}}
DAY = ("team:ml", "tokens", "day")


def limit(**fields: Any) -> LimitConfig:
    """A limit of 100 tokens a day on team ml."""
    return LimitConfig.model_validate({"scope": "team:ml", "unit": "tokens", "amount": 100, "window": "day", **fields})


def with_file_limit(amount: float = 50, **more: Any) -> Replica:
    """A process whose file limits team ml to so many tokens a day."""
    return replica(config_of(limits=[limit(amount=amount).model_dump()], **more))


def in_force(one: Replica) -> list[Limit]:
    """What the ledger is given."""
    return one.limits.in_force(one.config)


async def test_a_limit_of_the_store_is_in_force() -> None:
    """What is set is handed to the ledger, in its units, beside the file's; setting it again replaces it."""
    one = replica(config_of(PRICED, limits=[limit(scope="model:qwen", amount=9).model_dump()]))
    await one.limits.put(ROOT, limit(unit="usd", amount=0.25))
    await one.limits.put(ROOT, limit(unit="concurrency", amount=3, window=None))
    await one.limits.put(ROOT, limit(unit="concurrency", amount=4, window=None))
    assert in_force(one) == [
        Limit(scope="model:qwen", unit="tokens", amount=9, window="day"),
        Limit(scope="team:ml", unit="usd", amount=250_000_000, window="day"),
        Limit(scope="team:ml", unit="concurrency", amount=4),
    ]


@pytest.mark.parametrize(("of_file", "of_store", "tighter"), [(50, 100, 50), (100, 50, 50), (70, 70, 70)])
async def test_of_two_the_tighter_counts(of_file: int, of_store: int, tighter: int) -> None:
    """Where the file later limits what the store limits, the smaller amount is in force and listed as counted."""
    one = replica()
    await one.limits.put(ROOT, limit(amount=of_store))
    one.config = config_of(limits=[limit(amount=of_file).model_dump()])
    assert in_force(one) == [Limit(scope="team:ml", unit="tokens", amount=tighter, window="day")]
    entries = one.limits.entries(ROOT)
    assert [(entry.source, entry.amount) for entry in entries] == [("file", of_file), ("store", of_store)]
    assert [entry.is_counted for entry in entries] == [of_file <= of_store, of_file > of_store]


async def test_limits_of_the_file_are_read_only() -> None:
    """Setting or removing one is a 409 that says to change the file, whatever the amount."""
    one = with_file_limit()
    for call in (one.limits.put(ROOT, limit(amount=10)), one.limits.remove(ROOT, DAY)):
        with pytest.raises(
            ConflictingChange, match="tokens per day on team:ml stands in the configuration file"
        ) as refused:
            await call
        assert refused.value.status == 409
    assert in_force(one)[0].amount == 50


async def test_other_units_and_windows_are_other_limits() -> None:
    """The store may limit a scope of the file's in another unit or window."""
    one = with_file_limit()
    await one.limits.put(ROOT, limit(window="hour", amount=10))
    await one.limits.put(ROOT, limit(unit="requests", amount=10))
    assert len(in_force(one)) == 3


async def test_what_stands_beside_the_files_can_be_removed() -> None:
    """A limit of the store that the file came to overlap is removed without touching the file's; then there is none."""
    one = replica()
    await one.limits.put(ROOT, limit(amount=10))
    one.config = config_of(limits=[limit(amount=50).model_dump()])
    await one.limits.remove(ROOT, DAY)
    assert in_force(one)[0].amount == 50
    one.config = config_of()
    with pytest.raises(EntryNotFound, match="no limit of tokens per day on team:ml"):
        await one.limits.remove(ROOT, DAY)


async def test_a_removed_limit_can_be_set_again() -> None:
    """Removing leaves a mark for other replicas that does not stand in the way."""
    one = replica()
    await one.limits.put(ROOT, limit())
    await one.limits.remove(ROOT, DAY)
    assert (in_force(one), one.limits.entries(ROOT)) == ([], [])
    await one.limits.put(ROOT, limit(amount=7))
    assert in_force(one)[0].amount == 7


@pytest.mark.parametrize(
    ("said", "param", "text"),
    [
        ({"scope": "model:gpt"}, "scope", "'gpt' is not under `models` \\(qwen\\)"),
        ({"scope": "key:nobody"}, "scope", "there is no key 'nobody'"),
        ({"unit": "usd"}, "unit", "needs models.qwen.price_usd_per_mtok"),
        ({"scope": "model:qwen", "unit": "usd"}, "unit", "needs models.qwen.price_usd_per_mtok"),
    ],
)
async def test_what_the_file_would_refuse_is_refused(said: dict[str, Any], param: str, text: str) -> None:
    """Limits on what is not there, and on money without prices, are a 400 that says so."""
    one = replica()
    with pytest.raises(InvalidRequest, match=text) as refused:
        await one.limits.put(ROOT, limit(**said))
    assert refused.value.param == param


async def test_stored_keys_can_be_limited() -> None:
    """A limit on a key of the store is taken, as is one on a key of the file, and on anyone while there is no key."""
    one = replica(config_of(keys=[{"id": "file", "secret_sha256": "ab" * 32}]))
    await one.make("ada")
    for id in ("ada", "file"):
        assert (await one.limits.put(ROOT, limit(scope=f"key:{id}"))).is_counted
    with pytest.raises(InvalidRequest):
        await one.limits.put(ROOT, limit(scope="key:anyone"))
    assert (await replica().limits.put(ROOT, limit(scope="key:anyone"))).problem is None


async def test_a_limit_that_the_file_made_impossible_stays_and_says_so() -> None:
    """When a model or a price is gone, the store's limit is in force all the same, and listed with its problem."""
    one = replica(config_of(PRICED))
    await one.limits.put(ROOT, limit(unit="usd", amount=1))
    assert one.limits.entries(ROOT)[0].problem is None
    one.config = config_of()
    (entry,) = one.limits.entries(ROOT)
    assert entry.problem is not None
    assert "price_usd_per_mtok" in entry.problem
    assert len(in_force(one)) == 1


async def test_lists_come_by_scope() -> None:
    """Limits are ordered by scope, and one scope's can be asked for alone."""
    one = with_file_limit()
    await one.limits.put(ROOT, limit(scope="team:a"))
    await one.limits.put(ROOT, limit(window="hour"))
    assert [entry.scope for entry in one.limits.entries(ROOT)] == ["team:a", "team:ml", "team:ml"]
    assert [entry.source for entry in one.limits.entries(ROOT, scope="team:ml")] == ["file", "store"]
    assert one.limits.entries(ROOT, scope="team:z") == []


async def test_viewer_reads_and_changes_nothing() -> None:
    """A viewer sees every limit; setting or removing one is a 403."""
    one = with_file_limit()
    await one.limits.put(ROOT, limit(window="hour"))
    assert len(one.limits.entries(VIEWER)) == 2
    for call in (
        one.limits.put(VIEWER, limit(window="month")),
        one.limits.remove(VIEWER, ("team:ml", "tokens", "hour")),
    ):
        with pytest.raises(PermissionDenied):
            await call
    assert len(in_force(one)) == 2


async def test_scope_admin_has_the_limits_of_its_realm() -> None:
    """Its path's narrowest scope, and keys and users that lie within; nothing wider, beside or shared."""
    one = replica(config_of(limits=[limit(scope="model:qwen").model_dump()]))
    await one.make("mine", team="ml", org="acme", user="ada")
    await one.make("both", team="ops", org="acme", user="bob")
    await one.make("also", team="ml", org="acme", user="bob", tags=["beta"])
    lead = scoped("org:acme/team:ml")
    for scope in ("team:ml", "key:mine", "key:also", "user:ada"):
        await one.limits.put(lead, limit(scope=scope))
    for scope in ("org:acme", "team:ops", "key:both", "user:bob", "user:nobody", "tag:beta", "model:qwen"):
        with pytest.raises(PermissionDenied):
            await one.limits.put(lead, limit(scope=scope))
    await one.limits.put(ROOT, limit(scope="org:acme"))
    with pytest.raises(PermissionDenied):
        await one.limits.remove(lead, ("org:acme", "tokens", "day"))
    assert [entry.scope for entry in one.limits.entries(lead)] == ["key:also", "key:mine", "team:ml", "user:ada"]
    await one.limits.remove(lead, DAY)


async def test_audit_log_tells_what_a_limit_was() -> None:
    """Setting, changing and removing are entries with the limit before and after."""
    one = replica()
    await one.limits.put(ROOT, limit())
    await one.limits.put(ROOT, limit(amount=5))
    await one.limits.remove(ROOT, DAY)
    told = [
        (e["action"], e["target"], (e["before"] or {}).get("amount"), (e["after"] or {}).get("amount"))
        for e in await one.audit()
    ]
    on = "tokens per day on team:ml"
    assert told == [("limit.put", on, None, 100), ("limit.put", on, 100, 5), ("limit.remove", on, 5, None)]
