"""What a replica spends while the store is lost: only what it leased beforehand, and all of it is told afterwards."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from budget.errors import HoldRefused, StoreUnreachable
from budget.ledger import Amounts
from budget.ledgers.offline import SLICE_LEASE_S
from tests.budget.clocks import NOON, TEN, tokens, utc
from tests.budget.replicas import TODAY, Replicas, ended, taken, tell
from tests.budget.virtual import Fault


def test_slices_are_held_and_given_back(tmp_path: Path) -> None:
    """Of every limit in use a share is held in the store, and nothing once the process has ended."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), tokens(10, "day", unit="requests"))
        assert await replicas.in_books() == (0, 20, 0)
        assert await replicas.in_books("requests") == (1, 2, 0)
        assert ledger.held() == (await ledger.health()).held == Amounts()
        await ledger.close()
        replicas.place.ledgers.clear()
        replicas.start()
        assert await replicas.in_books() == (0, 0, 0)
        assert await replicas.in_books("requests") == (1, 0, 0)

    tell(tmp_path, story)


def test_without_a_share_nothing_is_spent_offline(tmp_path: Path) -> None:
    """The default is to fail closed."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), share=0.0)
        assert await replicas.in_books() == (0, 0, 0)
        await replicas.lose(ledger)
        with pytest.raises(StoreUnreachable):
            await taken(ledger, Amounts())

    tell(tmp_path, story)


def test_offline_a_replica_spends_its_slice_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Holds and extensions are granted at once as long as the slice has room; what was not used goes back into it."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"))
        await replicas.lose(ledger)
        hold = await taken(ledger)
        assert hold.is_offline
        rest = hold.remaining("tokens")
        assert rest is not None
        assert (rest.limit, rest.remaining, rest.reset_s) == (100, 10, SLICE_LEASE_S)
        await hold.extend(Amounts(tokens=8))
        assert (hold.ceiling, ledger.held()) == (Amounts(tokens=18), Amounts(tokens=18))
        for _ in range(2):
            with pytest.raises(StoreUnreachable, match="may spend without it is used up"):
                await hold.extend(Amounts(tokens=3))
            with pytest.raises(StoreUnreachable, match="may spend without it is used up"):
                await taken(ledger, Amounts(tokens=3))
        await ended(hold, 5)
        with pytest.raises(StoreUnreachable):
            await taken(ledger, Amounts(tokens=16))
        await ended(await taken(ledger, Amounts(tokens=15)), 15)
        with pytest.raises(StoreUnreachable):
            await taken(ledger, Amounts(tokens=1))
        assert ledger.figures().offline == 2

    with caplog.at_level(logging.ERROR, logger="thinkgate.ledger"):
        tell(tmp_path, story)
    assert "this replica spends its slices" in caplog.text


def test_what_was_spent_offline_is_told(tmp_path: Path) -> None:
    """When the store is back, every request is settled from the slice, in usage too; new slices are leased later."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), tokens(10, "day", unit="requests"))
        await replicas.lose(ledger)
        await ended(await taken(ledger), 4)
        await ended(await taken(ledger), 9)
        assert ledger.figures().waiting == 3  # and a release, of the hold by which the loss was noticed
        await replicas.find(ledger)
        assert await replicas.in_books() == (13, 0, 0)
        assert await replicas.in_books("requests") == (3, 0, 0)
        (row,) = await ledger.usage(NOON.date(), NOON.date())
        assert (row.requests, row.tokens, row.scopes) == (3, 13, ("key:a",))
        await ledger.beat()
        assert await replicas.in_books() == (13, 20, 0)

    tell(tmp_path, story)


def test_a_request_that_outlasts_the_loss_is_held_again(tmp_path: Path) -> None:
    """A hold that was granted offline and is still open becomes one in the store, and is settled there once."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), tokens(10, None, unit="concurrency"))
        await replicas.lose(ledger)
        hold = await taken(ledger)
        await replicas.find(ledger)
        assert await replicas.in_books() == (0, 10, 0)
        assert (await replicas.place.books())["key:a", "concurrency", None][0] == (0, 1, 0)
        await hold.extend(TEN)
        assert await replicas.in_books() == (0, 20, 0)
        await ended(hold, 17)
        assert await replicas.in_books() == (17, 0, 0)
        assert hold.is_offline

    tell(tmp_path, story)


@pytest.mark.parametrize("fault", ["before", "after"])
def test_a_return_that_breaks_off_is_told_again(tmp_path: Path, fault: Fault) -> None:
    """At whatever call the connection breaks again while the store is told, everything counts once."""

    async def story(replicas: Replicas) -> None:
        for call in range(4):
            ledger = await replicas.warm(tokens(100, "day", scope="key:a"))
            settled, _, _ = await replicas.in_books()
            await replicas.lose(ledger)
            await ended(await taken(ledger), 3)
            hold = await taken(ledger)
            store = replicas.stores[-1]
            store.always = None
            store.faults.extend([None] * call + [fault])
            await ledger.beat()
            await ledger.beat()
            assert ledger.figures().is_reachable
            await ended(hold, 4)
            await ledger.close()
            replicas.place.ledgers.clear()
            replicas.stores.clear()
            assert await replicas.in_books() == (settled + 7, 0, 0)

    tell(tmp_path, story)


def test_a_hold_that_the_store_may_know_of_grows_only_there(tmp_path: Path) -> None:
    """When the answer to its entry got lost, a hold grows no more before the next one."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"))
        await replicas.lose(ledger)
        hold = await taken(ledger)
        store = replicas.stores[-1]
        store.always = None
        store.faults.extend([None, None, "after"])
        await ledger.beat()
        assert not ledger.figures().is_reachable
        with pytest.raises(StoreUnreachable):
            await hold.extend(Amounts(tokens=5))
        await ledger.beat(sweeps=False)
        await hold.extend(Amounts(tokens=5))
        await ended(hold, 15)
        assert await replicas.in_books() == (15, 0, 0)

    tell(tmp_path, story)


def test_shares_of_several_replicas_never_add_up_to_more_than_the_limit(tmp_path: Path) -> None:
    """While two replicas spend offline, a third gets what nobody set aside; afterwards the limit is just used up."""

    async def story(replicas: Replicas) -> None:
        limit = tokens(100, "day")
        first, second, third = [await replicas.warm(limit) for _ in range(3)]
        assert await replicas.in_books() == (0, 60, 0)
        await replicas.lose(first)
        await replicas.lose(second)
        for ledger in (first, second):
            await ended(await taken(ledger, Amounts(tokens=20)), 20)
        await ended(await taken(third, Amounts(tokens=60)), 60)  # its own slice is given back for that
        assert await replicas.in_books() == (60, 40, 0)
        with pytest.raises(HoldRefused):
            await taken(third, Amounts(tokens=1))
        await replicas.find(first)
        await replicas.find(second)
        assert await replicas.in_books() == (100, 0, 0)

    tell(tmp_path, story)


def test_a_slice_is_given_back_for_exactly_the_room_that_is_short(tmp_path: Path) -> None:
    """A request is not refused for want of room that its own replica set aside; nothing is given back in vain."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"))
        with pytest.raises(HoldRefused):
            await taken(ledger, Amounts(tokens=101))
        assert await replicas.in_books() == (0, 20, 0)
        hold = await taken(ledger, Amounts(tokens=75))
        await hold.extend(Amounts(tokens=25))
        assert await replicas.in_books() == (0, 100, 0)
        await ended(hold, 100)
        await ledger.beat()
        assert await replicas.in_books() == (100, 0, 0)

    tell(tmp_path, story)


def test_a_slice_is_given_back_for_all_that_are_short_at_once(tmp_path: Path) -> None:
    """Of several requests that are refused in the same moment for want of a slice none is refused for good."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), share=0.9)
        holds = await asyncio.gather(*(taken(ledger, Amounts(tokens=20)) for _ in range(5)))
        for hold in holds:
            await ended(hold, 20)
        assert await replicas.in_books() == (100, 0, 0)

    tell(tmp_path, story)


def test_a_slice_ends_with_its_window(tmp_path: Path) -> None:
    """After midnight nothing is spent from yesterday's slice, nor from today's, of which there is none yet."""

    async def story(replicas: Replicas) -> None:
        replicas.clock.now = utc(2024, 5, 17, 23, 59)
        ledger = await replicas.warm(tokens(100, "day"))
        await replicas.lose(ledger)
        await ended(await taken(ledger), 4)
        replicas.clock.now += 60
        with pytest.raises(StoreUnreachable):
            await taken(ledger)
        await replicas.find(ledger)
        assert await replicas.in_books() == (4, 0, 0)
        async with ledger.hold(["key:a"], TEN):
            pass
        await ledger.beat()
        tomorrow = (await replicas.place.books())["key:a", "tokens", "day"][TODAY + 86_400]
        assert tomorrow == (0, 20, 0)

    tell(tmp_path, story)


def test_a_slice_ends_with_its_lease(tmp_path: Path) -> None:
    """Who cannot reach the store for too long spends nothing more, as the room may be somebody else's by then."""

    async def story(replicas: Replicas) -> None:
        ledger, other = await replicas.warm(tokens(100, "day")), await replicas.warm(tokens(100, "day"), share=0)
        await replicas.lose(ledger)
        replicas.clock.now += SLICE_LEASE_S - 1
        await other.beat()
        await ended(await taken(ledger), 4)
        assert await replicas.in_books() == (0, 20, 0)
        replicas.clock.now += 1
        await other.beat()
        assert await replicas.in_books() == (0, 0, 0)
        with pytest.raises(StoreUnreachable):
            await taken(ledger)
        hold = await taken(other, Amounts(tokens=98))
        await replicas.find(ledger)
        assert await replicas.in_books() == (4, 98, 2)  # what is too much is debt
        await ended(hold, 98)
        assert await replicas.in_books() == (102, 0, 2)

    tell(tmp_path, story)


def test_slices_are_renewed_while_their_limits_are_in_use(tmp_path: Path) -> None:
    """A limit that nobody used for a while needs no slice; one that was changed gets a new one."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"))
        for _ in range(5):
            replicas.clock.now += 100
            async with ledger.hold(["key:a"], TEN):
                await ledger.beat()
        assert await replicas.in_books() == (0, 20, 0)
        ledger.set_limits([tokens(50, "day")])
        async with ledger.hold(["key:a"], TEN):
            pass
        await ledger.beat()
        assert await replicas.in_books() == (0, 10, 0)
        replicas.clock.now += 400
        await ledger.beat()
        assert await replicas.in_books() == (0, 0, 0)

    tell(tmp_path, story)


def test_of_a_rate_a_replica_has_its_share_beginning_with_nothing(tmp_path: Path) -> None:
    """Offline a tenth of ten a second is one a second, and the first after a second."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(60, "minute", unit="requests"), share=0.1)
        await replicas.lose(ledger)
        granted = 0
        for _ in range(600):
            replicas.clock.now += 0.5
            try:
                await ended(await taken(ledger, Amounts()), 0)
            except StoreUnreachable:
                continue
            granted += 1
        assert granted == 30  # in 300 s, at 6 a minute
        await replicas.find(ledger)
        hold = await taken(ledger)
        rest = hold.remaining("requests")
        assert rest is not None
        assert rest.remaining == 60 - 30 - 1

    tell(tmp_path, story)


def test_a_store_that_lost_its_slices_books_what_is_too_much_as_debt(tmp_path: Path) -> None:
    """After a restart without persistence, what was spent offline is settled all the same."""

    async def story(replicas: Replicas) -> None:
        ledger, other = await replicas.warm(tokens(100, "day")), await replicas.warm(tokens(100, "day"), share=0)
        await replicas.lose(ledger)
        await ended(await taken(ledger, Amounts(tokens=20)), 15)
        running = await taken(ledger, Amounts(tokens=5))
        replicas.place.forget()
        await ended(await taken(other, Amounts(tokens=90)), 90)
        await replicas.find(ledger)
        assert await replicas.in_books() == (105, 5, 10)
        await ended(running, 5)
        assert await replicas.in_books() == (110, 0, 10)

    tell(tmp_path, story)


def test_a_slice_in_doubt_is_released(tmp_path: Path) -> None:
    """When the answer to a lease gets lost, its slice is given back, and another one leased later."""

    async def story(replicas: Replicas) -> None:
        ledger = replicas.start(tokens(100, "day"))
        async with ledger.hold(["key:a"], TEN):
            pass
        replicas.stores[-1].faults.extend([None, "after"])
        await ledger.beat()
        assert await replicas.in_books() == (0, 0, 0)
        replicas.clock.now += 61
        await ledger.beat()
        assert await replicas.in_books() == (0, 20, 0)

    tell(tmp_path, story)


def test_a_hold_of_nothing_does_not_grow_into_what_was_not_leased(tmp_path: Path) -> None:
    """Of two limits on tokens one has no slice: a hold of no tokens is granted, and not extended."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), tokens(4, "hour"))
        await replicas.lose(ledger)
        hold = await taken(ledger, Amounts())
        with pytest.raises(StoreUnreachable):
            await hold.extend(Amounts(tokens=1))

    tell(tmp_path, story)


def test_a_limit_of_which_the_share_is_less_than_one_has_no_slice(tmp_path: Path) -> None:
    """Nothing is set aside of it, and nothing that needs it is granted offline."""

    async def story(replicas: Replicas) -> None:
        ledger = await replicas.warm(tokens(100, "day"), tokens(4, None, unit="concurrency"))
        await replicas.lose(ledger)
        with pytest.raises(StoreUnreachable):
            await taken(ledger)

    tell(tmp_path, story)
